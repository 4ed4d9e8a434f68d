"""Tokens that do without the whole FFN: a linear gate on its input, and what comes out instead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ffsplit.ffn.projections.base import Spec


class SkipSpec(Spec):
    """A gate on the input of an FFN.

    Attributes:
        d_model: of the FFN.
        sparsity: share of the tokens that skip it on the calibration text.
        constant: whether a skipped token gets a stored constant instead of zero.
    """

    d_model: PositiveInt
    sparsity: float = Field(ge=0, le=1)
    constant: bool = False

    @property
    def parameters(self) -> int:
        """The gate's direction, its threshold, and the constant."""
        return self.d_model + 1 + self.d_model * self.constant

    def macs(self, ffn: float) -> float:
        """Multiply-accumulates of an average token, given those of the FFN.

        A batch is computed whole and masked; only a single token on its own really skips.
        """
        return self.d_model + (1 - self.sparsity) * ffn

    def describe(self) -> str:
        return f"skipped by {self.sparsity:.0%} of tokens"


class Skip(nn.Module):
    """A token whose score ``x . direction`` is at most the threshold gets the constant (or zero), not the FFN."""

    direction: Tensor
    threshold: Tensor
    constant: nn.Parameter | None

    def __init__(
        self,
        spec: SkipSpec,
        direction: Float[Tensor, " d_model"],
        threshold: Float[Tensor, " one"],
        constant: Float[Tensor, " d_model"] | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("direction", direction.contiguous())
        self.register_buffer("threshold", threshold.contiguous())
        self.register_parameter("constant", None if constant is None else nn.Parameter(constant.contiguous()))

    @classmethod
    def empty(cls, spec: SkipSpec, dtype: torch.dtype, device: torch.device) -> Skip:
        def vector(size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        return cls(spec, vector(spec.d_model), vector(1), vector(spec.d_model) if spec.constant else None)

    def works(self, x: Float[Tensor, "*tokens d_model"]) -> Bool[Tensor, "*tokens one"]:
        """Whether the FFN works for a token."""
        return scores(x, self.direction)[..., None] > self.threshold.float()

    def instead(self, like: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        """What a skipped token gets."""
        return torch.zeros_like(like) if self.constant is None else self.constant.to(like.dtype).expand_as(like)

    def forward(
        self,
        x: Float[Tensor, "*tokens d_model"],
        ffn: Callable[[Float[Tensor, "*tokens d_model"]], Float[Tensor, "*tokens d_model"]],
    ) -> Float[Tensor, "*tokens d_model"]:
        works = self.works(x)
        if _may_branch(x) and not bool(works):
            return self.instead(x)
        out = ffn(x)
        return torch.where(works, out, self.instead(out))


def scores(
    x: Float[Tensor, "*tokens d_model"], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "*tokens"]:  # fmt: skip
    """``x . direction`` in float32, and no matrix product: a token's score must not depend on its batch."""
    return (x.float() * direction.float()).sum(-1)


def _may_branch(x: Tensor) -> bool:
    """Whether this is one token outside any graph: only then can work be left out, and the answer be waited for."""
    return (
        x.numel() == x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )
