"""Logits at chosen positions, a chunk of tokens at a time, so that a large vocabulary fits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffsplit.families.head import call as call
from ffsplit.families.head import device_of as device_of
from ffsplit.families.head import last_hidden_state, probe_head

CHUNK_ELEMENTS = 1 << 25
_PROBE_TOKENS = 16


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
        self.by_head, self.vocabulary = probe_head(model, _to(short, self.device))

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


def pieces(tensor: Tensor, size: int) -> list[Tensor]:
    """The tensor cut along its first axis, ``size`` at a time."""
    return [tensor[start : start + size] for start in range(0, tensor.shape[0], size)]


def _to(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}
