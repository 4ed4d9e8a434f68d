"""WINA: the inputs with the largest part in a projection's output, a fixed number a token (arXiv 2505.19427)."""

from __future__ import annotations

from typing import Literal

import torch

from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.selectors import TopInputs, TopInputsSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.assemble import Part, fit_parts
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.registry import SparsityConfig, method
from ffsplit.methods.sparsity import left_over
from ffsplit.ops.scores import column_norm


class WinaConfig(SparsityConfig):
    """How many inputs are left out.

    Attributes:
        sparsity: share of the inputs of each projection that are left out for every token, with their columns of the
            weight (rounded so that at least this share is); it is saved of the FFN's products too.
    """

    method: Literal["wina"] = "wina"

    @property
    def needs_data(self) -> bool:
        return False


def structure(shape: FFNShape, config: WinaConfig) -> SumSpec:
    """All neurons, of whose inputs a fixed number works.

    Raises:
        BudgetError: not one input would be left.
    """
    selector = TopInputsSpec(
        neurons=shape.d_ff,
        d_model=shape.d_model,
        gated=shape.gated,
        inputs=left_over(shape.d_model, config.sparsity, "inputs"),
        hidden=left_over(shape.d_ff, config.sparsity, "neurons"),
    )
    branch = dense_branch_spec(shape, shape.d_ff).model_copy(update={"selector": selector})
    return sum_spec(shape, [branch], bias=shape.down_bias)


@method(
    "wina",
    summary="leave out the inputs of every projection whose size times column length is small; needs no text",
    paper="WINA, arXiv 2505.19427",
    budget=("sparsity",),
    as_sum="one dense branch, the top inputs of each token",
    config=WinaConfig,
    structure=structure,
)
def wina(data: LayerData, config: WinaConfig) -> SumFFN:
    """The lengths of the columns are all that is stored."""
    ffn, spec = data.ffn, structure(FFNShape.of(data.ffn), config)
    branch = spec.branches[0]
    assert isinstance(branch.selector, TopInputsSpec)
    up, down, gate = (
        None if weight is None else column_norm(weight).to(weight) for weight in (ffn.up, ffn.down, ffn.gate)
    )
    assert up is not None
    assert down is not None
    neurons = torch.arange(ffn.d_ff, device=ffn.up.device)
    part = Part(neurons, branch, selector=TopInputs(branch.selector, up, down, gate))
    return fit_parts(data, [part], spec, refit=False, ridge=0.0)
