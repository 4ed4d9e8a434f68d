"""Bytes and parameters of a model in memory and of a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ffsplit.errors import CheckpointError

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a model takes.

    Attributes:
        parameters: elements of distinct parameters; for a folder, of all stored tensors. A packed tensor counts its
            bytes, not the weights inside: ask the plan for those.
        bytes_in_memory: of distinct storages, buffers included, tied weights once; for a folder, of its tensors.
        buffer_bytes: the buffers' share of that; for a folder 0, a file does not tell buffers from parameters.
        bytes_on_disk: of all files of the folder; ``None`` for a model in memory.
        weight_bytes_on_disk: of its safetensors files alone.
    """

    parameters: int
    bytes_in_memory: int
    buffer_bytes: int = 0
    bytes_on_disk: int | None = None
    weight_bytes_on_disk: int | None = None

    def describe(self) -> str:
        """One line."""
        disk = "" if self.bytes_on_disk is None else f", {_mega(self.bytes_on_disk)} on disk"
        return f"{self.parameters:,} parameters, {_mega(self.bytes_in_memory)} in memory{disk}"


def size_of(model: nn.Module | str | Path) -> Size:
    """The size of a model in memory, or of a checkpoint folder (or one safetensors file) without loading it.

    Raises:
        CheckpointError: the folder is missing, holds no safetensors file, or one is damaged.
    """
    return _in_memory(model) if isinstance(model, nn.Module) else _on_disk(Path(model))


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors, each counted whole and once."""
    # _cdata tells storages apart on the meta device too, where all data pointers are 0.
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def _in_memory(model: nn.Module) -> Size:
    everything = unique_bytes(chain(model.parameters(), model.buffers()))
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes_in_memory=everything,
        buffer_bytes=everything - unique_bytes(model.parameters()),
    )


def _on_disk(path: Path) -> Size:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        state = "holds no safetensors file" if path.exists() else "does not exist"
        raise CheckpointError(f"size of {str(path)!r}: {state}")
    tensors = [_stored(file) for file in weights]
    return Size(
        parameters=sum(elements for elements, _ in tensors),
        bytes_in_memory=sum(size for _, size in tensors),
        bytes_on_disk=sum(file.stat().st_size for file in files),
        weight_bytes_on_disk=sum(file.stat().st_size for file in weights),
    )


def _stored(file: Path) -> tuple[int, int]:
    """Elements and bytes of one safetensors file, from its header."""
    elements = size = 0
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - not a mapping
                tensor = content.get_slice(name)
                count = prod(tensor.get_shape())
                elements += count
                size += count * _DTYPE_BYTES[tensor.get_dtype()]
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged, or stores a type this version does not know ({error})") from error
    return elements, size


def _mega(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
