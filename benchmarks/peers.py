"""Peers as their users get them: GPTQ, AWQ, SparseGPT and Wanda of llm-compressor on the FFNs of SmolLM2-135M.

The protocol is that of ``_protocol.py``. It runs where llm-compressor is installed beside what ffsplit needs, which is
nowhere else in this project: ``pip install llmcompressor`` into an environment of its own, then, from the checkout,

    PYTHONPATH=src python benchmarks/peers.py [--device cuda] [--only PATTERN] [--out benchmarks/results/peers.json]

Only the FFNs' linear layers are compressed. Groups are of 64: 128, the usual size, does not divide the 576 inputs of
``up`` and ``gate``, and llm-compressor refuses it. Every model is saved by the peer in float16 and loaded again; what
is measured has the FFN weights that were loaded, and bits are those of the file. As in ``table.py`` all computing is in
float32 and the rest of the model stays so.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.offload import remove_dispatch
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from _protocol import Protocol, command_line, line
from ffsplit.calibrate.tokens import TokenWindows

FFN = r"re:.*\.mlp\.(gate|up|down)_proj$"
GROUP = 64
BITS_2_4 = 0.5 * (16 + 2)
"""Half the weights in 16 bits, each with a position of 2 bits."""
PACKAGES = ("llmcompressor", "compressed-tensors")


@dataclass(frozen=True)
class Peer:
    """A recipe of llm-compressor.

    ``sparse`` ones keep two of four weights. The package saves these as dense tensors with zeros; the row says too what
    the 2:4 layout would take.
    """

    name: str
    recipe: Callable[[], list[Modifier]]
    sparse: bool = False


def integers(bits: int, symmetric: bool) -> dict[str, Any]:
    """Integers in groups along the inputs, in the FFNs' linear layers."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    return {"ffn": {"targets": [FFN], "weights": weights}}


def gptq(bits: int, symmetric: bool = False) -> list[Modifier]:
    return [GPTQModifier(config_groups=integers(bits, symmetric))]


def awq(bits: int, symmetric: bool = False) -> list[Modifier]:
    return [AWQModifier(), QuantizationModifier(config_groups=integers(bits, symmetric))]


PEERS = [
    Peer("llm-compressor gptq w4 g64", lambda: gptq(4)),
    Peer("llm-compressor gptq w3 g64", lambda: gptq(3)),
    Peer(
        "llm-compressor sparsegpt 2:4",
        lambda: [SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=[FFN])],
        sparse=True,
    ),
    Peer("llm-compressor awq w4 g64", lambda: awq(4)),
    Peer(
        "llm-compressor wanda 2:4",
        lambda: [WandaPruningModifier(sparsity=0.5, mask_structure="2:4", targets=[FFN])],
        sparse=True,
    ),
    Peer("llm-compressor awq w3 g64", lambda: awq(3)),
    Peer("llm-compressor gptq w4 g64 symmetric", lambda: gptq(4, symmetric=True)),
    Peer("llm-compressor gptq w3 g64 symmetric", lambda: gptq(3, symmetric=True)),
]


def calibration_data(windows: TokenWindows) -> DataLoader[dict[str, Tensor]]:
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.input_ids]
    return DataLoader(samples, batch_size=1)  # type: ignore[arg-type]


def compressed(peer: Peer, dense: Path, protocol: Protocol) -> PreTrainedModel:
    """The dense model after the peer's recipe, still in the peer's hands."""
    reset_session()
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    return oneshot(
        model=model, processor=protocol.tokenizer, dataset=calibration_data(protocol.calibration), recipe=peer.recipe()
    )


def stored(model: PreTrainedModel, dense: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, float, float]:
    """``dense`` with the FFNs that come back from the peer's file, their bits a weight there, and the share that is
    not 0.

    The loaded weights go into plain layers: the peer's own would round them again in every forward.
    """
    remove_dispatch(model)  # it is left split between the device and memory
    model.to("cpu", torch.float16).save_pretrained(folder, save_compressed=True)
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    found = {
        name: value.to("cpu", torch.float32)
        for name, value in loaded.state_dict().items()
        if name.endswith("_proj.weight") and ".mlp." in name
    }
    wanted = {name for name in dense.state_dict() if name.endswith("_proj.weight") and ".mlp." in name}
    if found.keys() != wanted:
        raise SystemExit(f"the peer's file has other FFN weights: {sorted(found.keys() ^ wanted)[:4]}")
    dense.load_state_dict(found, strict=False)
    numbers = sum(weight.numel() for weight in found.values())
    return dense, 8 * ffn_bytes(folder) / numbers, sum(int(w.count_nonzero()) for w in found.values()) / numbers


def ffn_bytes(folder: Path) -> int:
    """Everything that the files hold for the FFNs: codes, scales, zeros and shapes."""
    found = [
        tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items() if ".mlp." in name
    ]
    if any(tensor.dtype == torch.float32 for tensor in found):
        raise SystemExit("the peer saved float32, which its users do not")
    return sum(tensor.nbytes for tensor in found)


def row_of(peer: Peer, dense: Path, protocol: Protocol, device: str) -> dict[str, Any]:
    started = time.perf_counter()
    model = compressed(peer, dense, protocol)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        loaded, bits, nonzero = stored(model, copy.deepcopy(protocol.dense), Path(folder))
    return {
        "name": peer.name,
        "package": f"llmcompressor {metadata.version('llmcompressor')}",
        "recipe": [modifier.model_dump(mode="json", exclude_unset=True) for modifier in peer.recipe()],
        "keep_ffn": nonzero if peer.sparse else 1.0,
        "bits_ffn": bits,
        **({"bits_2_4": BITS_2_4} if peer.sparse else {}),
        **protocol.measure(loaded.to(device)),
        "seconds": round(seconds, 1),
    }


def run(peers: list[Peer], protocol: Protocol, device: str, out: Path) -> None:
    packages = {name: metadata.version(name) for name in PACKAGES}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as dense:
        protocol.dense.save_pretrained(dense)
        for peer in peers:
            rows.append(row_of(peer, Path(dense), protocol, device))
            print(line(rows[-1]), flush=True)
            protocol.write(out, "peers", rows, packages=packages)


def main() -> None:
    options = command_line(__doc__, "peers.json").parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    peers = [peer for peer in PEERS if re.search(options.only, peer.name)]
    run(peers, Protocol.prepare(options.device, options.samples, options.windows), options.device, options.out)


if __name__ == "__main__":
    main()
