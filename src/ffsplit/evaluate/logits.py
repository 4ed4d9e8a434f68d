"""Logits at chosen positions, a chunk of tokens at a time, so that a large vocabulary fits in memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK_ELEMENTS = 1 << 25
_PROBE_TOKENS = 16
# Settings by which a model changes its logits after the output embedding. A probe finds the change too, unless the
# probe's logits are so small that a soft cap does nothing to them.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True, eq=False)
class Query:
    """One batch of model inputs and what to predict from it.

    Attributes:
        inputs: the model's keyword arguments; ``input_ids`` is ``[batch, seq_len]``.
        positions: where to read logits, as indices into the flattened ``[batch * seq_len]``.
        targets: the id to be predicted at each of them.
    """

    inputs: Mapping[str, Tensor]
    positions: Int[Tensor, " predicted"]
    targets: Int[Tensor, " predicted"]


class LogitReader:
    """Reads a language model's logits in chunks, through the output embedding alone where that is exact.

    The body runs once per batch. Where ``output embedding(last hidden state)`` equals the model's own logits on a
    short probe, only a chunk of the logits exists at any time; otherwise (soft-capped or scaled logits, a head with
    more than one layer) the model's own logits of the batch are computed whole and then read in chunks.
    """

    def __init__(self, model: PreTrainedModel, probe: Mapping[str, Tensor]) -> None:
        """Probe the model with the first few tokens of ``probe``; the model must be in evaluation mode."""
        self.model = model
        self.device = device_of(model)
        short = {name: tensor[:1, :_PROBE_TOKENS] for name, tensor in probe.items()}
        self.by_head, self.vocabulary = _probe_head(model, _to(short, self.device))

    @torch.no_grad()
    def chunks(self, query: Query, size: int) -> Iterator[Float[Tensor, "tokens vocab"]]:
        """Float32 logits at the query's positions, in order, ``size`` tokens at a time."""
        inputs = _to(query.inputs, self.device)
        if self.by_head:
            head: nn.Module = self.model.get_output_embeddings()
            states = last_hidden_state(self.model.base_model, inputs)
        else:
            head = nn.Identity()
            states = call(self.model, inputs).logits
        flat = states.flatten(0, 1)
        for positions in pieces(query.positions.to(flat.device), size):
            logits: Tensor = head(flat[positions])
            yield logits.float()


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the input embedding, also when a model is spread over several."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def call(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model without its key-value cache, which an evaluation never reads."""
    parameters = inspect.signature(module.forward).parameters
    # A wrapper (a compiled model, the decoder inside BartForCausalLM) takes *args and hands on what it is given.
    wrapper = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values())
    has_cache = "use_cache" in parameters or (wrapper and hasattr(getattr(module, "config", None), "use_cache"))
    return module(**inputs, use_cache=False) if has_cache else module(**inputs)


def pieces(tensor: Tensor, size: int) -> list[Tensor]:
    """The tensor cut along its first axis, ``size`` at a time."""
    return [tensor[start : start + size] for start in range(0, tensor.shape[0], size)]


def last_hidden_state(body: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch seq_len d_model"]:
    """The last hidden state of a model without a head."""
    states: Tensor = call(body, inputs).last_hidden_state
    return states


def _to(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.no_grad()
def _probe_head(model: PreTrainedModel, probe: Mapping[str, Tensor]) -> tuple[bool, int]:
    """Whether the output embedding of the body's last hidden state is all there is to the logits; their number."""
    logits: Tensor = call(model, probe).logits.float()
    vocabulary = logits.shape[-1]
    head, body = model.get_output_embeddings(), model.base_model
    if not isinstance(head, nn.Linear) or body is model:
        return False, vocabulary
    config = model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _AFTER_HEAD):
        return False, vocabulary
    states = getattr(call(body, probe), "last_hidden_state", None)
    if not isinstance(states, Tensor) or states.shape[-1] != head.in_features:
        return False, vocabulary
    ours = head(states).float()
    exact_to = 1e-5 if states.dtype in (torch.float32, torch.float64) else 2e-2
    same = ours.shape == logits.shape and bool((logits - ours).abs().max() <= exact_to * logits.abs().max())
    return same, vocabulary
