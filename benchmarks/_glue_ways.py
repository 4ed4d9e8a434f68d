"""What ``glue.py`` compares: the ways to make an encoder smaller, and the rows of its table in order of importance.

A :class:`Way` says what is done to an encoder: a recipe, masks that are learned, or only more training. :data:`WAYS`
has all of them by the name that a row gives; the tuples after it say which of them stand together in a block of rows. A
:class:`Row` is one encoder, task, budget, way and seed, and :func:`rows` is the whole plan. A budget is a name until
:func:`keep_of` turns it into the share of FFN parameters that stay. Nothing here trains or measures: ``glue.py`` does,
and ``_glue_variants.py`` builds the same ways to time them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ffsplit.families import find_ffns

SEEDS = (0, 1, 2)
# Shares of heavy neurons of FFSplit, everything else equal.
SWEEP = (0.0, 0.01, 0.03, 0.05, 0.1, 0.25)


@dataclass(frozen=True)
class Way:
    """How an encoder is compressed and trained again, or both at once by learned masks; else it is only trained."""

    recipe: dict[str, Any] | None
    distill: bool = False
    again: bool = False
    # Compressed before the task is seen and distilled on text of no task, then fine-tuned once.
    general: bool = False
    masks: bool = False
    # Trained again on more pairs of the training sentences, which the fine-tuned dense model labels.
    pairs: bool = False


def method(name: str, drift: float = 0.0, **fields: Any) -> dict[str, Any]:
    """A recipe without a budget: a method with its settings, and the drift repair while layers are fitted."""
    return {"method": {"method": name, **fields}, "drift": drift}


def split(heavy: float, **fields: Any) -> dict[str, Any]:
    """FFSplit as published: heavy neurons dense, the rest by plain SVD, nothing refitted."""
    return method("ffsplit", rest="svd", heavy=heavy, refit=False, **{"score": "output_norm", **fields})


PRUNED = method("prune", score="leverage")
SPLIT = method("ffsplit", rest="whitened", heavy=0.1, score="output_norm")
WAYS: dict[str, Way] = {
    "dense": Way(None),
    # As much training as a compressed model has had: before and after.
    "dense-twice": Way(None, again=True),
    "svd": Way(method("svd")),
    "ffsplit": Way(split(0.1)),
    "whitened-svd": Way(method("whitened-svd")),
    "prune": Way(method("prune")),
    "prune-bias": Way(method("prune", compensate="mean")),
    "ffsplit-linear": Way(method("ffsplit")),
    "best": Way(method("prune", drift=0.5), distill=True),
    "best-linear": Way(method("ffsplit", drift=0.5), distill=True),
    "svd-distilled": Way(method("svd"), distill=True),
    "best-general": Way(PRUNED, distill=True, general=True),
    "ffsplit-general": Way(SPLIT, distill=True, general=True),
    "best-pairs": Way(PRUNED, distill=True, general=True, pairs=True),
    "ffsplit-pairs": Way(SPLIT, distill=True, general=True, pairs=True),
    "dense-pairs": Way(None, again=True, pairs=True),
    # Which neurons stay is learned in the same epochs.
    "movement": Way(None, distill=True, masks=True),
    **{f"heavy-{heavy:g}": Way(split(heavy)) for heavy in SWEEP if heavy != 0.1},
    "heavy-random": Way(split(0.1, score="random")),
}
DENSE = ("dense", "dense-twice")
MAIN = ("svd", "ffsplit", "best")
GENERAL = ("best-general", "best-pairs", "ffsplit-general", "ffsplit-pairs")
OTHERS = ("prune", "whitened-svd", "ffsplit-linear", "prune-bias", "best-linear", "svd-distilled", "movement")
SWEPT = tuple(name for name in WAYS if name.startswith("heavy-"))


@dataclass(frozen=True)
class Row:
    """One figure of the table, for one seed."""

    encoder: str
    task: str
    budget: str
    way: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.encoder} {self.task} {self.budget} {self.way} seed {self.seed}"


def rows() -> Iterator[Row]:
    """All rows, the most important first; a dense row comes before what is compressed from it."""

    def block(encoder: str, task: str, budget: str, ways: tuple[str, ...], seeds: tuple[int, ...]) -> Iterator[Row]:
        for seed in seeds:
            for way in ways:
                yield Row(encoder, task, budget, way, seed)

    for encoder in ("mpnet", "minilm"):
        for seed in SEEDS:
            yield from block(encoder, "stsb", "dense", DENSE, (seed,))
            yield from block(encoder, "stsb", "43.1", MAIN, (seed,))
    for encoder in ("mpnet", "minilm"):
        yield from block(encoder, "stsb", "70", MAIN, SEEDS)
    for budget, ways in (("dense", ("dense-pairs",)), ("43.1", GENERAL), ("70", GENERAL)):
        for encoder in ("mpnet", "minilm"):
            for way in ways:
                yield from block(encoder, "stsb", budget, (way,), SEEDS)
    for encoder in ("mpnet", "minilm"):
        for seed in SEEDS:
            yield from block(encoder, "sst2", "dense", DENSE, (seed,))
            yield from block(encoder, "sst2", "43.1", MAIN, (seed,))
    for encoder in ("minilm", "mpnet"):
        yield from block(encoder, "stsb", "43.1", OTHERS[:3], SEEDS)
        yield from block(encoder, "stsb", "43.1", SWEPT, SEEDS[:1])
    for encoder in ("mpnet", "minilm"):
        yield from block(encoder, "sst2", "70", MAIN, SEEDS)
        yield from block(encoder, "stsb", "70", ("movement",), SEEDS)
        yield from block(encoder, "stsb", "43.1", OTHERS[3:], SEEDS)
        yield from block(encoder, "stsb", "43.1", SWEPT, SEEDS[1:])
    for encoder in ("minilm", "mpnet"):
        for seed in SEEDS:
            yield from block(encoder, "agnews", "dense", DENSE, (seed,))
            yield from block(encoder, "agnews", "43.1", MAIN, (seed,))
    for task in ("sst2", "agnews"):
        for way in ("ffsplit-general", "best-general"):
            yield from block("mpnet", task, "43.1", (way,), SEEDS)


def keep_of(model: PreTrainedModel, encoder: str, budget: str) -> float:
    """The share of FFN parameters that a budget leaves.

    43.1 means that share of MPNet's encoder (its 12 layers, without embeddings and head), taken from the FFNs alone; of
    MiniLM's FFNs. 70 is a share of the FFN parameters of either.
    """
    share = float(budget) / 100
    if encoder == "mpnet" and budget == "43.1":
        layers = sum(parameter.numel() for parameter in model.base_model.encoder.parameters())
        sites = find_ffns(model).sites
        ffn = sum(
            parameter.numel() for site in sites for path in (site.up, site.down)
            for parameter in model.get_submodule(path).parameters()
        )  # fmt: skip
        share = share * layers / ffn
    return 1 - share


def recipe_for(recipe: dict[str, Any], keep: float) -> dict[str, Any]:
    """A way's recipe at a budget, the share of FFN parameters that stay."""
    return {**recipe, "method": {**recipe["method"], "keep": keep}}
