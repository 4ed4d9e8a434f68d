from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffsplit.calibrate.cache import Activations, TensorCache


@pytest.fixture(params=["memory", "disk"])
def parent(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "below" / "cache" if request.param == "disk" else None


def test_what_is_put_comes_back(parent: Path | None) -> None:
    tensors = [
        torch.randn(3, 4),
        torch.randn(4, 2).bfloat16(),
        torch.tensor([True, False]),
        torch.empty(0, dtype=torch.bool),
        torch.arange(6).view(2, 3).T,
        torch.tensor(3.5),
    ]
    with TensorCache(parent) as cache:
        cache.put("some.list-0", tensors)
        found = cache.get("some.list-0")
        assert [t.dtype for t in found] == [t.dtype for t in tensors]
        assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
        cache.put("some.list-0", tensors[:1])
        assert len(cache.get("some.list-0")) == 1
        with pytest.raises(KeyError):
            cache.get("some.list-1")


def test_order_survives_more_than_ten_tensors(parent: Path | None) -> None:
    with TensorCache(parent) as cache:
        cache.put("many", [torch.tensor([number]) for number in range(12)])
        assert [int(tensor) for tensor in cache.get("many")] == list(range(12))


def test_one_tensor_twice_and_parts_of_one(parent: Path | None) -> None:
    whole = torch.arange(10.0)
    with TensorCache(parent) as cache:
        cache.put("key", [whole, whole, whole[2:7], whole[4:]])
        assert [tensor.sum().item() for tensor in cache.get("key")] == [45, 45, 20, 39]


def test_later_changes_do_not_reach_the_cache(parent: Path | None) -> None:
    x = torch.ones(4)
    with TensorCache(parent) as cache:
        cache.put("key", [x])
        x.mul_(5)
        assert cache.get("key")[0].tolist() == [1, 1, 1, 1]


def test_what_was_read_may_be_written_back(parent: Path | None) -> None:
    """A block that hands on what it was given: on disk, the file that is read is the one that is replaced."""
    with TensorCache(parent) as cache:
        cache.put("key", [torch.arange(5000.0), torch.ones(3)])
        for _ in range(3):
            first, second = cache.get("key")
            cache.put("key", [second, first])
        assert torch.equal(cache.get("key")[1], torch.arange(5000.0))


def test_drop_forgets_a_prefix_only(parent: Path | None) -> None:
    with TensorCache(parent) as cache:
        for key in ("in-1-0", "in-1-1", "in-10-0", "block-x-0"):
            cache.put(key, [torch.ones(1)])
        cache.drop("in-1-")
        for key in ("in-1-0", "in-1-1"):
            with pytest.raises(KeyError):
                cache.get(key)
        assert len(cache.get("in-10-0")) == len(cache.get("block-x-0")) == 1


def test_the_directory_is_gone_at_the_end_and_its_neighbours_are_not(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")

    def fail() -> None:
        with TensorCache(tmp_path) as cache, TensorCache(tmp_path) as other:
            cache.put("key", [torch.zeros(2)])
            other.put("key", [torch.ones(2)])
            assert len(list(tmp_path.glob("ffsplit-cache-*/*.safetensors"))) == 2
            assert cache.get("key")[0].sum() == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_activations_skip_empty_chunks_and_can_be_read_twice(parent: Path | None) -> None:
    chunks = [torch.randn(rows, 4) for rows in (3, 0, 5)]
    with TensorCache(parent) as cache:
        store = Activations(cache, "in-0-")
        for chunk in chunks:
            store.append(chunk)
        assert (len(store), store.tokens) == (2, 8)
        for _ in range(2):
            assert [torch.equal(a, b) for a, b in zip(store, [chunks[0], chunks[2]], strict=True)] == [True, True]
        store.drop()
        assert (len(store), store.tokens, list(store)) == (0, 0, [])
        with pytest.raises(KeyError):
            cache.get("in-0-0")


def test_two_stores_in_one_cache(parent: Path | None) -> None:
    with TensorCache(parent) as cache:
        first, second = Activations(cache, "in-0-"), Activations(cache, "in-1-")
        first.append(torch.zeros(2, 3))
        second.append(torch.ones(2, 3))
        first.drop()
        assert [float(chunk.mean()) for chunk in second] == [1.0]
