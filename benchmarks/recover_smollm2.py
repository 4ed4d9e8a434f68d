"""Recovery of SmolLM2-135M with half of its FFN parameters: fit, then whole-model distillation from the dense model.

Trained on: WikiText-2 ``valid`` without its last windows, which are held out, and the first 30 MB of enwik8 without
its markup, every second article with WikiText's spacing of punctuation. The dense model's answers are the targets.
Evaluated as in ``table.py``: the first 40 windows of 2,048 tokens of WikiText-2 ``test`` and of the C4 slice. enwik8
may share articles with WikiText's test part, C4 does not, so both are reported.

    python benchmarks/recover_smollm2.py --prepare            # once, on any machine: build/recover-text.safetensors
    python benchmarks/recover_smollm2.py --device cuda --minutes 3
"""

from __future__ import annotations

import argparse
import copy
import gzip
import html
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import ffsplit
from _common import ROOT, data_folder, smollm2, write_result
from _protocol import CALIBRATION_WINDOWS, EVALUATION_WINDOWS, MODEL, Protocol
from ffsplit.calibrate.tokens import TokenWindows
from ffsplit.pipeline.load import open_source
from ffsplit.provenance import provenance
from ffsplit.recover.config import Recovery
from ffsplit.recover.text import Text
from ffsplit.recover.weights import as_sums
from ffsplit.recover.whole import distil_model
from table import ROWS

PREPARED = ROOT / "build" / "recover-text.safetensors"
FIT = "best: prune greedy OBS + refit 0.5, drift"
SEQ_LEN, HELD_OUT, REPEATS = 1024, 24, 3
# What is tried for a few seconds each, before the long run takes the one with the lowest held-out loss.
PROBES: list[dict[str, Any]] = [
    {"train": "ffn", "lr": 5e-4},
    {"train": "ffn", "lr": 1.5e-3},
    {"train": "all", "lr": 3e-4},
    {"train": "all", "lr": 1e-3},
]
_DROPPED = (
    r"<!--.*?-->", r"<ref[^>/]*/>", r"<ref.*?</ref>", r"<math.*?</math>", r"<[^>]{1,200}>", r"\{\|.*?\|\}",
    r"\[\[(?:Image|File|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", r"\[https?://\S+\]", r"https?://\S+",
)  # fmt: skip


def articles(file: Path) -> Iterator[str]:
    """The articles of a Wikipedia dump as plain text, redirects and stubs left out."""
    with gzip.open(file, "rt", encoding="utf-8", errors="ignore") as handle:
        dump = handle.read()
    for found in re.finditer(r"<title>([^<]*)</title>.*?<text[^>]*>(.*?)(?:</text>|\Z)", dump, re.DOTALL):
        title, text = found[1], html.unescape(html.unescape(found[2]))
        if ":" in title or text.lstrip().upper().startswith("#REDIRECT"):
            continue
        text = plain_text(text)
        if len(text) > 1000:
            yield f" = {title} = \n\n{text}"


def plain_text(text: str) -> str:
    """Wiki markup taken off."""
    for _ in range(4):  # templates inside templates
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    for pattern in _DROPPED:
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    text = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[\S+ ([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^(=+)\s*(.*?)\s*=+\s*$", lambda m: f" {' '.join(m[1])} {m[2]} {' '.join(m[1])} ", text, flags=re.M)
    text = re.sub(r"^[*#:;|!].*$", "", text, flags=re.M)
    return re.sub(r"\s*\n\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def spaced(text: str) -> str:
    """Punctuation set apart as in WikiText-2."""
    text = re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", text)
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    text = re.sub(r"([,;:!?()\"])", r" \1 ", text)
    text = re.sub(r"(?<![@.])\.(?=\s|$)", " .", text)
    text = re.sub(r"(?<=\w)'s\b", " 's", text)
    return re.sub(r" {2,}", " ", text)


def prepare(out: Path, tokenizer: Any) -> None:
    """Tokenise the text once and keep it: windows to train on, and windows held out."""
    found = [spaced(text) if index % 2 else text for index, text in enumerate(
        articles(data_folder() / "enwik8" / "enwik8_30m.xml.gz"))]  # fmt: skip
    wiki = cut(tokenizer, "\n\n".join(found))
    valid = cut(tokenizer, (data_folder() / "wikitext2" / "valid.txt").read_text(encoding="utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"enwik8": wiki, "valid": valid}, out)
    print(
        f"{out}: {wiki.numel():,} tokens of {len(found):,} articles, {valid.numel():,} of WikiText-2 valid", flush=True
    )


def cut(tokenizer: Any, text: str) -> torch.Tensor:
    """Windows of token ids, int32; the last, incomplete one is dropped."""
    pieces = [text[start : start + 1_000_000] for start in range(0, len(text), 1_000_000)]
    ids = torch.cat([
        torch.tensor(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int32)
        for piece in pieces
    ])  # fmt: skip
    return ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN).contiguous()


def training_text(file: Path, batch: int, seed: int, held_out: int) -> Text:
    stored = load_file(file)
    valid = stored["valid"].long()
    train = [stored["enwik8"].long(), *[valid[:-held_out]] * REPEATS]
    ids = torch.cat([*train, valid[-held_out:]])
    name = f"enwik8_30m without markup, {REPEATS} x WikiText-2 valid"
    return Text(TokenWindows.from_ids(ids, name=name), held_out, batch, seed, causal=True)


def fitted(protocol: Protocol, options: argparse.Namespace) -> tuple[PreTrainedModel, float]:
    """The compressed model, from the cache if it is there."""
    if (options.fit / "config.json").is_file():
        return open_source(str(options.fit)).load(), 0.0
    started = time.perf_counter()
    recipe = next(recipe for name, recipe, _ in ROWS if name == FIT)
    result = ffsplit.compress(
        copy.deepcopy(protocol.dense),
        protocol.tokenizer,
        recipe=recipe,
        calibration=protocol.calibration,
        device=options.device,
        seed=0,
    )
    seconds = time.perf_counter() - started
    ffsplit.save(result, options.fit, verify=False)
    return result.model, seconds


def config_of(options: argparse.Namespace, fields: dict[str, Any], minutes: float) -> Recovery:
    return Recovery(
        seq_len=SEQ_LEN,
        batch_size=options.batch,
        steps=options.steps,
        minutes=minutes,
        evaluations=options.evaluations,
        labels=options.labels,
        seed=options.seed,
        **fields,
    )


def probe(
    dense: PreTrainedModel, student: PreTrainedModel, text: Text, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings with the lowest held-out loss after a few seconds, and all that was tried."""
    tried = []
    for fields in PROBES:
        config = config_of(options, fields, options.probe_seconds / 60).model_copy(update={"evaluations": 1})
        notes = distil_model(copy.deepcopy(student), dense, text, config)
        tried.append({**fields, **{key: notes[key] for key in ("held_out_loss", "steps", "seconds")}})
        print(tried[-1], flush=True)
    best = min(tried, key=lambda notes: notes["held_out_loss"])
    return {name: best[name] for name in ("train", "lr")}, tried


def run(options: argparse.Namespace) -> None:
    if options.prepare or not options.text.is_file():
        prepare(options.text, open_source(str(smollm2())).tokenizer())
    if options.prepare:
        return
    protocol = Protocol.prepare(options.device, options.samples, options.windows)
    text = training_text(options.text, options.batch, options.seed, options.held_out)
    student, seconds = fitted(protocol, options)
    as_sums(student)
    student = student.to(options.device)
    document = described(protocol, text, options)
    document |= {"fit_seconds": round(seconds, 1), "fit": protocol.measure(student)}
    print(f"fit {seconds:.0f} s: {document['fit']}", flush=True)
    write_result(options.name, document)
    fields: dict[str, Any] = {"train": options.train, "lr": options.lr}
    if options.probe_seconds:
        fields, document["probes"] = probe(protocol.reference, student, text, options)
        write_result(options.name, document)
    config = config_of(options, fields, options.minutes)
    started = time.perf_counter()
    document["notes"] = distil_model(
        student, protocol.reference, text, config, state=options.state, identity=str(fields), progress=Said()
    )
    document["recovery_seconds"] = round(time.perf_counter() - started, 1)
    document["settings"] = config.model_dump(mode="json")
    write_result(options.name, document)
    document["recovered"] = protocol.measure(student)
    write_result(options.name, document)
    print(f"recovered in {document['recovery_seconds']} s: {document['recovered']}", flush=True)


def described(protocol: Protocol, text: Text, options: argparse.Namespace) -> dict[str, Any]:
    """What it takes to repeat a run."""
    return {
        "benchmark": "recover-smollm2",
        "model": {"name": MODEL, "sha256": protocol.model_sha256},
        "protocol": {
            "fit": FIT,
            "evaluation": f"first {options.windows} windows of 2048, stride 2048, float32",
            "training": f"KL to the dense model on {text.windows.name}; {text.held_out} windows of valid held out",
            "labels": options.labels,
            "data": {w.name: w.sha256 for w in (text.windows, protocol.test, protocol.c4)},
        },
        "dense": protocol.base,
        "provenance": provenance(seed=options.seed, data={"text": text.windows.sha256}),
    }


class Said:
    """A line every ten seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, label: str, done: int, total: int) -> None:
        if time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"{label} {done}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="tokenise the text and stop")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", type=Path, default=PREPARED)
    parser.add_argument("--fit", type=Path, default=ROOT / "build" / "recover-smollm2-fit", help="cache of the fit")
    parser.add_argument("--samples", type=int, default=CALIBRATION_WINDOWS, help="calibration windows of the fit")
    parser.add_argument("--windows", type=int, default=EVALUATION_WINDOWS, help="evaluation windows")
    parser.add_argument("--minutes", type=float, default=3.0, help="of the long run")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--evaluations", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help="windows of 1024 tokens a step")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="windows of WikiText-2 valid")
    parser.add_argument("--labels", type=float, default=0.0, help="share of cross entropy in the loss")
    parser.add_argument("--probe-seconds", type=float, default=8.0, help="for each setting that is tried; 0 tries none")
    parser.add_argument("--train", default="all", help="without probes")
    parser.add_argument("--lr", type=float, default=5e-4, help="without probes")
    parser.add_argument("--state", type=Path, help="file that lets a killed run go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="recover-smollm2", help="of the results file")
    transformers.utils.logging.disable_progress_bar()
    run(parser.parse_args())


if __name__ == "__main__":
    main()
