"""How stock `from_pretrained` rebuilds a compressed model: transformers' own hook for stored formats.

`config.json` carries ``quantization_config = {"quant_method": "ffsplit", ...}`` with the structure of every FFN. After
``import ffsplit`` the class below is asked to prepare the empty model before its weights are read. Without the import
transformers only warns about an unknown method; the tripwire tensors (see :mod:`ffsplit.families.tripwire`) make that
load fail instead of giving a wrong model.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ffsplit.errors import CheckpointError, FFSplitError
from ffsplit.families.site import FFNSite
from ffsplit.families.surgery import activation, replace
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN

FORMAT_VERSION = 1
METHOD = "ffsplit"


@register_quantization_config(METHOD)
class FFSplitStorageConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The structure of every compressed FFN, as stored in ``config.json``.

    Args:
        ffns: list of ``{"site": FFNSite, "spec": SumSpec}`` as plain values.
        version: of this format.
    """

    def __init__(
        self, ffns: list[dict[str, Any]] | None = None, version: int = FORMAT_VERSION, quant_method: str = METHOD
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.ffns = ffns or []
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {version}; this one reads up to {FORMAT_VERSION}: update ffsplit"
            )

    def entries(self) -> list[tuple[FFNSite, SumSpec]]:
        """Sites and structures. Raises CheckpointError when ``config.json`` was tampered with or is damaged."""
        try:
            return [(FFNSite.from_dict(ffn["site"]), SumSpec.model_validate(ffn["spec"])) for ffn in self.ffns]
        except (KeyError, TypeError, ValidationError, FFSplitError) as error:
            raise CheckpointError(f"config.json: quantization_config.ffns is damaged: {error}") from error


@register_quantizer(METHOD)
class FFSplitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the FFNs of an empty model for empty sums of branches, so that stored tensors find their places."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.get_default_dtype()
        entries = self.quantization_config.entries()
        if not entries:
            raise CheckpointError("config.json: quantization_config.ffns is empty")
        for site, spec in entries:
            here = localize(model, site)
            replace(model, here, SumFFN.empty(spec, activation(model, here), dtype, "meta"))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def localize(model: PreTrainedModel, site: FFNSite) -> FFNSite:
    """A site's paths in a model with or without the head that it was stored with.

    Raises:
        CheckpointError: the model has no such module.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (
        site,
        site.renamed(lambda path: path.removeprefix(prefix)),
        site.renamed(lambda path: prefix + path),
    ):
        if _has(model, candidate.down):
            return candidate
    raise CheckpointError(
        f"{type(model).__name__} has no module {site.down!r}: the checkpoint is of another architecture"
    )


def _has(model: PreTrainedModel, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
