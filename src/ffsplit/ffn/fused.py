"""The branches of a sum as the kernels over whole FFNs want them: two at a time, their tensors in a row."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import activations

from ffsplit.ffn.projections import Dense, Packed, Projection
from ffsplit.kernels.cache import DerivedCache
from ffsplit.kernels.float8_ffn import Float8FFN, float8_ffn, run_float8, wants_float8
from ffsplit.kernels.low_bit import LowBitShape, low_bit_ffn, takes

if TYPE_CHECKING:
    from ffsplit.ffn.sum import Branch

DENSE_BITS = 16
ACTIVATION_NAMES: dict[type[nn.Module], str] = {
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu_squared",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    nn.Identity: "identity",
    activations.LinearActivation: "identity",
}


def activation_name(act: nn.Module) -> str | None:
    """Its name among :data:`ffsplit.kernels.low_bit.ACTIVATIONS`; None if it is not one of them."""
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    if isinstance(act, activations.GELUActivation):
        return "gelu" if act.act is functional.gelu else None
    return ACTIVATION_NAMES.get(type(act))


class FusedBranches:
    """Which kernels run the branches of a sum, found when they are first needed and again after one was replaced.

    Copies and pickles of a sum find them anew.
    """

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[nn.Module] | None, ...] = ()
        self._shapes: tuple[LowBitShape, ...] | None = None
        self.derived = DerivedCache()

    def __call__(
        self, x: Float[Tensor, "*tokens d_model"], branches: Sequence[Branch], bias: Tensor | None
    ) -> Tensor | None:
        """The outputs of all branches and the bias together; None where the kernels do not apply."""
        # Before anything else: on other devices this must cost nothing.
        if x.device.type != "cuda" or not branches:
            return None
        shapes = self._found(branches)
        if shapes is None:
            return None
        tensors = [_tensors(branches[at : at + 2]) for at in range(0, len(branches), 2)]
        if not _may_run(x, [*(tensor for part in tensors for tensor in part), bias]):
            return None
        if all(takes(x, shape) for shape in shapes):
            return _low_bit(x, tensors, bias, shapes)
        if not wants_float8(x, sum(sum(shape.neurons) for shape in shapes)):
            return None
        sources = [tensor for part in tensors for tensor in part] + [bias]
        act = shapes[0].act
        return run_float8(x, self.derived.get("float8", sources, lambda: _as_float8(branches, bias, act, x.dtype)))

    def _found(self, branches: Sequence[Branch]) -> tuple[LowBitShape, ...] | None:
        if torch.compiler.is_compiling():
            return low_bit_shapes(branches)
        modules = [module for b in branches for module in (b, b.act, b.up, b.gate, b.down, b.selector)]
        seen = self._seen
        same = len(seen) == len(modules) and all(
            module is (None if ref is None else ref()) for ref, module in zip(seen, modules, strict=True)
        )
        if not same:
            self._seen = tuple(None if module is None else weakref.ref(module) for module in modules)
            self._shapes = low_bit_shapes(branches)
        return self._shapes

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedBranches:
        return FusedBranches()

    def __reduce__(self) -> tuple[type[FusedBranches], tuple[()]]:
        return FusedBranches, ()


def _may_run(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing is differentiated, and all tensors are where the inputs are and in their dtype."""
    present = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *present)):
        return False
    return all(t.device == x.device and (t.dtype == x.dtype or not t.is_floating_point()) for t in present)


def _low_bit(
    x: Tensor, tensors: Sequence[list[Tensor | None]], bias: Tensor | None, shapes: Sequence[LowBitShape]
) -> Tensor | None:
    """The sum over pairs of branches; the first one adds the bias."""
    total: Tensor | None = None
    for at, (part, shape) in enumerate(zip(tensors, shapes, strict=True)):
        out = low_bit_ffn(x, [*part, bias if at == 0 else None], shape)
        if out is None:
            return None
        total = out if total is None else total + out
    return total


def _as_float8(branches: Sequence[Branch], bias: Tensor | None, act: str, dtype: torch.dtype) -> Float8FFN:
    """All branches as one dense FFN, rounded."""
    gates = [branch.gate.dense(dtype) for branch in branches if branch.gate is not None]
    ups = [branch.up.dense(dtype) for branch in branches]
    return float8_ffn(
        torch.cat(ups),
        torch.cat([branch.down.dense(dtype) for branch in branches], dim=1),
        act,
        gate=torch.cat(gates) if gates else None,
        up_bias=_joined_biases([branch.up_bias for branch in branches], ups),
        gate_bias=_joined_biases([branch.gate_bias for branch in branches], ups),
        bias=bias,
    )


def _joined_biases(biases: Sequence[Tensor | None], ups: Sequence[Tensor]) -> Tensor | None:
    """Biases of all branches, zeros where one has none; None if no branch has any."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat([up.new_zeros(len(up)) if b is None else b for b, up in zip(biases, ups, strict=True)])


def low_bit_shapes(branches: Sequence[Branch]) -> tuple[LowBitShape, ...] | None:
    """Branches two at a time, as far as the kernels know their storages; None if there is one that they do not know."""
    known = [_known(branch) for branch in branches]
    if any(one is None for one in known) or not any(isinstance(branch.up, Packed) for branch in branches):
        return None
    shapes = []
    for at in range(0, len(known), 2):
        shape = _joined([one for one in known[at : at + 2] if one is not None])
        if shape is None or not shape.is_supported:
            return None
        shapes.append(shape)
    return tuple(shapes)


def _known(branch: Branch) -> LowBitShape | None:
    """The shape of one branch; a dense one takes over the group of the branch beside it (0 until then)."""
    act = activation_name(branch.act)
    matrices = [branch.up, branch.down] + ([] if branch.gate is None else [branch.gate])
    if act is None or branch.selector is not None:
        return None
    neurons, d_model = branch.up.spec.shape
    gated = branch.gate is not None
    if all(type(matrix) is Dense for matrix in matrices):
        return LowBitShape(d_model, (neurons,), (DENSE_BITS,), 0, gated, act)
    if not all(type(matrix) is Packed and matrix.input_scale is None for matrix in matrices):
        return None
    grids = {(matrix.spec.bits, matrix.spec.group) for matrix in matrices}
    if len(grids) != 1:
        return None
    ((bits, group),) = grids
    return LowBitShape(d_model, (neurons,), (bits,), group, gated, act)


def _joined(known: Sequence[LowBitShape]) -> LowBitShape | None:
    """Two branches as one; None if their groups, gates or activations differ."""
    groups = {one.group for one in known if one.group}
    if len(groups) > 1 or len({(one.gated, one.act) for one in known}) != 1:
        return None
    first = known[0]
    # A pair of dense branches beside packed ones may have any tiling of its own.
    group = groups.pop() if groups else 128
    neurons = tuple(size for one in known for size in one.neurons)
    bits = tuple(width for one in known for width in one.bits)
    return LowBitShape(first.d_model, neurons, bits, group, first.gated, first.act)


def _tensors(branches: Sequence[Branch]) -> list[Tensor | None]:
    """In the order of :func:`ffsplit.kernels.low_bit.low_bit_ffn`, without the last."""
    found: list[Tensor | None] = []
    for branch in branches:
        for matrix in (branch.gate, branch.up, branch.down):
            found.extend(_stored(matrix))
        found.extend([branch.gate_bias, branch.up_bias])
    return found


def _stored(matrix: Projection | None) -> tuple[Tensor | None, ...]:
    """Codes, scales, zeros and row scales."""
    if matrix is None:
        return None, None, None, None
    if isinstance(matrix, Dense):
        return matrix.weight, None, None, None
    assert isinstance(matrix, Packed)
    return matrix.codes, matrix.scale, matrix.zero, matrix.row_scale
