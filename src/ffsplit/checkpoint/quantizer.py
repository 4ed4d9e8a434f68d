"""How stock `from_pretrained` rebuilds a compressed model: transformers' own hook for stored formats.

`config.json` carries ``quantization_config = {"quant_method": "ffsplit", ...}`` with the structure of every FFN. After
``import ffsplit`` the class below is asked to prepare the empty model before its weights are read. Without the import
transformers only warns about an unknown method; the tripwire tensors (see :mod:`ffsplit.families.tripwire`) make that
load fail instead of giving a wrong model.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ffsplit.checkpoint.stored import refuse_other_tensors, stored_shapes
from ffsplit.errors import CheckpointError, FFSplitError, ModelError
from ffsplit.families.attention_site import AttentionSite
from ffsplit.families.dropped_attention import drop_attention
from ffsplit.families.site import FFNSite
from ffsplit.families.spelling import has_module, renamings
from ffsplit.families.surgery import activation, replace
from ffsplit.families.ties import link_ties
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN

FORMAT_VERSION = 1
METHOD = "ffsplit"
Site = TypeVar("Site", FFNSite, AttentionSite)


@register_quantization_config(METHOD)
class FFSplitStorageConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The structure of every compressed FFN, as stored in ``config.json``.

    Args:
        ffns: list of ``{"site": FFNSite, "spec": SumSpec}`` as plain values.
        attention: list of every `AttentionSite` that was left out, as plain values.
        version: of this format.
    """

    def __init__(
        self,
        ffns: list[dict[str, Any]] | None = None,
        attention: list[dict[str, Any]] | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.ffns = ffns or []
        self.attention = attention or []
        if type(version) is not int or version < 1:
            raise CheckpointError(f"config.json: quantization_config.version is {version!r}, not a format version")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {version}; this one reads up to {FORMAT_VERSION}: update ffsplit"
            )
        if unknown:
            raise CheckpointError(f"config.json: quantization_config has unknown keys {sorted(unknown)}")

    def entries(self) -> list[tuple[FFNSite, SumSpec]]:
        """Sites and structures. Raises CheckpointError when ``config.json`` was tampered with or is damaged."""
        try:
            return [(FFNSite.from_dict(ffn["site"]), SumSpec.model_validate(ffn["spec"])) for ffn in self.ffns]
        except (KeyError, TypeError, AttributeError, ValidationError, FFSplitError) as error:
            raise CheckpointError(f"config.json: quantization_config.ffns is damaged: {error}") from error

    def left_out(self) -> list[AttentionSite]:
        """Attentions that are gone. Raises CheckpointError when ``config.json`` was tampered with or is damaged."""
        try:
            return [AttentionSite.model_validate(site) for site in self.attention]
        except (TypeError, ValidationError) as error:
            raise CheckpointError(f"config.json: quantization_config.attention is damaged: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values; nothing about attention where none is gone."""
        values: dict[str, Any] = super().to_dict()
        return values if self.attention else {name: value for name, value in values.items() if name != "attention"}


@register_quantizer(METHOD)
class FFSplitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the FFNs of an empty model for empty sums of branches, so that stored tensors find their places."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.get_default_dtype()
        entries, gone = self.quantization_config.entries(), self.quantization_config.left_out()
        if not entries and not gone:
            raise CheckpointError("config.json: quantization_config.ffns is empty")
        sites = [localize(model, site) for site, _ in entries]
        for here, (_, spec) in zip(sites, entries, strict=True):
            _put_empty(model, here, spec, dtype)
        _link(model)
        without = [localize(model, site) for site in gone]
        for attention in without:
            _leave_out(model, attention)
        files = [file for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        if files:
            refuse_other_tensors(model, [*sites, *without], stored_shapes(files))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _put_empty(model: PreTrainedModel, site: FFNSite, spec: SumSpec, dtype: torch.dtype) -> None:
    try:
        replace(model, site, SumFFN.empty(spec, activation(model, site), dtype, "meta"))
    except ModelError as error:
        raise CheckpointError(f"config.json: quantization_config does not fit the model: {error}") from error


def _leave_out(model: PreTrainedModel, site: AttentionSite) -> None:
    try:
        drop_attention(model, site)
    except ModelError as error:
        raise CheckpointError(f"config.json: quantization_config does not fit the model: {error}") from error


def _link(model: PreTrainedModel) -> None:
    try:
        link_ties(model)
    except ModelError as error:
        raise CheckpointError(f"config.json: quantization_config does not fit the model: {error}") from error


def localize(model: PreTrainedModel, site: Site) -> Site:
    """A site's paths in a model with or without the head that it was stored with.

    Raises:
        CheckpointError: the model has no such module.
    """
    for rename in renamings(model):
        candidate = site.renamed(rename)
        if has_module(model, candidate.down):
            return candidate
    raise CheckpointError(
        f"{type(model).__name__} has no module {site.down!r}: the checkpoint is of another architecture"
    )
