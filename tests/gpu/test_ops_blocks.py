"""The rounding kernels against plain torch on the CPU."""

from __future__ import annotations

import pytest
import torch

from ffsplit.ops.blocks import descend, round_block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator with Triton"),
]
SIZES = [(64, 1153, 3), (64, 32, 2), (17, 5, 4), (1, 700, 8), (63, 64, 2)]


@pytest.mark.parametrize(("block", "out", "bits"), SIZES)
def test_a_rounded_block_is_the_same(block: int, out: int, bits: int) -> None:
    values = torch.randn(block, out)
    factor = torch.triu(torch.randn(block, block) * 0.3) + 1.5 * torch.eye(block)
    scale, zero = torch.rand(block, out) * 0.3 + 0.1, torch.randint(0, 2**bits, (block, out)).float()
    device = torch.accelerator.current_accelerator()
    codes, found = torch.zeros(block, out, dtype=torch.uint8), torch.full((block, out), 99, dtype=torch.uint8)
    expected = round_block(values.clone(), factor, scale, zero, bits, codes)
    on_device = found.to(device)
    errors = round_block(values.to(device), factor.to(device), scale.to(device), zero.to(device), bits, on_device)
    # A tie that falls the other way changes what follows in its row; all but a handful of rows are equal.
    same = (on_device.cpu() == codes).all(0)
    assert float(same.float().mean()) > 0.98
    torch.testing.assert_close(errors.cpu()[:, same], expected[:, same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("block", "out", "bits"), SIZES)
def test_a_descent_is_the_same(block: int, out: int, bits: int) -> None:
    root = torch.randn(block, block + 3)
    metric, gradient = root @ root.T / block, torch.randn(block, out)
    scale, zero = torch.rand(block, out) * 0.3 + 0.1, torch.randint(0, 2**bits, (block, out)).float()
    current = torch.randint(0, 2**bits, (block, out)).float()
    device = torch.accelerator.current_accelerator()
    here, there = current.clone(), current.to(device)
    expected = descend(here, gradient.clone(), metric, scale, zero, bits)
    moved = descend(there, gradient.to(device), metric.to(device), scale.to(device), zero.to(device), bits)
    same = (there.cpu() == here).all(0)
    assert float(same.float().mean()) > 0.98
    torch.testing.assert_close(moved.cpu()[:, same], expected[:, same], rtol=1e-4, atol=1e-4)
