"""What ``benchmarks/gpu.py`` times, as far as that needs no GPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.mark.parametrize("index", range(3))
def test_the_smaller_ffns_have_half_of_the_parameters(gpu: ModuleType, index: int) -> None:
    d_model, d_ff, gated, _ = gpu.SHAPES[index]
    dense = (3 if gated else 2) * d_model * d_ff
    for way in gpu.SMALLER.values():
        spec = gpu.smaller_spec(d_model, d_ff, gated, way)
        assert gpu.KEEP - 0.03 < spec.parameters / dense <= gpu.KEEP
        assert len(spec.branches) == (1 if way == "prune" else 2)


def test_what_fewer_multiplications_promise(gpu: ModuleType) -> None:
    made = {"dense bf16": ([], 200), "pruned 0.5": ([], 100), "split low rank 0.5": ([], 80)}
    seconds = {"dense bf16": 1.0, "pruned 0.5": 0.5, "split low rank 0.5": 0.8}
    assert gpu.promised(made, seconds) == {"pruned 0.5": 1.0, "split low rank 0.5": 0.5}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_candidates_for_a_layout_can_be_launched(tiles: int, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    layouts = importlib.import_module("gpu_layouts")
    found = list(layouts.blocks(tiles, gated))
    names = {candidate.name for candidate in found}
    assert len(names) > 20
    for candidate in found:
        block = candidate.inner or candidate.outer
        assert block.warps % block.across == 0
        assert block.shared % 16 == 0  # what threads copy at once
        assert block.warps * block.shared <= layouts.MOST_SHARED
