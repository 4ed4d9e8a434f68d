"""The main job: find, plan, collect, fit layer by layer, replace."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ffsplit.calibrate.batches import Batches, CalibrationInput, make_batches
from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.drift import DriftMeter
from ffsplit.calibrate.layer import LayerData
from ffsplit.calibrate.replay import BlockReplay, move_outside_blocks
from ffsplit.errors import ModelError
from ffsplit.families import FFNs, FFNSite, check_finite, find_ffns, read, replace, verify
from ffsplit.families.blocks import Block
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import MethodConfig, get_method
from ffsplit.pipeline.journal import Journal
from ffsplit.pipeline.load import open_source
from ffsplit.pipeline.plan import Plan, make_plan
from ffsplit.pipeline.recipe import Recipe, load_recipe
from ffsplit.pipeline.result import CompressionResult
from ffsplit.provenance import hash_model, provenance

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


def compress(
    model: PreTrainedModel | str | Path,
    tokenizer: Any | None = None,
    *,
    recipe: str | Path | dict[str, Any] | Recipe = "ffsplit",
    keep: float | None = None,
    bits: float | None = None,
    calibration: CalibrationInput | None = None,
    field: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    journal: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> CompressionResult:
    """Compress the FFNs of a model.

    Args:
        model: a loaded model, whose FFNs are replaced in place, or a hub id, folder or GGUF file to load.
        tokenizer: for text; None loads the one beside a model given by name.
        recipe: a method's name, a preset, a YAML file, or plain values.
        keep: budget: share of the FFN parameters that stay.
        bits: budget: average stored bits per FFN weight, scales and zeros included.
        calibration: a source of text, texts, a tensor of token ids ``[samples, seq_len]``, or ready-made batches.
        field: column of a structured source.
        samples: calibration windows (documents for encoders).
        seq_len: tokens per window; capped at what the model can take.
        batch_size: windows per forward pass.
        device: where statistics and fits are computed; the model itself stays where it is, one block at a time
            visits the device. None means an accelerator if there is one.
        dtype: to load the model in, when it is given by name.
        seed: of everything random.
        journal: directory that lets a killed run go on; removed by the command line once the result is saved.
        cache_dir: keep activations on disk below this directory instead of in memory.
        progress: called with (what, done, total).

    Raises:
        FFSplitError: the input cannot work; raised before tokens are run wherever that is possible.
    """
    asked = {"field": field, "samples": samples, "seq_len": seq_len, "batch_size": batch_size}
    overrides = {name: value for name, value in asked.items() if value is not None}
    if isinstance(calibration, str):
        overrides["source"] = calibration
    resolved = load_recipe(recipe, keep=keep, bits=bits, calibration=overrides, seed=seed)
    if isinstance(model, str | Path):
        model, tokenizer = _load(str(model), tokenizer, resolved, dtype)
    source = calibration if calibration is not None else resolved.calibration.source
    where = torch.device(device) if device is not None else default_device()
    with evaluating(model), TensorCache(cache_dir) as cache, TensorCache(cache_dir) as drift_cache:
        job = _prepare(model, tokenizer, resolved, source, where, progress)
        started = time.perf_counter()
        log = Journal(journal, job.identity()) if journal is not None else None
        _run(job, cache, drift_cache, log)
        seconds = time.perf_counter() - started
    return CompressionResult(model, job.plan, resolved, _report(job, seconds), tokenizer)


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None and found.type != "mps" else torch.device("cpu")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no key-value cache while a model is worked on; both are put back."""
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache


def _load(name: str, tokenizer: Any | None, recipe: Recipe, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Any]:
    """Load a model by name, after its empty skeleton has shown that the plan works out."""
    source = open_source(name)
    refuse_compressed(source.config, name)
    try:
        skeleton = source.skeleton()
        found = find_ffns(skeleton)
    except ModelError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:
        # Some models cannot run on the meta device; they are looked at again once their weights are there.
        logger.info("%s could not be traced without weights: %s", name, error)
    else:
        plan_for(skeleton, found, recipe)
    return source.load(dtype), tokenizer if tokenizer is not None else source.tokenizer()


def refuse_compressed(config: Any, name: str) -> None:
    """Refuse a model that is stored in some compressed form already.

    Raises:
        ModelError: its configuration has a ``quantization_config``.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    kind = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    hint = "run `ffsplit.decompress` first" if kind == "ffsplit" else "give the original, dense checkpoint"
    raise ModelError(f"{name} is already compressed (quant_method={kind}); {hint}")


@dataclass
class _Job:
    """One compression under way."""

    model: PreTrainedModel
    found: FFNs
    recipe: Recipe
    plan: Plan
    configs: list[MethodConfig | None]
    data: Batches
    device: torch.device
    progress: Progress | None
    model_sha256: str
    notes: list[dict[str, Any]] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        """What an interrupted run and its continuation must share."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "model": self.model_sha256,
            "data": self.data.sha256,
            "dtype": str(self.model.dtype),
            "plan": self.plan.model_dump(mode="json")["ffns"],
        }


def plan_for(model: PreTrainedModel, found: FFNs, recipe: Recipe) -> Plan:
    """The plan of a recipe for the FFNs that were found. Works on the meta device."""
    shapes = [FFNShape.of(read(model, site)) for site in found.sites]
    return make_plan(found.sites, shapes, recipe.methods_for(len(found.sites)))


def _prepare(
    model: PreTrainedModel,
    tokenizer: Any | None,
    recipe: Recipe,
    source: CalibrationInput,
    device: torch.device,
    progress: Progress | None,
) -> _Job:
    """Everything that can refuse the input, before the long work."""
    refuse_compressed(model.config, type(model).__name__)
    found = find_ffns(model)
    plan = plan_for(model, found, recipe)
    check_finite(model, found.sites)
    verify(model, found.sites)
    wanted = recipe.calibration
    data = make_batches(
        model,
        tokenizer,
        source,
        field=wanted.field,
        seq_len=wanted.seq_len,
        samples=wanted.samples,
        batch_size=wanted.batch_size,
    )
    configs = recipe.methods_for(len(found.sites))
    return _Job(model, found, recipe, plan, configs, data, device, progress, hash_model(model))


def _run(job: _Job, cache: TensorCache, drift_cache: TensorCache, log: Journal | None) -> None:
    """Block by block: capture the inputs, fit, replace, go on with what the compressed block gives."""
    replay = BlockReplay(job.model, job.data.batches, cache, job.device, job.progress)
    index_of = {site.name: index for index, site in enumerate(job.found.sites)}
    drift = DriftMeter(replay, drift_cache) if job.recipe.targets == "dense" and job.recipe.propagate else None
    homes = _home_devices(job.model)
    move_outside_blocks(job.model, job.found.blocks, job.device)
    try:
        for number, block in enumerate(job.found.blocks):
            _run_block(job, replay, drift, log, block, index_of)
            if job.progress is not None:
                job.progress("fit", number + 1, len(job.found.blocks))
    finally:
        _go_home(job.model, homes)


def _run_block(
    job: _Job,
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
            module, notes = log.load(index, read(job.model, site).act, _weight_dtype(job.model, site))
        elif job.configs[index] is None:
            continue
        else:
            module, notes = _fit(job, site, index, inputs[site.name], corrections)
            if log is not None:
                log.store(index, module, notes)
        job.notes.append(notes)
        replace(job.model, site, module.to(_weight_device(job.model, site)))
    for store in inputs.values():
        store.drop()
    if job.recipe.propagate:
        replay.advance(block)


def _fit(
    job: _Job, site: FFNSite, index: int, inputs: Activations, corrections: Activations | None
) -> tuple[SumFFN, dict[str, Any]]:
    """One FFN: its compressed form in the model's dtype, and what the report says about it."""
    config = job.configs[index]
    assert config is not None
    started = time.perf_counter()
    dense = read(job.model, site).map(lambda tensor: tensor.to(device=job.device, dtype=torch.float32))
    dense.act.to(job.device)
    data = LayerData(dense, inputs, site.name, job.recipe.seed + index, corrections)
    if config.needs_data and inputs.tokens == 0:
        raise ModelError(f"{site.name}: the calibration text never reached this FFN")
    with torch.no_grad():
        module = get_method(config.method).apply(data, config)
        planned = job.plan.ffns[index].spec
        if module.spec != planned:
            raise RuntimeError(f"{site.name}: {config.method} built another structure than its plan promised")
        error = relative_error(data, module)
    notes = {
        "ffn": site.name,
        "method": config.method,
        "tokens": inputs.tokens,
        "output_error": error,
        "seconds": round(time.perf_counter() - started, 3),
    }
    module.requires_grad_(False)
    return module.to(_weight_dtype(job.model, site)), notes


def relative_error(data: LayerData, module: SumFFN, chunks: int = 8) -> float:
    """``||FFN(x) - sum(x)|| / ||FFN(x)||`` over the first chunks of the calibration inputs; NaN without inputs."""
    difference = total = 0.0
    for number, chunk in enumerate(data.inputs):
        if number == chunks:
            break
        x = chunk.to(device=data.ffn.up.device, dtype=data.ffn.up.dtype)
        wanted = data.ffn(x)
        difference += float((wanted - module(x)).double().square().sum())
        total += float(wanted.double().square().sum())
    return (difference / total) ** 0.5 if total else float("nan")


def _weight_dtype(model: PreTrainedModel, site: FFNSite) -> torch.dtype:
    return next(model.get_submodule(site.down).parameters()).dtype


def _weight_device(model: PreTrainedModel, site: FFNSite) -> torch.device:
    return next(model.get_submodule(site.down).parameters()).device


def _home_devices(model: PreTrainedModel) -> dict[str, torch.device]:
    return {name: parameter.device for name, parameter in model.named_parameters()}


def _go_home(model: PreTrainedModel, homes: dict[str, torch.device]) -> None:
    """Bring what the run moved back; replaced FFNs follow the model's first parameter."""
    default = next(iter(homes.values()))
    with ExitStack():
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(default)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(homes.get(name, default))


def _report(job: _Job, seconds: float) -> dict[str, Any]:
    """The figures of a run, as plain values."""
    coverage = job.found.coverage
    linear = _linear_parameters(job)
    dense = sum(ffn.dense_shape.parameters for ffn in job.plan.ffns)
    kept = sum(ffn.spec.parameters for ffn in job.plan.ffns)
    return {
        "coverage": {
            "ffns": len(job.found.sites),
            "covered_share_of_ffn": coverage.covered_share_of_ffn,
            "ffn_share_of_model": coverage.ffn_share_of_model,
            "uncovered_notes": list(coverage.notes),
        },
        "budget": {
            "keep_ffn": kept / dense,
            "keep_linear": (linear - dense + kept) / linear,
            "keep_model": (coverage.model_parameters - dense + kept) / coverage.model_parameters,
            "bits_ffn": job.plan.bits,
        },
        "calibration": job.data.describe(),
        "layers": job.notes,
        "seconds": round(seconds, 1),
        "provenance": provenance(
            seed=job.recipe.seed, data={"calibration": job.data.sha256}
        ) | {"model_sha256": job.model_sha256},
    }


def _linear_parameters(job: _Job) -> int:
    """Parameters of all linear layers of the dense model, output head and embeddings not counted."""
    head = job.model.get_output_embeddings()
    total = 0
    for name, module in job.model.named_modules():
        if module is head or not isinstance(module, torch.nn.Linear) or _inside_replaced(job, name):
            continue
        total += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return total + sum(ffn.dense_shape.parameters for ffn in job.plan.ffns)


def _inside_replaced(job: _Job, name: str) -> bool:
    return any(name == site.name or name.startswith(f"{site.name}.") for site in job.found.sites)
