"""Folding the weight and the bias of a norm into the projections that it feeds; the model computes the same.

``W (n(x) * s + t) + b = (W diag(s)) n(x) + (b + W t)``, where ``n`` is the norm without its parameters. Afterwards the
inputs of the FFN are plain normalised vectors, and the weights carry all of the scale.

Reference: FlashNorm, arXiv 2407.09577 (RMSNorm); the same for the weight and bias of LayerNorm. LayerNorm's output
before them has mean zero already, so in front of the FFN there is nothing to centre; behind it there is: `centring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families.affine import Affine, RefusedError, affine_of, scale_and_shift
from ffsplit.families.find import find_ffns
from ffsplit.families.forward import Inputs, drive
from ffsplit.families.in_place import Changed, check_unshared, overwrite, undone_on_error
from ffsplit.families.norm_flow import NormTracer
from ffsplit.families.outputs import allowed_change, outputs_of, refuse_change
from ffsplit.families.projection import get_weight, is_projection


@dataclass(frozen=True)
class NormFold:
    """What became of the norm in front of one or more FFNs.

    Attributes:
        norm: module path; empty when no module produces the FFN's input.
        ffns: names of the FFNs that it feeds.
        projections: paths of all projections that it feeds, those of attention included.
        refused: why it was left as it is; None when it was folded.
    """

    norm: str
    ffns: tuple[str, ...]
    projections: tuple[str, ...]
    refused: str | None = None


@torch.no_grad()
def fold_norms(model: PreTrainedModel, inputs: Inputs | None = None) -> tuple[NormFold, ...]:
    """Fold the weights of the norms in front of FFNs into everything that they feed, in place.

    Nothing but numbers changes: the model still saves and loads as a plain transformers model. In half precision every
    changed weight is rounded once. A norm that feeds anything else than projections (the residual stream of a
    post-norm model), or whose bias a projection without one would have to take, is left as it is.

    Args:
        model: with weights, not compressed.
        inputs: keyword arguments of its ``forward``; tiny ones are made up when not given.

    Returns:
        one entry a norm, in execution order, with the reason for each that was left.

    Raises:
        ModelError: no norm can be folded; or the model gives other outputs afterwards, and has been put back.
    """
    sites = find_ffns(model, inputs).sites
    tracers = list(drive(model, lambda kwargs: NormTracer(model, kwargs), inputs).values())
    before = outputs_of(model, _watched, inputs)
    folds: list[NormFold] = []
    with undone_on_error() as changed:
        for norm, (tracer, ffns) in _producers(tracers, [(site.name, site.up) for site in sites]).items():
            folds.append(_fold(model, tracer, norm, ffns, changed))
        if all(fold.refused for fold in folds):
            reasons = "".join(f"\n  {fold.norm or fold.ffns[0]}: {fold.refused}" for fold in folds)
            raise ModelError(f"no norm of {type(model).__name__} can be folded into the projections it feeds:{reasons}")
        refuse_change(model, before, outputs_of(model, _watched, inputs), "folding its norms", allowed_change(model))
    return tuple(folds)


def _producers(
    tracers: Sequence[NormTracer], ups: Sequence[tuple[str, str]]
) -> dict[str, tuple[NormTracer, tuple[str, ...]]]:
    """By the path of the module that feeds them (a made-up one where there is none): names of FFNs, and the run."""
    found: dict[str, tuple[NormTracer, tuple[str, ...]]] = {}
    for name, up in ups:
        tracer = next(tracer for tracer in tracers if up in tracer.given)
        norm = tracer.producer(up) or f"?{name}"
        found[norm] = (tracer, (*found[norm][1], name) if norm in found else (name,))
    return found


def _fold(model: nn.Module, tracer: NormTracer, norm: str, ffns: tuple[str, ...], changed: Changed) -> NormFold:
    """Fold one norm, or say why not. What is overwritten is kept in ``changed``."""
    gave = tracer.gave.get(norm, set())
    fed = tuple(path for path, given in tracer.given.items() if given & gave)
    try:
        if norm.startswith("?"):
            raise RefusedError("no module alone makes its input: it takes the residual stream as it is")
        module = model.get_submodule(norm)
        affine = affine_of(module)
        _check_flow(tracer, norm, fed)
        check_unshared(model, [norm, *fed])
        _absorb(model, module, affine, fed, changed)
    except RefusedError as error:
        return NormFold("" if norm.startswith("?") else norm, ffns, fed, str(error))
    return NormFold(norm, ffns, fed)


def _check_flow(tracer: NormTracer, norm: str, fed: Sequence[str]) -> None:
    gave = tracer.gave[norm]
    other = next((tracer.uses[identity] for identity in sorted(gave) if identity in tracer.uses), None)
    if other is not None:
        raise RefusedError(f"its output also goes into {other}, which cannot absorb a weight")
    if gave & tracer.returned:
        raise RefusedError("its output is also returned by the model")
    for path in fed:
        if not tracer.given[path] <= gave:
            raise RefusedError(f"{path} is also used on other inputs")


def _absorb(model: nn.Module, norm: nn.Module, affine: Affine, fed: Sequence[str], changed: Changed) -> None:
    scale, shift = scale_and_shift(norm, affine)
    pairs = [(path, *get_weight(model.get_submodule(path))) for path in fed]
    if shift is not None and bool(shift.any()):
        lacking = next((path for path, _, bias in pairs if bias is None), None)
        if lacking is not None:
            raise RefusedError(f"it has a bias, and {lacking} has none to take it")

    for _, weight, bias in pairs:
        wide = weight.double()
        if shift is not None and bias is not None:
            overwrite(bias, bias.double() + wide @ shift.to(wide.device), changed)
        overwrite(weight, wide * scale.to(wide.device), changed)
    overwrite(norm.get_parameter(affine.weight).detach(), 1.0 - affine.offset, changed)
    if affine.bias is not None:
        overwrite(norm.get_parameter(affine.bias).detach(), 0.0, changed)


def _watched(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) or is_projection(module)
