"""The language-model loss of a model on its calibration text, and its gradient with respect to masks on the FFNs."""

from __future__ import annotations

from contextlib import ExitStack, closing

import torch
from jaxtyping import Bool
from torch import Tensor

from ffsplit.budget.dropper import Score
from ffsplit.budget.scene import Scene
from ffsplit.calibrate.batches import is_causal
from ffsplit.calibrate.gradients import parameters_at_rest
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.errors import ModelError
from ffsplit.families.blocks import Block
from ffsplit.ops.likelihood import next_token_losses


def check_causal(scene: Scene, metric: str) -> None:
    """Raise ModelError where the text itself says no loss: encoders, encoder-decoder models, models without a head."""
    reads_tokens = all("input_ids" in batch for batch in scene.data.batches)
    if not is_causal(scene.model) or not reads_tokens:
        raise ModelError(
            f"metric={metric!r} needs a language model that predicts the next token of its text; "
            f"{type(scene.model).__name__} does not. Use kl, js or cosine, which compare with the dense model"
        )


def mean_loss(scene: Scene, batches: int) -> Score:
    """The mean next-token loss over the sequences of some batches; infinite where it is NaN."""
    data = scene.batches(batches)

    def score(replay: BlockReplay, block: Block) -> float:
        losses = []
        for index, output in replay.finish(block):
            ids = data[index]["input_ids"].to(scene.device)
            losses.append(next_token_losses(output.logits, ids, _real(data[index], ids)))  # type: ignore[attr-defined]
        value = float(torch.cat(losses).double().mean())
        return value if value == value else float("inf")

    return score


def mask_gradients(scene: Scene, batches: int | None = None) -> list[float]:
    """``E |dL / d mask|`` of every FFN, then of every attention: one backward pass a batch through the dense model.

    The mask of one multiplies its output and is 1; ``L`` is the mean next-token loss of a sequence, and the
    expectation is over sequences.

    Raises:
        ModelError: the model has no such loss, or does not fit on the device as a whole.

    Reference: 2005.00561 (after Michel et al. 2019), for whole FFNs.
    """
    totals, sequences = [0.0] * len(scene.sub_layers), 0
    with closing(scene.walk(batches, "mask gradients", to_the_end=True)) as walk, parameters_at_rest(scene.model):
        _, replay = next(walk)
        if any(parameter.device.type != scene.device.type for parameter in scene.model.parameters()):
            raise ModelError("metric='mask-gradient' needs the whole model on the device, which is too small for it")
        for index in range(len(replay.batches)):
            gradients = _batch_gradients(scene, replay, index)
            for place, chunks in enumerate(gradients):
                totals[place] += sum(abs(float(chunk.double().sum())) for chunk in chunks)
            sequences += len(scene.data.batches[index]["input_ids"])
    return [total / sequences for total in totals]


@torch.enable_grad()
def _batch_gradients(scene: Scene, replay: BlockReplay, index: int) -> list[list[Tensor]]:
    """For each sub-layer and sequence of a batch, the loss's gradient with respect to a mask at every real token."""
    batch = {name: tensor.to(scene.device) for name, tensor in scene.data.batches[index].items()}
    masks: list[list[Tensor]] = [[] for _ in scene.sub_layers]

    def masking(place: int, output: Tensor) -> Tensor:
        mask = torch.ones(*output.shape[:-1], 1, device=output.device, requires_grad=True)
        masks[place].append(mask)
        return (output * mask).to(output.dtype)

    with ExitStack() as stack:
        for place, site in enumerate(scene.sub_layers):
            down = scene.model.get_submodule(site.down)
            handle = down.register_forward_hook(lambda _module, _args, output, place=place: masking(place, output))
            stack.callback(handle.remove)
        logits = scene.model(**batch).logits
    loss = next_token_losses(logits, batch["input_ids"], _real(batch, batch["input_ids"])).sum()
    found = iter(torch.autograd.grad(loss, [mask for row in masks for mask in row]))
    gradients = []
    for site, row in zip(scene.sub_layers, masks, strict=True):
        if not row:
            raise ModelError(f"{site.name}: the calibration text never reached it")
        summed = torch.stack([next(found) for _ in row]).sum(0)  # a shared FFN runs more than once
        gradients.append(list(replay.rows(index, site, summed)))
    return gradients


def _real(batch: dict[str, Tensor], ids: Tensor) -> Bool[Tensor, "batch tokens"]:
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
