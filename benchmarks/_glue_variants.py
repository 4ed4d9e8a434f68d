"""The encoders that ``glue_speed.py`` times: one model whose FFNs are exchanged, with random numbers in real shapes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from _glue_ways import WAYS, keep_of
from ffsplit.budget.registry import entry_config
from ffsplit.families import find_ffns, read
from ffsplit.families.site import FFNSite
from ffsplit.families.surgery import activation, originals, replace, restore
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method

NAMES = ("svd", "ffsplit", "prune", "ffsplit-linear")
Modules = dict[str, nn.Module]


@dataclass(frozen=True)
class Variant:
    """What stands in the place of a model's FFNs.

    Attributes:
        modules: by path.
        keep: share of the FFN parameters that they have.
        structure: of the first of them, in words.
    """

    name: str
    modules: Modules
    keep: float
    structure: str


class Nothing(nn.Module):
    """An FFN that takes no time."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def variants_of(model: PreTrainedModel, encoder: str, budgets: Sequence[str], align: int) -> list[Variant]:
    """The dense model first, then every way at every budget, last the model without FFNs, which is the limit."""
    sites = find_ffns(model).sites
    dense = _standing(model, sites)
    found = [Variant("dense", dense, 1.0, "dense")]
    for budget in budgets:
        keep = keep_of(model, encoder, budget)
        found += [_made(model, sites, way, budget, keep, align) for way in NAMES]
    for site in sites:
        replace(model, site, Nothing())
    found.append(Variant("none", _standing(model, sites), 0.0, "none"))
    restore(model, dense)
    return found


def planned(shape: FFNShape, way: str, keep: float, align: int) -> SumSpec:
    """The structure of a way of ``glue.py``, its widths and ranks multiples of ``align``."""
    recipe = WAYS[way].recipe
    assert recipe is not None
    config = entry_config({**recipe["method"], "keep": keep, "align": align})
    return get_method(config.method).plan(shape, config)


def _standing(model: PreTrainedModel, sites: Sequence[FFNSite]) -> Modules:
    return {path: module for site in sites for path, module in originals(model, site).items()}


def _made(model: PreTrainedModel, sites: Sequence[FFNSite], way: str, budget: str, keep: float, align: int) -> Variant:
    before = _standing(model, sites)
    shapes = [FFNShape.of(read(model, site)) for site in sites]
    specs = [planned(shape, way, keep, align) for shape in shapes]
    for site, spec in zip(sites, specs, strict=True):
        if spec.is_one_dense_branch:
            _narrow(model, site, spec.neurons)
        else:
            ffn = SumFFN.empty(spec, activation(model, site), model.dtype, model.device)
            fill(ffn)
            replace(model, site, ffn.eval())
    modules = _standing(model, sites)
    restore(model, before)
    share = sum(spec.parameters for spec in specs) / sum(shape.parameters for shape in shapes)
    return Variant(f"{way} {budget}", modules, share, specs[0].describe())


def _narrow(model: PreTrainedModel, site: FFNSite, width: int) -> None:
    """A pruned FFN as it is saved: the model's own modules with fewer neurons."""
    restore(model, {path: copy.deepcopy(module) for path, module in originals(model, site).items()})
    place = {"device": model.device, "dtype": model.dtype}
    model.set_submodule(site.up, nn.Linear(site.d_model, width, **place))
    model.set_submodule(site.down, nn.Linear(width, site.d_model, **place))


def make_recordable(model: PreTrainedModel) -> None:
    """Take out of a forward what makes an accelerator wait for the host, which no graph can hold.

    Beside the relative positions that are two things about padding, which these batches do not have. A look for it in
    the token ids: releases of transformers take two columns by a list, whose numbers are copied to the device, and read
    the answer. And a mask, which eager forwards leave out and recorded ones do not; its zero is copied to the device.
    """
    reuse_position_bias(model)
    if hasattr(model, "warn_if_padding_and_no_attention_mask"):
        model.warn_if_padding_and_no_attention_mask = lambda *_, **__: None
    code = sys.modules[type(model).__module__]
    if hasattr(code, "create_bidirectional_mask"):
        code.create_bidirectional_mask = lambda *_, **__: None  # type: ignore[attr-defined]


def reuse_position_bias(model: PreTrainedModel) -> None:
    """Let MPNet make its relative positions once for a batch and a length instead of in every forward.

    Releases of transformers make them on the CPU and copy them over, which waits for the device: no graph can hold
    that. A model without them stays as it is.
    """
    encoder = getattr(model, "encoder", None)
    compute = getattr(encoder, "compute_position_bias", None)
    if encoder is None or compute is None:
        return
    kept: dict[tuple[object, ...], Tensor] = {}

    def position_bias(x: Tensor) -> Tensor:
        key = x.shape[0], x.shape[1], x.device, x.dtype
        if key not in kept:
            kept[key] = compute(x)
        return kept[key]

    encoder.compute_position_bias = position_bias
