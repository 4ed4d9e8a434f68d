"""One model with different FFNs put in before each measurement, so that everything else is the same module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from ffsplit.families.site import FFNSite
from ffsplit.families.surgery import originals, replace, restore
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.sum import SumFFN


@dataclass(frozen=True)
class Variant:
    """A model as it is to be timed.

    Attributes:
        model: loaded.
        modules: what to put in first, by path; nothing where the model is timed as it is.
    """

    model: PreTrainedModel
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    def ready(self) -> PreTrainedModel:
        """The model with its modules in place."""
        restore(self.model, self.modules)
        return self.model


def own(model: PreTrainedModel, sites: Sequence[FFNSite]) -> Variant:
    """A model with what it holds at these sites now."""
    held: dict[str, nn.Module] = {}
    for site in sites:
        held |= originals(model, site)
    return Variant(model, held)


def filled(model: PreTrainedModel, sites: Sequence[FFNSite], make: Callable[[FFNSite], nn.Module]) -> Variant:
    """A model with made FFNs at these sites; it is left as it was.

    Args:
        model: loaded; dense or compressed.
        sites: where.
        make: maps ``[..., d_model]`` to ``[..., d_model]`` at a site.
    """
    before, held = own(model, sites), dict[str, nn.Module]()
    for site in sites:
        replace(model, site, make(site).eval())
    held |= own(model, sites).modules
    before.ready()
    return Variant(model, held)


def without_ffns(model: PreTrainedModel, sites: Sequence[FFNSite]) -> Variant:
    """A model whose FFNs add nothing: what is left of its time is not theirs."""
    return filled(model, sites, lambda site: SumFFN(site.d_model))


def native(model: PreTrainedModel, sites: Sequence[FFNSite], architecture: PreTrainedModel) -> Variant:
    """A model with FFNs of another one's code, with made-up numbers.

    Args:
        model: loaded.
        sites: where.
        architecture: has the FFNs, without weights.
    """
    held: dict[str, nn.Module] = {}
    for site in sites:
        for path, module in originals(architecture, site).items():
            made = deepcopy(module).to_empty(device=model.device).to(model.dtype).requires_grad_(False).eval()
            fill(made)
            held[path] = made
    return Variant(model, held)
