"""The output head of a language model: whether it is one matrix, and calling a model without its cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

# Settings by which a model changes its logits after the output embedding. A probe finds the change too, unless the
# probe's logits are so small that a soft cap does nothing to them.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


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


def last_hidden_state(body: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch seq_len d_model"]:
    """The last hidden state of a model without a head."""
    states: Tensor = call(body, inputs).last_hidden_state
    return states


@torch.no_grad()
def probe_head(model: PreTrainedModel, probe: Mapping[str, Tensor]) -> tuple[bool, int]:
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
