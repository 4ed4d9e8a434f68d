"""A model or checkpoint on the bench: its FFNs and the whole of it, beside the dense ones, and why it is not faster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ffsplit.bench.ffn import FEW_TOKENS
from ffsplit.bench.ffn_rows import FFNBench
from ffsplit.bench.loaded import Loaded, load
from ffsplit.bench.memory import resident_bytes, stored_bytes
from ffsplit.bench.result import Bench
from ffsplit.bench.roofline import measure_roofline
from ffsplit.bench.subject import Subject, check_same_shapes, open_subject
from ffsplit.bench.verdict import model_verdict
from ffsplit.bench.whole import MOST_SEQUENCES, NEW_TOKENS, PROMPT, PhaseTiming, decodes, time_decode, time_prefill
from ffsplit.devices import device_of
from ffsplit.errors import DataError
from ffsplit.evaluate.size import size_of
from ffsplit.provenance import provenance
from ffsplit.timing import Clock

Progress = Callable[[str, int, int], None]
DEFAULT_TOKENS = (1, 16, 128, 2048)
DEFAULT_ROUNDS, WARMUP = 7, 1


def bench(
    model: str,
    *,
    against: str | None = None,
    tokens: Sequence[int] | None = None,
    ffn_only: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    rounds: int = DEFAULT_ROUNDS,
    peers: bool = True,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> Bench:
    """Measure a dense model, or a checkpoint in turns with its dense model.

    Args:
        model: hub id, folder, or GGUF file.
        against: the dense model of a checkpoint; its FFNs are rebuilt in the same sizes when it is not given.
        tokens: numbers of tokens in a forward; 1, 16, 128 and 2048 when not given, as far as the model goes.
        ffn_only: leave out the whole model.
        device: None means an accelerator if there is one.
        dtype: of the weights; None keeps the stored one.
        rounds: timed turns of each; medians are reported.
        peers: measure other storages that are installed, at the FFNs' sizes.
        clock: seconds, monotonic.
        progress: called with a label, what is done and the total.

    Raises:
        DataError: a number of tokens or rounds is out of range, or beyond the model's positions.
        ModelError: there is no model, or ``against`` has other shapes.
        CheckpointError: the checkpoint is damaged.
    """
    _check(tokens, rounds)
    subject, dense = _sides(model, against)
    counts, notes = token_counts(subject, tokens, ffn_only)
    notes += _notes(subject, dense, ffn_only)
    place = device_of(device)
    loaded = load(subject, dense, place, dtype)
    roofline = measure_roofline(place, loaded.model.dtype, clock)
    single = FFNBench(loaded, counts, roofline, rounds, WARMUP, clock, peers)
    rows = single.rows(progress)
    whole = subject.reads_text and not ffn_only
    phases = _phases(loaded, counts, rounds, clock, progress) if whole else []
    found = Bench(
        model=model,
        kind=subject.kind,
        against=against,
        dense_ffns=loaded.dense_source,
        settings=_settings(loaded, place, counts, rounds),
        roofline=roofline,
        ffns=rows,
        phases=tuple(phases),
        phase_verdicts=tuple(None for _ in phases),
        memory=_memory(loaded),
        peers=single.peer_errors,
        peers_missing=single.peers_missing,
        notes=tuple(notes),
        provenance={**provenance(), "load_average": _load()},
    )
    return replace(found, phase_verdicts=tuple(_verdict(phase, found) for phase in phases))


def _sides(model: str, against: str | None) -> tuple[Subject, Subject | None]:
    """What is measured, and the dense model if there is one.

    Raises:
        ModelError: there is none of that name, or the two have other shapes.
    """
    subject, dense = open_subject(model), None if against is None else open_subject(against)
    if dense is not None:
        check_same_shapes(subject, dense)
    return subject, dense


def _settings(loaded: Loaded, device: torch.device, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    return {
        "device": str(device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "tokens": counts,
        "rounds": rounds,
        "warmup": WARMUP,
        "weights": f"out of the cache below {FEW_TOKENS} tokens",
    }


def _notes(subject: Subject, dense: Subject | None, ffn_only: bool) -> list[str]:
    """What the reader of the figures must know."""
    notes = []
    if subject.attentions_left_out and dense is None:
        notes.append(
            f"the checkpoint lacks {subject.attentions_left_out} attentions, and so does the dense side rebuilt from "
            "it: give --against for what leaving them out saves"
        )
    if not ffn_only and not subject.reads_text:
        notes.append(f"the whole model reads {subject.architecture.main_input_name}, not text, and was not timed")
    return notes


def token_counts(subject: Subject, tokens: Sequence[int] | None, ffn_only: bool) -> tuple[list[int], list[str]]:
    """The numbers of tokens to measure at, and a note on those of the default that the model does not take.

    Raises:
        DataError: a given one is beyond the model's positions and the whole model is to be timed.
    """
    limit = subject.positions
    wanted = sorted(set(tokens if tokens is not None else DEFAULT_TOKENS))
    beyond = [] if limit is None or ffn_only or not subject.reads_text else [n for n in wanted if n > limit]
    if not beyond:
        return wanted, []
    words = ", ".join(f"{count:,}" for count in beyond)
    if tokens is not None:
        raise DataError(
            f"--tokens {words}: {subject.source.name} has {limit:,} positions; leave them out, or time its FFNs alone "
            "with --ffn-only"
        )
    kept = [count for count in wanted if count not in beyond]
    return kept, [f"{words} tokens were left out: the model has {limit:,} positions"]


def _check(tokens: Sequence[int] | None, rounds: int) -> None:
    if rounds < 1:
        raise DataError(f"--rounds {rounds}: must be at least 1")
    if tokens is not None and not tokens:
        raise DataError("--tokens: name at least one number of tokens")
    for count in tokens or ():
        if count < 1:
            raise DataError(f"--tokens {count}: must be at least 1")


def _phases(
    loaded: Loaded, counts: Sequence[int], rounds: int, clock: Clock, progress: Progress | None
) -> list[PhaseTiming]:
    """Prefill at every number of tokens above 1; decoding of up to 32 sequences at a time."""
    variants = loaded.variants()
    prefills = [count for count in counts if count > 1] or list(counts)
    batches = [count for count in counts if count <= MOST_SEQUENCES] or [1]
    batches = batches if decodes(loaded.model) else []
    limit = loaded.subject.positions or PROMPT + NEW_TOKENS
    prompt = max(1, min(PROMPT, limit // 2))
    room = {"prompt": prompt, "new_tokens": max(1, min(NEW_TOKENS, limit - prompt))}
    work = [partial(time_prefill, variants, count, rounds, WARMUP, clock) for count in prefills]
    work += [partial(time_decode, variants, count, rounds, WARMUP, clock, **room) for count in batches]
    found = []
    for done, measure in enumerate(work, start=1):
        found.append(measure())
        if progress is not None:
            progress("whole model", done, len(work))
    for name in ("dense", "this"):  # in this order: both may be the same model
        if name in variants:
            variants[name].ready()
    return found


def _verdict(phase: PhaseTiming, found: Bench) -> str | None:
    if phase.speed is None:
        return None
    speeds = found.ffn_speeds()
    alone = speeds.get(phase.tokens) if speeds else 1.0  # all FFNs were left dense
    unit = "token" if phase.phase == "prefill" else "sequence"
    words = f"{phase.phase} of {phase.tokens:,} {unit}{'' if phase.tokens == 1 else 's'}"
    return model_verdict(words, phase.speed, phase.limit, alone)


def _memory(loaded: Loaded) -> dict[str, Any]:
    """Bytes of the whole model: as loaded, held now, of its dense counterpart, and of its files."""
    model, folder = loaded.model, Path(loaded.subject.source.name).expanduser()
    on_disk = folder.is_dir() and any(folder.glob("*.safetensors"))
    stored = stored_bytes(model)
    return {
        "bytes": stored,
        "resident_bytes": resident_bytes(model),
        "dense_bytes": stored if loaded.against is None and loaded.subject.kind == "dense" else _dense_bytes(loaded),
        "disk_bytes": size_of(folder).weight_bytes_on_disk if on_disk else None,
    }


def _dense_bytes(loaded: Loaded) -> int:
    if loaded.against is not None:
        return stored_bytes(loaded.against)
    variants = loaded.variants()
    dense = stored_bytes(variants["dense"].ready())
    variants["this"].ready()
    return dense


def _load() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None
