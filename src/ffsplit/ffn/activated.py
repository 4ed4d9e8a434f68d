"""Hidden activations of an FFN from what its inner matrices give."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import activations

from ffsplit.ffn.hooks import have_hooks
from ffsplit.kernels.activations import activate, biased

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
    """Its name among :data:`ffsplit.kernels.activations.ACTIVATIONS`; None if it is not one of them."""
    kind = type(act)  # a subclass may do anything
    if "forward" in vars(act):
        return None
    if kind is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    if kind is activations.GELUActivation:
        return "gelu" if act.act is functional.gelu else None
    return ACTIVATION_NAMES.get(kind)


def activated(
    act: nn.Module,
    up: Float[Tensor, "*tokens neurons"],
    gate: Float[Tensor, "*tokens neurons"] | None,
    up_bias: Float[Tensor, " neurons"] | None = None,
    gate_bias: Float[Tensor, " neurons"] | None = None,
    out: Float[Tensor, "*tokens neurons"] | None = None,
) -> Float[Tensor, "*tokens neurons"]:
    """``act(gate) * up``, or ``act(up)`` without a gate, biases added before; written to ``out`` if that is given.

    In one pass where there is a kernel for it. An activation with hooks is called, since a kernel would not run them.
    """
    if up.is_cuda and not have_hooks((act,)):
        found = activate(activation_name(act), up, gate, up_bias, gate_bias, out)
        if found is not None:
            return found
    up = biased(up, up_bias)
    hidden: Tensor = act(up) if gate is None else act(biased(gate, gate_bias)) * up
    return hidden if out is None else out.copy_(hidden)
