"""Zeros inside the matrices: single weights go, or all but N of every M neighbours."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ffsplit.calibrate.layer import LayerData
from ffsplit.errors import BudgetError
from ffsplit.ffn.projections import MaskedSpec, NMSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import BranchSpec, SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.kernels.n_m import TILE
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import dense_branch_spec, keep_budget, sum_spec
from ffsplit.methods.neurons import neuron_order
from ffsplit.methods.registry import MethodConfig, method
from ffsplit.methods.sparsifier import Sparsifier, WeightScore
from ffsplit.ops.scores import activation_norm

UNSTRUCTURED = "unstructured"
ROUNDING = 1e-9
"""Slack for shares that binary fractions cannot hold."""


@dataclass(frozen=True)
class Pattern:
    """``n`` survivors in every ``m`` neighbours."""

    n: int
    m: int

    @property
    def share(self) -> float:
        return self.n / self.m


class SparsifyConfig(MethodConfig):
    """Which weights become zero.

    Attributes:
        keep: share of the FFN's parameters that stay; values and biases count, the places are bits and do not. Required
            when ``pattern`` is unstructured. An N:M pattern fixes it (N/M, and the heavy neurons): leave it out, or
            name just that.
        pattern: ``unstructured`` (any places; a quality reference, smaller but never faster), or N:M, such as ``"2:4"``
            (has a kernel, on NVIDIA GPUs) or ``"4:8"`` (has none), N weights of every M along the inputs. Quote it in
            YAML.
        score: what makes a weight worth keeping. ``magnitude``; ``wanda``, times the norm of its input; ``dass``, for
            `up` and `gate` also times a power of the norm of its neuron's activation, unstructured only;
            ``sparsegpt``, its cost once the weights still undecided make up for it.
        alpha: that power; 0 scores like ``wanda``, but compares across neurons instead of within each.
        heavy: share of the neurons, by output norm, that stay dense beside the sparse rest; with N:M rounded down to
            64 neurons where d_ff is a multiple of that, which the hardware wants of the rest.
        refit: fit `down` to the dense outputs on the activations that the sparse `up` and `gate` give, and in each
            matrix the surviving weights by least squares. With false only ``sparsegpt`` changes a surviving weight.
        ridge: pull of those fits to the old weights.
    """

    budget_is_optional: ClassVar[bool] = True  # an N:M pattern is one itself
    method: Literal["sparsify"] = "sparsify"
    keep: float | None = Field(None, gt=0, le=1)
    pattern: str = UNSTRUCTURED
    score: WeightScore = "sparsegpt"
    alpha: float = Field(0.5, ge=0)
    heavy: float = Field(0.0, ge=0, lt=1)
    refit: bool = True
    ridge: float = Field(1e-3, ge=0)

    @field_validator("pattern", mode="before")
    @classmethod
    def _no_number(cls, pattern: Any) -> Any:
        if isinstance(pattern, int):
            raise ValueError("write the pattern in quotes: YAML reads an unquoted 2:4 as a number to the base of 60")
        return pattern

    @model_validator(mode="after")
    def _consistent(self) -> SparsifyConfig:
        pattern = self.n_m
        if pattern is None:
            if self.keep is None:
                raise ValueError("keep is required when pattern is unstructured (share of FFN parameters that stay)")
            return self
        fixed = self.heavy + (1 - self.heavy) * pattern.share
        if self.keep is not None and abs(self.keep - fixed) > 1e-6:
            beside = f" and heavy={self.heavy}" if self.heavy else ""
            raise ValueError(
                f"pattern {self.pattern}{beside} fixes keep at {fixed:.6g}, not {self.keep}: leave keep out, or take "
                "pattern: unstructured for any other share"
            )
        if self.score == "dass":
            raise ValueError(
                "score dass needs pattern: unstructured; the weights of an N:M group feed the same neuron, so that "
                "its norm changes nothing among them: use wanda"
            )
        return self

    @property
    def n_m(self) -> Pattern | None:
        """The N:M pattern, or None when any place may stay.

        Raises:
            ValueError: not a pattern.
        """
        if self.pattern == UNSTRUCTURED:
            return None
        found = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", self.pattern)
        n, m = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < n < m <= 256:
            raise ValueError(
                f"pattern {self.pattern!r} is neither unstructured nor N:M with 0 < N < M <= 256, such as 2:4"
            )
        return Pattern(n, m)

    @property
    def full_budget(self) -> bool:
        return self.keep == 1

    @property
    def needs_data(self) -> bool:
        return self.refit or self.score != "magnitude" or self.heavy > 0


def structure(shape: FFNShape, config: SparsifyConfig) -> SumSpec:
    """Heavy neurons, if any, in a dense branch; all others in a sparse one."""
    pattern = config.n_m
    heavy = int(config.heavy * shape.d_ff + ROUNDING)
    if pattern is not None and shape.d_ff % TILE[1] == 0:
        heavy -= heavy % TILE[1]
    if pattern is None:
        rest = _masked_branch_spec(shape, config, heavy)
    else:
        rest = _sparse_branch_spec(shape, *_n_m_specs(shape, shape.d_ff - heavy, pattern))
    spec = sum_spec(shape, [dense_branch_spec(shape, heavy), rest], bias=shape.down_bias)
    if config.keep is not None and spec.parameters > config.keep * shape.parameters * (1 + ROUNDING):
        raise BudgetError(
            f"pattern {config.pattern} with its biases (and whole groups) is above keep={config.keep}; the smallest "
            f"reachable keep is {spec.parameters / shape.parameters:.4f}, which is what you get without `keep`"
        )
    return spec


def _masked_branch_spec(shape: FFNShape, config: SparsifyConfig, heavy: int) -> BranchSpec:
    """As many surviving weights as the budget pays for, the same share of every matrix."""
    assert config.keep is not None
    rest = shape.d_ff - heavy
    fixed = heavy * shape.neuron_parameters + rest * shape.neuron_biases + shape.d_model * shape.down_bias
    weights = keep_budget(shape, config.keep) - fixed
    if weights < shape.matrices:
        smallest = (fixed + shape.matrices) / shape.parameters
        beside = f" beside {heavy} dense heavy neurons" if heavy else ""
        raise BudgetError(
            f"keep={config.keep} leaves no weight of d_ff={shape.d_ff} neurons{beside}; the smallest reachable keep is "
            f"{smallest:.4f}"
        )
    inner = weights // shape.matrices
    last = min(weights - (shape.matrices - 1) * inner, rest * shape.d_model)
    return _sparse_branch_spec(
        shape,
        MaskedSpec(shape=(rest, shape.d_model), kept=inner),
        MaskedSpec(shape=(shape.d_model, rest), kept=last),
    )


def _n_m_specs(shape: FFNShape, neurons: int, pattern: Pattern) -> tuple[NMSpec, NMSpec]:
    inner, down = (neurons, shape.d_model), (shape.d_model, neurons)
    return NMSpec(shape=inner, n=pattern.n, m=pattern.m), NMSpec(shape=down, n=pattern.n, m=pattern.m)


def _sparse_branch_spec(shape: FFNShape, inner: MaskedSpec | NMSpec, down: MaskedSpec | NMSpec) -> BranchSpec:
    return BranchSpec(
        up=inner,
        gate=inner if shape.gated else None,
        down=down,
        up_bias=shape.up_bias,
        gate_bias=shape.gate_bias,
    )


@method(
    "sparsify",
    summary="zeros inside the matrices, anywhere or all but N of every M, by magnitude, Wanda, DaSS or SparseGPT",
    paper="SparseGPT 2301.00774, Wanda 2306.11695, DaSS 2405.01943 (by `score`)",
    budget=("keep",),
    as_sum="one sparse branch of all neurons, or heavy: dense + rest: sparse",
    config=SparsifyConfig,
    structure=structure,
    status="experimental",
)
def sparsify(data: LayerData, config: SparsifyConfig) -> SumFFN:
    """Up and gate first, then `down` on the activations that they really give."""
    spec = structure(FFNShape.of(data.ffn), config)
    order = _neurons(data, config, spec)
    parts, start = [], 0
    for branch in spec.branches:
        parts.append(_part(data, order[start : start + branch.neurons], branch, config))
        start += branch.neurons
    return fit_parts(data, parts, spec, refit=config.refit, ridge=config.ridge)


def _neurons(data: LayerData, config: SparsifyConfig, spec: SumSpec) -> Int[Tensor, " d_ff"]:
    """Heavy neurons first where there are any; otherwise as they stand, which suits N:M groups as well as any order."""
    if len(spec.branches) == 1:
        return torch.arange(data.ffn.d_ff, device=data.ffn.up.device)
    heavy = spec.branches[0].neurons
    order = neuron_order(data, "output_norm", heavy)
    return torch.cat([order[:heavy], order[heavy:].sort().values])


def _part(data: LayerData, neurons: Int[Tensor, " part"], spec: BranchSpec, config: SparsifyConfig) -> Part:
    ridge = config.ridge if config.refit else None
    if config.score != "dass":
        return Part(neurons, spec, Sparsifier(config.score, ridge))
    norms: Float[Tensor, " part"] = activation_norm(data.moments.hidden_square_sum[neurons])
    return Part(neurons, spec, Sparsifier("dass", ridge, norms, config.alpha), Sparsifier("wanda", ridge))
