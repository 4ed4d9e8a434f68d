"""First-order importance of neurons from activations and their gradients; no weight gradient is ever stored.

For a linear layer ``o = W x + b`` the gradient of a loss is ``dL/dW = sum over tokens of g x^T`` with ``g = dL/do``. So
the products of a row's parameters with their gradients add up to something that the outputs alone tell:
``sum_k W_jk dL/dW_jk + b_j dL/db_j = sum over tokens of o_j g_j``, and likewise for a column of the next layer,
``sum_i V_ij dL/dV_ij = sum over tokens of h_j dL/dh_j``.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def products(values: Float[Tensor, "sequences tokens n"], gradients: Float[Tensor, "sequences tokens n"]) -> Tensor:
    """``sum over tokens of v_j dL/dv_j``, of every sequence: ``[sequences, n]``, float64.

    The gradient of a mask that multiplies ``v_j``; and for the outputs of a linear layer, what its row's parameters
    and their gradients give together.

    Reference: LLM-Pruner, arXiv 2305.11627 (vector-wise importance, first order); for masks Michel et al., arXiv
    1905.10650.
    """
    return (values.double() * gradients.double()).sum(1)


def elementwise(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    x: Float[Tensor, "sequences tokens in"],
    gradients: Float[Tensor, "sequences tokens out"],
) -> tuple[Float[Tensor, " out"], Float[Tensor, " in"]]:
    """``|w dL/dw|`` of every parameter and sequence, summed over sequences and rows, or over sequences and columns.

    Args:
        weight: ``W``.
        bias: ``b``, or None; it counts in the rows.
        x: inputs of the layer.
        gradients: of the loss, by the layer's outputs.

    Returns:
        The sums of the rows and of the columns, float64.

    Reference: LLM-Pruner, arXiv 2305.11627 (its element-wise importance, first order), one sequence at a time.
    """
    rows, columns = weight.new_zeros(weight.shape[0]).double(), weight.new_zeros(weight.shape[1]).double()
    for inputs, along in zip(x, gradients, strict=True):
        size = (weight.float() * (along.float().T @ inputs.float())).abs()
        rows += size.sum(1, dtype=rows.dtype)
        columns += size.sum(0, dtype=columns.dtype)
        if bias is not None:
            rows += (bias.double() * along.double().sum(0)).abs()
    return rows, columns
