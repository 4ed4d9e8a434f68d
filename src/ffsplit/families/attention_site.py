"""Where an attention sits in a model: plain paths, stored in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ffsplit.families.site import FFNSite


class AttentionSite(BaseModel):
    """One self-attention of a model, as far as it takes to leave it out.

    Attributes:
        name: path of the module whose place is taken.
        out: path of the projection whose output is added to the residual stream.
        kind: ``"module"``: ``out`` is inside ``name``. ``"inline"``: ``out`` shares a module with other code (a
            residual, a norm), and ``name`` computes what it is given.
        x: the keyword under which ``name`` gets the hidden states; None when they are its first argument.
        returns: how many values ``name`` returns as a tuple, the hidden states first; 0 when it returns them alone.
        width: size of what ``name`` returns.
        d_model: outputs of ``out``.
        layer: its place in the key-value cache; None where the model has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)
    out: str = Field(min_length=1)
    kind: Literal["module", "inline"]
    x: str | None
    returns: int = Field(ge=0)
    width: int = Field(gt=0)
    d_model: int = Field(gt=0)
    layer: int | None = Field(ge=0)

    @model_validator(mode="after")
    def _out_is_in_its_place(self) -> AttentionSite:
        if self.out.startswith(f"{self.name}.") != (self.kind == "module"):
            raise ValueError(f"{self.out} does not fit an attention at {self.name} of kind {self.kind}")
        return self

    @property
    def down(self) -> str:
        """The path where the tripwire stands, as that of an FFN does."""
        return self.out

    def renamed(self, rename: Callable[[str], str]) -> AttentionSite:
        """The same site with every module path changed by ``rename``."""
        return self.model_copy(update={"name": rename(self.name), "out": rename(self.out)})


SubLayer = FFNSite | AttentionSite
"""What a layer adds to the residual stream: its FFN, or its attention."""
