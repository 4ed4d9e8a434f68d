"""Back to dense weights: a plain transformers model that computes what the compressed one computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.checkpoint.quantizer import FFSplitStorageConfig, localize
from ffsplit.checkpoint.stock import empty_model, filled
from ffsplit.errors import ModelError
from ffsplit.families import AttentionSite, FFNSite
from ffsplit.families.surgery import activation
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights


def decompress(model: PreTrainedModel) -> PreTrainedModel:
    """A stock model of the original shape with the compressed model's weights decoded.

    Low-bit codes become floats, low-rank factors their product, dropped neurons and attentions zeros; the result loads
    everywhere and gives the same outputs up to rounding, but is as large as the original.

    Args:
        model: loaded from an ffsplit checkpoint, or saved as one. It is left as it is; what is not an FFN shares its
            memory with the result.

    Raises:
        ModelError: the model is not compressed by ffsplit, or holds something that no dense FFN of its family
            expresses: a linear map beside the neurons, an output bias where the family has none, or an attention that
            is gone and had buffers.
    """
    stored = _stored(model)
    sites = [localize(model, site) for site, _ in stored.entries()]
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    skeleton = empty_model(type(model), config)
    if skeleton is None:
        raise ModelError(f"{type(model).__name__} cannot be built from its own configuration")
    weights = {site.name: _full_width(model, skeleton, site) for site in sites}
    gone = [localize(model, site) for site in stored.left_out()]
    _refuse_buffers(skeleton, gone)
    dense = filled(model, skeleton, sites, weights, gone)
    if dense is None:
        raise ModelError("the compressed FFNs have an output bias that this family has no place for")
    return dense


def _stored(model: PreTrainedModel) -> FFSplitStorageConfig:
    stored = getattr(model.config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == "ffsplit":
        stored = FFSplitStorageConfig.from_dict(stored)
    if isinstance(stored, FFSplitStorageConfig):
        return stored
    raise ModelError(f"{type(model).__name__} was not compressed by ffsplit")


def _full_width(model: PreTrainedModel, skeleton: PreTrainedModel, site: FFNSite) -> FFNWeights:
    """Dense weights padded with neurons that do nothing up to the original width."""
    module = model.get_submodule(site.name)
    assert isinstance(module, SumFFN)
    dtype = next(model.parameters()).dtype
    if len(module.branches):
        ffn = module.to_weights(dtype)
    else:
        ffn = _no_neurons(module, skeleton, site, model.get_buffer(f"{site.down}.weight").to(dtype))
    missing = site.d_ff - ffn.d_ff
    if missing < 0:
        raise ModelError(f"{site.name} holds {ffn.d_ff} neurons, of several FFNs; a dense one has {site.d_ff}")

    def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

    up = rows(ffn.up)
    assert up is not None
    down = torch.cat([ffn.down, ffn.down.new_zeros(site.d_model, missing)], dim=1)
    return FFNWeights(up, down, ffn.act, rows(ffn.gate), rows(ffn.up_bias), rows(ffn.gate_bias), ffn.down_bias)


def _no_neurons(
    module: SumFFN, skeleton: PreTrainedModel, site: FFNSite, like: Float[Tensor, "d_model 0"]
) -> FFNWeights:
    """A dropped FFN, in the dtype and on the device of its tripwire ``like``."""
    if module.lookup is not None:
        raise ModelError(f"{site.name}: lookup tables cannot be written as dense weights")
    if module.skip is not None:
        raise ModelError(f"{site.name}: an FFN that works for some tokens only cannot be written as dense weights")
    if module.linear is not None:
        raise ModelError(f"{site.name}: a linear map cannot be written as dense up/gate/down weights")
    up = like.new_zeros(0, site.d_model)
    return FFNWeights(
        up=up,
        down=like.new_zeros(site.d_model, 0),
        act=activation(skeleton, site),
        gate=up if site.gated else None,
        down_bias=module.bias,
    )


def _refuse_buffers(skeleton: PreTrainedModel, gone: Sequence[AttentionSite]) -> None:
    """An attention whose weights are zeros does nothing, but what its buffers held (a mask) is not known any more."""
    for site in gone:
        for name, _ in skeleton.get_submodule(site.name).named_buffers():
            raise ModelError(f"{site.name} is gone, and its buffer {name} with it")
