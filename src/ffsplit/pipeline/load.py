"""Loading the model to work on: a hub id, a local folder, or a GGUF file, all through transformers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ffsplit.errors import FFSplitError, ModelError

logger = logging.getLogger(__name__)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "source.spm",
)
# Weights that a finished model may lack: a pooler that training never used, a vector that only training uses.
DISPENSABLE = ("pooler", "masked_spec_embed")


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
        """The class that the checkpoint was saved from, or the bare model when it does not say.

        Raises:
            ModelError: transformers has no class of that name. The bare model in its place would lose the head.
        """
        named = self.config.architectures or ()
        for architecture in named:
            found = getattr(transformers, str(architecture), None)
            if isinstance(found, type) and issubclass(found, PreTrainedModel):
                return found
        if named:
            raise ModelError(
                f"{self.name}: config.json names the architecture {named!r}, which transformers "
                f"{transformers.__version__} does not have"
            )
        if self.gguf_file is not None:
            return transformers.AutoModelForCausalLM  # type: ignore[no-any-return]
        return AutoModel  # type: ignore[no-any-return]

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on the meta device: enough to find FFNs and make a plan.

        Raises:
            ModelError: no model can be built from the configuration.
        """
        config, kind = copy.deepcopy(self.config), self.model_class
        build = getattr(kind, "from_config", None) or kind._from_config
        try:
            with torch.device("meta"):
                return build(config)  # type: ignore[no-any-return]
        except Exception as error:  # a wrong value in config.json surfaces as anything, wherever it is first used
            raise ModelError(f"{self.name}: no model can be built from its config.json: {_named(error)}") from error

    def load(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model with its weights, on the CPU, in eval mode.

        A checkpoint that names a class with a head but holds none of its weights (sentence encoders are saved so) is
        loaded as the bare model: a head of random numbers has no answers.

        Args:
            dtype: of the weights; None keeps the stored one (float32 for GGUF).

        Raises:
            ModelError: the weights cannot be read, or some of the FFN weights are missing in the files.
        """
        wanted: Any = dtype or (torch.float32 if self.gguf_file is not None else "auto")
        model, info = self._load(self.model_class, wanted)
        if _lacks_head(model, info.get("missing_keys", ())):
            logger.info("%s: no head of a %s is in the files; loaded without", self.name, type(model).__name__)
            model, info = self._load(AutoModel, wanted)
        refuse_missing(self.name, model, info.get("missing_keys", ()))
        if self.gguf_file is not None:
            # The weights are plain tensors now; the marks of the file's format would make every tool treat the model
            # as quantised.
            model.hf_quantizer.remove_quantization_config(model)
        return model.eval()  # type: ignore[no-any-return]

    def _load(self, kind: type[Any], dtype: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """What transformers loads, and what it says about it."""
        try:
            return kind.from_pretrained(  # type: ignore[no-any-return]
                self.location, dtype=dtype, output_loading_info=True, **self._options
            )
        except FFSplitError:
            raise
        except Exception as error:  # the readers of each weight format have errors of their own
            raise ModelError(f"{self.name}: transformers could not load the weights: {error}") from error

    def tokenizer(self) -> Any | None:
        """The model's tokenizer, or None when it has none (vision and audio models)."""
        folder = Path(self.location)
        if self.gguf_file is None and folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.location, **self._options)
        except Exception as error:  # damaged tokenizer files surface as anything
            if folder.is_dir():
                raise ModelError(f"{self.name}: the tokenizer cannot be read: {error}") from error
            return None


def open_source(name: str) -> Source:
    """Read a model's configuration, no weights.

    Raises:
        ModelError: no such file, folder or hub id; not a model; already quantised by something else.
    """
    path = Path(name).expanduser()
    if max(map(len, path.parts), default=0) > 255:
        raise ModelError(f"model {name[:60]!r}...: a name of more than 255 characters is no file, folder or hub id")
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
    except FFSplitError:
        raise
    except Exception as error:  # every configuration class checks its fields in its own way
        raise ModelError(f"{name}: no model can be read there: {_named(error)}") from error
    return Source(name, location, gguf_file, config)


def first_line(error: Exception) -> str:
    """The first line of an error's message; the rest is often a page of hints for other situations."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _named(error: Exception) -> str:
    """An error as one line; with its class when the message alone says little (``KeyError: 'gelu2'``)."""
    words = " ".join(str(error).split()) if type(error).__name__.startswith("StrictDataclass") else first_line(error)
    return words if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {words}"


def _lacks_head(model: PreTrainedModel, missing: Iterable[str]) -> bool:
    """Whether all of the head's own weights are missing; a head may have none, tied to the embeddings."""
    body = _body(model)
    head = {name for name, _ in model.named_parameters() if not name.startswith(body)} if body else set()
    return bool(head) and head <= set(missing)


def refuse_missing(name: str, model: PreTrainedModel, missing: Any) -> None:
    """Weights that no file provides were filled with random numbers; only a head may be (it is not ours to change)."""
    lost = (key for key in missing if key.startswith(_body(model)))
    inside = sorted(key for key in lost if not any(word in key for word in DISPENSABLE))
    if inside:
        raise ModelError(
            f"{name}: the checkpoint lacks weights of the model's body, first {inside[0]!r}; refusing to go on"
        )


def refuse_mismatched(name: str, model: PreTrainedModel, mismatched: Any) -> None:
    """Weights of another shape than the configuration's were filled with random numbers; only a head may be.

    Args:
        name: of the model, for the message.
        model: as it was loaded.
        mismatched: (key, shape in the file, shape in the model) of each such weight.
    """
    inside = sorted((key, tuple(old), tuple(new)) for key, old, new in mismatched if key.startswith(_body(model)))
    if inside:
        key, stored, wanted = inside[0]
        raise ModelError(
            f"{name}: {key} has the shape {stored} in the checkpoint and {wanted} by its config.json; refusing to go on"
        )


def _body(model: PreTrainedModel) -> str:
    """What the names of the body's weights begin with. A bare model is its own body, and they have no prefix."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."
