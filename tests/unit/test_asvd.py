"""ASVD against its definition on the activations of the dense FFN."""

from __future__ import annotations

import pytest
import torch

from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method, method_config
from tests.unit.test_statistics import layer, make_ffn, make_inputs


def fitted(alpha: float, *, gated: bool = True, refit: bool = False) -> SumFFN:
    data = layer(make_ffn(6, 12, gated=gated), make_inputs(20, 30, d_model=6))
    config = method_config({"method": "asvd", "keep": 0.8, "alpha": alpha, "refit": refit})
    return get_method("asvd").apply(data, config)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_every_matrix_is_scaled_by_the_mean_size_of_its_inputs(alpha: float, gated: bool) -> None:
    ffn, x = make_ffn(6, 12, gated=gated), torch.cat(make_inputs(20, 30, d_model=6))
    branch = fitted(alpha, gated=gated).branches[0]
    sizes = {"up": x, "gate": x, "down": ffn.hidden(x)}
    for name, weight in ffn.tensors().items():
        if name not in sizes:
            continue
        scale = sizes[name].abs().mean(0).double() ** alpha
        u, values, v = torch.linalg.svd(weight.double() * scale, full_matrices=False)
        rank = getattr(branch, name).spec.rank
        expected = (u[:, :rank] * values[:rank]) @ v[:rank] / scale
        torch.testing.assert_close(getattr(branch, name).dense(torch.float64), expected, rtol=1e-4, atol=1e-5)


def test_alpha_zero_is_the_plain_svd_and_needs_no_data() -> None:
    config = method_config({"method": "asvd", "keep": 0.8, "alpha": 0})
    assert not config.needs_data
    empty = layer(make_ffn(6, 12), [])
    found, plain = (
        get_method("asvd").apply(empty, config),
        get_method("svd").apply(empty, method_config({"method": "svd", "keep": 0.8})),
    )
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


@torch.no_grad()
def test_the_refit_helps_on_the_calibration_inputs() -> None:
    ffn, x = make_ffn(6, 12), torch.cat(make_inputs(20, 30, d_model=6))
    errors = [float((fitted(0.5, refit=refit)(x) - ffn(x)).norm()) for refit in (True, False)]
    assert errors[0] < errors[1]
