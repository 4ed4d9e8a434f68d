from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ffsplit.errors import CheckpointError
from ffsplit.evaluate.size import size_of
from tests.unit.evaluate_helpers import tiny_llama


def test_tied_weights_count_once_and_buffers_count() -> None:
    layer = nn.Linear(8, 8, bias=False)
    model = nn.ModuleList([layer, nn.Linear(8, 8, bias=False), nn.BatchNorm1d(2, affine=False)])
    model[1].weight = layer.weight
    size = size_of(model)
    buffers = 2 * 4 + 2 * 4 + 8
    assert (size.parameters, size.bytes_in_memory, size.buffer_bytes) == (64, 64 * 4 + buffers, buffers)
    assert size.bytes_on_disk is None
    assert size.describe() == "64 parameters, 0.0 MB in memory"


def test_a_buffer_that_is_not_stored_still_takes_memory() -> None:
    model = nn.Module()
    model.register_buffer("cache", torch.zeros(100, dtype=torch.uint8), persistent=False)
    assert size_of(model).bytes_in_memory == 100


def test_a_view_holds_its_whole_storage() -> None:
    model = nn.Module()
    whole = torch.zeros(10, 4)
    model.first, model.second = nn.Parameter(whole[:2]), nn.Parameter(whole[5:])
    size = size_of(model)
    assert (size.parameters, size.bytes_in_memory) == (28, 160)


def test_meta_tensors_are_told_apart() -> None:
    assert size_of(nn.Sequential(nn.Linear(2, 3, device="meta"), nn.Linear(3, 2, device="meta"))).bytes_in_memory == 68


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_measured_without_loading_it(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="4KB")
    files = [file for file in tmp_path.iterdir() if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) > 1
    size, memory = size_of(tmp_path), size_of(model)
    assert size.parameters == memory.parameters
    assert size.bytes_in_memory == 2 * memory.parameters
    assert size.bytes_on_disk == sum(file.stat().st_size for file in files)
    assert size.weight_bytes_on_disk == sum(file.stat().st_size for file in weights)
    assert "MB on disk" in size.describe()


def test_packed_types_and_a_single_file(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"q": torch.zeros(3, 5, dtype=torch.uint8), "s": torch.zeros(2, dtype=torch.float16)}, file)
    size = size_of(str(file))
    assert (size.parameters, size.bytes_in_memory) == (17, 19)


def test_missing_and_damaged_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        size_of(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        size_of(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: damaged"):
        size_of(tmp_path)
