"""A loss for any model that answers with logits, from its calibration batches alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ffsplit.calibrate.batches import is_causal
from ffsplit.errors import ModelError


def calibration_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], output: Any) -> Float[Tensor, ""]:
    """Cross entropy summed over the real positions of a batch.

    A causal language model is asked for the next token. Any other model (masked language models, sequence to sequence,
    classifiers) is asked for its own answers, the classes it finds likeliest: that needs no labels and no mask token,
    and its gradient tells how far an answer depends on a neuron.

    Args:
        model: with a head.
        batch: keyword arguments of its forward.
        output: what the forward returned.

    Raises:
        ModelError: there are no logits, or no classes in them.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"gradients need a loss, and {type(model).__name__} returns no logits: load the model with its head, or "
            "choose a score that needs no gradients"
        )
    main = batch.get(model.main_input_name)
    if logits.shape[-1] < 2 or (main is not None and logits.shape == main.shape):
        raise ModelError(
            f"gradients need a loss, and the logits of {type(model).__name__}, of shape {list(logits.shape)}, are no "
            "scores of classes; choose a score that needs no gradients"
        )
    if is_causal(model) and "input_ids" in batch and logits.dim() == 3:
        return _summed(logits[:, :-1], batch["input_ids"][:, 1:], _mask(batch, "attention_mask", logits, 1))
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    return _summed(logits, logits.detach().argmax(-1), _mask(batch, name, logits, 0))


def _mask(batch: Mapping[str, Tensor], name: str, logits: Tensor, first: int) -> Tensor | None:
    """The real positions, from ``first`` on; None when all are, or when there is one answer a sequence."""
    mask = batch.get(name)
    return None if mask is None or mask.shape != logits.shape[:-1] else mask[:, first:].bool()


def _summed(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Float[Tensor, ""]:
    if mask is not None:
        logits, labels = logits[mask], labels[mask]
    # A sum, not a mean: then it does not matter how sequences are put into batches.
    return cross_entropy(logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
