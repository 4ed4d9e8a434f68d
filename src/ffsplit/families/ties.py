"""Giving tied projections their owners, once all sums are in their places."""

from __future__ import annotations

from torch import nn

from ffsplit.errors import ModelError
from ffsplit.families.spelling import has_module, spellings
from ffsplit.ffn.projections import Projection, Tied, TiedSpec
from ffsplit.ffn.sum import Branch, SumFFN


def link_ties(model: nn.Module) -> None:
    """Point every tied projection of a model's sums at the projection that it is tied to.

    Called whenever sums were put in: after a fit, from a journal, before a checkpoint's tensors are read.

    Raises:
        ModelError: an owner is missing, is no sum, or has no such projection.
    """
    sums = [(path, module) for path, module in model.named_modules() if isinstance(module, SumFFN)]
    for path, module in sums:
        for inside in module.modules():
            if isinstance(inside, Tied):
                inside.link(_owner(model, path, inside.spec))


def _owner(model: nn.Module, member: str, spec: TiedSpec) -> Projection:
    found = next((path for path in spellings(model, spec.owner) if has_module(model, path)), None)
    if found is None:
        raise ModelError(f"{member} is tied to {spec.owner}, which {type(model).__name__} does not have")
    module = model.get_submodule(found)
    if not isinstance(module, SumFFN):
        raise ModelError(f"{member} is tied to {found}, which is a {type(module).__name__} and no compressed FFN")
    branch = module.branches[spec.branch] if spec.branch < len(module.branches) else None
    projection = getattr(branch, spec.projection) if isinstance(branch, Branch) else None
    if not isinstance(projection, Projection):
        raise ModelError(f"{member} is tied to {spec.projection} of branch {spec.branch} of {found}, which has none")
    return projection
