"""What an exported model is called with: a text encoder's batch, or a decoder's batch and its key-value cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ffsplit.errors import ModelError

Kind = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Signature:
    """Which inputs a model of some class takes.

    Attributes:
        kind: ``decoder`` has a key-value cache among its inputs and outputs.
        names: of its tensors, beside the cache.
        vocabulary: token ids are below it.
        longest: sequence that the model has positions for, or None.
    """

    kind: Kind
    names: tuple[str, ...]
    vocabulary: int
    longest: int | None

    def batch(self, mask: Int[Tensor, "rows total"], new: int, seed: int, cache: Cache | None = None) -> dict[str, Any]:
        """Keyword arguments for ``forward``: random ids for the last ``new`` positions of ``mask``."""
        generator = torch.Generator().manual_seed(seed)
        low = min(5, self.vocabulary - 1)
        values: dict[str, Any] = {
            "input_ids": torch.randint(low, self.vocabulary, (mask.shape[0], new), generator=generator),
            "attention_mask": mask,
            "token_type_ids": torch.zeros(mask.shape[0], new, dtype=torch.long),
            "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:],
        }
        found = {name: values[name] for name in self.names}
        return found if cache is None else {**found, "past_key_values": cache}


def signature(model_class: type[PreTrainedModel], config: Any) -> Signature:
    """The inputs of a text model, from its class and configuration alone.

    Raises:
        ModelError: it is neither a text encoder nor a decoder, or reads and writes different sequences.
    """
    name = model_class.__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: encoder-decoder models cannot be exported to ONNX yet, only encoders and decoders")
    known = inspect.signature(model_class.forward).parameters
    if model_class.main_input_name != "input_ids" or "input_ids" not in known:
        raise ModelError(f"{name} reads {model_class.main_input_name!r}: only models of text can be exported to ONNX")
    text = config.get_text_config()
    kind: Kind = "decoder" if model_class.can_generate() and "past_key_values" in known else "encoder"
    names = ["input_ids", *(["attention_mask"] if "attention_mask" in known else [])]
    if kind == "decoder" and "position_ids" in known:
        names.append("position_ids")
    if kind == "encoder" and "token_type_ids" in known and int(getattr(text, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    longest = getattr(text, "max_position_embeddings", None)
    return Signature(kind, tuple(names), int(text.vocab_size), None if longest is None else int(longest))


def leaves(outputs: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a model's output by their paths, a cache's ``past_key_values.layers.0.keys`` included."""
    if isinstance(outputs, Tensor):
        return {prefix: outputs}
    if isinstance(outputs, Cache):
        named = {f"layers.{i}": {"keys": layer.keys, "values": layer.values} for i, layer in enumerate(outputs.layers)}
        return leaves(named, prefix)
    items = outputs.items() if hasattr(outputs, "items") else ()
    if isinstance(outputs, (list, tuple)):
        items = ((str(index), value) for index, value in enumerate(outputs))
    found: dict[str, Tensor] = {}
    for name, value in items:
        found |= leaves(value, f"{prefix}.{name}" if prefix else str(name))
    return found
