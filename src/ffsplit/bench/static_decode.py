"""Greedy decoding as one recorded graph a token, over a cache of fixed size: what serving engines do on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from ffsplit.bench.graphs import WARMUP, captured
from ffsplit.bench.roofline import seconds_of
from ffsplit.errors import ModelError
from ffsplit.evaluate.logits import device_of
from ffsplit.timing import Clock


class StaticDecode:
    """Decodes the same tokens over and over from one prompt; each turn starts behind it."""

    def __init__(
        self, model: PreTrainedModel, prompt: Int[Tensor, "batch seq_len"], new_tokens: int, *, graph: bool = True
    ) -> None:
        """Run the prompt and record one token.

        Args:
            model: with the FFNs that are to be recorded in place.
            prompt: token ids.
            new_tokens: a turn decodes so many.
            graph: record the step; False runs it again and again instead.

        Raises:
            ModelError: the model's cache keeps a window, whose position no graph can hold.
            RuntimeError: the step cannot be recorded.
        """
        ids = prompt.to(device_of(model))
        room = ids.shape[1] + max(new_tokens, WARMUP + 1)
        cache: Any = StaticCache(config=model.config, max_cache_len=room)
        if any(layer.is_sliding for layer in cache.layers):
            raise ModelError(f"{type(model).__name__} keeps a sliding window, which is decoded without a graph")
        self._model, self._cache, self._start, self._new_tokens = model, cache, ids.shape[1], new_tokens
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        self._first = logits[:, -1:].argmax(-1)
        self._token = self._first.clone()
        self._step = captured(self._decode, ids.device) if graph else self._decode

    def _decode(self) -> None:
        output = self._model(input_ids=self._token, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._token.copy_(output.logits[:, -1:].argmax(-1))

    def _rewind(self) -> None:
        self._token.copy_(self._first)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._start)

    def tokens(self) -> Int[Tensor, "batch new_tokens"]:
        """The decoded tokens, those after the prompt's own next one."""
        self._rewind()
        found = []
        for _ in range(self._new_tokens):
            self._step()
            found.append(self._token.clone())
        return torch.cat(found, dim=1)

    def seconds(self, clock: Clock) -> float:
        """Mean time of a token over one turn."""
        self._rewind()

        def turn() -> None:
            for _ in range(self._new_tokens):
                self._step()

        return seconds_of(turn, self._token.device, clock) / self._new_tokens
