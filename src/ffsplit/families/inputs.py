"""Tiny inputs for any transformers model, built from its config and the signature of its ``forward``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOKENS = 8
_SUB_CONFIGS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "encoder_config", "speech_config")


def candidate_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Keyword arguments for ``model.forward`` to be tried in order: one short sequence, one image, one sound.

    First everything that the signature names and this file can make, then the main input alone (a multimodal decoder
    rejects an image that no token refers to).
    """
    known = inspect.signature(model.forward).parameters
    switches = {"use_cache": False} if "use_cache" in known else {}
    names = [name for name in _MAKERS if name in known]
    main = [name for name in names if name in (model.main_input_name, "decoder_input_ids", "bbox")]
    text = [name for name in names if name in ("input_ids", "decoder_input_ids")]
    seen: list[list[str]] = []
    for chosen in (names, main, text):
        if not chosen or chosen in seen:
            continue
        seen.append(chosen)
        for values in product(*(_MAKERS[name](model) for name in chosen)):
            yield {**dict(zip(chosen, values, strict=True)), **switches}


def _settings(model: PreTrainedModel, *names: str) -> list[Any]:
    """What the config, or else its sub-configs, say under the first of the names that any of them has set."""
    configs = [model.config]
    configs += [sub for name in _SUB_CONFIGS if (sub := getattr(model.config, name, None)) is not None]
    for name in names:
        values = [config.get(name) if isinstance(config, dict) else getattr(config, name, None) for config in configs]
        if found := [value for value in values if value is not None]:
            return found
    return []


def _setting(model: PreTrainedModel, *names: str) -> Any:
    return next(iter(_settings(model, *names)), None)


def _device(model: PreTrainedModel) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device  # see `skeleton`


def _token_ids(model: PreTrainedModel) -> list[Tensor]:
    vocabulary = min((int(size) for size in _settings(model, "vocab_size")), default=2 * TOKENS)
    ids = torch.arange(TOKENS) * 7 % max(vocabulary - 5, 1) + min(5, vocabulary - 1)
    end = _setting(model, "eos_token_id")
    end = end[0] if isinstance(end, (list, tuple)) else end
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[-1] = end  # sequence classifiers of the BART kind read the position of the end token
    return [ids.unsqueeze(0).to(_device(model))]


def _wave(model: PreTrainedModel, *shape: int) -> Tensor:
    """Numbers between -1 and 1 without a pattern; no random generator is touched."""
    size = int(torch.Size(shape).numel())
    values = torch.sin(torch.arange(size, dtype=torch.float32) * 12.9898).mul(43.758).frac()
    return values.reshape(shape).to(device=_device(model), dtype=model.dtype)


def _pixels(model: PreTrainedModel) -> list[Tensor]:
    channels = int(_setting(model, "num_channels", "in_channels", "in_chans") or 3)
    size = _setting(model, "image_size", "input_size", "img_size") or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else next(iter(size.values()))
    height, width = (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))
    image = _wave(model, 1, channels, height, width)
    frames = _setting(model, "num_frames")
    return [image] if frames is None else [image.expand(int(frames), -1, -1, -1).unsqueeze(0), image]


def _spectrogram(model: PreTrainedModel) -> list[Tensor]:
    """``[1, bins, frames]`` (Whisper) and ``[1, frames, bins]`` (most others)."""
    bins = int(_setting(model, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim") or 80)
    positions = _setting(model, "max_source_positions", "max_length")
    frames = 2 * int(positions) if positions is not None else 64
    return [_wave(model, 1, bins, frames), _wave(model, 1, min(frames, 64), bins), _wave(model, 1, frames, bins)]


def _sound(model: PreTrainedModel) -> list[Tensor]:
    """Raw audio, long enough for the usual strides; some take a spectrogram under the same name."""
    bins, frames = _setting(model, "num_mel_bins"), _setting(model, "max_length")
    spectrogram = [_wave(model, 1, int(frames), int(bins))] if bins is not None and frames is not None else []
    return [*spectrogram, _wave(model, 1, 4000)]


def _boxes(model: PreTrainedModel) -> list[Tensor]:
    return [torch.arange(4, device=_device(model)).expand(1, TOKENS, 4).contiguous()]


_MAKERS: dict[str, Callable[[PreTrainedModel], list[Tensor]]] = {
    "input_ids": _token_ids,
    "decoder_input_ids": _token_ids,
    "pixel_values": _pixels,
    "input_features": _spectrogram,
    "input_values": _sound,
    "bbox": _boxes,
}
