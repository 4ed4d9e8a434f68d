"""How far a compressed model's token states are from the dense model's, for models without a language-model head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ffsplit.calibrate.tokens import TokenWindows, check_fits
from ffsplit.errors import DataError, ModelError
from ffsplit.evaluate.logits import call, device_of
from ffsplit.evaluate.scoring import Progress
from ffsplit.families.forward import evaluating
from ffsplit.kernels.dispatch import exact_products


@dataclass(frozen=True)
class HiddenSimilarity:
    """Last hidden states of the compressed model against those of the dense one, padding left out.

    Attributes:
        cosine: mean over tokens of the cosine between the two states.
        relative_error: ``||compressed - dense||_F / ||dense||_F`` over all tokens.
        tokens: how many tokens were compared.
        sequences: how many sequences they lie in.
        source: the text's name.
        split: the part of it.
        sha256: of the token ids.
    """

    cosine: float
    relative_error: float
    tokens: int
    sequences: int
    source: str
    split: str
    sha256: str

    def describe(self) -> str:
        """One line."""
        return (
            f"hidden states: cosine {self.cosine:.4f} to dense, relative error {self.relative_error:.4f} "
            f"({self.source}, split {self.split}: {self.tokens:,} tokens)"
        )


def hidden_similarity(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    windows: TokenWindows,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> HiddenSimilarity:
    """Compare the last hidden states of both models over the same tokens.

    An encoder-decoder reads the same tokens on both sides, and its decoder's states are compared.

    Raises:
        DataError: the ids do not fit a model, or the states have different widths.
        ModelError: a state is NaN.
    """
    check_fits(windows, dense)
    check_fits(windows, compressed)
    cosine = error = energy = 0.0
    batches = windows.batches(batch_size)
    with evaluating(dense, compressed), exact_products(), torch.no_grad():
        for done, batch in enumerate(batches, start=1):
            reference, other = token_states(dense, batch).double(), token_states(compressed, batch).double()
            if reference.shape != other.shape:
                raise DataError(f"cannot compare states of width {reference.shape[-1]} and {other.shape[-1]}")
            cosine += float(cosine_similarity(reference, other, dim=-1).sum())
            error += float((other - reference).square().sum())
            energy += float(reference.square().sum())
            if progress is not None:
                progress("hidden states", done, len(batches))
    if not torch.tensor([error, energy]).isfinite().all():
        raise ModelError(f"the hidden states of {type(compressed).__name__} or its dense model are not finite")
    return HiddenSimilarity(
        cosine=cosine / windows.tokens,
        relative_error=(error / energy) ** 0.5 if energy else float(error > 0),
        tokens=windows.tokens,
        sequences=windows.samples,
        source=windows.name,
        split=windows.split,
        sha256=windows.sha256,
    )


def token_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Float[Tensor, "tokens d_model"]:
    """Float32 last hidden states of the real tokens of a batch, on the CPU."""
    inputs = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return last_states(model, inputs).float().cpu()[mask]


def last_states(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch seq_len d_model"]:
    """The last hidden states of the model's body, whatever head is on top; of the decoder where there are two."""
    body = model.base_model
    if model.config.is_encoder_decoder:
        sides = {"decoder_input_ids": inputs["input_ids"]}
        if "attention_mask" in inputs:
            sides["decoder_attention_mask"] = inputs["attention_mask"]
        output = call(body, {**inputs, **sides, "output_hidden_states": True})
        decoded: Tensor = output.decoder_hidden_states[-1]
        return decoded
    output = call(body, inputs)
    if isinstance(last := getattr(output, "last_hidden_state", None), Tensor):
        return last
    layers: tuple[Tensor, ...] = call(body, {**inputs, "output_hidden_states": True}).hidden_states
    return layers[-1]
