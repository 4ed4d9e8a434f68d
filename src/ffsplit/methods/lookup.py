"""Lookup tables for the light neurons: hash the token, add up stored rows."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.lookup import Lookup, LookupSpec, projections
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import dense_branch_spec, heavy_count, keep_budget, sum_spec
from ffsplit.methods.neurons import neuron_order
from ffsplit.methods.registry import KeepConfig, method
from ffsplit.ops.least_squares import centred
from ffsplit.ops.linalg import eigh_psd
from ffsplit.ops.lookup import backfit, buckets, hyperplanes


class LookupConfig(KeepConfig):
    """Tables, hashes, and the neurons that stay.

    Attributes:
        hash_bits: signs in a hash; a table has two to this power rows. The budget decides the number of tables.
        planes: directions whose signs are taken: ``random`` in all directions alike, or ``pca`` for directions along
            which the inputs vary, in proportion to how much.
        heavy: share (below 1) or number of neurons of largest output norm that stay; null gives them half the budget.
        shrink: tokens worth of zero in the mean of every bucket: rows seen by few tokens stay small.
        rounds: how often each table is fitted to what the others leave.
        ridge: pull of the refit of the heavy neurons' `down` to the old weights.
    """

    method: Literal["lookup"] = "lookup"
    hash_bits: int = Field(6, ge=1, le=16)
    planes: Literal["random", "pca"] = "pca"
    heavy: float | None = Field(None, ge=0)
    shrink: float = Field(4.0, ge=0)
    rounds: int = Field(3, ge=1)
    ridge: float = Field(1e-3, ge=0)


def structure(shape: FFNShape, config: LookupConfig) -> SumSpec:
    """Heavy neurons and as many tables as the rest of the budget pays for.

    Raises:
        BudgetError: not even one table fits.
    """
    constant = shape.d_model * shape.down_bias
    budget = keep_budget(shape, config.keep) - constant
    one = LookupSpec(d_model=shape.d_model, tables=1, bits=config.hash_bits).parameters
    if config.heavy is None:
        heavy = min(max(budget // 2, 0) // shape.neuron_parameters, shape.d_ff)
        smallest = 2 * one + constant
    else:
        heavy = heavy_count(shape, config.heavy)
        smallest = heavy * shape.neuron_parameters + one + constant
    tables = (budget - heavy * shape.neuron_parameters) // one
    if tables < 1:
        raise BudgetError(
            f"keep={config.keep} leaves no table of {1 << config.hash_bits} rows beside {heavy} heavy neurons; the "
            f"smallest reachable keep is {smallest / shape.parameters:.4f} (or lower `hash_bits`)"
        )
    spec = sum_spec(shape, [dense_branch_spec(shape, heavy)], bias=shape.down_bias)
    lookup = LookupSpec(d_model=shape.d_model, tables=tables, bits=config.hash_bits)
    return spec.model_copy(update={"lookup": lookup})


@method(
    "lookup",
    summary="tokens are hashed and rows of tables added up in place of the light neurons",
    paper="LookupFFN, arXiv 2403.07221, with tables fitted by backfitting instead of trained (ours)",
    budget=("keep",),
    as_sum="heavy: dense + lookup tables",
    config=LookupConfig,
    structure=structure,
    status="experimental",
)
def lookup(data: LayerData, config: LookupConfig) -> SumFFN:
    """Refit the heavy neurons alone, then fit the tables to what they leave."""
    spec = structure(FFNShape.of(data.ffn), config)
    assert spec.lookup is not None
    module = _heavy_alone(data, config, spec)
    planes = data.as_stored(_planes(data, config, spec.lookup.planes))
    none = planes.new_zeros(len(planes))
    # The medians, so that every sign splits the tokens in halves.
    offsets = data.as_stored(torch.cat([projections(x, planes, none) for x in data.chunks()]).median(0).values)
    index = torch.cat([buckets(projections(x, planes, offsets), config.hash_bits) for x in data.chunks()])
    bias = 0 if data.ffn.down_bias is None else data.ffn.down_bias
    with torch.no_grad():
        left = torch.cat([target + bias - module(x) for x, target in data.targets()])
    tables = backfit(left, index, 1 << config.hash_bits, config.shrink, config.rounds)
    module.lookup = Lookup(spec.lookup, planes, offsets, tables.flatten(0, 1))
    return module


def _heavy_alone(data: LayerData, config: LookupConfig, spec: SumSpec) -> SumFFN:
    """The heavy neurons with `down` refitted; without any, the bias."""
    if not spec.branches:
        return SumFFN(data.ffn.d_model, bias=data.ffn.down_bias)
    heavy = neuron_order(data, "output_norm", spec.neurons)[: spec.neurons]
    bare = spec.model_copy(update={"lookup": None})
    return fit_parts(data, [Part(heavy, spec.branches[0])], bare, refit=True, ridge=config.ridge)


def _planes(data: LayerData, config: LookupConfig, count: int) -> Float[Tensor, "count d_model"]:
    moments, d_model = data.moments, data.ffn.d_model
    generator = torch.Generator().manual_seed(data.seed)
    if config.planes == "random":
        return hyperplanes(count, d_model, generator)
    gram, _ = centred(
        moments.input_gram, moments.input_gram, moments.input_sum, moments.input_sum, int(moments.tokens)
    )  # fmt: skip
    values, vectors = eigh_psd(gram.cpu())
    return hyperplanes(count, d_model, generator, values.sqrt()[:, None] * vectors.T)
