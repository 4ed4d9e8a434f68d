"""Sums over many tokens piece by piece: the same numbers, and only where nothing else is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ffsplit.ffn import pieces
from ffsplit.ffn.projections import Dense, LowRank, Projection
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.kernels.cache import set_decoded_limit
from ffsplit.kernels.dispatch import reference_only
from tests.unit.test_ffn_merged import D_MODEL, ffn


@contextmanager
def sizes_of(module: SumFFN) -> Iterator[list[int]]:
    """How many tokens the first branch is given at a time."""
    seen: list[int] = []
    (first, *_) = module.branches
    hook = first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel() // D_MODEL))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("kinds", [("dense", "low_rank"), ("low_rank",), ("dense",)])
@pytest.mark.parametrize("gated", [True, False])
def test_many_tokens_go_in_about_equal_pieces(kinds: tuple[str, ...], gated: bool) -> None:
    module, x = ffn(*kinds, gated=gated), torch.randn(5, 500, D_MODEL)
    module.linear = LowRank(torch.randn(D_MODEL, 8), torch.randn(8, D_MODEL))
    with torch.no_grad(), sizes_of(module) as sizes:
        found = module(x)
        assert sizes == [834, 834, 832]
        with reference_only():
            whole = module(x)
        assert sizes[3:] == [2500]
        assert torch.equal(module(x[:2]), module(x[:2].transpose(0, 1)).transpose(0, 1))
        assert sizes[4:] == [1000, 1000]
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_a_view_that_is_not_contiguous_is_taken() -> None:
    module, x = ffn("low_rank"), torch.randn(700, 3, D_MODEL).transpose(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(module(x), module(x.contiguous()), rtol=0, atol=0)


def test_gradients_autocast_and_other_dtypes_see_all_tokens_at_once() -> None:
    module, x = ffn("dense", "low_rank"), torch.randn(1500, D_MODEL)
    with sizes_of(module) as sizes:
        module(x).sum().backward()
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                module(x)
            module.double()(x.double())
    assert sizes == [1500] * 3


@pytest.mark.parametrize("kinds", [("dense", "4"), ("8", "4"), ("w8a8",)], ids="+".join)
def test_codes_go_in_pieces_too(kinds: tuple[str, ...]) -> None:
    module, x = ffn(*kinds, wide=5), torch.randn(1500, D_MODEL)
    with torch.no_grad():
        found = module(x)
        with sizes_of(module) as sizes:
            module(x)
        assert sizes == [750, 750]
        pieces_apart = torch.cat([module(x[:750]), module(x[750:])])
    torch.testing.assert_close(found, pieces_apart, rtol=0, atol=0)


def test_codes_that_are_decoded_at_every_forward_are_so_once() -> None:
    module, x = ffn("4", "4", wide=5), torch.randn(1500, D_MODEL)
    set_decoded_limit(0)
    try:
        with torch.no_grad(), sizes_of(module) as sizes:
            module(x)
        assert sizes == [1500]
    finally:
        set_decoded_limit(None)


class Noticed(Dense):
    """A subclass may do anything."""


@pytest.mark.parametrize("changed", ["up", "linear"])
def test_subclasses_see_all_tokens_at_once(changed: str) -> None:
    weight = torch.randn(D_MODEL, D_MODEL)
    own: Projection = Noticed(weight)
    branch = Branch(nn.GELU(), own if changed == "up" else Dense(weight), Dense(weight))
    module = SumFFN(D_MODEL, [branch], own if changed == "linear" else None)
    x = torch.randn(1500, D_MODEL)
    with torch.no_grad():
        assert not pieces.pays_in_pieces(x, [branch], module.linear, module.merged)
        with sizes_of(module) as sizes:
            module(x)
    assert sizes == [1500]


def test_a_compiler_sees_all_tokens_at_once() -> None:
    module, x = ffn("dense", "low_rank"), torch.randn(1500, D_MODEL)
    torch.compiler.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, backend=backend, fullgraph=True)(x), module(x))
    assert len(graphs) == 1
    assert "chunk" not in graphs[0]
