"""Narrower models from one sorted checkpoint: the first neurons of every FFN, nothing fitted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ffsplit.checkpoint.stock import stock_model
from ffsplit.errors import CheckpointError, FFSplitError, ModelError, RecipeError
from ffsplit.families import FFNSite, read, replace
from ffsplit.ffn.sum import SumFFN, dense_branch
from ffsplit.pipeline.load import open_source
from ffsplit.pipeline.result import PLAN_FILE


def load(directory: str | Path, *, width: float | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a checkpoint, at its full width or, if method ``sort`` made it, at a smaller one.

    Args:
        directory: that :func:`ffsplit.save` wrote.
        width: share of every FFN's neurons, the most important first; above 0 and at most 1. The result is an ordinary
            model with a smaller intermediate size, which `save_pretrained` stores as such.
        dtype: of the weights; None keeps the stored one.

    Raises:
        RecipeError: the width is out of range.
        CheckpointError: the checkpoint is not sorted.
        ModelError: there is no checkpoint, or its family has no setting for the width.
    """
    if width is None:
        return open_source(str(directory)).load(dtype)
    if not 0 < width <= 1:
        raise RecipeError(f"width={width}: a share of the neurons is above 0 and at most 1")
    source = open_source(str(directory))
    sites = sorted_sites(Path(directory))
    return narrowed(source.load(dtype), sites, width)


def sorted_sites(directory: Path) -> list[FFNSite]:
    """Where the FFNs of a sorted checkpoint are.

    Raises:
        CheckpointError: there is no plan beside the weights, or it does not say that every FFN is sorted.
    """
    file = directory / PLAN_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory} holds no {PLAN_FILE}, so its neurons are in no known order; {_HOW}")
    try:
        ffns = json.loads(file.read_text(encoding="utf-8"))["ffns"]
        sites = [FFNSite.from_dict(ffn["site"]) for ffn in ffns]
        others = [ffn["site"]["name"] for ffn in ffns if (ffn["method"] or {}).get("method") != "sort"]
    except (ValueError, KeyError, TypeError, AttributeError, FFSplitError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not sites:
        raise CheckpointError(f"{file} names no FFN")
    if others:
        raise CheckpointError(
            f"{directory}: {len(others)} of {len(sites)} FFNs are not sorted, first {others[0]!r}; {_HOW}"
        )
    return sites


_HOW = "only what `ffsplit compress --recipe sort` wrote can be sliced"


def narrowed(model: PreTrainedModel, sites: Sequence[FFNSite], width: float) -> PreTrainedModel:
    """A model of the first neurons of every FFN; it shares all other tensors with ``model``, which is used up.

    Raises:
        ModelError: no setting of the model's configuration gives its FFNs that width.
    """
    for site in sites:
        ffn = read(model, site)
        first = torch.arange(max(1, round(width * ffn.d_ff)), device=ffn.up.device)
        kept = ffn.take(first)
        replace(model, site, SumFFN(ffn.d_model, [dense_branch(kept)], bias=kept.down_bias))
    made = stock_model(model, list(sites))
    if made is None:
        raise ModelError(f"the configuration of {type(model).__name__} has no setting for the width of its FFNs")
    return made
