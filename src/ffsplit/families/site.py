"""Where an FFN sits in a model: plain paths, stored in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ffsplit.errors import ModelError


@dataclass(frozen=True)
class FFNSite:
    """One FFN of a model.

    Attributes:
        name: module path that a replacement occupies.
        up: path of the ``up`` projection.
        down: path of the ``down`` projection.
        gate: path of the ``gate`` projection; equal to ``up`` when one projection holds both; ``None`` without a gate.
        act: path of the activation module, ``None`` when the model computes it with a function.
        act_name: that function's name in ``transformers.activations.ACT2FN``.
        fused: order of the halves of a fused projection.
        kind: ``"module"``: the whole module ``name`` is the FFN. ``"inline"``: the FFN shares its module with other
            code (a residual, a norm); ``name`` is ``up``, or a module that computes everything before ``down``.
        d_model: size of the input and the output.
        d_ff: number of neurons.
    """

    name: str
    up: str
    down: str
    gate: str | None
    act: str | None
    act_name: str | None
    fused: Literal["gate_up", "up_gate"] | None
    kind: Literal["module", "inline"]
    d_model: int
    d_ff: int

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of the projections, each once."""
        return tuple(dict.fromkeys(path for path in (self.up, self.gate, self.down) if path is not None))

    def to_dict(self) -> dict[str, Any]:
        """The site as JSON-ready plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FFNSite:
        """The site that `to_dict` wrote.

        Raises:
            ModelError: a field is missing, unknown or of the wrong type.
        """
        wanted = {field.name for field in fields(cls)}
        if set(data) != wanted:
            missing, unknown = sorted(wanted - set(data)), sorted(set(data) - wanted)
            raise ModelError(f"FFN site {data.get('name')!r}: missing fields {missing}, unknown fields {unknown}")
        site = cls(**data)
        allowed = {"kind": ("module", "inline"), "fused": ("gate_up", "up_gate", None)}
        for name, values in allowed.items():
            if data[name] not in values:
                raise ModelError(f"FFN site {site.name!r}: {name} is {data[name]!r}, allowed are {values}")
        for name in ("name", "up", "down"):
            if not isinstance(data[name], str) or not data[name]:
                raise ModelError(f"FFN site {site.name!r}: {name} is {data[name]!r}, it must be a module path")
        for name in ("gate", "act", "act_name"):
            if data[name] is not None and not isinstance(data[name], str):
                raise ModelError(f"FFN site {site.name!r}: {name} is {data[name]!r}, it must be a name or null")
        for name in ("d_model", "d_ff"):
            if type(data[name]) is not int or data[name] <= 0:
                raise ModelError(f"FFN site {site.name!r}: {name} is {data[name]!r}, it must be a positive integer")
        return site

    def renamed(self, rename: Callable[[str], str]) -> FFNSite:
        """The same site with every module path changed by ``rename``."""
        paths = ("name", "up", "down", "gate", "act")
        changes: dict[str, Any] = {p: rename(value) for p in paths if (value := getattr(self, p)) is not None}
        return replace(self, **changes)
