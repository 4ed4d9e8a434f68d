"""The main job: find, plan, collect, fit layer by layer, replace."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ffsplit.budget.registry import planners
from ffsplit.calibrate.batches import Batches, CalibrationInput, is_causal, make_batches
from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.calibrate.devices import visiting
from ffsplit.calibrate.drift import DriftMeter
from ffsplit.calibrate.layer import LayerData
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.calibrate.tokens import max_positions
from ffsplit.errors import CannotRunError, ModelError
from ffsplit.families import FFNs, FFNSite, check_dtypes, check_finite, find_ffns, read, replace, verify
from ffsplit.families.blocks import Block
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.methods.registry import get_method
from ffsplit.pipeline.decide import decide
from ffsplit.pipeline.job import Job, linear_parameters, make_report
from ffsplit.pipeline.journal import Journal
from ffsplit.pipeline.load import open_source
from ffsplit.pipeline.plan import make_plan
from ffsplit.pipeline.recipe import DEFAULT_DOCUMENTS, Recipe, load_recipe
from ffsplit.pipeline.result import CompressionResult
from ffsplit.provenance import hash_model

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
TOKENS_PER_NEURON = 8


def compress(
    model: PreTrainedModel | str | Path,
    tokenizer: Any | None = None,
    *,
    recipe: str | Path | dict[str, Any] | Recipe = "ffsplit",
    keep: float | None = None,
    bits: float | None = None,
    sparsity: float | None = None,
    calibration: CalibrationInput | Path | None = None,
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
        sparsity: budget: share of activations or tokens that are left out at run time.
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
    if isinstance(calibration, Path):
        calibration = str(calibration)
    if isinstance(calibration, str):
        overrides["source"] = calibration
    resolved = load_recipe(recipe, keep=keep, bits=bits, sparsity=sparsity, calibration=overrides, seed=seed)
    if isinstance(model, str | Path):
        model, tokenizer = _load(str(model), tokenizer, resolved, dtype)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"model is a {type(model).__name__}; it must be a transformers model, or the name of one")
    source = calibration if calibration is not None else resolved.calibration.source
    where = torch.device(device) if device is not None else default_device()
    with evaluating(model):
        job = _prepare(model, tokenizer, resolved, source, where, progress)
        seconds = _timed_run(job, journal, cache_dir)
    resolved = _with_data(resolved, job.data, named=isinstance(source, str))
    return CompressionResult(model, job.plan, resolved, make_report(job, seconds), tokenizer)


def _timed_run(job: Job, journal: str | Path | None, cache_dir: str | Path | None) -> float:
    """The long work; how many seconds it took."""
    started = time.perf_counter()
    log = Journal(journal, job.identity()) if journal is not None else None
    if job.recipe.planner is not None:
        job.settle(job.recipe.methods_for(len(job.shapes), decide(job, log)))
    home = cache_home(job.device, job.data.tokens, job.found.sites[0].d_model)
    with TensorCache(cache_dir, home) as cache, TensorCache(cache_dir, home) as drift_cache:
        _run(job, cache, drift_cache, log)
    return time.perf_counter() - started


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None and found.type != "mps" else torch.device("cpu")


def cache_home(device: torch.device, tokens: int, d_model: int) -> torch.device:
    """Where activations wait: on the accelerator when they take a small part of its free memory, else on the CPU."""
    if device.type == "cpu":
        return device
    # Inputs, outputs and drift of one layer, for two streams, in float32.
    needed = 6 * tokens * d_model * 4
    free, _ = torch.accelerator.get_memory_info(device)
    return device if needed < free / 4 else torch.device("cpu")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no key-value cache while a model is worked on; both are put back."""
    training = {name: module.training for name, module in model.named_modules()}
    use_cache = getattr(model.config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        for name, module in model.named_modules():  # a module that was put in meanwhile follows the model
            module.training = training.get(name, training[""])
        if use_cache is not None:
            model.config.use_cache = use_cache


def _load(name: str, tokenizer: Any | None, recipe: Recipe, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Any]:
    """Load a model by name, after its empty skeleton has shown that the plan works out."""
    source = open_source(name)
    refuse_compressed(source.config, name)
    try:
        skeleton = source.skeleton()
        found = find_ffns(skeleton)
    except CannotRunError as error:
        # Some models need real weights to run; they are looked at again once these are there.
        logger.info("%s could not be traced without weights: %s", name, error)
    else:
        check_plan(found, shapes_of(skeleton, found), recipe)
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


def shapes_of(model: PreTrainedModel, found: FFNs) -> tuple[FFNShape, ...]:
    """Sizes of the FFNs that were found. Works on the meta device."""
    return tuple(FFNShape.of(read(model, site)) for site in found.sites)


def check_plan(found: FFNs, shapes: Sequence[FFNShape], recipe: Recipe) -> None:
    """Refuse, from shapes alone, what cannot work.

    Raises:
        RecipeError: no FFN would change, or a setting does not fit the model.
        BudgetError: a budget is out of reach.
    """
    if recipe.planner is None:
        make_plan(found.sites, shapes, recipe.methods_for(len(shapes)))
    else:
        planners()[recipe.planner.method].check(shapes, recipe.planner)


def _prepare(
    model: PreTrainedModel,
    tokenizer: Any | None,
    recipe: Recipe,
    source: CalibrationInput,
    device: torch.device,
    progress: Progress | None,
) -> Job:
    """Everything that can refuse the input, before the long work."""
    refuse_compressed(model.config, type(model).__name__)
    if any(isinstance(module, SumFFN) for module in model.modules()):
        raise ModelError(f"{type(model).__name__} has been compressed already; start from the dense model")
    found = find_ffns(model)
    shapes = shapes_of(model, found)
    check_plan(found, shapes, recipe)
    check_dtypes(model, found.sites)
    check_finite(model, found.sites)
    verify(model, found.sites)
    wanted = recipe.calibration
    data = make_batches(
        model,
        tokenizer,
        source,
        field=wanted.field,
        seq_len=_seq_len(model, recipe),
        samples=_samples(model, recipe),
        batch_size=wanted.batch_size,
    )
    _warn_of_little_text(data, recipe, max(site.d_ff for site in found.sites))
    job = Job(model, found, shapes, recipe, data, device, progress, hash_model(model), linear_parameters(model))
    if recipe.planner is None:
        job.settle(recipe.methods_for(len(shapes)))
    return job


def _warn_of_little_text(data: Batches, recipe: Recipe, d_ff: int) -> None:
    """A fit over ``d_ff`` neurons from hardly more tokens than that follows the text, not the model."""
    used = [recipe.method, *(override.method for override in recipe.overrides)]
    fitted = any(config is not None and config.needs_data for config in used)
    if fitted and data.windows is not None and data.tokens < TOKENS_PER_NEURON * d_ff:
        logger.warning(
            "%s tokens of calibration text are few for FFNs of %s neurons; quality gains from several times as many "
            "(samples is %s)", f"{data.tokens:,}", f"{d_ff:,}", data.samples,
        )  # fmt: skip


def _with_data(recipe: Recipe, data: Batches, *, named: bool) -> Recipe:
    """The recipe with the calibration data as it really was: what is stored must not claim another run."""
    facts: dict[str, Any] = {"samples": data.samples} if named else {"source": data.name, "samples": data.samples}
    if data.windows is not None:
        facts["seq_len"] = data.windows.seq_len
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=facts)})


def _samples(model: PreTrainedModel, recipe: Recipe) -> int:
    """How many sequences: what was asked for, or the default, which is far more where a sequence is one document."""
    if is_causal(model) or "samples" in recipe.calibration.model_fields_set:
        return recipe.calibration.samples
    return DEFAULT_DOCUMENTS


def _seq_len(model: PreTrainedModel, recipe: Recipe) -> int:
    """The window length: what was asked for, or the default as far as the model's positions reach."""
    wanted, limit = recipe.calibration.seq_len, max_positions(model)
    if limit is None or "seq_len" in recipe.calibration.model_fields_set:
        return wanted
    return min(wanted, limit)


def _run(job: Job, cache: TensorCache, drift_cache: TensorCache, log: Journal | None) -> None:
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
            module, notes = log.load(index, read(job.model, site).act, _weight_dtype(job.model, site))
        elif job.configs[index] is None:
            continue
        else:
            module, notes = _fit(job, site, index, inputs[site.name], corrections)
            if log is not None:
                log.store(index, module, notes)
        job.notes.append(notes)
        replace(job.model, site, module.to(_weight_device(job.model, site)))
    for store in (*inputs.values(), *([corrections] if corrections is not None else [])):
        store.drop()
    if job.recipe.propagate:
        replay.advance(block)


def _fit(
    job: Job, site: FFNSite, index: int, inputs: Activations, corrections: Activations | None
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


def _weight_dtype(model: PreTrainedModel, site: FFNSite) -> torch.dtype:
    dtype: torch.dtype = next(model.get_submodule(site.down).parameters()).dtype
    return dtype


def _weight_device(model: PreTrainedModel, site: FFNSite) -> torch.device:
    device: torch.device = next(model.get_submodule(site.down).parameters()).device
    return device
