"""Which evaluation a model is fit for."""

from __future__ import annotations

from enum import StrEnum

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


class ModelKind(StrEnum):
    """Causal language model, masked language model, or anything else that gives token states."""

    CAUSAL = "causal"
    MASKED = "masked"
    ENCODER = "encoder"


def model_kind(model: PreTrainedModel) -> ModelKind:
    """The kind of a model, from transformers' own tables of classes; for classes of others, from their names."""
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        return ModelKind.ENCODER
    names = [cls.__name__ for cls in type(model).__mro__]
    if _named(names, set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()), ("ForCausalLM", "LMHeadModel")):
        return ModelKind.CAUSAL
    if _named(names, set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()), ("ForMaskedLM",)):
        return ModelKind.MASKED
    return ModelKind.ENCODER


def _named(names: list[str], known: set[object], endings: tuple[str, ...]) -> bool:
    return any(name in known or name.endswith(endings) for name in names)
