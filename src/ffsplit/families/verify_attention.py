"""Proof that attentions can be left out: the model without them is the model whose attentions give zeros."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families.attention_site import AttentionSite
from ffsplit.families.dropped_attention import drop_attention
from ffsplit.families.forward import Inputs, evaluating
from ffsplit.families.inputs import candidate_inputs
from ffsplit.families.masking import masked
from ffsplit.families.outputs import allowed_change, outputs_of, relative_change, worst_change
from ffsplit.families.surgery import restore


@torch.no_grad()
def verify_attention(model: PreTrainedModel, sites: Sequence[AttentionSite], inputs: Inputs | None = None) -> None:
    """Leave out every other attention, then the others, and compare on a few tokens, with and without a cache.

    Args:
        model: with weights, its attentions in place; it is left as it was.
        sites: what `find_attention` found.
        inputs: keyword arguments of its ``forward``; tiny ones are made up when not given.

    Raises:
        ModelError: an output differs from that with attentions that give zeros, or tokens given one after the other
            differ from tokens given at once.
    """
    with evaluating(model):
        for some in (sites[::2], sites[1::2]):
            if some:
                _compare(model, some, inputs)


def _compare(model: PreTrainedModel, sites: Sequence[AttentionSite], inputs: Inputs | None) -> None:
    def is_model(module: torch.nn.Module) -> bool:
        return isinstance(module, PreTrainedModel)

    allowed = allowed_change(model)
    with masked(model, *(site.out for site in sites)):
        wanted = outputs_of(model, is_model, inputs)
    taken = [drop_attention(model, site) for site in sites]
    try:
        _, error = worst_change(wanted, outputs_of(model, is_model, inputs))
        if not error <= allowed:  # NaN must not pass
            raise ModelError(
                f"{sites[0].name}: without it and its like the model differs by {error:.3g} (relative, allowed "
                f"{allowed:.3g}) from one whose attentions give zeros; this family needs them for something else"
            )
        error = _cached_change(model)
        if not error <= allowed:
            raise ModelError(
                f"{sites[0].name}: without it and its like, decoding with a key-value cache differs by {error:.3g} "
                f"(relative, allowed {allowed:.3g}) from running all tokens at once"
            )
    finally:
        for modules in reversed(taken):
            restore(model, modules)


def _cached_change(model: PreTrainedModel) -> float:
    """How far the answer to the last tokens changes when a cache holds what came before; 0 for models without one."""
    known = inspect.signature(model.forward).parameters
    if "use_cache" not in known or "past_key_values" not in known or model.config.is_encoder_decoder:
        return 0.0
    ids = next((kwargs["input_ids"] for kwargs in candidate_inputs(model) if "input_ids" in kwargs), None)
    if not isinstance(ids, Tensor):
        return 0.0
    half = ids.shape[1] // 2
    before = model(input_ids=ids[:, :half], use_cache=True)
    cache = getattr(before, "past_key_values", None)
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        return 0.0
    found = model(input_ids=ids[:, half:], past_key_values=cache, use_cache=True)[0]
    return relative_change(model(input_ids=ids, use_cache=False)[0][:, half:].float(), found.float())
