"""What a recovery does: the stages, how long each trains, and on what."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ffsplit.train.movement import Movement, Scope

Stage = Literal["refit", "blocks", "masks", "model"]
LR = {"blocks": 1e-3, "ffn": 3e-4, "all": 5e-5, "lora": 1e-3}
"""Peak learning rates where none is asked for, by what is trained."""


class Recovery(BaseModel):
    """Everything that determines a recovery, beside the models.

    Attributes:
        stages: in this order: ``refit`` solves for all output maps in closed form, layer by layer; ``blocks`` trains
            each FFN to give its dense original's outputs; ``model`` trains the whole model to give the dense one's
            answers; ``masks`` does so too while it learns which neurons stay, and removes the others.
        keep: of the stage ``masks``: share of the dense model's FFN parameters that stay.
        scope: of the stage ``masks``: ``model``: neurons of all FFNs compete; ``ffn``: those of each.
        mask_begin: of the stage ``masks``: share of the steps with all neurons.
        mask_end: of the stage ``masks``: share of the steps after which the masks stay what they are.
        source: text; None takes that of the calibration.
        field: column of a structured source.
        samples: windows of text, the held-out ones included; None takes all.
        seq_len: tokens per window, at most what the model can take.
        batch_size: windows per forward pass.
        accumulate: forward passes per step.
        held_out: share of the windows that is not trained on, at least one and at most 64.
        steps: optimizer steps of the stages ``model`` and ``masks``, and of every FFN in ``blocks``.
        minutes: budget of the stage ``model``, by the clock; it ends at whichever of the two is used up first.
        lr: peak learning rate; None takes one that suits what is trained.
        warmup: share of the steps over which the learning rate rises; it then falls along a cosine to a tenth.
        weight_decay: decoupled, on matrices only.
        clip: largest norm of the gradient.
        patience: stop after so many evaluations in a row without a lower held-out loss; 0 never does.
        evaluations: how often the held-out loss is looked at.
        train: ``ffn``: the branches of the compressed FFNs; ``all``: every parameter of the model.
        lora: train adapters of this rank on the dense matrices of the branches instead, merged at the end.
        low_bit: of packed matrices ``scales`` trains the scales of the groups, ``codes`` the codes too, straight
            through their rounding, ``frozen`` neither.
        temperature: of both models' logits.
        guide: share of the steps of the stage ``model`` over which every FFN turns from its dense original into the
            compressed one; 0 starts with the compressed one.
        hidden: weight of the squared difference of hidden states, beside the loss on the answers.
        labels: share, 0 to 1, of the loss that is cross entropy with the text itself; 1 without a teacher.
        prefix: what records the inputs of the stages ``refit`` and ``blocks``: the ``compressed`` model as far as it is
            recovered, or the ``dense`` one, which makes the layers independent.
        precision: ``bfloat16`` under autocast, weights in float32; None: that on an accelerator, float32 elsewhere.
        seed: of everything random.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stages: tuple[Stage, ...] = ("model",)
    keep: float | None = Field(None, gt=0, le=1)
    scope: Scope = "model"
    mask_begin: float = Field(0.1, ge=0, lt=1)
    mask_end: float = Field(0.7, gt=0, lt=1)
    source: str | None = None
    field: str | None = None
    samples: int | None = Field(None, ge=2)
    seq_len: int = Field(512, ge=2)
    batch_size: int = Field(8, ge=1)
    accumulate: int = Field(1, ge=1)
    held_out: float = Field(0.05, gt=0, lt=1)
    steps: int = Field(1000, ge=1)
    minutes: float | None = Field(None, gt=0)
    lr: float | None = Field(None, gt=0, lt=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    patience: int = Field(0, ge=0)
    evaluations: int = Field(10, ge=1)
    train: Literal["ffn", "all"] = "ffn"
    lora: int | None = Field(None, ge=1)
    low_bit: Literal["scales", "codes", "frozen"] = "scales"
    temperature: float = Field(1.0, gt=0)
    guide: float = Field(0.0, ge=0, le=1)
    hidden: float = Field(0.0, ge=0)
    labels: float = Field(0.0, ge=0, le=1)
    prefix: Literal["compressed", "dense"] = "compressed"
    precision: Literal["float32", "bfloat16"] | None = None
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("stages", mode="before")
    @classmethod
    def _as_names(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Recovery:
        if not self.stages or len(set(self.stages)) < len(self.stages):
            raise ValueError(
                f"stages {list(self.stages)}: name each of refit, blocks, masks, model at most once, one at least"
            )
        if self.lora is not None and self.train == "all":
            raise ValueError("lora trains adapters on the branches; train=all trains everything: choose one")
        if self.guide and self.minutes is not None:
            raise ValueError("guide fades over the steps, which a budget in minutes does not know: give steps alone")
        if self.lora is not None and (self.low_bit == "codes" or "masks" in self.stages):
            other = "low_bit=codes trains packed matrices" if self.low_bit == "codes" else "stage masks trains weights"
            raise ValueError(f"lora trains adapters beside dense matrices that stay, {other}: choose one")
        self._check_masks()
        return self

    def _check_masks(self) -> None:
        if (self.keep is None) == ("masks" in self.stages):
            raise ValueError("stage masks needs keep (share of the FFN parameters that stay), and keep is for it alone")
        if self.mask_begin >= self.mask_end:
            raise ValueError(f"mask_begin={self.mask_begin} must be below mask_end={self.mask_end}")
        if self.keep is not None and self.minutes is not None:
            raise ValueError("masks follow the steps, which a budget in minutes does not know: give steps alone")

    @property
    def movement(self) -> Movement:
        """Of the stage ``masks``."""
        assert self.keep is not None
        return Movement(self.keep, self.scope, self.mask_begin, self.mask_end)

    @property
    def learning_rate(self) -> float:
        """Of the stages ``model`` and ``masks``."""
        return self.lr or LR["lora" if self.lora is not None else self.train]
