"""A dense FFN as one ONNX graph, run by ONNX Runtime: in fp32, or with MatMulNBits in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ffsplit.bench.peer_linears import int4_codes
from ffsplit.export.check import session
from ffsplit.ffn.weights import FFNWeights

BLOCK = 128
ACCURACY_LEVEL = 4
"""Inputs are rounded to int8, which is ONNX Runtime's fastest way."""
OPSET = 20
_PROBE = torch.linspace(-4, 4, 33)
_REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
}


class OnnxFFN(nn.Module):
    """A session that is called like a module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.session = session(model.SerializeToString(), torch.get_num_threads())

    def forward(self, x: Tensor) -> Tensor:
        (found,) = self.session.run(None, {"x": x.float().numpy()})
        return torch.from_numpy(found).to(x.dtype)


def dense_ffn(ffn: FFNWeights) -> nn.Module:
    """In fp32."""
    return OnnxFFN(_Graph(ffn, packed=False).model())


def int4_ffn(ffn: FFNWeights) -> nn.Module:
    """With MatMulNBits, blocks of 128 symmetric codes."""
    return OnnxFFN(_Graph(ffn, packed=True).model())


def activation_name(act: nn.Module) -> str:
    """Which of the activations that ONNX has this one is, found by trying.

    Raises:
        ValueError: none of them.
    """
    values = act(_PROBE[None])[0]
    for name, reference in _REFERENCES.items():
        if torch.allclose(values.float(), reference(_PROBE), atol=1e-4):
            return name
    raise ValueError(f"the activation {type(act).__name__} has no counterpart in ONNX here")


class _Graph:
    """Nodes and constants of one FFN."""

    def __init__(self, ffn: FFNWeights, packed: bool) -> None:
        self.ffn, self.packed = ffn, packed
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def model(self) -> Any:
        """The whole graph from ``x`` to ``y``."""
        from onnx import TensorProto, helper

        ffn = self.ffn
        up = self._linear("up", "x", ffn.up, ffn.up_bias)
        if ffn.gate is None:
            hidden = self._activated(up)
        else:
            hidden = self._node("Mul", [self._activated(self._linear("gate", "x", ffn.gate, ffn.gate_bias)), up])
        found = self._linear("down", hidden, ffn.down, ffn.down_bias)
        self._node("Identity", [found], out="y")
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["tokens", ffn.d_model]) for n in ("x", "y")]
        graph = helper.make_graph(self.nodes, "ffn", ends[:1], ends[1:], self.constants)
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=10)

    def _linear(self, name: str, x: str, weight: Tensor, bias: Tensor | None) -> str:
        if self.packed:
            found = self._packed(name, x, weight)
        else:
            found = self._node("MatMul", [x, self._constant(name, weight.detach().float().T.contiguous().numpy())])
        if bias is None:
            return found
        return self._node("Add", [found, self._constant(f"{name}_bias", bias.detach().float().numpy())])

    def _packed(self, name: str, x: str, weight: Tensor) -> str:
        codes, scale = int4_codes(weight, BLOCK)
        rows, columns = codes.shape
        nibbles = codes.to(torch.uint8).view(rows, columns // BLOCK, BLOCK)
        halves = (nibbles[..., 1::2] << 4 | nibbles[..., ::2]).numpy()
        inputs = [x, self._constant(name, halves), self._constant(f"{name}_scale", scale.flatten().numpy())]
        return self._node(
            "MatMulNBits", inputs, domain="com.microsoft", K=columns, N=rows, bits=4, block_size=BLOCK,
            accuracy_level=ACCURACY_LEVEL,
        )  # fmt: skip

    def _activated(self, x: str) -> str:
        name = activation_name(self.ffn.act)
        if name == "silu":
            return self._node("Mul", [x, self._node("Sigmoid", [x])])
        if name == "relu":
            return self._node("Relu", [x])
        return self._node("Gelu", [x], approximate="tanh" if name == "gelu_tanh" else "none")

    def _constant(self, name: str, values: np.ndarray[Any, Any]) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def _node(self, kind: str, inputs: list[str], out: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name
