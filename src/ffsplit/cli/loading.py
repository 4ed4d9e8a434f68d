"""Loading models to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffsplit.cli import checks
from ffsplit.cli.console import say
from ffsplit.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ffsplit.pipeline.load import Source


@dataclass(frozen=True)
class Settings:
    """Where and as what models are loaded."""

    device: torch.device
    dtype: torch.dtype | None

    def load(self, source: Source) -> PreTrainedModel:
        """A model with its weights, on the device."""
        say(f"loading {source.name}")
        model: Any = source.load(self.dtype)
        return model.to(self.device)  # type: ignore[no-any-return]


def settings(device: str | None, dtype: str | None) -> Settings:
    """Check the options."""
    weights = checks.torch_dtype(dtype)
    return Settings(checks.torch_device(device), weights)


def source(name: str) -> Source:
    """A model's configuration, no weights."""
    register()
    from ffsplit.pipeline.load import open_source

    checks.check_model_name(name)
    return open_source(name)


def register() -> None:
    """Let transformers know the format of compressed checkpoints."""
    import ffsplit.checkpoint.quantizer  # noqa: F401


def disk_bytes(name: str) -> dict[str, int] | None:
    """Bytes of a local model's files: all, and its weights alone; None for a hub id."""
    from ffsplit.evaluate.size import size_of

    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return {"all": path.stat().st_size, "weights": path.stat().st_size}
    if not path.is_dir() or not any(path.rglob("*.safetensors")):
        return None
    stored = size_of(path)
    return {"all": stored.bytes_on_disk or 0, "weights": stored.weight_bytes_on_disk or 0}


def is_ffsplit(directory: str) -> bool:
    """Whether a folder holds a checkpoint in ffsplit's format."""
    stored = checks.stored_config(directory).get("quantization_config")
    return isinstance(stored, dict) and stored.get("quant_method") == "ffsplit"


def require_ffsplit(directory: str) -> None:
    """Refuse a folder that holds another kind of checkpoint.

    Raises:
        ModelError: there is none, or it is not in ffsplit's format.
    """
    path = Path(directory).expanduser()
    if not (path / "config.json").is_file():
        raise ModelError(f"{directory}: the folder holds no config.json, so it is not a checkpoint")
    if not is_ffsplit(directory):
        raise ModelError(f"{directory}: is not in ffsplit's format; it loads in plain transformers as it is")
