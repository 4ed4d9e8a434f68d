"""Which layout of the low-bit kernels is the fastest on a GPU: how ``Layout.of`` of ``kernels/low_bit.py`` was found.

Either kernel alone and both together, in bfloat16, groups of 128, weights that are not in the cache, CUDA graphs, all
candidates in turns, medians of rounds. A candidate whose numbers differ from those of the layout in use is not timed.

    python benchmarks/gpu_layouts.py [--shape 7B] [--tokens 16] [--out benchmarks/results/gpu-layouts.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffsplit.ffn.fused import _places, low_bit_shapes
from ffsplit.ffn.places import tensors_at
from ffsplit.ffn.sum import SumFFN
from ffsplit.kernels.low_bit import Block, Layout, LowBitFFN
from ffsplit.provenance import provenance
from gpu import GROUP, ROUNDS, SHAPES, DenseFFN, beyond_cache, captured, interleaved, split_ffn

NAMES = ("7B", "70B", "plain", "small")
SMALL = (2048, 5632, True, 512)
REPEATS, TOLERANCE, MOST_SHARED = 24, 1e-2, 227 * 1024


@dataclass(frozen=True)
class Candidate:
    """Blocks of both kernels; one of them is None where the other is timed alone."""

    inner: Block | None
    outer: Block | None

    @property
    def name(self) -> str:
        """As the results file has it."""
        return " + ".join(
            f"{kind} {astuple(block)}" for kind, block in (("inner", self.inner), ("outer", self.outer)) if block
        )


def blocks(tiles: int, gated: bool) -> Iterator[Candidate]:
    """Everything that might be good, either kernel alone."""
    teams, rings = ((1,), (8192, 12288)) if tiles == 1 else ((1, 2), (8192, 12288, 16384))
    # What a warp holds in registers: the more, the fewer warps there is room for.
    wide = tiles * (2 if gated else 1)
    for tall in (1, 2):
        residents = {1: (16, 20), 2: (12, 16, 20), 4: (12, 16), 8: (8, 12)}.get(wide * tall, (8,))
        for warps, team, ring, resident in product((4, 8), teams, rings, residents):
            roomy = ring * 3 // 2 if resident == 8 else ring
            yield Candidate(Block(warps, team, tall, roomy, resident), None)
    for warps, team, tall, ring in product((8, 12, 16), (1, 2, 4) if tiles == 4 else (1, 2), (1, 2), (*rings, 16384)):
        if warps % team == 0 and warps * ring <= MOST_SHARED:
            yield Candidate(None, Block(warps, team, tall, ring, 12 if warps == 12 else 16))


class Layouts:
    """One FFN in several copies, run by any layout."""

    def __init__(self, shape: tuple[int, int, bool, int], parts: list[tuple[int, int]], tokens: int) -> None:
        d_model, _, gated, _ = shape
        size = sum((3 if gated else 2) * d_model * neurons * bits / 8 for neurons, bits in parts)
        self.copies = beyond_cache(lambda: split_ffn(d_model, parts, gated), size)
        self.x = torch.randn(tokens, d_model, device="cuda", dtype=torch.bfloat16)
        (self.shape,) = low_bit_shapes(self.copies[0]._branches()) or ()
        usual = Layout.of(tokens, self.shape, MOST_SHARED)
        self.tiles, self.usual = usual.tiles, Candidate(usual.inner, usual.outer)

    @cached_property
    def expected(self) -> Tensor:
        """Outputs of the first copy by the layout in use."""
        usual = self.made(self.copies[0], self.usual)
        assert usual is not None
        return usual(self.x).double()

    def made(self, ffn: SumFFN, candidate: Candidate) -> LowBitFFN | None:
        """The launches of a candidate; None where it does not compile or find its memory."""
        inner, outer = candidate.inner or self.usual.inner, candidate.outer or self.usual.outer
        assert inner is not None
        assert outer is not None
        tensors = tensors_at(place for branch in ffn._branches() for place in _places(branch))
        made = LowBitFFN([*tensors, None], self.shape, len(self.x), torch.bfloat16, 0, Layout(self.tiles, inner, outer))
        return made if made.is_compiled else None

    def compile(self, candidates: list[Candidate]) -> None:
        """All of them, on all cores (NVRTC lets go of Python's lock); later calls find them made."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(partial(self.made, self.copies[0]), candidates))

    def calls(self, candidate: Candidate) -> list[Any] | None:
        """One call for every copy; None where the numbers are wrong."""
        launches = [self.made(ffn, candidate) for ffn in self.copies]
        if launches[0] is None:
            return None
        if (launches[0](self.x).double() - self.expected).norm() > TOLERANCE * self.expected.norm():
            print(f"WRONG: {candidate.name}", flush=True)
            return None
        for launch in launches:
            assert launch is not None
            if candidate.outer is None:
                launch.outer = nothing
            if candidate.inner is None:
                launch.inner, launch.arrange = nothing, None
        return [partial(launch, self.x) for launch in launches if launch is not None]


def nothing(*_: Any, **__: Any) -> None:
    """In the place of a launch that is not timed."""


def timed(layouts: Layouts, candidates: list[Candidate], dense: list[Any]) -> dict[str, float]:
    """Microseconds of each."""
    graphs = {"dense": captured(dense, REPEATS)}
    for candidate in candidates:
        calls = layouts.calls(candidate)
        if calls is not None:
            graphs[candidate.name] = captured(calls, REPEATS)
    return {name: round(value * 1e6, 2) for name, value in interleaved(graphs).items()}


def measure(shape: tuple[int, int, bool, int], parts: list[tuple[int, int]], tokens: int, best: int) -> dict[str, Any]:
    """Either kernel alone, then the best few of both together."""
    d_model, d_ff, gated, _ = shape
    layouts = Layouts(shape, parts, tokens)
    dense_size = 2 * (3 if gated else 2) * d_model * d_ff
    dense = beyond_cache(lambda: partial(DenseFFN(d_model, d_ff, gated), layouts.x), dense_size)
    usual_alone = {"inner": replace(layouts.usual, outer=None), "outer": replace(layouts.usual, inner=None)}
    alone = [*dict.fromkeys([*usual_alone.values(), *blocks(layouts.tiles, gated)])]
    layouts.compile(alone)
    seconds = timed(layouts, alone, dense)
    order = sorted((one for one in alone if one.name in seconds), key=lambda one: seconds[one.name])
    inner, outer = [one.inner for one in order if one.inner][:best], [one.outer for one in order if one.outer][:best]
    both = dict.fromkeys([layouts.usual, *(Candidate(*pair) for pair in product(inner, outer))])
    together = timed(layouts, [*both], dense)
    first = min((name for name in together if name != "dense"), key=lambda name: together[name])
    times = {name: f"{value} us (x{together['dense'] / value:.2f})" for name, value in together.items()}
    print(
        f"{d_model}/{d_ff} {parts} {tokens} tokens: in use {times[layouts.usual.name]}, best {times[first]} {first}",
        flush=True,
    )
    for kind, usual in usual_alone.items():
        told = [f"{one.name} {seconds[one.name]}" for one in order if getattr(one, kind)][:4]
        print("   in use", seconds[usual.name], *told, sep=" | ", flush=True)
    return {
        "d_model": d_model, "d_ff": d_ff, "gated": gated, "branches": parts, "tokens": tokens,
        "microseconds_alone": seconds, "microseconds_together": together,
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=NAMES, action="append", help="all if not given; may be repeated")
    parser.add_argument("--tokens", type=int, action="append", help="1, 16 and 32 if not given; may be repeated")
    parser.add_argument("--branches", choices=("int4", "int8+int4"), action="append", help="both if not given")
    parser.add_argument("--best", type=int, default=3, help="of either kernel, so many are tried together")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu-layouts.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = dict(zip(NAMES, (*SHAPES, SMALL), strict=True))
    document: dict[str, Any] = {
        "benchmark": "gpu-layouts",
        "protocol": f"random bfloat16 weights beyond the cache, groups of {GROUP}, CUDA graphs, medians of {ROUNDS} "
        f"rounds, candidates in turns; a block is {[field.name for field in fields(Block)]}",
        "rows": [],
        "provenance": provenance(seed=0, data={}),
        "device": torch.cuda.get_device_name(),
    }
    for name, tokens in product(options.shape or NAMES, options.tokens or (1, 16, 32)):
        d_model, d_ff, gated, heavy = shapes[name]
        for branches in options.branches or ("int4", "int8+int4"):
            parts = [(d_ff, 4)] if branches == "int4" else [(heavy, 8), (d_ff - heavy, 4)]
            document["rows"].append(measure((d_model, d_ff, gated, heavy), parts, tokens, options.best))
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
