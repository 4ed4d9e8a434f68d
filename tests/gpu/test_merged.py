"""Sums of dense and low-rank branches in merged products on a GPU, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ffsplit.ffn.projections import Dense, LowRank, Projection
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels.cache import set_decoded_limit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
D_MODEL = 512


def matrix(rows: int, columns: int, rank: int | None) -> Projection:
    if rank is None:
        return Dense(torch.randn(rows, columns) * columns**-0.5)
    return LowRank(torch.randn(rows, rank) * rank**-0.5, torch.randn(rank, columns) * columns**-0.5)


def split(gated: bool, parts: tuple[tuple[int, int | None], ...] = ((128, None), (896, 96))) -> SumFFN:
    branches = [
        Branch(
            nn.SiLU(),
            matrix(neurons, D_MODEL, rank),
            matrix(D_MODEL, neurons, rank),
            matrix(neurons, D_MODEL, rank) if gated else None,
            torch.randn(neurons),
        )
        for neurons, rank in parts
    ]
    return SumFFN(D_MODEL, branches, bias=torch.randn(D_MODEL)).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("parts", [((128, None), (896, 96)), ((512, None),), ((1024, 96),)], ids=str)
@torch.no_grad()
def test_any_number_of_tokens(parts: tuple[tuple[int, int | None], ...], gated: bool, dtype: torch.dtype) -> None:
    ffn = split(gated, parts).to(dtype)
    on_gpu = copy.deepcopy(ffn).cuda()
    for tokens in (1, 3, 300):
        x = torch.randn(tokens, D_MODEL).to(dtype)
        exact = copy.deepcopy(ffn).double()(x.double())
        found = on_gpu(x.cuda()).double().cpu()
        assert float((found - exact).norm() / exact.norm()) < (2e-2 if dtype == torch.bfloat16 else 4e-3)
    assert not on_gpu.merged.is_empty
    on_gpu.cpu()
    assert on_gpu.merged.is_empty


@torch.no_grad()
def test_a_captured_graph_replays_it_and_without_room_branches_run() -> None:
    x = torch.randn(3, D_MODEL, device="cuda", dtype=torch.bfloat16)
    for limit in (None, 0):
        set_decoded_limit(limit)
        try:
            ffn = split(True).bfloat16().cuda()
            expected = ffn(x)
            assert ffn.merged.is_empty == (limit == 0)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = ffn(x)
            graph.replay()
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
        finally:
            set_decoded_limit(None)
