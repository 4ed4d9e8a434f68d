"""The state of a training under way in one safetensors file: a killed run goes on from its last one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ffsplit.errors import ResumeError
from ffsplit.files import whole_file

Tensors = dict[str, Tensor]


@dataclass
class Standing:
    """How far a training has come.

    Attributes:
        step: optimizer steps done.
        best: the best score so far, larger is better; None before the first evaluation.
        best_step: after which step that was.
        scores: of every evaluation, as (step, score).
        losses: mean loss since the last entry, as (step, loss).
        stale: evaluations since the best one.
        shares: of the budget that were used up at the last look; see ``TrainSettings.evaluate_share``.
        seconds: of training, over all runs of it.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    scores: list[tuple[int, float]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    stale: int = 0
    shares: int = 0
    seconds: float = 0.0


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that gradients flow to, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_state(
    file: Path, identity: str, model: nn.Module, optimizer: torch.optim.Optimizer, best: Tensors, standing: Standing
) -> None:
    """Write everything that the next step depends on; the file is replaced whole or not at all."""
    tensors = {f"model.{name}": value.detach() for name, value in trained_parameters(model).items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for name, parameter in trained_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value.reshape(1) if value.ndim == 0 else value
    note = {"identity": identity, "standing": json.dumps(asdict(standing))}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=note)


def read_state(
    file: Path, identity: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Standing, Tensors] | None:
    """Put a stored state into the model and the optimizer; None if there is none.

    Returns:
        where the training stands, and the best weights so far.

    Raises:
        ResumeError: the file is damaged or belongs to another training.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            note = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ResumeError(f"{file}: damaged ({error}); remove it to train from the start") from error
    if note.get("identity") != identity:
        raise ResumeError(f"{file}: belongs to a training with other data or settings; remove it, or use another --out")
    best = _fill(model, optimizer, tensors)
    values: dict[str, Any] = json.loads(note["standing"])
    values |= {name: [tuple(entry) for entry in values[name]] for name in ("scores", "losses")}
    return Standing(**values), best


@torch.no_grad()
def _fill(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> Tensors:
    best: Tensors = {}
    for name, parameter in trained_parameters(model).items():
        parameter.copy_(tensors[f"model.{name}"])
        if f"best.{name}" in tensors:
            best[name] = tensors[f"best.{name}"].to(parameter.device)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"optimizer.{key}.{name}" in tensors:
                value = tensors[f"optimizer.{key}.{name}"].to(parameter.device)
                optimizer.state[parameter][key] = value.reshape(()) if key == "step" else value
    return best


@torch.no_grad()
def load_weights(model: nn.Module, weights: Tensors) -> None:
    """Copy weights by name into the trained parameters."""
    parameters = trained_parameters(model)
    for name, value in weights.items():
        parameters[name].copy_(value)
