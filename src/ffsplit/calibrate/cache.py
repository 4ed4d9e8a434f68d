"""A cache of tensors in memory or on disk: activations waiting for the next layer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor


class TensorCache:
    """Lists of tensors under string keys, kept in the memory of a device or, with a directory, on disk.

    Args:
        parent: a directory of the cache's own is created below it and removed by :meth:`close`; files are safetensors.
        device: where tensors wait when there is no directory.
    """

    def __init__(self, parent: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        self._device = torch.device("cpu" if parent is not None else device)
        self._memory: dict[str, list[Tensor]] = {}
        self._directory: Path | None = None
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
            self._directory = Path(tempfile.mkdtemp(prefix="ffsplit-cache-", dir=parent))

    def _file(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{key}.safetensors"

    def put(self, key: str, tensors: Sequence[Tensor]) -> None:
        """Store a list of tensors, replacing what was there."""
        # Copies: what was handed over may be a part of something larger, or be worked on in place later.
        kept = [tensor.detach().to(self._device, copy=True).contiguous() for tensor in tensors]
        if self._directory is None:
            self._memory[key] = kept
        else:
            save_file({str(index): tensor for index, tensor in enumerate(kept)}, self._file(key))

    def get(self, key: str) -> list[Tensor]:
        """The list stored under a key. Raises KeyError when there is none."""
        if self._directory is None:
            return self._memory[key]
        if not self._file(key).exists():
            raise KeyError(key)
        stored = load_file(self._file(key))
        return [stored[str(index)] for index in range(len(stored))]

    def drop(self, prefix: str) -> None:
        """Forget every key that starts with ``prefix``."""
        for key in [key for key in self._memory if key.startswith(prefix)]:
            del self._memory[key]
        if self._directory is not None:
            for file in self._directory.glob(f"{prefix}*.safetensors"):
                file.unlink()

    def close(self) -> None:
        """Forget everything and remove the directory."""
        self._memory.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> TensorCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Activations:
    """The inputs of one FFN: one ``[tokens, d_model]`` chunk a sequence, padded positions already removed."""

    def __init__(self, cache: TensorCache, prefix: str) -> None:
        self._cache = cache
        self._prefix = prefix
        self._lengths: list[int] = []

    def append(self, chunk: Float[Tensor, "tokens d_model"]) -> None:
        """Add the rows of one sequence; an empty one is skipped."""
        if chunk.shape[0]:
            self._cache.put(f"{self._prefix}{len(self._lengths)}", [chunk])
            self._lengths.append(chunk.shape[0])

    @property
    def tokens(self) -> int:
        return sum(self._lengths)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[Float[Tensor, "tokens d_model"]]:
        for index in range(len(self._lengths)):
            yield self._cache.get(f"{self._prefix}{index}")[0]

    def drop(self) -> None:
        """Free the chunks."""
        self._cache.drop(self._prefix)
        self._lengths.clear()
