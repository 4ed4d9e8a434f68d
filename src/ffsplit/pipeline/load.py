"""Loading the model to work on: a hub id, a local folder, or a GGUF file, all through transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ffsplit.errors import ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "source.spm")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, with its configuration already read.

    Attributes:
        name: as the user gave it.
        location: hub id or folder for `from_pretrained`.
        gguf_file: name of the GGUF file inside ``location``, or None.
        config: the model's configuration.
    """

    name: str
    location: str
    gguf_file: str | None
    config: PreTrainedConfig

    @property
    def _options(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class that the checkpoint was saved from, or the bare model when it does not say."""
        for architecture in self.config.architectures or ():
            found = getattr(transformers, architecture, None)
            if found is not None:
                return found  # type: ignore[no-any-return]
        if self.gguf_file is not None:
            return transformers.AutoModelForCausalLM  # type: ignore[no-any-return]
        return AutoModel  # type: ignore[no-any-return]

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on the meta device: enough to find FFNs and make a plan."""
        config = copy.deepcopy(self.config)
        with torch.device("meta"):
            build = getattr(self.model_class, "from_config", None) or self.model_class._from_config
            return build(config)  # type: ignore[no-any-return]

    def load(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model with its weights, on the CPU, in eval mode.

        Args:
            dtype: of the weights; None keeps the stored one (float32 for GGUF).

        Raises:
            ModelError: the weights cannot be read, or some of the FFN weights are missing in the files.
        """
        wanted: Any = dtype or (torch.float32 if self.gguf_file is not None else "auto")
        try:
            model, info = self.model_class.from_pretrained(
                self.location, dtype=wanted, output_loading_info=True, **self._options
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelError(f"{self.name}: transformers could not load the weights: {error}") from error
        _refuse_missing(self.name, model, info.get("missing_keys", ()))
        if self.gguf_file is not None:
            # The weights are plain tensors now; the marks of the file's format would make every tool treat the model
            # as quantised.
            model.hf_quantizer.remove_quantization_config(model)
        return model.eval()  # type: ignore[no-any-return]

    def tokenizer(self) -> Any | None:
        """The model's tokenizer, or None when it has none (vision and audio models)."""
        folder = Path(self.location)
        if self.gguf_file is None and folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.location, **self._options)
        except (OSError, ValueError, KeyError) as error:
            if folder.is_dir():
                raise ModelError(f"{self.name}: the tokenizer cannot be read: {error}") from error
            return None


def open_source(name: str) -> Source:
    """Read a model's configuration, no weights.

    Raises:
        ModelError: no such file, folder or hub id; not a model; already quantised by something else.
    """
    path = Path(name).expanduser()
    location, gguf_file = str(path), None
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise ModelError(f"{name}: no such GGUF file")
        if path.suffix != ".gguf":
            raise ModelError(
                f"{name}: a model is a hub id, a folder or a .gguf file, not a {path.suffix or 'plain'} file"
            )
        location, gguf_file = str(path.parent), path.name
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: the folder holds no config.json, so it is not a transformers checkpoint")
    else:
        location = name
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config = AutoConfig.from_pretrained(location, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{name}: no model can be read there: {first_line(error)}") from error
    return Source(name, location, gguf_file, config)


def first_line(error: Exception) -> str:
    """The first line of an error's message; the rest is often a page of hints for other situations."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _refuse_missing(name: str, model: PreTrainedModel, missing: Any) -> None:
    """Weights that no file provides were filled with random numbers; only a head may be (it is not ours to change)."""
    base = model.base_model_prefix
    inside = sorted(key for key in missing if key.startswith(f"{base}.") and "pooler" not in key)
    if inside:
        raise ModelError(
            f"{name}: the checkpoint lacks weights of the model's body, first {inside[0]!r}; refusing to go on"
        )
