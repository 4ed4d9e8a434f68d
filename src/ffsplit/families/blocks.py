"""The blocks of a model: the elements of its layer lists that contain FFNs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ffsplit.families.site import FFNSite
from ffsplit.families.trace import Flow


@dataclass(frozen=True)
class Block:
    """One element of a layer list, or the whole model when it has no such structure.

    Attributes:
        path: module path of the element; empty for the whole model.
        list_path: module path of the list; empty for the whole model.
        index: place in the list.
        sites: the FFNs inside, in execution order.
    """

    path: str
    list_path: str
    index: int
    sites: tuple[FFNSite, ...]

    @property
    def whole_model(self) -> bool:
        """Whether the FFNs have to be worked on in one stage, with the whole model."""
        return not self.path


def blocks_of(
    model: nn.Module, sites: Sequence[FFNSite], flows: Mapping[str, Sequence[Flow]] | None = None
) -> tuple[Block, ...]:
    """Group FFNs by the element of the outermost ``nn.ModuleList`` that contains them.

    Args:
        model: the model that the sites are in.
        sites: FFNs in execution order.
        flows: traced calls of list elements; without them the blocks are taken to run once each, as a chain.

    Returns:
        Blocks in execution order. One block with an empty path when an FFN is outside any list, when a block runs more
        than once in a forward, or when blocks are not a chain in which each takes what the one before it returned.
    """
    everything = (Block("", "", 0, tuple(sites)),)
    groups: dict[tuple[str, str], list[FFNSite]] = {}
    previous: tuple[str, str] | None = None
    for site in sites:
        key = _element(model, site)
        if key is None or (key in groups and key != previous):
            return everything
        groups.setdefault(key, []).append(site)
        previous = key
    shared = [model.get_submodule(path) for path, _ in groups]
    if len(set(map(id, shared))) != len(shared):
        return everything
    if flows is not None and not all(_chained(list_path, flows) for list_path in {key[1] for key in groups}):
        return everything
    return tuple(
        Block(path, list_path, int(path.rpartition(".")[2]), tuple(inside))
        for (path, list_path), inside in groups.items()
    )


def _chained(list_path: str, flows: Mapping[str, Sequence[Flow]]) -> bool:
    """Whether each element runs once, on the first output of the one before, and on nothing of those before that."""
    before: Flow | None = None
    past: set[int] = set()
    for path, calls in flows.items():
        if path.rpartition(".")[0] != list_path:
            continue
        if len(calls) != 1:
            return False
        flow = calls[0]
        if before is not None and (
            before.returned[:1] == () or before.returned[0] not in flow.given or past & set(flow.given)
        ):
            return False
        past = (past | set(before.returned if before else ())) - set(flow.returned)
        before = flow
    return before is not None


def _element(model: nn.Module, site: FFNSite) -> tuple[str, str] | None:
    """Paths of the element and of the outermost list around an FFN; the element holds all of it."""
    parts = site.up.split(".")
    for depth in range(1, len(parts)):
        list_path = ".".join(parts[:depth])
        if isinstance(model.get_submodule(list_path), nn.ModuleList):
            path = ".".join(parts[: depth + 1])
            inside = all(projection.startswith(f"{path}.") for projection in site.projections)
            return (path, list_path) if inside else None
    return None
