"""An encoder with a head for a task: loading it, and compressing it on the task's own text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.pipeline.load import Source, first_line, refuse_mismatched, refuse_missing
from ffsplit.tasks.encode import Encoded
from ffsplit.tasks.examples import TaskData

_CALIBRATION_BATCH = 256


def load_classifier(source: Source, data: TaskData, seed: int, padding: int | None = None) -> PreTrainedModel:
    """The model's body with a head for the task, in float32, on the CPU, in eval mode.

    A head of the right size that the checkpoint has is kept; any other is new, drawn from ``seed``. A configuration
    without a padding token gets ``padding``: decoders need it to find the last token of a text.

    Raises:
        ModelError: transformers has no classifier of this kind of model, or weights of the body are missing
            or of another shape than its configuration says.
    """
    labels = dict(enumerate(data.classes)) if data.classes else {0: data.task.name}
    torch.manual_seed(seed)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source.location,
            num_labels=data.outputs,
            id2label=labels,
            label2id={name: number for number, name in labels.items()},
            problem_type="regression" if data.task.regression else "single_label_classification",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # the readers of each weight format and each configuration have errors of their own
        raise ModelError(f"{source.name}: no classifier can be loaded from it: {first_line(error)}") from error
    refuse_missing(source.name, model, info["missing_keys"])
    refuse_mismatched(source.name, model, info["mismatched_keys"])
    if padding_of(model) is None:
        model.config.get_text_config().pad_token_id = padding
    return model.eval()  # type: ignore[no-any-return]


def padding_of(model: PreTrainedModel) -> int | None:
    """The padding token of a model's configuration, if it has one."""
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def calibration_batches(data: Encoded, samples: int) -> list[dict[str, Tensor]]:
    """Batches of examples drawn at random once (seed 0), those of similar length together, on the CPU."""
    rows = np.random.default_rng(0).permutation(len(data))[:samples]
    rows = rows[np.argsort(data.lengths[rows], kind="stable")]
    cut = [rows[start : start + _CALIBRATION_BATCH] for start in range(0, len(rows), _CALIBRATION_BATCH)]
    return [{name: tensor.cpu() for name, tensor in data.batch(part)[0].items()} for part in cut]
