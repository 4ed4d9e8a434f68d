"""From traced calls to FFN sites: pairing projections, and deciding what a replacement takes the place of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from ffsplit.families.activation import identify
from ffsplit.families.projection import features
from ffsplit.families.provenance import Stream
from ffsplit.families.site import FFNSite
from ffsplit.families.trace import DownCall, Trace


@dataclass(frozen=True)
class Pairing:
    """The projections of one FFN, as the data flowed: the roles are certain, the surroundings not yet looked at."""

    up: str
    gate: str | None
    down: str
    fused: str | None

    @property
    def projections(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for path in (self.up, self.gate, self.down) if path is not None))


@dataclass
class Use:
    """How an FFN was used in a forward: the stream that carries its activation, and each call with its trace."""

    curve: Stream
    calls: list[tuple[Trace, DownCall]] = field(default_factory=list)


def pair(model: nn.Module, traces: Iterable[Trace]) -> dict[Pairing, Use]:
    """The FFNs that the traced forwards computed, in execution order of their first call.

    What an FFN returns is added to a residual stream; projections one after the other in a prediction head, an adapter
    between two models or the modulation of a norm are none.
    """
    found: dict[Pairing, Use] = {}
    for trace in traces:
        for call in trace.downs:
            match = _match(model, call) if call.path in trace.added else None
            if match is not None:
                found.setdefault(match[0], Use(match[1])).calls.append((trace, call))
    # A chain of three projections would be two FFNs that share one: a prediction head, not an FFN.
    roles = Counter(path for pairing in found for path in pairing.projections)
    return {pairing: use for pairing, use in found.items() if all(roles[path] == 1 for path in pairing.projections)}


def _match(model: nn.Module, call: DownCall) -> tuple[Pairing, Stream] | None:
    """The FFN that a call of ``down`` completes, with the stream of its activation; sizes must agree."""
    if len(call.value) == 1:
        up = gate = call.value[0]
        if not up.nonlinear or up.part is not None:
            return None
        pairing = Pairing(up.source, None, call.path, None)
    else:
        first, second = call.value
        if first.nonlinear and second.nonlinear:
            return None
        gate, up = (second, first) if second.nonlinear else (first, second)
        fused = None if gate.part is None else ("gate_up" if gate.part == 0 else "up_gate")
        if (up.part is None) != (gate.part is None) or (up.source == gate.source) != (fused is not None):
            return None
        pairing = Pairing(up.source, gate.source, call.path, fused)
    d_model, d_ff = features(model.get_submodule(call.path))
    wanted = (2 * d_ff if pairing.fused else d_ff, d_model)
    fits = all(features(model.get_submodule(path)) == wanted for path in (up.source, gate.source))
    return (pairing, gate) if fits else None


class Placer:
    """Decides for each pairing what a replacement takes the place of."""

    def __init__(self, model: PreTrainedModel, found: dict[Pairing, Use]) -> None:
        self._model = model
        self._found = found
        self._aliases: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._aliases.setdefault(module, []).append(path)
        # How many FFNs use each activation module, and how many of its calls are theirs.
        self._act_calls: Counter[str] = Counter()
        self._act_sites: Counter[str] = Counter()
        for pairing, use in found.items():
            if use.curve.act is not None:
                self._act_calls[use.curve.act] += len(use.calls)
                self._act_sites[self._nearest(use.curve.act, pairing.up)] += 1

    def place(self, pairing: Pairing) -> FFNSite | str:
        """The site, or the reason why there can be none."""
        use = self._found[pairing]
        names = identify(self._model, use.curve.act, use.curve.function) if use.curve.nonlinear else (None, "linear")
        if names is None:
            return f"{pairing.down}: what is computed between {pairing.gate or pairing.up} and it has no known name"
        act, act_name = names
        act = None if act is None else self._nearest(act, pairing.up)
        host = self._module_between(pairing, [(trace, call.value[0].x, call.output) for trace, call in use.calls], True)
        if host is None:
            name = pairing.up
            if pairing.gate is not None or act is None or not self._exclusive(act, use):
                front = [(trace, call.value[0].x, call.hidden) for trace, call in use.calls]
                name = self._module_between(pairing, front, False) or ""
            if not name:
                why = "a function" if act is None else "a gate" if pairing.gate else "a shared activation module"
                return f"{pairing.down}: {why} before it is part of a forward that does other work too"
        d_model, d_ff = features(self._model.get_submodule(pairing.down))
        return FFNSite(
            name=host or name,
            up=pairing.up,
            down=pairing.down,
            gate=pairing.gate,
            act=act,
            act_name=act_name,
            fused=pairing.fused,  # type: ignore[arg-type]
            kind="module" if host else "inline",
            d_model=d_model,
            d_ff=d_ff,
        )

    def _nearest(self, act: str, up: str) -> str:
        """Of the names of a module, the one that shares most of its path with ``up``: layers may share one module."""
        paths = self._aliases[self._model.get_submodule(act)]
        return max(paths, key=lambda path: _common(path, up))

    def _exclusive(self, act: str, use: Use) -> bool:
        """Whether the activation can become an identity: all its calls are FFNs', and its name is that of one FFN."""
        first = use.curve.act or act
        calls = sum(trace.calls[first] for trace in {id(trace): trace for trace, _ in use.calls}.values())
        return self._act_calls[first] == calls and self._act_sites[act] == 1

    def _module_between(self, pairing: Pairing, spans: Sequence[tuple[Trace, int, int]], with_down: bool) -> str | None:
        """The innermost module that, in every call, turns ``x`` into the given value and holds nothing else."""
        choices: list[str] | None = None
        for trace, x, output in spans:
            here = [call.path for call in trace.simple if call.x == x and call.output == output]
            choices = here if choices is None else [path for path in choices if path in here]
        for path in choices or []:
            inside = [projection.startswith(f"{path}.") for projection in pairing.projections]
            if inside == [True] * (len(inside) - 1) + [with_down] and self._holds_only(path, pairing):
                return path
        return None

    def _holds_only(self, path: str, pairing: Pairing) -> bool:
        use = self._found[pairing]
        own = [self._model.get_submodule(projection) for projection in pairing.projections]
        own += [self._model.get_submodule(use.curve.act)] if use.curve.act is not None else []
        allowed = {id(parameter) for module in own for parameter in module.parameters()}
        return all(id(parameter) in allowed for parameter in self._model.get_submodule(path).parameters())


def _common(a: str, b: str) -> int:
    """How many leading parts two paths share."""
    count = 0
    for left, right in zip(a.split("."), b.split("."), strict=False):
        if left != right:
            break
        count += 1
    return count
