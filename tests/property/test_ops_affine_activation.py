"""The straight line in place of an activation: least squares against brute force, and what folding it keeps."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ffsplit.ops.affine_activation import ActivationMoments, collapsed_neurons, fit_affine_activation
from ffsplit.ops.linalg import schur_complement

CLOSE = {"rtol": 1e-8, "atol": 1e-9}
ACTS = st.sampled_from([nn.SiLU(), nn.GELU(), nn.ReLU(), nn.Tanh()])


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(g: Tensor, a: Tensor, u: Tensor | None = None, chunks: int = 1) -> ActivationMoments:
    moments = ActivationMoments.zeros(g.shape[1])
    for rows in torch.arange(len(g)).tensor_split(chunks):
        moments.update(g[rows], a[rows], None if u is None else u[rows])
    return moments


@given(act=ACTS, seed=st.integers(0, 999), tokens=st.integers(1, 40), gated=st.booleans(), slope=st.booleans())
def test_the_line_is_the_least_squares_one(act: nn.Module, seed: int, tokens: int, gated: bool, slope: bool) -> None:
    g = 2 * draws(seed, tokens, 3) + draws(seed + 1, 3)
    a, u = act(g), draws(seed + 2, tokens, 3) if gated else torch.ones(tokens, 3).double()
    fitted = fit_affine_activation(moments_of(g, a, u if gated else None), slope=slope)
    for j in range(3):
        columns = torch.stack([u[:, j] * g[:, j], u[:, j]], dim=1)[:, 0 if slope else 1 :]
        best = torch.linalg.lstsq(columns, (u * a)[:, j : j + 1], driver="gelsd").solution
        least = (columns @ best - (u * a)[:, j : j + 1]).square().sum()
        missed = (u * (a - fitted.scale * g - fitted.shift))[:, j].square().sum()
        torch.testing.assert_close(missed, least, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(fitted.residual[j], least, rtol=1e-6, atol=1e-8)


@given(seed=st.integers(0, 99), chunks=st.integers(1, 7))
def test_chunks_add_up(seed: int, chunks: int) -> None:
    g, u = draws(seed, 20, 4), draws(seed + 1, 20, 4)
    whole, parts = moments_of(g, g.relu(), u), moments_of(g, g.relu(), u, chunks)
    for name, total in vars(whole).items():
        torch.testing.assert_close(getattr(parts, name), total, **CLOSE)


def test_a_dead_and_a_constant_neuron_have_no_slope() -> None:
    g = torch.tensor([[3.0, 2.0], [3.0, -1.0]]).double()
    fitted = fit_affine_activation(moments_of(g, g.relu(), torch.tensor([[1.0, 0.0], [1.0, 0.0]])))
    assert fitted.scale.tolist() == [0.0, 0.0]
    assert fitted.shift.tolist() == [3.0, 0.0]
    assert fitted.residual.tolist() == [0.0, 0.0]


@given(act=ACTS, seed=st.integers(0, 99))
def test_the_loss_is_the_output_error_of_linearising_one_neuron(act: nn.Module, seed: int) -> None:
    g, u, down = draws(seed, 30, 5), draws(seed + 1, 30, 5), draws(seed + 2, 4, 5)
    fitted = fit_affine_activation(moments_of(g, act(g), u))
    for j, loss in enumerate(fitted.loss(down)):
        hidden = act(g) * u
        changed = hidden.clone()
        changed[:, j] = (fitted.scale * g + fitted.shift)[:, j] * u[:, j]
        torch.testing.assert_close(loss, ((hidden - changed) @ down.T).norm(), rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 99), biased=st.booleans())
def test_collapsed_plain_neurons_are_their_lines(seed: int, biased: bool) -> None:
    x, up, down = draws(seed, 9, 6), draws(seed + 1, 8, 6), draws(seed + 2, 6, 8)
    bias = draws(seed + 3, 8) if biased else None
    scale, shift = draws(seed + 4, 8), draws(seed + 5, 8)
    weight, constant = collapsed_neurons(up, bias, down, scale, shift)
    g = x @ up.T + (0 if bias is None else bias)
    torch.testing.assert_close(x @ weight.T + constant, (scale * g + shift) @ down.T, **CLOSE)
    weight, constant = collapsed_neurons(up, bias, down, shift)
    torch.testing.assert_close(x @ weight.T + constant, (shift * g) @ down.T, **CLOSE)


@given(seed=st.integers(0, 99), biased=st.booleans())
def test_a_folded_line_is_the_line(seed: int, biased: bool) -> None:
    x, gate = draws(seed, 9, 6), draws(seed + 1, 4, 6)
    bias = draws(seed + 2, 4) if biased else None
    g = x @ gate.T + (0 if bias is None else bias)
    line = fit_affine_activation(moments_of(g, g.relu()))
    weight, constant = line.folded(gate, bias)
    torch.testing.assert_close(x @ weight.T + constant, line.scale * g + line.shift, **CLOSE)
    some = line.take(torch.tensor([3, 1]))
    assert torch.equal(some.scale, line.scale[[3, 1]])
    assert some.folded(gate.float()[[3, 1]], None)[0].dtype == torch.float32


@given(seed=st.integers(0, 99), known=st.integers(1, 5))
def test_a_schur_complement_is_the_gram_of_what_is_left(seed: int, known: int) -> None:
    columns = draws(seed, 30, 8)
    first, rest = columns[:, :known], columns[:, known:]
    left = rest - first @ torch.linalg.lstsq(first, rest).solution
    found = schur_complement(columns.T @ columns, slice(0, known), slice(known, None), 0.0)
    torch.testing.assert_close(found, left.T @ left, **CLOSE)
    assert torch.equal(found, found.T)


def test_a_schur_complement_of_a_zero_column_is_the_gram() -> None:
    gram = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert schur_complement(gram, slice(0, 1), slice(1, 2), 0.0).tolist() == [[2.0]]
