"""Peers as their users get them: GPTQ, AWQ, SparseGPT and Wanda of llm-compressor on the FFNs of SmolLM2-135M.

The protocol is that of ``_protocol.py``. It runs where llm-compressor is installed beside what ffsplit needs, which is
nowhere else in this project: ``pip install llmcompressor`` into an environment of its own, then, from the checkout,

    PYTHONPATH=src python benchmarks/peers.py [--device cuda] [--only PATTERN] [--out benchmarks/results/peers.json]

Only the FFNs' linear layers are compressed. Groups are of 64: 128, the usual size, does not divide the 576 inputs of
``up`` and ``gate``, and llm-compressor refuses it. Every model is saved by the peer in float16 and loaded again; what
is measured has the FFN weights that were loaded, and bits are those of the file. As in ``table.py`` all computing is in
float32 and the rest of the model stays so, but for the norms before the FFNs: AWQ divides their weights by the scales
of what they feed, and the file's are taken. A file in which anything else changed is refused.

Rows of ``--out`` that this run does not measure stay there, so that the rows can be measured in several runs.
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
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from _protocol import Protocol, command_line, line
from ffsplit.calibrate.tokens import TokenWindows

FFN = r"re:.*\.mlp\.(gate|up|down)_proj$"
FFN_WEIGHT = re.compile(r"\.mlp\.(gate|up|down)_proj\.weight$")
NORM_WEIGHT = re.compile(r"\.post_attention_layernorm\.weight$")
"""What scales of the FFNs' inputs are folded into."""
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
    """AWQ between the FFN and the norm before it: the default mappings are for attention too."""
    mappings = [
        AWQMapping(r"re:.*\.post_attention_layernorm$", [r"re:.*\.mlp\.gate_proj$", r"re:.*\.mlp\.up_proj$"]),
        AWQMapping(r"re:.*\.mlp\.up_proj$", [r"re:.*\.mlp\.down_proj$"]),
    ]
    return [AWQModifier(mappings=mappings), QuantizationModifier(config_groups=integers(bits, symmetric))]


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
    """``dense`` with what the peer's file has instead (see :func:`changed`), the FFNs' bits a weight in the file, and
    the share of their weights that is not 0.

    The loaded weights go into plain layers: the peer's own would round them again in every forward.
    """
    remove_dispatch(model)  # it is left split between the device and memory
    model.to("cpu", torch.float16).save_pretrained(folder, save_compressed=True)
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).state_dict()
    found = changed({name: value.to("cpu", torch.float32) for name, value in loaded.items()}, dense.state_dict())
    dense.load_state_dict(found, strict=False)
    weights = [value for name, value in found.items() if FFN_WEIGHT.search(name)]
    numbers = sum(weight.numel() for weight in weights)
    return dense, 8 * ffn_bytes(folder) / numbers, sum(int(w.count_nonzero()) for w in weights) / numbers


def changed(loaded: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """All FFN weights of the peer's model, and those norms before FFNs that it folded scales into.

    Args:
        loaded: state of the peer's model, in float32, read from a file in float16.
        dense: state of the dense model, in float32.

    Raises:
        SystemExit: an FFN weight is missing, or the peer changed something else by more than rounding to float16. Such
            a change undoes one in an FFN, and to leave it out would spoil the peer's model.
    """
    ffns = {name for name in dense if FFN_WEIGHT.search(name)}
    if missing := ffns - loaded.keys():
        raise SystemExit(f"the peer's file lacks FFN weights: {sorted(missing)[:4]}")
    # A packed layer keeps its scales and zeros beside the weight, and they have gone into it.
    others = {name: value for name, value in loaded.items() if ".mlp." not in name}
    moved = {name for name, value in others.items() if name not in dense or not same(value, dense[name])}
    if unknown := sorted(name for name in moved if name not in dense or not NORM_WEIGHT.search(name)):
        raise SystemExit(f"the peer changed more than FFNs and the norms before them: {unknown[:4]}")
    return {name: loaded[name] for name in ffns | moved}


def same(loaded: Tensor, dense: Tensor) -> bool:
    """Whether nothing but rounding to float16 lies between two tensors."""
    return torch.equal(loaded, dense.to(torch.float16).float())


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
    rows = {row["name"]: row for row in protocol.kept(out)}
    order = {peer.name: number for number, peer in enumerate(PEERS)}
    with tempfile.TemporaryDirectory() as dense:
        protocol.dense.save_pretrained(dense)
        for peer in peers:
            rows[peer.name] = row_of(peer, Path(dense), protocol, device)
            print(line(rows[peer.name]), flush=True)
            in_order = sorted(rows.values(), key=lambda row: order.get(row["name"], len(order)))
            protocol.write(out, "peers", in_order, packages=packages)


def main() -> None:
    options = command_line(__doc__, "peers.json").parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    peers = [peer for peer in PEERS if re.search(options.only, peer.name)]
    run(peers, Protocol.prepare(options.device, options.samples, options.windows), options.device, options.out)


if __name__ == "__main__":
    main()
