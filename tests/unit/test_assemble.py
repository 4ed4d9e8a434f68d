from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.layer import LayerData, RefitSums
from ffsplit.ffn.projections import Dense, LowRank, PackedSpec, Projection
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.assemble import Part, Segment, fit_parts, fit_segments
from ffsplit.methods.blockwise import BlockwiseFit, blockwise_branch_spec
from ffsplit.methods.budgets import dense_branch_spec, low_rank_branch_spec, packed_branch_spec, sum_spec
from ffsplit.methods.compressors import SVD, WHITENED, Rounding
from ffsplit.ops.least_squares import residual_energy
from ffsplit.ops.lowrank import svd_factors, whitened_factors

D_MODEL, D_FF = 8, 24


def make_sums(hidden: int = 12, outputs: int = 5, tokens: int = 60, seed: int = 0) -> tuple[RefitSums, Tensor, Tensor]:
    """Sums of correlated activations in very different units, the activations, and the targets."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    h = random(tokens, hidden) @ random(hidden, hidden) * torch.logspace(-2, 2, hidden, dtype=torch.float64)
    y = h @ random(hidden, outputs) + random(tokens, outputs)
    return RefitSums(h.T @ h, h.T @ y, y.square().sum()), h, y


def dense(weight: Tensor, _gram: Tensor) -> Projection:
    return Dense(weight).requires_grad_(False)


def low_rank(rank: int) -> Callable[[Tensor, Tensor], Projection]:
    return lambda weight, gram: LowRank(*whitened_factors(weight, gram, rank)).requires_grad_(False)


def segments(*parts: tuple[int, Callable[[Tensor, Tensor], Projection]]) -> list[Segment]:
    edges = [0]
    for width, _ in parts:
        edges.append(edges[-1] + width)
    return [Segment(slice(start, stop), how) for start, stop, (_, how) in zip(edges, edges[1:], parts, strict=False)]


def joined(projections: list[Projection]) -> Tensor:
    return torch.cat([projection.dense(torch.float64) for projection in projections], dim=1).detach()


def error(sums: RefitSums, weight: Tensor) -> float:
    return float(residual_energy(sums.gram, sums.cross, sums.energy, weight))


@given(cut=st.lists(st.integers(1, 11), min_size=0, max_size=3, unique=True), seed=st.integers(0, 99))
def test_dense_segments_are_the_joint_least_squares(cut: list[int], seed: int) -> None:
    sums, h, y = make_sums(seed=seed)
    edges = [0, *sorted(cut), 12]
    widths = [stop - start for start, stop in pairwise(edges)]
    fitted = joined(fit_segments(sums, segments(*((width, dense) for width in widths)), torch.zeros(5, 12), 0.0))
    expected = torch.linalg.lstsq(h, y).solution.T
    assert error(sums, fitted) <= error(sums, expected) * (1 + 1e-6)
    torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=1e-5)


def test_the_ridge_pulls_to_the_prior_in_every_segments_own_unit() -> None:
    sums, h, y = make_sums()
    prior = torch.randn(5, 12, generator=torch.Generator().manual_seed(5)).double()
    ridge = 0.1
    fitted = joined(fit_segments(sums, segments((1, dense), (7, dense), (4, dense)), prior, ridge))
    unit = torch.cat([h[:, part].square().sum(0).mean().sqrt().expand(w) for part, w in
                      ((slice(0, 1), 1), (slice(1, 8), 7), (slice(8, 12), 4))])  # fmt: skip
    scaled = h / unit
    left = scaled.T @ scaled + ridge * torch.eye(12).double()
    expected = (torch.linalg.solve(left, scaled.T @ y + ridge * (prior * unit).T).T) / unit
    torch.testing.assert_close(fitted, expected, rtol=1e-6, atol=1e-8)
    pulled = joined(fit_segments(sums, segments((8, dense), (4, dense)), prior, 1e9))
    torch.testing.assert_close(pulled, prior, rtol=1e-5, atol=1e-6)


def test_sums_are_not_changed() -> None:
    sums, _, _ = make_sums()
    kept = [tensor.clone() for tensor in (sums.gram, sums.cross, sums.energy)]
    fit_segments(sums, segments((6, dense), (6, low_rank(2))), torch.zeros(5, 12), 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(kept, (sums.gram, sums.cross, sums.energy), strict=True))


def test_directions_without_data_keep_the_prior() -> None:
    sums, _, _ = make_sums()
    sums.gram[3] = sums.gram[:, 3] = 0
    sums.cross[3] = 0
    prior = torch.ones(5, 12)
    fitted = joined(fit_segments(sums, segments((6, dense), (6, dense)), prior, 1e-3))
    torch.testing.assert_close(fitted[:, 3], prior[:, 3].double())
    assert bool(torch.isfinite(fitted).all())


@given(heavy=st.integers(1, 11), rank=st.integers(0, 3), seed=st.integers(0, 99))
def test_the_heavy_segment_absorbs_the_error_of_the_rest(heavy: int, rank: int, seed: int) -> None:
    sums, _, _ = make_sums(seed=seed)
    rest = 12 - heavy
    how = low_rank(min(rank, rest))
    absorbed = joined(fit_segments(sums, segments((heavy, dense), (rest, how)), torch.zeros(5, 12), 0.0))
    exact = joined(fit_segments(sums, segments((12, dense)), torch.zeros(5, 12), 0.0))
    alone = torch.cat([exact[:, :heavy], absorbed[:, heavy:]], dim=1)
    assert error(sums, absorbed) <= error(sums, alone) * (1 + 1e-6) + 1e-6
    on_its_own = how(exact[:, heavy:], sums.gram[heavy:, heavy:]).dense(torch.float64)
    independent = torch.cat([exact[:, :heavy], on_its_own], dim=1)
    assert error(sums, absorbed) <= error(sums, independent) * (1 + 1e-6) + 1e-6


def test_the_rest_is_compressed_for_what_the_heavy_part_cannot_repair() -> None:
    """The Gram that a segment sees is the Schur complement: what is left after projecting on the heavy part."""
    sums, h, _ = make_sums()
    seen: list[Tensor] = []

    def look(weight: Tensor, gram: Tensor) -> Projection:
        seen.append(gram)
        return Dense(weight)

    fit_segments(sums, segments((5, dense), (7, look)), torch.zeros(5, 12), 0.0)
    heavy, rest = h[:, :5], h[:, 5:]
    left = rest - heavy @ torch.linalg.lstsq(heavy, rest).solution
    torch.testing.assert_close(seen[0], left.T @ left, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[0], seen[0].T)


def layer(*, gated: bool = True, biased: bool = True, tokens: int = 200, seed: int = 0) -> LayerData:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ffn = FFNWeights(
        random(D_FF, D_MODEL),
        random(D_MODEL, D_FF),
        nn.GELU(),
        random(D_FF, D_MODEL) if gated else None,
        random(D_FF) if biased else None,
        random(D_FF) if biased and gated else None,
        random(D_MODEL) if biased else None,
    )
    store = Activations(TensorCache(), "in-")
    for _ in range(2):
        store.append(random(tokens // 2, D_MODEL))
    return LayerData(ffn, store)


@torch.no_grad()
def output_error(data: LayerData, module: SumFFN) -> float:
    x = torch.cat(list(data.inputs))
    wanted = data.ffn(x)
    return float((module(x) - wanted).norm() / wanted.norm())


KINDS = {
    "dense": (lambda shape, n: dense_branch_spec(shape, n), SVD),
    "svd": (lambda shape, n: low_rank_branch_spec(shape, n, 3), SVD),
    "whitened": (lambda shape, n: low_rank_branch_spec(shape, n, 3), WHITENED),
    "block-dense": (lambda shape, n: blockwise_branch_spec("block-dense", shape, D_FF - n, 2, 950), BlockwiseFit()),
    "monarch": (lambda shape, n: blockwise_branch_spec("monarch", shape, D_FF - n, 2, 950), BlockwiseFit(sweeps=0)),
    "rtn": (lambda shape, n: packed_branch_spec(shape, n, 3, 8), Rounding("rtn")),
    "gptq": (lambda shape, n: packed_branch_spec(shape, n, 3, 8), Rounding("gptq")),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_refitting_helps_on_the_calibration_inputs(kind: str, gated: bool, biased: bool) -> None:
    data = layer(gated=gated, biased=biased)
    shape = FFNShape.of(data.ffn)
    make, how = KINDS[kind]
    heavy, rest = torch.arange(8), torch.arange(8, D_FF - 2)
    spec = sum_spec(shape, [dense_branch_spec(shape, 8), make(shape, len(rest))], bias=shape.down_bias)
    parts = [Part(heavy, spec.branches[0], how), Part(rest, spec.branches[1], how)]  # type: ignore[arg-type]
    errors = {}
    for refit in (True, False):
        module = fit_parts(data, parts, spec, refit=refit, ridge=1e-6)
        assert module.spec == spec
        assert (module.bias is not None) == biased
        errors[refit] = output_error(data, module)
    assert errors[True] < errors[False]


@torch.no_grad()
def test_a_linear_map_beside_the_heavy_part() -> None:
    data = layer()
    shape = FFNShape.of(data.ffn)
    heavy = torch.arange(12)
    errors = []
    for rank in (None, 1, 8):
        spec = sum_spec(shape, [dense_branch_spec(shape, 12)], bias=True, linear_rank=rank or 0)
        part = Part(heavy, spec.branches[0], WHITENED)
        module = fit_parts(data, [part], spec, refit=True, ridge=1e-6)
        assert module.spec == spec
        errors.append(output_error(data, module))
    assert errors[0] > errors[1] > errors[2]


@torch.no_grad()
def test_all_neurons_dense_reproduce_the_ffn_in_any_order() -> None:
    data = layer()
    shape = FFNShape.of(data.ffn)
    order = torch.randperm(D_FF, generator=torch.Generator().manual_seed(0))
    spec = sum_spec(shape, [dense_branch_spec(shape, 10), dense_branch_spec(shape, 14)], bias=True)
    parts = [Part(order[:10], spec.branches[0], SVD), Part(order[10:], spec.branches[1], SVD)]
    for refit in (True, False):
        assert output_error(data, fit_parts(data, parts, spec, refit=refit, ridge=1e-3)) < 1e-5


@torch.no_grad()
def test_without_inner_error_the_statistics_are_enough() -> None:
    """No bias, dense inner projections: the refit from the hidden Gram equals the one from a second pass."""
    data = layer(biased=False)
    shape = FFNShape.of(data.ffn)
    kept = torch.tensor([3, 1, 20, 7, 9, 11])
    spec = sum_spec(shape, [dense_branch_spec(shape, 6)], bias=False)
    module = fit_parts(data, [Part(kept, spec.branches[0], SVD)], spec, refit=True, ridge=0.0)
    x = torch.cat(list(data.inputs)).double()
    wide = data.ffn.map(lambda tensor: tensor.double())
    h = wide.hidden(x)
    expected = torch.linalg.lstsq(h[:, kept], h @ wide.down.T).solution.T
    torch.testing.assert_close(module.branches[0].down.dense(torch.float64), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_corrections_move_the_targets() -> None:
    data = layer(biased=False)
    shift = torch.tensor([2.0, *[0.0] * (D_MODEL - 1)])
    corrections = Activations(TensorCache(), "c-")
    for chunk in data.inputs:
        corrections.append((chunk @ torch.outer(chunk[0], shift)).detach())
    moved = LayerData(data.ffn, data.inputs, corrections=corrections)
    shape = FFNShape.of(data.ffn)
    spec = sum_spec(shape, [dense_branch_spec(shape, D_FF)], bias=False)
    part = Part(torch.arange(D_FF), spec.branches[0], SVD)
    module = fit_parts(moved, [part], spec, refit=True, ridge=1e-6)
    x, asked = torch.cat(list(data.inputs)), torch.cat(list(corrections))
    target = data.ffn(x) + asked
    assert float((module(x) - target).norm()) < 0.9 * float(asked.norm())
    assert output_error(data, module) > 0.01


def test_up_and_gate_rounded_together_are_those_rounded_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    up, gate, x = (torch.randn(rows, 16, generator=generator) for rows in (6, 6, 40))
    spec, gram = PackedSpec(shape=(6, 16), bits=3, group=8), (x.T @ x).double()
    for how in ("gptq", "rtn"):
        rounding = Rounding(how, polish=2)  # type: ignore[arg-type]
        together = rounding.together([up, gate], spec, gram, torch.float32)
        alone = [rounding(weight, spec, gram, torch.float32) for weight in (up, gate)]
        for first, second in zip(together, alone, strict=True):
            torch.testing.assert_close(first.dense(), second.dense())
            assert first.spec == spec


def test_low_rank_without_a_gram_is_the_plain_svd() -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    spec = low_rank_branch_spec(FFNShape(9, 6, gated=False), 6, 2).up
    expected = torch.matmul(*svd_factors(weight, 2)).float()
    for how in (SVD, WHITENED):
        found = how(weight, spec, None, torch.float32)
        torch.testing.assert_close(found.dense(), expected)
