"""The text of a recovery: what is trained on, batch by batch, and what is held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.calibrate.batches import CalibrationInput, is_causal, make_windows, with_decoder
from ffsplit.calibrate.tokens import TokenWindows, max_positions
from ffsplit.errors import DataError
from ffsplit.recover.config import Recovery
from ffsplit.train.lengths import alike

NO_TARGET = -100
MOST_HELD_OUT = 64
MASKED_SHARE = 0.15
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Sample:
    """One batch.

    Attributes:
        inputs: keyword arguments of a model's forward.
        targets: the id that the text has at every position, `NO_TARGET` where nothing is asked; None when the text
            does not say what the model should answer.
    """

    inputs: dict[str, Tensor]
    targets: Int[Tensor, "batch seq_len"] | None


@dataclass(frozen=True, eq=False)
class Text:
    """Windows in a random order of every epoch's own; batch n is the same whenever it is asked for.

    Windows of similar length share a batch, so that little of it is padding.

    Attributes:
        windows: all of them, the held-out ones at the end.
        held_out: how many these are.
        batch_size: windows of one batch, at most.
        seed: of the orders and masks.
        causal: whether the targets are the next tokens.
        mask_id: of a masked language model, which is shown it in place of some tokens.
        special_ids: tokens that are never masked.
        share: ``(index, count)`` of this process among several; each takes batches of its own.
    """

    windows: TokenWindows
    held_out: int
    batch_size: int
    seed: int
    causal: bool
    mask_id: int | None = None
    special_ids: tuple[int, ...] = ()
    share: tuple[int, int] = (0, 1)
    _latest: dict[int, Int[Tensor, "batches batch"]] = field(default_factory=dict, repr=False)

    @property
    def trained_on(self) -> int:
        """Windows that are not held out."""
        return self.windows.samples - self.held_out

    def batch(self, number: int) -> Sample:
        """The ``number``-th batch of this process, from 0."""
        size = min(self.batch_size, self.trained_on)
        number = number * self.share[1] + self.share[0]
        epoch, place = divmod(number, self.trained_on // size)
        if epoch not in self._latest:
            self._latest.clear()
            self._latest[epoch] = self._epoch(epoch, size)
        return self._sample(self._latest[epoch][place], number)

    def _epoch(self, epoch: int, size: int) -> Int[Tensor, "batches batch"]:
        """The windows of every batch of an epoch; those that fill no batch are left out."""
        generator = torch.Generator().manual_seed(self.seed * _SEED_STRIDE + epoch)
        order = torch.randperm(self.trained_on, generator=generator)[: self.trained_on // size * size]
        if self.windows.attention_mask is None:
            return order.view(-1, size)
        lengths = self.windows.attention_mask.sum(1).numpy()
        batches = torch.from_numpy(alike(order.numpy(), lengths, size)).view(-1, size)
        return batches[torch.randperm(len(batches), generator=generator)]

    def held_out_batches(self) -> Iterator[Sample]:
        """The held-out windows, every time with the same masks."""
        rows = torch.arange(self.trained_on, self.windows.samples)
        for number, chosen in enumerate(torch.split(rows, self.batch_size)):
            yield self._sample(chosen, -1 - number)

    def plain(self, rows: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """Some windows as they are, padding common to all cut off."""
        ids, mask = self.windows.input_ids[rows], self.windows.attention_mask
        if mask is None:
            return {"input_ids": ids}
        mask = mask[rows]
        longest = max(1, int(mask.any(0).nonzero().max()) + 1) if bool(mask.any()) else 1
        return {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}

    def _sample(self, rows: Int[Tensor, " batch"], number: int) -> Sample:
        inputs = self.plain(rows)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if self.causal:
            return Sample(inputs, _next_tokens(ids, mask))
        if self.mask_id is None:
            return Sample(inputs, None)
        hidden = self._masked(ids, mask, number)
        inputs["input_ids"] = ids.masked_fill(hidden, self.mask_id)
        return Sample(inputs, ids.masked_fill(~hidden, NO_TARGET))

    def _masked(self, ids: Tensor, mask: Tensor | None, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(abs(self.seed * _SEED_STRIDE + 2 * number + 1))
        chosen = torch.rand(ids.shape, generator=generator) < MASKED_SHARE
        for special in self.special_ids:
            chosen &= ids != special
        return chosen if mask is None else chosen & mask.bool()


def recovery_text(
    model: PreTrainedModel,
    windows: TokenWindows,
    config: Recovery,
    mask_id: int | None,
    special_ids: tuple[int, ...] = (),
    share: tuple[int, int] = (0, 1),
) -> Text:
    """Set windows aside and say what the model is asked.

    Args:
        model: that is recovered.
        windows: of text, at least two.
        config: share that is held out, batch size, seed.
        mask_id: of a masked language model.
        special_ids: tokens that are never masked.
        share: of this process among several.

    Raises:
        DataError: there is only one window.
    """
    if windows.samples < 2:
        raise DataError(
            f"{windows.name}: recovery needs at least 2 windows of text, one to train on and one held out; there is "
            f"{windows.samples} of seq_len {windows.seq_len}: give more text or a smaller seq_len"
        )
    held_out = min(max(1, round(config.held_out * windows.samples)), MOST_HELD_OUT, windows.samples - 1)
    return Text(
        windows, held_out, config.batch_size, config.seed, is_causal(model), mask_id, special_ids, share
    )  # fmt: skip


def recovery_windows(
    model: PreTrainedModel,
    tokenizer: Any | None,
    settings: Recovery,
    given: CalibrationInput | Path | None,
    fallback: str,
) -> TokenWindows:
    """The windows of text that a recovery trains on.

    Args:
        model: that is recovered.
        tokenizer: for text.
        settings: source, field, amount.
        given: text or token ids that the caller has; None takes the source.
        fallback: source where the settings name none.

    Raises:
        DataError: no text, too little of it, or ready-made batches.
    """
    text = given if settings.source is None and given is not None else settings.source or fallback
    if isinstance(text, Path):
        text = str(text)
    if not isinstance(text, str | Tensor | TokenWindows | Sequence) or (
        isinstance(text, Sequence) and not all(isinstance(piece, str) for piece in text)
    ):
        raise DataError("recovery needs text or token ids to deal with in an order of its own, not ready-made batches")
    limit = max_positions(model)
    seq_len = settings.seq_len
    if limit is not None and "seq_len" not in settings.model_fields_set:
        seq_len = min(seq_len, limit)
    return make_windows(
        model, tokenizer, text, field=settings.field, seq_len=seq_len, samples=settings.samples  # type: ignore[arg-type]
    )  # fmt: skip


def model_inputs(model: PreTrainedModel, sample: Sample, device: torch.device) -> dict[str, Tensor]:
    """The keyword arguments on a device, with a decoder's side where the model has one."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in sample.inputs.items()}
    return with_decoder(model, inputs)


def _next_tokens(ids: Int[Tensor, "batch seq_len"], mask: Tensor | None) -> Int[Tensor, "batch seq_len"]:
    targets = torch.full_like(ids, NO_TARGET)
    targets[:, :-1] = ids[:, 1:]
    return targets if mask is None else targets.masked_fill(~torch.roll(mask, -1, 1).bool(), NO_TARGET)
