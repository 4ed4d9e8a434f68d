"""How far a student's answers are from its teacher's, or from the text: the loss of whole-model distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ffsplit.errors import DataError, ModelError
from ffsplit.families.head import call, device_of, probe_head
from ffsplit.ops.divergence import kl_divergence, relative_distance
from ffsplit.recover.config import Recovery
from ffsplit.recover.head_loss import through_head
from ffsplit.recover.text import NO_TARGET, Sample, model_inputs
from ffsplit.train.distill import hidden_loss, logits_loss

CHUNK_ELEMENTS = 1 << 26
_PROBE_TOKENS = 16


@dataclass(frozen=True)
class _Answer:
    """What a model said: states in front of a plain head, or logits, or states alone; and all hidden states."""

    states: Tensor
    hidden: tuple[Tensor, ...]


class Distillation:
    """The loss of one batch, a mean over its real tokens, in nats where there are logits.

    Causal and masked language models are compared by ``T^2 KL(teacher / T || student / T)`` of their logits, mixed with
    the cross entropy of the text by ``config.labels``; classifiers by the KL of their classes; models without logits by
    the squared difference of their last hidden states, of every token and of the mean over tokens (what a sentence
    encoder returns), relative to the teacher's.

    Reference: Hinton et al., arXiv 1503.02531, section 2.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, config: Recovery, probe: Sample
    ) -> None:
        """Find out what both models answer with.

        Raises:
            ModelError: there is no teacher, and the student answers nothing that text could judge.
            DataError: the two models' answers cannot be compared.
        """
        self.student, self.teacher = student, teacher
        self.temperature, self.hidden = config.temperature, config.hidden
        self.labels = 1.0 if teacher is None else config.labels
        kinds = [_kind(model, probe) for model in (student, teacher) if model is not None]
        if any(width != kinds[0][1] for _, width in kinds):
            raise DataError(f"cannot distil from a model with {kinds[1][1]} answers into one with {kinds[0][1]}")
        self.by_head = all(kind == "head" for kind, _ in kinds)
        self.has_logits = all(kind != "states" for kind, _ in kinds)
        self.width = kinds[0][1]
        self.unpadded = "attention_mask" not in probe.inputs
        if self.labels and (probe.targets is None or not self.has_logits):
            raise ModelError(
                f"{type(student).__name__} is no language model, so the text says nothing about its answers: "
                "give a teacher and leave labels at 0"
            )

    def __call__(self, sample: Sample) -> Float[Tensor, ""]:
        device = device_of(self.student)
        inputs = model_inputs(self.student, sample, device)
        mask = _real(self.student, inputs)
        theirs = None
        if self.teacher is not None:
            with torch.no_grad():
                theirs = self._answer(self.teacher, inputs)
        ours = self._answer(self.student, inputs)
        targets = None if sample.targets is None else sample.targets.to(device)
        loss = self._of_answers(ours.states, None if theirs is None else theirs.states, mask, targets)
        if self.hidden and theirs is not None:
            loss = loss + self.hidden * hidden_loss(ours.hidden, theirs.hidden, mask)
        return loss

    def _answer(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> _Answer:
        options: dict[str, Any] = {"output_hidden_states": True} if self.hidden else {}
        whole = self.has_logits and not self.by_head
        output = call(model if whole else model.base_model, {**inputs, **options})
        states = output.logits if whole else output.last_hidden_state
        hidden = getattr(output, "hidden_states", None) or getattr(output, "decoder_hidden_states", None) or ()
        return _Answer(states, tuple(hidden))

    def _of_answers(
        self, ours: Tensor, theirs: Tensor | None, mask: Int[Tensor, "batch seq_len"], targets: Tensor | None
    ) -> Float[Tensor, ""]:
        if not self.has_logits:
            assert theirs is not None
            return _state_loss(ours, theirs, mask)
        if ours.dim() == 2 or ours.shape[:2] != mask.shape:  # a class a sequence, or logits of parts of it
            assert theirs is not None
            return logits_loss(ours, theirs, self.temperature)
        mine, other, wanted = (
            None if found is None else self._on_real(found.flatten(0, 1), mask) for found in (ours, theirs, targets)
        )
        assert mine is not None
        counts = (len(mine), 0 if wanted is None else (wanted != NO_TARGET).sum().clamp_min(1))

        def part(logits: Tensor, rows: slice) -> Tensor:
            reference = None if other is None else self._logits(self.teacher, other[rows])
            return self._token_loss(logits, reference, None if wanted is None else wanted[rows], counts)

        head = self._head(self.student) if self.by_head else None
        if head is None:
            return part(mine, slice(None))
        return through_head(mine, head.weight, head.bias, part, max(1, CHUNK_ELEMENTS // self.width))

    def _on_real(self, flat: Tensor, mask: Int[Tensor, "batch seq_len"]) -> Tensor:
        """The rows of real tokens. Picking them waits for the device, so that it is left out where all are real."""
        return flat if self.unpadded else flat[mask.flatten().bool()]

    def _head(self, model: PreTrainedModel) -> nn.Linear:
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @torch.no_grad()
    def _logits(self, model: PreTrainedModel | None, states: Tensor) -> Tensor:
        assert model is not None
        return self._head(model)(states) if self.by_head else states

    def _token_loss(
        self, logits: Tensor, reference: Tensor | None, targets: Tensor | None, counts: tuple[int, Any]
    ) -> Tensor:
        """The part that some tokens have in the mean over all."""
        logits, (tokens, asked) = logits.float(), counts
        total = torch.zeros((), device=logits.device)
        if reference is not None and self.labels < 1:
            heat = self.temperature
            distance = kl_divergence(reference.float() / heat, logits / heat).sum()
            total = total + (1 - self.labels) * heat**2 * distance / tokens
        if targets is not None and self.labels > 0:
            entropy = cross_entropy(logits, targets, ignore_index=NO_TARGET, reduction="sum")
            total = total + self.labels * entropy / asked
        return total


def _state_loss(ours: Tensor, theirs: Tensor, mask: Int[Tensor, "batch seq_len"]) -> Float[Tensor, ""]:
    """Relative squared difference of the tokens' states, and of their mean over each sequence."""
    ours, theirs = ours.float(), theirs.float()
    weight = mask.unsqueeze(-1).to(ours.dtype)
    tokens = relative_distance(theirs[mask.bool()], ours[mask.bool()]).mean()
    pooled = [(states * weight).sum(1) / weight.sum(1).clamp_min(1) for states in (theirs, ours)]
    return tokens + relative_distance(pooled[0], pooled[1]).mean()


def _real(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Int[Tensor, "batch seq_len"]:
    """1 where a position is no padding."""
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    return inputs[name] if name in inputs else torch.ones_like(inputs["input_ids"])


@torch.no_grad()
def _kind(model: PreTrainedModel, probe: Sample) -> tuple[str, int]:
    """``head``: the model answers with logits through one matrix; ``logits``; or ``states``. And how many numbers."""
    short = Sample({name: tensor[:1, :_PROBE_TOKENS] for name, tensor in probe.inputs.items()}, None)
    inputs = model_inputs(model, short, device_of(model))
    output = call(model, inputs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        return "states", call(model.base_model, inputs).last_hidden_state.shape[-1]
    plain = logits.dim() == 3 and not model.config.is_encoder_decoder and probe_head(model, inputs)[0]
    return "head" if plain else "logits", logits.shape[-1]
