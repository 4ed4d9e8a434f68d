"""The proof that a graph is the model: ONNX Runtime's outputs beside torch's, on fresh inputs of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.errors import CheckpointError
from ffsplit.export.inputs import Signature, leaves
from ffsplit.export.nodes import ROUNDED_INPUTS
from ffsplit.kernels.dispatch import reference_only

LENGTHS = (9, 14)
EXACT = 1e-3
"""Allowed relative difference of any output where both compute in float32."""
LOOSE = 0.1
"""Where both round inputs alike, or leave work out: a value may fall the other way in one of them."""
ROUNDED = 0.3
"""Where ONNX Runtime alone rounds inputs to 8 bits in blocks, after the graph was proved without: a last look only."""


@dataclass(frozen=True)
class Case:
    """Inputs by name, what torch answers, and which positions are not padding."""

    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    new: Tensor
    total: Tensor


@torch.no_grad()
def cases(model: PreTrainedModel, signature: Signature) -> list[Case]:
    """Torch's answers: two lengths, one with padding; for a decoder an empty cache, and then one token more.

    Packed matrices are multiplied as they are stored, without the roundings of torch's own fast kernels.
    """
    with reference_only():
        return [
            case for number, mask in enumerate(_masks(signature)) for case in _answered(model, signature, mask, number)
        ]


def _masks(signature: Signature) -> list[Tensor]:
    longest = signature.longest or max(LENGTHS) + 2
    lengths = [min(length, max(longest - 3, 2)) for length in LENGTHS]
    padded = torch.ones(2, lengths[0], dtype=torch.long)
    # Decoders are padded on the left, where generation goes on at the right.
    hidden = slice(0, 3) if signature.kind == "decoder" else slice(lengths[0] - 3, None)
    padded[1, hidden] = 0
    return [padded, torch.ones(1, lengths[1], dtype=torch.long)]


def _answered(model: PreTrainedModel, signature: Signature, mask: Tensor, number: int) -> list[Case]:
    """What the model makes of a batch, and for a decoder also of one more token."""
    inputs = signature.batch(mask, mask.shape[1], seed=10 + number)
    if signature.kind == "encoder":
        return [Case(inputs, leaves(model(**inputs)), mask, mask)]
    out = model(**inputs, use_cache=True)
    first = {name: tensor.clone() for name, tensor in leaves(out).items()}  # some caches grow in place
    past = {name: tensor for name, tensor in first.items() if name.startswith("past_key_values")}
    empty = {name: tensor[:, :, :0] for name, tensor in past.items()}
    longer = torch.cat([mask, torch.ones(mask.shape[0], 1, dtype=torch.long)], dim=1)
    step = signature.batch(longer, 1, seed=20 + number)
    answer = leaves(model(**step, past_key_values=out.past_key_values, use_cache=True))
    return [Case(inputs | empty, first, mask, mask), Case(step | past, answer, longer[:, -1:], longer)]


def session(graph: Path | bytes, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU, with its errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Its threads would go on spinning after a run and slow down whatever runs next, another session being timed say.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    where = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(where, options, providers=["CPUExecutionProvider"])


def float_inputs(graph: Path) -> Path:
    """A copy of a graph, beside it and on the same weights, whose MatMulNBits leave their inputs in float32."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    for node in _nodes(model):
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
    copy = graph.with_name(f"float_inputs.{graph.name}")
    copy.write_bytes(model.SerializeToString())
    return copy


def rounds_blocks(graph: Path) -> bool:
    """Whether a graph has nodes that round their inputs in blocks, which torch's storages do not."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    return any(node.op_type == "MatMulNBits" and _level(node) == ROUNDED_INPUTS for node in _nodes(model))


def _nodes(model: Any) -> list[Any]:
    return [*model.graph.node, *(node for function in model.functions for node in function.node)]


def _level(node: Any) -> int | None:
    return next((int(a.i) for a in node.attribute if a.name == "accuracy_level"), None)


def compare(graph: Path, answers: Sequence[Case], allowed: float) -> float:
    """The largest relative difference (norm of the difference over norm of the output) of any output in any case.

    Raises:
        CheckpointError: it is above ``allowed``, an output is missing, or ONNX Runtime refuses the graph.
    """
    worst = 0.0
    try:
        running = session(graph)
        names = [output.name for output in running.get_outputs()]
        for case in answers:
            results = running.run(names, {i.name: _fed(case, i.name) for i in running.get_inputs()})
            for name, result in zip(names, results, strict=True):
                difference = _difference(_expected(case, name), torch.from_numpy(result), case)
                if not difference <= allowed:
                    shape = list(case.inputs["input_ids"].shape)
                    raise CheckpointError(
                        f"{name} of ONNX Runtime differs from torch's by {difference:.3g} on inputs of shape {shape} "
                        f"(relative, allowed {allowed:g})"
                    )
                worst = max(worst, difference)
    except Exception as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"ONNX Runtime does not run the exported graph: {str(error).strip()[:500]}") from error
    return worst


def _fed(case: Case, name: str) -> Any:
    """An input as an array. The exporter marks names that inputs and outputs share."""
    plain = name.removeprefix("input.")
    if plain not in case.inputs:
        raise CheckpointError(f"the exported graph asks for {name!r}, which the model does not take")
    return case.inputs[plain].contiguous().numpy()


def _expected(case: Case, name: str) -> Tensor:
    plain = name.removeprefix("output.")
    if plain not in case.expected:
        raise CheckpointError(f"the exported graph gives {name!r}, which the model does not: {sorted(case.expected)}")
    return case.expected[plain]


def _difference(expected: Tensor, found: Tensor, case: Case) -> float:
    if expected.shape != found.shape:
        raise CheckpointError(f"ONNX Runtime gives shape {list(found.shape)}, torch {list(expected.shape)}")
    expected, found = _unpadded(expected, case), _unpadded(found, case)
    smallest = torch.finfo(torch.float32).tiny
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(smallest))


def _unpadded(tensor: Tensor, case: Case) -> Tensor:
    """Without the positions of padding, where every implementation computes nonsense of its own."""
    if tensor.shape[:2] == case.new.shape:
        return tensor[case.new.bool()]
    if tensor.dim() == 4 and tensor.shape[0] == case.total.shape[0] and tensor.shape[2] == case.total.shape[1]:
        return tensor.transpose(1, 2)[case.total.bool()]
    return tensor
