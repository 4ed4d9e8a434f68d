"""Finding the self-attentions of any transformers model by following its data, as its FFNs are found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families.attention_site import AttentionSite
from ffsplit.families.attention_trace import AttentionTracer, HostCall, OutCall
from ffsplit.families.find import FFNs
from ffsplit.families.forward import Inputs, drive
from ffsplit.families.projection import features, is_projection

CACHE_PLACES = ("layer_idx", "layer_id")
"""What families call an attention's place in the cache."""


@dataclass(frozen=True)
class Attentions:
    """The self-attentions of a model.

    Attributes:
        sites: in execution order.
        notes: attentions that cannot be left out, and why.
    """

    sites: tuple[AttentionSite, ...]
    notes: tuple[str, ...]


def find_attention(model: PreTrainedModel, found: FFNs, inputs: Inputs | None = None) -> Attentions:
    """Find every self-attention that a module of its own computes; the model may be on the meta device.

    Args:
        model: with its FFNs in place.
        found: its FFNs.
        inputs: keyword arguments of its ``forward``; tiny ones are made up when not given.

    Raises:
        ModelError: there is none, or the model could not be run.
    """
    ffns = {path for site in found.sites for path in site.projections}
    sites: list[AttentionSite] = []
    notes: list[str] = []
    tracers = drive(model, lambda kwargs: AttentionTracer(model, kwargs), inputs)
    # As with FFNs: what the model's own forward on these inputs does not run is left alone.
    for tracer in [tracers[""]] if "" in tracers else tracers.values():
        added = tracer.added - ffns
        for out, calls in tracer.outs.items():
            if out not in added or not any(map(tracer.follows, calls)):
                continue
            placed = _place(model, tracer, out, added | ffns) if len(calls) == 1 else f"{out}: it runs more than once"
            sites.append(placed) if isinstance(placed, AttentionSite) else notes.append(placed)
    if not sites:
        reasons = "".join(f"\n  {note}" for note in notes)
        raise ModelError(f"no attention that could be left out was found in {type(model).__name__}.{reasons}")
    return Attentions(tuple(sites), tuple(notes))


def _place(model: nn.Module, tracer: AttentionTracer, out: str, others: set[str]) -> AttentionSite | str:
    """The site of an attention's last projection, or the reason why there can be none."""
    (call,) = tracer.outs[out]
    whole = [host for host in tracer.hosts if out.startswith(f"{host.path}.") and host.returned[:1] == (call.y,)]
    front = [host for host in tracer.hosts if not out.startswith(f"{host.path}.") and host.returned[:1] == (call.x,)]
    # The outermost: what it computes besides is of no use without the attention.
    hosts = sorted((*whole, *front), key=lambda host: (host not in whole, host.path.count(".")))
    for host in hosts:
        key = _input(model, tracer, host, out, others - {out})
        if isinstance(key, _Key):
            return _site(model, host, call, key.name, "module" if host in whole else "inline")
    return f"{out}: attention is part of a forward that does other work too, or attends to another input"


@dataclass(frozen=True)
class _Key:
    """The keyword of an argument, None for the first positional one."""

    name: str | None


def _input(model: nn.Module, tracer: AttentionTracer, host: HostCall, out: str, others: set[str]) -> _Key | None:
    """The argument that all of a module's projections start from; None if it is no self-attention and nothing else."""
    inside = [path for path in _projections(model, host.path) if path != out]
    if not inside or any(path in others for path in inside):
        return None
    read = {call.x for path in inside for call in tracer.outs.get(path, ())}
    keys = [key for key, identity in host.given.items() if identity in read]
    return _Key(keys[0] or None) if len(keys) == 1 else None


def _projections(model: nn.Module, path: str) -> Iterator[str]:
    return (f"{path}.{name}" for name, module in model.get_submodule(path).named_modules() if is_projection(module))


def _site(model: nn.Module, host: HostCall, call: OutCall, x: str | None, kind: str) -> AttentionSite:
    d_model, width = features(model.get_submodule(call.path))
    return AttentionSite(
        name=host.path,
        out=call.path,
        kind=kind,  # type: ignore[arg-type]
        x=x,
        returns=host.returns,
        width=d_model if kind == "module" else width,
        d_model=d_model,
        layer=_cache_place(model.get_submodule(host.path)),
    )


def _cache_place(module: nn.Module) -> int | None:
    """The number that an attention gives the cache with its keys and values."""
    for part in module.modules():
        for name in CACHE_PLACES:
            if type(place := getattr(part, name, None)) is int:
                return place
    return None


def attention_parameters(model: nn.Module, site: AttentionSite) -> tuple[int, int]:
    """Parameters that leaving a site out removes, and how many of them are in linear layers."""
    paths = [site.name] if site.kind == "module" else [site.name, site.out]
    modules = [module for path in paths for module in model.get_submodule(path).modules()]
    linear = [module for module in modules if is_projection(module)]
    total, inside = (sum(p.numel() for m in group for p in m.parameters(recurse=False)) for group in (modules, linear))
    return total, inside


def sites_in(path: str, sites: Sequence[AttentionSite]) -> list[AttentionSite]:
    """The sites inside a module; all for the empty path."""
    return [site for site in sites if not path or site.name.startswith(f"{path}.")]
