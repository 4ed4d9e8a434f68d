"""Other ways to store the same FFN, measured beside it: what torch and installed packages offer. None is shipped."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffsplit.bench import peer_linears, peer_onnx
from ffsplit.ffn.weights import FFNWeights

Linear = Callable[[Tensor, Tensor | None], nn.Module]
GROUP = peer_linears.GROUP


@dataclass(frozen=True)
class Peer:
    """Another storage of a dense FFN.

    Attributes:
        name: in tables.
        devices: types of devices that it runs on.
        build: the FFN from dense weights.
        needs: packages that must be installed.
    """

    name: str
    devices: tuple[str, ...]
    build: Callable[[FFNWeights], nn.Module]
    needs: tuple[str, ...] = ()

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot be measured here, or ``None``."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}"
        lacking = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{' and '.join(lacking)} not installed" if lacking else None


class PeerFFN(nn.Module):
    """A dense FFN whose projections are another package's."""

    def __init__(self, ffn: FFNWeights, linear: Linear) -> None:
        super().__init__()
        self.act = ffn.act
        self.up = linear(ffn.up, ffn.up_bias)
        self.gate = None if ffn.gate is None else linear(ffn.gate, ffn.gate_bias)
        self.down = linear(ffn.down, ffn.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = self.act(up) if self.gate is None else self.act(self.gate(x)) * up
        return self.down(hidden)  # type: ignore[no-any-return]


def _of(linear: Linear) -> Callable[[FFNWeights], nn.Module]:
    return lambda ffn: PeerFFN(ffn, linear)


PEERS = (
    Peer("torch bf16", ("cpu",), _of(peer_linears.HalfLinear)),
    Peer("torch int8 dynamic", ("cpu",), _of(peer_linears.Int8DynamicLinear)),
    Peer(f"torch int4 g{GROUP}", ("cpu", "cuda"), _of(peer_linears.Int4Linear)),
    Peer(f"torchao int4 g{GROUP}", ("cuda",), _of(peer_linears.torchao_linear), ("torchao",)),
    Peer(f"gemlite int4 g{GROUP}", ("cuda",), _of(peer_linears.gemlite_linear), ("gemlite",)),
    Peer("ONNX Runtime fp32", ("cpu",), peer_onnx.dense_ffn, ("onnx", "onnxruntime")),
    Peer(f"ONNX Runtime int4 g{peer_onnx.BLOCK}", ("cpu",), peer_onnx.int4_ffn, ("onnx", "onnxruntime")),
)


def build_peers(ffn: FFNWeights, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """All peers that can be built here, and for every other one the reason why it was not measured.

    Args:
        ffn: dense weights, on the device.
        device: to run on.
    """
    built: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    x = torch.zeros(1, ffn.d_model, dtype=ffn.up.dtype, device=device)
    for peer in PEERS:
        reason = peer.missing(device)
        if reason is None:
            try:
                with torch.inference_mode():
                    made = peer.build(ffn)
                    made(x)
                built[peer.name] = made
            except Exception as error:  # another package's code fails in ways of its own; the report says how
                reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        if reason is not None:
            reasons[peer.name] = reason
    return built, reasons
