"""The FFNs of a model on the bench: one row a structure, beside the dense FFN and what is installed besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from ffsplit.bench.caches import Flush
from ffsplit.bench.costs import Side, ffn_timing
from ffsplit.bench.ffn import FEW_TOKENS, time_ffns
from ffsplit.bench.loaded import Group, Loaded
from ffsplit.bench.memory import extra_bytes, resident_bytes, stored_bytes
from ffsplit.bench.observe import observe
from ffsplit.bench.peers import build_peers
from ffsplit.bench.result import FFNRow, FFNTiming
from ffsplit.bench.roofline import Roofline
from ffsplit.budget.cost import dense_spec
from ffsplit.timing import Clock

Progress = Callable[[str, int, int], None]


@dataclass
class FFNBench:
    """Measures FFNs one structure after another.

    Attributes:
        loaded: the model.
        tokens: numbers of tokens, ascending.
        roofline: of the machine.
        rounds: timed turns.
        warmup: turns before those.
        clock: seconds, monotonic.
        with_peers: measure other storages too, once for every size of a dense FFN.
        peer_errors: of those that were measured, relative to the dense FFN's output.
        peers_missing: why others were not.
    """

    loaded: Loaded
    tokens: Sequence[int]
    roofline: Roofline
    rounds: int
    warmup: int
    clock: Clock
    with_peers: bool = True
    peer_errors: dict[str, float] = field(default_factory=dict)
    peers_missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device, self.dtype = self.loaded.model.device, self.loaded.model.dtype
        small = self.device.type == "cpu" and self.tokens[0] < FEW_TOKENS
        self._flush = Flush(self.device) if small else None

    def rows(self, progress: Progress | None = None) -> tuple[FFNRow, ...]:
        """One row a structure."""
        groups, rows = self.loaded.groups(), list[FFNRow]()
        for done, group in enumerate(groups, start=1):
            new = all(group.shape != earlier.shape for earlier in groups[: done - 1])
            rows.append(self._row(group, peers=self.with_peers and new))
            if progress is not None:
                progress("FFNs", done, len(groups))
        return tuple(rows)

    def _row(self, group: Group, *, peers: bool) -> FFNRow:
        dense, this = self.loaded.dense_ffn(group), self.loaded.compressed_ffn(group)
        subject = dense if this is None else this
        stored = stored_bytes(subject)
        others = self._peers(dense) if peers else {}
        timings = tuple(self._timing(group, dense, this, others, count) for count in self.tokens)
        x = self._input(group, self.tokens[-1])
        with torch.inference_mode():
            extra = extra_bytes(lambda: subject(x), self.device)
        return FFNRow(
            first=group.sites[0].name,
            last=group.sites[-1].name,
            count=len(group.sites),
            structure="dense" if group.spec is None else group.spec.describe(),
            shape=asdict(group.shape),
            dense_bytes=stored_bytes(dense),
            stored_bytes=stored,
            resident_bytes=resident_bytes(subject),
            extra_bytes=extra,
            timings=timings,
        )

    def _timing(
        self, group: Group, dense: nn.Module, this: nn.Module | None, others: dict[str, nn.Module], tokens: int
    ) -> FFNTiming:
        x = self._input(group, tokens)
        # An input whose activations have the shape of no weight: a decoded weight is recognised by its shape.
        watched = torch.cat([x, x[:1]]) if tokens in (group.shape.d_model, group.shape.d_ff) else x
        modules = {"": dense, **({} if this is None else {"this": this}), **others}
        seconds = time_ffns(modules, x, rounds=self.rounds, warmup=self.warmup, clock=self.clock, flush=self._flush)
        specs = {"": dense_spec(group.shape)} | ({} if group.spec is None else {"this": group.spec})
        sides = {
            name: Side(spec, stored_bytes(modules[name]), tokens, x.element_size(), seconds[name],
                       observe(modules[name], watched))
            for name, spec in specs.items()
        }  # fmt: skip
        return ffn_timing(sides[""], sides.get("this"), self.roofline, {name: seconds[name] for name in others})

    def _peers(self, dense: nn.Module) -> dict[str, nn.Module]:
        built, missing = build_peers(dense.to_weights(), self.device)  # type: ignore[operator]
        self.peers_missing |= missing
        x = torch.randn(16, dense.d_model, generator=torch.Generator().manual_seed(0))  # type: ignore[call-overload]
        x = x.to(device=self.device, dtype=self.dtype)
        with torch.inference_mode():
            wanted = dense(x).float()
            for name, module in built.items():
                error = (module(x).float() - wanted).norm() / wanted.norm().clamp_min(1e-30)
                self.peer_errors.setdefault(name, float(error))
        return built

    def _input(self, group: Group, tokens: int) -> Tensor:
        drawn = torch.randn(tokens, group.shape.d_model, generator=torch.Generator().manual_seed(0))
        return drawn.to(device=self.device, dtype=self.dtype)
