"""What a compressed FFN costs, in the unit of the budget: parameters, bits, bytes, work, or measured time."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ffsplit.budget.scene import Scene
from ffsplit.errors import BudgetError, RecipeError
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN
from ffsplit.kernels.dispatch import exact_products
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.timing import medians, synchronize

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)B", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)x?(?:@tokens=(\d+))?")
ROUNDS, WARMUP = 15, 3


UNITS = {
    "keep": "share of the FFN parameters that stay",
    "bits": "stored bits per FFN weight",
    "bytes": "bytes of the whole model's weights",
    "flops": "share of the FFNs' multiply-accumulates",
}


def dense_spec(shape: FFNShape) -> SumSpec:
    """An FFN left as it is, as a sum."""
    return sum_spec(shape, [dense_branch_spec(shape, shape.d_ff)], bias=shape.down_bias)


def parse_bytes(text: str | int) -> int:
    """``80MB``, ``1.5GB`` or a number of bytes.

    Raises:
        RecipeError: it is neither.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"bytes={text!r}: write a size such as 80MB or 1.5GB (decimal units), or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_latency(text: str) -> tuple[float, int]:
    """``0.7x@tokens=1`` as (0.7, 1): share of the dense FFNs' time, at so many tokens a forward (default 1).

    Raises:
        RecipeError: it is not of that form.
    """
    match = _LATENCY.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0 or match[2] == "0":
        raise RecipeError(f"latency={text!r}: write a share of the dense FFNs' time, such as 0.7x@tokens=1")
    return float(match[1]), int(match[2] or 1)


def number_of(budget: str, value: float | int | str) -> float:
    """The value of a budget in its unit: a share, bits a weight, or bytes."""
    if budget == "bytes":
        return parse_bytes(value)  # type: ignore[arg-type]
    return parse_latency(str(value))[0] if budget == "latency" else float(value)


class Cost(ABC):
    """A unit of cost and how much of it all FFNs together may take.

    Attributes:
        limit: of the total.
        unit: of the budget, in words.
    """

    limit: float
    unit: str

    @abstractmethod
    def of(self, spec: SumSpec, layer: int) -> float:
        """What one FFN costs."""

    @abstractmethod
    def in_unit(self, total: float) -> float:
        """A total cost of all FFNs as a number in the unit of the budget."""

    @abstractmethod
    def describe(self, total: float) -> str:
        """A total cost of all FFNs in the words of the budget."""


@dataclass
class CountedCost(Cost):
    """Parameters (``keep``), stored bits (``bits``, ``bytes``) or multiply-accumulates (``flops``): from the spec.

    Attributes:
        kind: of the budget.
        value: as the user gave it.
        dense: what the dense FFNs cost in total; for ``bits``, their weights.
        other_bytes: of everything in the model that is no FFN, as it is stored.
        float_bits: of a stored floating-point number.
    """

    kind: str
    value: float
    dense: float
    other_bytes: int = 0
    float_bits: int = 16
    limit: float = field(init=False)
    unit: str = field(init=False)

    def __post_init__(self) -> None:
        self.unit = UNITS[self.kind]
        self.limit = 8 * (self.value - self.other_bytes) if self.kind == "bytes" else self.value * self.dense

    def of(self, spec: SumSpec, layer: int) -> float:
        if self.kind == "keep":
            return spec.parameters
        return spec.macs if self.kind == "flops" else spec.stored_bits(self.float_bits)

    def in_unit(self, total: float) -> float:
        return total / 8 + self.other_bytes if self.kind == "bytes" else total / self.dense

    def describe(self, total: float) -> str:
        if self.kind == "bytes":
            return f"{self.in_unit(total) / 1e6:.1f} MB for the whole model's weights"
        return f"{self.kind} {self.in_unit(total):.4g} of the FFNs"


class LatencyCost(Cost):
    """Seconds of a forward on this device, every structure timed once, in turns with the dense FFN of its layer."""

    def __init__(self, scene: Scene, share: float, tokens: int) -> None:
        """``share`` of the dense FFNs' total time is the limit, at ``tokens`` a forward."""
        self._scene, self._tokens = scene, tokens
        self._known: dict[tuple[FFNShape, str], float] = {}
        self._dense_seconds: dict[FFNShape, float] = {}
        self._total = sum(self.of(dense_spec(shape), layer) for layer, shape in enumerate(scene.shapes))
        self.limit = share * self._total
        self.unit = f"share of the dense FFNs' time, {tokens} tokens a forward"

    def of(self, spec: SumSpec, layer: int) -> float:
        shape = self._scene.shapes[layer]
        key = (shape, spec.model_dump_json())
        if key not in self._known:
            dense, other = timed(self._scene, [dense_spec(shape), spec], layer, self._tokens)
            unit = self._dense_seconds.setdefault(shape, dense)
            self._known[key] = other / dense * unit
        return self._known[key]

    def in_unit(self, total: float) -> float:
        return total / self._total

    def describe(self, total: float) -> str:
        return f"{self.in_unit(total):.3f} of the dense FFNs' time at {self._tokens} tokens a forward"


def timed(scene: Scene, specs: Sequence[SumSpec], layer: int, tokens: int) -> list[float]:
    """Median seconds of a forward of each structure, with made-up numbers, taken in turns on the scene's device."""
    dtype, device = scene.model.dtype, scene.device
    made = (SumFFN.empty(spec, scene.act(layer), dtype, device) for spec in specs)
    # Moved once more: an activation with a parameter comes from wherever the model is.
    modules = [module.to(device).requires_grad_(False).eval() for module in made]
    for module in modules:
        fill(module)
    x = torch.randn(tokens, scene.shapes[layer].d_model, dtype=dtype, device=device)

    def turn(module: SumFFN) -> float:
        synchronize(device)
        started = time.perf_counter()
        module(x)
        synchronize(device)
        return time.perf_counter() - started

    with torch.inference_mode(), exact_products(wanted=False):
        return medians([partial(turn, module) for module in modules], ROUNDS, WARMUP)


def cost_of(scene: Scene, budget: str, value: float | int | str) -> Cost:
    """The cost model of a budget.

    Args:
        scene: whose FFNs are counted, and timed for ``latency``.
        budget: ``keep``, ``bits``, ``bytes``, ``flops`` or ``latency``.
        value: of the budget.

    Raises:
        BudgetError: fewer bytes are allowed than the model takes without its FFNs.
    """
    shapes = scene.shapes
    if budget == "latency":
        return LatencyCost(scene, *parse_latency(str(value)))
    if budget == "keep":
        return CountedCost(budget, float(value), sum(shape.parameters for shape in shapes))
    if budget == "flops":
        return CountedCost(budget, float(value), sum(dense_spec(shape).macs for shape in shapes))
    weights = sum(shape.weights for shape in shapes)
    if budget == "bits":
        return CountedCost(budget, float(value), weights)
    size = torch.empty((), dtype=scene.model.dtype).element_size()
    other = (scene.found.coverage.model_parameters - sum(shape.parameters for shape in shapes)) * size
    allowed = parse_bytes(value)  # type: ignore[arg-type]
    if allowed <= other:
        raise BudgetError(f"bytes={value}: the model's weights take {other / 1e6:.1f} MB without any FFN")
    return CountedCost(budget, allowed, weights, other, 8 * size)
