from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.gradients import NeuronGradients
from ffsplit.calibrate.layer import LayerData
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.neurons import DATA_FREE_SCORES, SCORES, ScoreName, neuron_order, neuron_scores
from ffsplit.ops.least_squares import refit_from_gram, residual_energy

JOINT = ("pivoted_qr", "greedy_obs", "forward")


def make_layer(
    d_model: int = 6,
    d_ff: int = 12,
    tokens: tuple[int, ...] = (20, 11),
    *,
    gated: bool = True,
    dead: tuple[int, ...] = (),
    twins: tuple[int, int] | None = None,
    seed: int = 0,
) -> LayerData:
    generator = torch.Generator().manual_seed(seed)
    up, gate = (torch.randn(d_ff, d_model, generator=generator) for _ in range(2))
    down = torch.randn(d_model, d_ff, generator=generator)
    up[list(dead)] = 0
    if twins is not None:
        up[twins[1]], gate[twins[1]] = up[twins[0]], gate[twins[0]]
    ffn = FFNWeights(up, down, nn.SiLU(), gate if gated else None)
    store = Activations(TensorCache(), "in-")
    for length in tokens:
        store.append(torch.randn(length, d_model, generator=generator))
    sums = torch.randn(3, d_ff, generator=torch.Generator().manual_seed(seed + 1)).double()
    sums[:, list(dead)] = 0  # what stays at zero has no gradient: see test_gradients
    gradients = NeuronGradients(sums[0], sums[1].abs(), sums[2].abs())
    return LayerData(ffn, store, seed=seed, gradients=gradients)


def hidden(data: LayerData) -> Tensor:
    return torch.cat([data.ffn.hidden(chunk) for chunk in data.inputs]).double()


def assert_permutation(order: Tensor, d_ff: int) -> None:
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(d_ff))


def test_the_names_are_known() -> None:
    assert set(SCORES) == set(get_args(ScoreName)) > DATA_FREE_SCORES | set(JOINT)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_every_score_gives_a_permutation(name: ScoreName, count: int) -> None:
    assert_permutation(neuron_order(make_layer(), name, count), 12)


@pytest.mark.parametrize("name", SCORES)
def test_dead_neurons_twins_and_few_tokens(name: ScoreName) -> None:
    data = make_layer(tokens=(4,), dead=(0, 3, 4), twins=(5, 6))
    for count in range(13):
        assert_permutation(neuron_order(data, name, count), 12)


@pytest.mark.parametrize("name", SCORES)
def test_nothing_but_dead_neurons(name: ScoreName) -> None:
    assert_permutation(neuron_order(make_layer(dead=tuple(range(12))), name, 5), 12)


@given(
    name=st.sampled_from(SCORES),
    d_ff=st.integers(1, 20),
    d_model=st.integers(1, 8),
    tokens=st.integers(1, 30),
    gated=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_permutations_of_any_shape(
    name: ScoreName, d_ff: int, d_model: int, tokens: int, gated: bool, share: float, seed: int
) -> None:
    data = make_layer(d_model, d_ff, (tokens,), gated=gated, seed=seed)
    assert_permutation(neuron_order(data, name, round(share * d_ff)), d_ff)


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"magnitude", "random"}))
def test_dead_neurons_come_last(name: ScoreName) -> None:
    data = make_layer(dead=(0, 3, 4))
    assert not {0, 3, 4} & set(neuron_order(data, name, 9)[:9].tolist())


@pytest.mark.parametrize("name", JOINT)
def test_one_of_two_twins_is_enough(name: ScoreName) -> None:
    data = make_layer(twins=(5, 6), tokens=(60,))
    chosen = set(neuron_order(data, name, 11)[:11].tolist())
    assert len({5, 6} & chosen) == 1


@pytest.mark.parametrize("name", sorted(set(SCORES) - set(JOINT)))
def test_scores_are_sorted(name: ScoreName) -> None:
    data = make_layer()
    scores = neuron_scores(data, name)
    assert scores.shape == (12,)
    ordered = scores[neuron_order(data, name, 4)]
    assert (ordered[:-1] >= ordered[1:]).all()


@pytest.mark.parametrize("name", JOINT)
def test_orderings_are_not_scores(name: ScoreName) -> None:
    with pytest.raises(KeyError):
        neuron_scores(make_layer(), name)


def test_scores_by_their_definitions() -> None:
    data = make_layer(tokens=(20, 11))
    h, down = hidden(data), data.ffn.down.double()
    rms = h.square().sum(0).sqrt()
    sequences = [data.ffn.hidden(chunk).double().abs().mean(0) for chunk in data.inputs]
    expected = {
        "output_norm": rms * down.norm(dim=0),
        "activation_norm": rms,
        "wanda_sp": rms * down.abs().sum(0),
        "flap_variance": h.var(0, unbiased=False) * down.square().sum(0),
        "minitron": torch.stack(sequences).norm(dim=0),
    }
    for name, values in expected.items():
        torch.testing.assert_close(neuron_scores(data, name), values, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_random_follows_the_seed_alone() -> None:
    first, same, other = (neuron_order(make_layer(seed=seed), "random", 5).tolist() for seed in (3, 3, 4))
    assert first == same != other


@pytest.mark.parametrize("name", sorted(DATA_FREE_SCORES))
def test_data_free_scores_need_no_inputs(name: ScoreName) -> None:
    data = LayerData(make_layer().ffn, Activations(TensorCache(), "in-"))
    assert_permutation(neuron_order(data, name, 3), 12)


def test_joint_selection_beats_chance_after_the_refit() -> None:
    data = make_layer(d_model=8, d_ff=24, tokens=(80,))
    gram, down = data.statistics.hidden_gram, data.ffn.down.double()
    energy = (down @ gram * down).sum()

    def error(name: ScoreName) -> float:
        kept = neuron_order(data, name, 12)[:12]
        refitted = refit_from_gram(gram, kept, down, 1e-6)
        return float(residual_energy(gram[kept][:, kept], gram[kept] @ down.T, energy, refitted) / energy)

    by_chance = error("random")
    assert all(error(name) < 0.9 * by_chance for name in ("greedy_obs", "forward"))
    assert error("output_norm") < by_chance
