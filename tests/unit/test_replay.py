from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ffsplit.calibrate.cache import TensorCache
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.families import FFNs, find_ffns
from ffsplit.families.forward import evaluating
from tests.tiny import tiny
from tests.unit.family_batches import FAMILIES, SEQ2SEQ, WHOLE, Batch, family_batches, padding_mask, token_ids

CPU = torch.device("cpu")


@torch.no_grad()
def full_forward(
    model: PreTrainedModel, found: FFNs, batch: Batch
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """What hooks see in an ordinary forward: FFN inputs by site and the hidden states of the blocks by path."""
    inputs: dict[str, list[Tensor]] = {site.name: [] for site in found.sites}
    outputs: dict[str, Tensor] = {}
    handles = []
    for site in found.sites:

        def keep_input(_module: nn.Module, args: tuple[Tensor], name: str = site.name) -> None:
            inputs[name].append(args[0].clone())

        handles.append(model.get_submodule(site.up).register_forward_pre_hook(keep_input))
    for block in found.blocks:

        def keep_output(_module: nn.Module, _args: object, output: object, path: str = block.path) -> None:
            outputs[path] = pytree.tree_leaves(output)[0].clone()

        if block.path:
            handles.append(model.get_submodule(block.path).register_forward_hook(keep_output))
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def real_rows(x: Tensor, batch: Batch, *, decoder: bool) -> list[Tensor]:
    """The unpadded rows of a captured input, one tensor a sequence, in the plainest way."""
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    sequences = len(next(iter(batch.values())))
    x = x.reshape(sequences, -1, x.shape[-1])
    return list(x) if mask is None else [rows[keep.bool()] for rows, keep in zip(x, mask, strict=True)]


def _hooks(module: nn.Module) -> tuple[int, int]:
    return len(module._forward_hooks), len(module._forward_pre_hooks)


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Weights, module attributes and hooks of a model must be the same afterwards."""

    def state() -> list[object]:
        return [
            (name, type(module), sorted(module.__dict__), module.training, _hooks(module))
            for name, module in model.named_modules()
        ]

    before, weights = state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert state() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_inputs_and_outputs_are_those_of_an_ordinary_forward(family: str, on_disk: bool, tmp_path: Path) -> None:
    model, batches = tiny(family), family_batches(family)
    found = find_ffns(model)
    assert found.blocks[0].whole_model == (family in WHOLE)
    with untouched(model), evaluating(model), TensorCache(tmp_path if on_disk else None) as cache:
        wanted = [full_forward(model, found, batch) for batch in batches]
        replay = BlockReplay(model, batches, cache, CPU)
        for block in found.blocks:
            for name, store in replay.capture(block).items():
                decoder = family in SEQ2SEQ and ".decoder." in f".{name}"
                rows = [
                    row
                    for batch, (inputs, _) in zip(batches, wanted, strict=True)
                    for x in inputs[name]
                    for row in real_rows(x, batch, decoder=decoder)
                ]
                assert store.tokens == sum(map(len, rows)) > 0
                assert all(torch.equal(a, b) for a, b in zip(store, rows, strict=True))
                store.drop()
            replay.advance(block)
            if block.path:
                for index, (_, outputs) in enumerate(wanted):
                    assert torch.equal(replay.block_output(block, index), outputs[block.path])


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "whisper"])
def test_a_changed_block_changes_what_follows(family: str) -> None:
    """Capture after a block was altered equals a full forward of the altered model."""
    model, batches = tiny(family), family_batches(family)
    found = find_ffns(model)
    with evaluating(model), TensorCache() as cache:
        replay = BlockReplay(model, batches, cache, CPU)
        first, second = found.blocks[:2]
        with torch.no_grad():
            model.get_submodule(first.sites[0].down).weight.mul_(-2)
        replay.advance(first)
        (store,) = replay.capture(second).values()
        name = second.sites[0].name
        rows = [
            row
            for batch in batches
            for x in full_forward(model, found, batch)[0][name]
            for row in real_rows(x, batch, decoder=False)
        ]
        assert all(torch.equal(a, b) for a, b in zip(store, rows, strict=True))


def test_outputs_do_not_go_on() -> None:
    model, batches = tiny("llama"), family_batches("llama")
    found = find_ffns(model)
    with untouched(model), evaluating(model), TensorCache() as cache:
        replay = BlockReplay(model, batches, cache, CPU)
        first = list(replay.outputs(found.blocks[0]))
        again = list(replay.outputs(found.blocks[0], limit=1))
        assert [index for index, _ in first] == [0, 1]
        assert torch.equal(first[0][1], again[0][1])
        replay.advance(found.blocks[0])
        assert torch.equal(replay.block_output(found.blocks[0], 1), first[1][1])


def test_progress_counts_batches() -> None:
    model, batches = tiny("llama"), family_batches("llama", count=3)
    seen: list[tuple[str, int, int]] = []
    with evaluating(model), TensorCache() as cache:
        block = find_ffns(model).blocks[0]
        replay = BlockReplay(model, batches, cache, CPU, lambda *call: seen.append(call))
        replay.capture(block)
        replay.advance(block)
    assert seen == [(f"{what} model.layers.0", n, 3) for what in ("capture", "advance") for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("family", "stage"),
    [("llama", "capture"), ("t5", "capture"), ("albert", "capture"), ("llama", "advance"), ("t5", "advance")],
)
def test_an_exception_leaves_nothing_behind(family: str, stage: str) -> None:
    model, batches = tiny(family), family_batches(family)
    found = find_ffns(model)
    block = found.blocks[-1]

    def fail(_module: nn.Module, _args: object) -> None:
        raise ZeroDivisionError

    handle = model.get_submodule(block.sites[0].up).register_forward_pre_hook(fail)
    with untouched(model), evaluating(model), TensorCache() as cache:
        replay = BlockReplay(model, batches, cache, CPU)
        for done in found.blocks[:-1]:
            replay.advance(done)
        with pytest.raises(ZeroDivisionError):
            getattr(replay, stage)(block)
    handle.remove()
    model(**batches[0])


def test_a_block_that_is_never_reached_is_an_error() -> None:
    model = tiny("bart")
    found = find_ffns(model)
    with untouched(model), TensorCache() as cache:
        encoder_only = BlockReplay(model.get_encoder(), family_batches("bert"), cache, CPU)
        decoder_block = found.blocks[-1]
        encoder_only.model = model
        # The decoder's blocks do not run when the encoder's outputs are all that is asked for.
        model.forward = model.get_encoder().forward  # type: ignore[method-assign]
        try:
            with pytest.raises(RuntimeError, match=r"never reached model\.decoder\.layers\.1"):
                encoder_only.advance(decoder_block)
        finally:
            del model.forward


def test_a_block_with_a_forward_of_its_own_that_works_in_place() -> None:
    """accelerate gives modules a forward of their own; some families add to the residual stream in place."""
    model, batches = tiny("llama"), family_batches("llama")
    for layer in model.model.layers:

        def forward(hidden_states: Tensor, *args: object, _layer: nn.Module = layer, **kwargs: object) -> Tensor:
            change = type(_layer).forward(_layer, hidden_states, *args, **kwargs) - hidden_states
            return hidden_states.add_(change)

        layer.forward = forward
    found = find_ffns(model)
    own = [layer.forward for layer in model.model.layers]
    with untouched(model), evaluating(model), TensorCache() as cache:
        wanted = [full_forward(model, found, batch) for batch in batches]
        replay = BlockReplay(model, batches, cache, CPU)
        for block in found.blocks:
            list(replay.outputs(block))
            (store,) = replay.capture(block).values()
            rows = [row for inputs, _ in wanted for x in inputs[block.sites[0].name] for row in x]
            assert all(torch.equal(a, b) for a, b in zip(store, rows, strict=True))
            replay.advance(block)
        assert torch.equal(replay.block_output(found.blocks[-1], 1), wanted[1][1][found.blocks[-1].path])
    assert all(layer.forward is forward for layer, forward in zip(model.model.layers, own, strict=True))


def test_padding_changes_nothing() -> None:
    """The rows of a sequence are the same whether it is padded in a batch or alone."""
    model, ids = tiny("bert"), token_ids(2, 20)
    found = find_ffns(model)
    mask = padding_mask(20, 11, columns=20)
    together = [{"input_ids": ids * mask, "attention_mask": mask}]
    alone = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :11]}]
    captured = []
    for batches in (together, alone):
        with TensorCache() as cache:
            replay = BlockReplay(model, batches, cache, CPU)
            replay.advance(found.blocks[0])
            captured.append(list(*replay.capture(found.blocks[1]).values()))
    assert [len(rows) for rows in captured[0]] == [20, 11]
    for padded, plain in zip(*captured, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)
