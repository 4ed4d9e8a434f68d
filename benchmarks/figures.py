"""The two observations that FFSplit rests on, measured on real models.

(a) ``output-norms``: few neurons of an FFN have far larger output norms than all others.
(b) ``ablation``: a model misses the 3 % with the largest norms far more than 3 % taken from the others.

Every model's numbers go to ``benchmarks/results/figures-{output-norms,ablation}-MODEL.json``; the figures are drawn
from all such files that are there. SmolLM2's ablation takes 25 minutes on 2 cores, all the rest a few.

    python benchmarks/figures.py
    python benchmarks/figures.py --only a --model smollm2 --calibration-windows 4
    python benchmarks/figures.py --plot-only
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from _common import FIGURES, RESULTS, data_folder, minilm, mpnet_folder, read_results, smollm2, write_result
from ffsplit.calibrate.replay import rows_of
from ffsplit.calibrate.sources import load_texts
from ffsplit.calibrate.tokens import TokenWindows, tokenize_documents, tokenize_windows
from ffsplit.evaluate.embeddings import sentence_similarity
from ffsplit.evaluate.evaluate import data_record
from ffsplit.evaluate.logits import call, device_of
from ffsplit.evaluate.perplexity import perplexity
from ffsplit.families import FFNSite, find_ffns, read
from ffsplit.ops.scores import output_norm
from ffsplit.pipeline.load import open_source
from ffsplit.provenance import provenance
from ffsplit.report.plots import Bar, BarPanel, NormCurves, bar_figure, norm_figure, save_figure

SHARE = 0.03
WINDOW = 2048
RANKS = 160
STS_PAIRS = 1024
Evaluate = Callable[[], float]


@dataclass(frozen=True)
class Subject:
    """A model, the text for its statistics, and how good it is."""

    key: str
    title: str
    place: Path
    measure: str
    lower_is_better: bool


SUBJECTS = {
    "smollm2": ("SmolLM2-135M (gated SiLU)", smollm2, "perplexity, WikiText-2 test", True),
    "minilm": ("MiniLM-L6 (GELU)", minilm, "Spearman × 100, STS-B test", False),
    "mpnet": ("MPNet base (GELU)", mpnet_folder, "Spearman × 100, STS-B test", False),
}


def main() -> None:
    options = arguments()
    if not options.plot_only:
        for key in options.model:
            title, place, measure, lower = SUBJECTS[key]
            measure_model(Subject(key, title, place(), measure, lower), options)
    draw(options.results, options.figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["a", "b"], help="one of the two figures")
    parser.add_argument("--model", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of 2,048 tokens (SmolLM2)")
    parser.add_argument("--calibration-windows", type=int, default=16, help="windows for the scores (SmolLM2)")
    parser.add_argument("--seeds", type=int, default=3, help="random choices of neurons")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--plot-only", action="store_true", help="draw from the results that are there")
    return parser.parse_args()


def measure_model(subject: Subject, options: argparse.Namespace) -> None:
    """Statistics once, then what is asked for."""
    started = time.perf_counter()
    source = open_source(str(subject.place))
    model, tokenizer = source.load(torch.float32).to(options.device), source.tokenizer()
    sites = find_ffns(model).sites
    windows = calibration_windows(subject, tokenizer, options.calibration_windows)
    sums, tokens = square_sums(model, sites, windows)
    scores = [output_norm(sums[site.name], read(model, site).down).cpu() for site in sites]
    common = {
        "model": subject.title,
        "key": subject.key,
        "calibration": data_record(windows) | {"tokens_seen": tokens},
        "provenance": provenance_of(subject, model),
    }
    print(f"{subject.key}: {len(sites)} FFNs, {tokens:,} tokens, {time.perf_counter() - started:.0f} s", flush=True)
    if options.only != "b":
        content = common | {"figure": "output-norms"} | norm_curves(scores, tokens)
        print(write_result(f"figures-output-norms-{subject.key}", content, options.results))
    if options.only != "a":
        evaluation, evaluate = evaluator(subject, model, tokenizer, options.windows)
        values = ablate(model, sites, scores, evaluate, options.seeds)
        content = common | {
            "figure": "ablation",
            "measure": subject.measure,
            "lower_is_better": subject.lower_is_better,
            "share": SHARE,
            "evaluation": evaluation,
            "values": values,
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(write_result(f"figures-ablation-{subject.key}", content, options.results))


def provenance_of(subject: Subject, model: PreTrainedModel) -> dict[str, Any]:
    """Versions, hardware and the weights' hash; the model's name without the folders of this machine.

    Only the body is hashed: MPNet's checkpoint has no weights for the head of its class, which are random then.
    """
    record = provenance(model.base_model, seed=0)
    record["model"]["name"] = subject.place.name
    return record


def calibration_windows(subject: Subject, tokenizer: Any, count: int) -> TokenWindows:
    """The text that neurons are scored on: never the one that is evaluated."""
    if subject.key == "smollm2":
        text = load_texts(data_folder() / "wikitext2" / "valid.txt")
        return tokenize_windows(text, tokenizer, seq_len=WINDOW, samples=count)
    first, second, _ = sts_pairs("train")
    # Evenly over the file: it is sorted by genre.
    every = len(first) // STS_PAIRS
    sentences = [sentence for pair in zip(first[::every], second[::every], strict=True) for sentence in pair]
    texts = replace(load_texts(sentences), name="sts-train.csv", split=f"pairs 0, {every}, {2 * every}, ...")
    return tokenize_documents(texts, tokenizer, seq_len=128)


def evaluator(subject: Subject, model: PreTrainedModel, tokenizer: Any, count: int) -> tuple[dict[str, Any], Evaluate]:
    """What is measured, in words for the result, and the measurement."""
    if subject.key == "smollm2":
        text = load_texts(data_folder() / "wikitext2" / "test.txt")
        windows = tokenize_windows(text, tokenizer, seq_len=WINDOW, samples=count)
        return data_record(windows), lambda: perplexity(model, windows).value
    first, second, gold = sts_pairs("test")
    record = {"source": "sts-test.csv", "pairs": len(first), "text_sha256": load_texts([*first, *second]).sha256}
    return record, lambda: 100 * sentence_similarity(model, tokenizer, first, second, gold).spearman


def sts_pairs(split: str) -> tuple[list[str], list[str], list[float]]:
    """Sentences and gold scores of the STS benchmark."""
    text = (data_folder() / "stsb" / f"sts-{split}.csv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.split("\n") if line]
    return [row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]


@torch.no_grad()
def square_sums(
    model: PreTrainedModel, sites: Sequence[FFNSite], windows: TokenWindows
) -> tuple[dict[str, Tensor], int]:
    """Sum over real tokens of every neuron's squared activation, from one pass of the model; the number of tokens.

    A dense FFN's activations are what its ``down`` projection is given.
    """
    device = device_of(model)
    sums = {site.name: torch.zeros(site.d_ff, dtype=torch.float64, device=device) for site in sites}
    mask: Tensor | None = None

    def watch(site: FFNSite) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(_module: Any, given: tuple[Tensor, ...]) -> None:
            for rows in rows_of(given[0], mask):
                sums[site.name] += rows.double().square().sum(0)

        return add

    handles = [model.get_submodule(site.down).register_forward_pre_hook(watch(site)) for site in sites]
    try:
        for batch in windows.batches(1 if windows.attention_mask is None else 32):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            call(model.base_model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sums, windows.tokens


def norm_curves(scores: Sequence[Tensor], tokens: int) -> dict[str, Any]:
    """Sorted output norms per layer, as root mean squares over tokens, at ranks that are dense at both ends."""
    d_ff = min(len(layer) for layer in scores)
    ranks = spread_ranks(d_ff)
    places = torch.tensor(ranks) - 1
    layers = [(layer / tokens**0.5).sort(descending=True).values for layer in scores]
    heavy = [int(SHARE * len(layer) + 0.5) for layer in layers]
    return {
        "ranks": ranks,
        "norms": [[float(f"{value:.5g}") for value in layer[places].tolist()] for layer in layers],
        "top_share_of_squares": [
            round(float(layer[:count].square().sum() / layer.square().sum()), 5)
            for layer, count in zip(layers, heavy, strict=True)
        ],
        "top_over_median": [
            round(float(layer[:count].mean() / layer.median()), 3) for layer, count in zip(layers, heavy, strict=True)
        ],
    }


def spread_ranks(count: int) -> list[int]:
    """Places from 1 to ``count``: close together at both ends, where the curve is steep."""
    half = torch.logspace(0, torch.tensor(count / 2).log10().item(), RANKS // 2).round().long().tolist()
    return sorted({*half, *(count + 1 - place for place in half), 1, count})


def ablate(
    model: PreTrainedModel, sites: Sequence[FFNSite], scores: Sequence[Tensor], evaluate: Evaluate, seeds: int
) -> dict[str, Any]:
    """The measure for each choice of neurons to remove in every FFN; a list for the random ones."""

    def without(choice: Callable[[int], Tensor], label: str) -> float:
        started = time.perf_counter()
        with removed(model, sites, [choice(index) for index in range(len(sites))]):
            value = evaluate()
        print(f"  {label}: {value:.2f}  ({time.perf_counter() - started:.0f} s)", flush=True)
        return value

    def extreme(descending: bool) -> Callable[[int], Tensor]:
        return lambda index: scores[index].argsort(descending=descending)[: removed_count(len(scores[index]))]

    def at_random(seed: int) -> Callable[[int], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return lambda index: torch.randperm(len(scores[index]), generator=generator)[
            : removed_count(len(scores[index]))
        ]

    return {
        "dense": without(lambda index: torch.zeros(0, dtype=torch.long), "dense"),
        "heavy": without(extreme(descending=True), "without the heaviest"),
        "light": without(extreme(descending=False), "without the lightest"),
        "random": [without(at_random(seed), f"without random ones, seed {seed}") for seed in range(seeds)],
        "removed_per_ffn": [removed_count(len(layer)) for layer in scores],
    }


def removed_count(neurons: int) -> int:
    return max(1, int(SHARE * neurons + 0.5))


@contextmanager
def removed(model: PreTrainedModel, sites: Sequence[FFNSite], neurons: Sequence[Tensor]) -> Iterator[None]:
    """Neurons without their columns of ``down`` for a while: they are computed and contribute nothing."""
    downs = [read(model, site).down for site in sites]
    kept = [down[:, which].clone() for down, which in zip(downs, neurons, strict=True)]
    try:
        for down, which in zip(downs, neurons, strict=True):
            down[:, which.to(down.device)] = 0
        yield
    finally:
        for down, which, columns in zip(downs, neurons, kept, strict=True):
            down[:, which.to(down.device)] = columns


def draw(results: Path, figures: Path) -> None:
    """Both figures, from the results that are there."""
    order = list(SUBJECTS)
    norms = sorted(read_results("figures-output-norms-*.json", results), key=lambda one: order.index(one["key"]))
    if norms:
        curves = [NormCurves(one["model"], one["ranks"], one["norms"]) for one in norms]
        print(*save_figure(norm_figure(curves, SHARE), figures / "output-norms"))
    ablations = sorted(read_results("figures-ablation-*.json", results), key=lambda one: order.index(one["key"]))
    if ablations:
        print(*save_figure(bar_figure([panel(one) for one in ablations]), figures / "ablation"))


def panel(result: Mapping[str, Any]) -> BarPanel:
    values, share = result["values"], f"{100 * result['share']:.0f} %"
    several = values["random"]
    bars = [
        Bar(f"without the lightest {share}", values["light"]),
        Bar(f"without {share} at random", mean(several), min(several), max(several)),
        Bar(f"without the heaviest {share}", values["heavy"], emphasis=True),
    ]
    ends = [values["dense"], *(bar.value for bar in bars)]
    return BarPanel(result["model"], result["measure"], values["dense"], bars, log=max(ends) > 5 * min(ends))


if __name__ == "__main__":
    main()
