"""Finding the FFNs of any transformers model by following its data, and counting what was found."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families.assemble import Pairing, Placer, pair
from ffsplit.families.blocks import Block, blocks_of
from ffsplit.families.experts import Experts, find_experts, silenced
from ffsplit.families.forward import Inputs
from ffsplit.families.projection import is_projection
from ffsplit.families.site import FFNSite
from ffsplit.families.trace import trace_model
from ffsplit.families.tree import module_tree

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coverage:
    """How much of a model the FFNs that were found are. Parameters shared under several names count once.

    Attributes:
        ffn_parameters: of the projections of the FFNs that were found, biases included.
        model_parameters: of the whole model.
        uncovered_ffn_parameters: of FFNs that cannot be worked on: experts, FFNs that did not run, odd ones.
        notes: why, for those.
    """

    ffn_parameters: int
    model_parameters: int
    uncovered_ffn_parameters: int = 0
    notes: tuple[str, ...] = ()

    @property
    def ffn_share_of_model(self) -> float:
        """Covered FFN parameters as a fraction of the model's."""
        return self.ffn_parameters / max(self.model_parameters, 1)

    @property
    def covered_share_of_ffn(self) -> float:
        """Covered FFN parameters as a fraction of all FFN parameters."""
        return self.ffn_parameters / max(self.ffn_parameters + self.uncovered_ffn_parameters, 1)


@dataclass(frozen=True)
class FFNs:
    """The FFNs of a model.

    Attributes:
        sites: in execution order.
        calls: how often one forward runs each, by the site's name.
        coverage: how much of the model they are.
        blocks: the layers that they are in.
    """

    sites: tuple[FFNSite, ...]
    calls: Mapping[str, int]
    coverage: Coverage
    blocks: tuple[Block, ...]


def find_ffns(model: PreTrainedModel, inputs: Inputs | None = None) -> FFNs:
    """Find every FFN of a model by tracing one forward; the model may be on the meta device.

    Args:
        model: any transformers model. It is left as it was.
        inputs: keyword arguments of its ``forward``; tiny ones are made up when not given.

    Raises:
        ModelError: there is no FFN, the model has mixture-of-experts layers, or it could not be run.
    """
    experts = find_experts(model)
    try:
        with silenced(model, experts):
            traces = trace_model(model, inputs)
    except ModelError as error:
        if experts:
            raise ModelError(_refusal(experts, None)) from error
        raise
    found = pair(model, traces.values())
    placer = Placer(model, found)
    placed: dict[Pairing, FFNSite | str] = {pairing: placer.place(pairing) for pairing in found}
    main = traces.get("")
    for pairing, use in found.items():
        if main is not None and all(trace is not main for trace, _ in use.calls):
            placed[pairing] = f"{pairing.down}: the model's forward on these inputs does not run it"
    sites = tuple(site for site in placed.values() if isinstance(site, FFNSite))
    notes = [reason for reason in placed.values() if isinstance(reason, str)]
    coverage = _coverage(model, found, sites, notes, experts)
    if experts:
        raise ModelError(_refusal(experts, coverage))
    if not sites:
        reasons = "".join(f"\n  {note}" for note in notes)
        raise ModelError(f"no FFN found in {type(model).__name__}.{reasons}\nIts modules:\n{module_tree(model)}")
    for note in coverage.notes:
        logger.warning("FFN not covered: %s", note)
    calls = {site.name: len(found[pairing].calls) for pairing, site in placed.items() if isinstance(site, FFNSite)}
    flows = {path: calls for trace in traces.values() for path, calls in trace.flows.items()}
    return FFNs(sites, calls, coverage, blocks_of(model, sites, flows))


def _coverage(
    model: nn.Module,
    found: Iterable[Pairing],
    sites: Iterable[FFNSite],
    notes: list[str],
    experts: list[Experts],
) -> Coverage:
    covered = {path for site in sites for path in site.projections}
    odd = {path for pairing in found for path in pairing.projections} - covered
    # Projections named like those of an FFN but for the layer's number, in layers that did not run.
    patterns = {_pattern(path) for path in covered}
    silent = {
        path
        for path, module in model.named_modules()
        if is_projection(module) and path not in covered | odd and _pattern(path) in patterns
    }
    notes = notes + [f"{path}: looks like part of an FFN, but no FFN was seen there" for path in sorted(silent)]
    uncovered = sum(_count(model, path) for path in odd | silent) + sum(found.parameters for found in experts)
    return Coverage(
        ffn_parameters=sum(_count(model, path) for path in covered),
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        uncovered_ffn_parameters=uncovered,
        notes=tuple(notes),
    )


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _count(model: nn.Module, path: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(path).parameters())


def _refusal(experts: list[Experts], coverage: Coverage | None) -> str:
    named = [f"{found.path} ({found.class_name}, {found.experts} experts, {found.parameters:,})" for found in experts]
    shown = named[:4] + ([f"... and {len(named) - 4} more"] if len(named) > 4 else [])
    total = sum(found.parameters for found in experts)
    share = (
        "" if coverage is None else f" Only {coverage.covered_share_of_ffn:.1%} of its FFN parameters could be covered."
    )
    return (
        f"mixture-of-experts is not supported yet: {total:,} parameters are in the experts of {len(experts)} layers: "
        f"{'; '.join(shown)}.{share}"
    )
