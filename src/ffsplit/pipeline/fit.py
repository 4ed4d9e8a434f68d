"""The loop over layers: capture the inputs, fit, replace, go on with what the compressed block gives."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.devices import visiting
from ffsplit.calibrate.drift import DriftMeter
from ffsplit.calibrate.layer import LayerData
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.errors import ModelError
from ffsplit.families import FFNSite, drop_attention, link_ties, read, replace
from ffsplit.families.blocks import Block
from ffsplit.families.surgery import weight_dtype
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method
from ffsplit.pipeline.across import layer_data
from ffsplit.pipeline.job import Job
from ffsplit.pipeline.journal import Journal


def fit_all(job: Job, log: Journal | None, cache_dir: str | Path | None) -> None:
    """Compress every FFN of a settled job in place; those that the journal holds are taken from there.

    Attentions that are left out go first: FFNs are fitted to what the model without them gives.
    """
    for gone in job.plan.attention:
        drop_attention(job.model, gone.site)
    job.take_gradients(config for index, config in enumerate(job.configs) if log is None or not log.has(index))
    home = cache_home(job.device, job.data.tokens, job.found.sites[0].d_model)
    with TensorCache(cache_dir, home) as cache, TensorCache(cache_dir, home) as drift_cache:
        _fit_all(job, cache, drift_cache, log)


def cache_home(device: torch.device, tokens: int, d_model: int) -> torch.device:
    """Where activations wait: on the accelerator when they take a small part of its free memory, else on the CPU."""
    if device.type == "cpu":
        return device
    # Inputs, outputs and drift of one layer, for two streams, in float32.
    needed = 6 * tokens * d_model * 4
    free, _ = torch.accelerator.get_memory_info(device)
    return device if needed < free / 4 else torch.device("cpu")


def _fit_all(job: Job, cache: TensorCache, drift_cache: TensorCache, log: Journal | None) -> None:
    """Block by block: capture the inputs, fit, replace, go on with what the compressed block gives."""
    replay = BlockReplay(job.model, job.data.batches, cache, job.device, job.progress)
    index_of = {site.name: index for index, site in enumerate(job.found.sites)}
    repair = job.recipe.drift if job.recipe.propagate else 0.0
    drift = DriftMeter(replay, drift_cache, repair) if repair else None
    with visiting(job.model, job.found.blocks, job.device):
        for number, block in enumerate(job.found.blocks):
            _run_block(job, replay, drift, log, block, index_of)
            if job.progress is not None:
                job.progress("fit", number + 1, len(job.found.blocks))


def _run_block(
    job: Job,
    replay: BlockReplay,
    drift: DriftMeter | None,
    log: Journal | None,
    block: Block,
    index_of: dict[str, int],
) -> None:
    done = log is not None and all(log.has(index_of[site.name]) for site in block.sites)
    touched = any(job.configs[index_of[site.name]] is not None for site in block.sites)
    corrections = drift.corrections(block, measure=touched and not done) if drift is not None else None
    inputs = replay.capture(block) if touched and not done else {}
    if not job.recipe.propagate:
        replay.advance(block)
    for site in block.sites:
        index = index_of[site.name]
        if log is not None and log.has(index):
            module, notes = log.load(index, read(job.model, site).act, weight_dtype(job.model, site))
        elif job.configs[index] is None:
            continue
        else:
            module, notes = _fit(job, site, index, inputs[site.name], corrections, replay)
            if log is not None:
                log.store(index, module, notes)
        job.notes.append(notes)
        replace(job.model, site, module.to(_weight_device(job.model, site)))
        link_ties(job.model)
    for store in (*inputs.values(), *([corrections] if corrections is not None else [])):
        store.drop()
    if job.recipe.propagate:
        replay.advance(block)


def _fit(
    job: Job, site: FFNSite, index: int, inputs: Activations, corrections: Activations | None, replay: BlockReplay
) -> tuple[SumFFN, dict[str, Any]]:
    """One FFN: its compressed form in the model's dtype, and what the report says about it."""
    config = job.configs[index]
    assert config is not None
    started = time.perf_counter()
    data = layer_data(job, index, inputs, corrections, replay)
    if config.needs_data and inputs.tokens == 0:
        raise ModelError(f"{site.name}: the calibration text never reached this FFN")
    with torch.no_grad():
        module = get_method(config.method).apply(data, config)
        planned = job.plan.ffns[index].spec
        if module.spec != planned:
            raise RuntimeError(f"{site.name}: {config.method} built another structure than its plan promised")
        error = relative_error(data, module) if config.imitates else None
    notes = {
        "ffn": site.name,
        "method": config.method,
        "tokens": inputs.tokens,
        "output_error": error,
        "seconds": round(time.perf_counter() - started, 3),
    }
    module.requires_grad_(False)
    return module.to(weight_dtype(job.model, site)), notes


def relative_error(data: LayerData, module: SumFFN, chunks: int = 8) -> float | None:
    """``||FFN(x) - sum(x)|| / ||FFN(x)||`` over the first chunks of the calibration inputs; None without inputs."""
    difference = total = 0.0
    for number, chunk in enumerate(data.inputs):
        if number == chunks:
            break
        x = chunk.to(device=data.ffn.up.device, dtype=data.ffn.up.dtype)
        wanted = data.ffn(x)
        difference += float((wanted - module(x)).double().square().sum())
        total += float(wanted.double().square().sum())
    return (difference / total) ** 0.5 if total else None


def _weight_device(model: PreTrainedModel, site: FFNSite) -> torch.device:
    device: torch.device = next(model.get_submodule(site.down).parameters()).device
    return device
