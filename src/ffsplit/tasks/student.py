"""An encoder that was made smaller before it saw the task: a compressed checkpoint under a fine-tuned head."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families import find_ffns
from ffsplit.pipeline.compress import shapes_of
from ffsplit.pipeline.load import Source
from ffsplit.tasks.classifier import load_classifier, padding_of
from ffsplit.tasks.examples import TaskData

SHARED = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""Settings in which a compressed checkpoint must equal its dense model."""


def check_student(student: Source, dense: Source, parameters: int) -> None:
    """Refuse a checkpoint that cannot stand in for the dense encoder.

    Args:
        student: the checkpoint.
        dense: the dense encoder.
        parameters: of the dense encoder's FFNs.

    Raises:
        ModelError: it is of another kind or size, or is not compressed.
    """
    for name in SHARED:
        theirs, ours = (getattr(source.config, name, None) for source in (dense, student))
        if ours != theirs:
            raise ModelError(
                f"{student.name} is no compressed form of {dense.name}: its {name} is {ours}, not {theirs}"
            )
    if getattr(student.config, "quantization_config", None) is not None:
        return  # stored in a compressed form, of which plain transformers builds no skeleton
    skeleton = student.skeleton()
    own = sum(shape.parameters for shape in shapes_of(skeleton, find_ffns(skeleton)))
    if own >= parameters:
        raise ModelError(
            f"{student.name} is no compressed form of {dense.name}: its FFNs have {own:,} parameters, which is "
            f"not less than {parameters:,}"
        )


def load_student(student: Source, data: TaskData, dense: PreTrainedModel) -> PreTrainedModel:
    """A classifier with the student's body and a copy of the head of ``dense``, on its device, in eval mode.

    Args:
        student: of a checkpoint that ffsplit wrote, or of any narrower model of the same kind.
        data: of the task.
        dense: the fine-tuned dense classifier.

    Raises:
        ModelError: the checkpoint lacks weights, or the head does not fit.
    """
    model = load_classifier(student, data, seed=0, padding=padding_of(dense))
    body = model.base_model_prefix
    for name, module in dense.named_children():
        if name != body:
            model.set_submodule(name, copy.deepcopy(module))
    return model.to(dense.device).eval()
