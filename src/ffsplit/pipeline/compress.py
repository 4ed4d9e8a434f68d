"""The main job: find, plan, collect, fit layer by layer, replace."""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from ffsplit.budget.registry import planners
from ffsplit.calibrate.batches import Batches, CalibrationInput, is_causal, make_batches
from ffsplit.calibrate.tokens import max_positions
from ffsplit.devices import device_of
from ffsplit.errors import CannotRunError, ModelError
from ffsplit.families import (
    AttentionSite,
    FFNs,
    check_dtypes,
    check_finite,
    find_attention,
    find_ffns,
    read,
    verify,
    verify_attention,
)
from ffsplit.families.attention import sites_in
from ffsplit.families.centring import centre_norms as centre
from ffsplit.families.centring import check_centring
from ffsplit.families.forward import evaluating, without_cache
from ffsplit.families.norms import fold_norms as fold
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.sum import SumFFN
from ffsplit.kernels.dispatch import exact_products
from ffsplit.pipeline.decide import settle_by_planner
from ffsplit.pipeline.fit import fit_all
from ffsplit.pipeline.job import Job, linear_parameters, make_report
from ffsplit.pipeline.journal import Journal
from ffsplit.pipeline.load import open_source
from ffsplit.pipeline.plan import make_plan
from ffsplit.pipeline.recipe import DEFAULT_DOCUMENTS, Recipe, load_recipe
from ffsplit.pipeline.result import CompressionResult
from ffsplit.provenance import hash_model
from ffsplit.recover.run import check_masks, check_possible, recover_model
from ffsplit.recover.text import recovery_windows
from ffsplit.recover.weights import specs_of

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
TOKENS_PER_NEURON = 8


def compress(
    model: PreTrainedModel | str | Path,
    tokenizer: Any | None = None,
    *,
    recipe: str | Path | dict[str, Any] | Recipe | None = None,
    keep: float | None = None,
    bits: float | None = None,
    sparsity: float | None = None,
    budget: str | None = None,
    methods: Sequence[str] = (),
    calibration: CalibrationInput | Path | None = None,
    field: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    fold_norms: bool | None = None,
    centre_norms: bool | None = None,
    journal: str | Path | None = None,
    cache_dir: str | Path | None = None,
    measured: str | Path | None = None,
    progress: Progress | None = None,
) -> CompressionResult:
    """Compress the FFNs of a model.

    Args:
        model: a loaded model, whose FFNs are replaced in place, or a hub id, folder or GGUF file to load.
        tokenizer: for text; None loads the one beside a model given by name.
        recipe: a method's name, a preset, a YAML file, or plain values; None means `ffsplit`, or `auto` if ``budget``
            or ``methods`` are given.
        keep: budget: share of the FFN parameters that stay.
        bits: budget: average stored bits per FFN weight, scales and zeros included.
        sparsity: budget: share of activations or tokens that are left out at run time.
        budget: any of them, or one of the whole model, as words: ``keep=0.6``, ``bytes=80MB``,
            ``flops=0.6``, ``latency=0.7x@tokens=1``.
        methods: names of what `auto` chooses from, layer by layer.
        calibration: a source of text, texts, a tensor of token ids ``[samples, seq_len]``, or ready-made batches.
        field: column of a structured source.
        samples: calibration windows (documents for encoders).
        seq_len: tokens per window; capped at what the model can take.
        batch_size: windows per forward pass.
        device: where statistics and fits are computed; the model itself stays where it is, one block at a time
            visits the device. None means an accelerator if there is one.
        dtype: to load the model in, when it is given by name.
        seed: of everything random.
        fold_norms: first fold the weights of the norms in front of the FFNs into what they feed; see
            :func:`ffsplit.fold_norms`.
        centre_norms: then take out of every FFN's ``down`` what LayerNorms subtract anyway; see
            :func:`ffsplit.centre_norms`.
        journal: directory that lets a killed run go on; removed by the command line once the result is saved.
        cache_dir: keep activations on disk below this directory instead of in memory.
        measured: directory where a planner finds and leaves its measurements, so that other budgets of the same model
            and text need not repeat them; None keeps them with the journal.
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
    resolved = load_recipe(
        recipe,
        keep=keep,
        bits=bits,
        sparsity=sparsity,
        budget=budget,
        methods=methods,
        calibration=overrides,
        seed=seed,
        fold_norms=fold_norms,
        centre_norms=centre_norms,
    )
    if isinstance(model, str | Path):
        model, tokenizer = load_dense(str(model), tokenizer, [resolved], dtype)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"model is a {type(model).__name__}; it must be a transformers model, or the name of one")
    source = calibration if calibration is not None else resolved.calibration.source
    where = device_of(device)
    with evaluating(model), without_cache(model), exact_products():
        retrain = _recovery(model, tokenizer, resolved, source, where, journal, progress)
        job = prepare(model, tokenizer, resolved, source, where, progress)
        seconds = _timed_run(job, journal, cache_dir, measured)
    resolved = _with_data(resolved, job.data, named=isinstance(source, str))
    notes = None if retrain is None else retrain(dense=job.plan.dense_parameters)
    if notes is not None:
        job.plan = job.plan.with_specs(specs_of(model))
    report = make_report(job, seconds) | ({} if notes is None else {"recovery": notes})
    return CompressionResult(model, job.plan, resolved, report, tokenizer)


def _recovery(
    model: PreTrainedModel,
    tokenizer: Any | None,
    recipe: Recipe,
    source: CalibrationInput,
    device: torch.device,
    journal: str | Path | None,
    progress: Progress | None,
) -> Callable[..., dict[str, Any]] | None:
    """What trains the model once it is compressed, its text tried and the dense model kept; None if none is wanted."""
    if recipe.recovery is None:
        return None
    check_possible(recipe.recovery, has_teacher=True, unlike=recipe.unlike_dense)
    windows = recovery_windows(model, tokenizer, recipe.recovery, source, recipe.calibration.source)
    return functools.partial(
        recover_model,
        model,
        copy.deepcopy(model),
        windows,
        recipe.recovery,
        tokenizer=tokenizer,
        device=device,
        folder=None if journal is None else Path(journal) / "recovery",
        progress=progress,
    )


def _timed_run(
    job: Job, journal: str | Path | None, cache_dir: str | Path | None, measured: str | Path | None
) -> float:
    """The long work; how many seconds it took."""
    started = time.perf_counter()
    with ExitStack() as stack:
        if journal is None and job.recipe.planner is not None:
            # What a planner tries out is kept somewhere, or it would have to be fitted again.
            journal = stack.enter_context(TemporaryDirectory(prefix="ffsplit-"))
        log = Journal(journal, job.identity()) if journal is not None else None
        if log is not None and job.recipe.planner is not None:
            log = settle_by_planner(job, log, cache_dir, measured)
        fit_all(job, log, cache_dir)
    return time.perf_counter() - started


def load_dense(
    name: str, tokenizer: Any | None, recipes: Sequence[Recipe], dtype: torch.dtype | None
) -> tuple[PreTrainedModel, Any]:
    """Load a model by name, after its empty skeleton has shown that what the recipes plan works out."""
    source = open_source(name)
    refuse_compressed(source.config, name)
    try:
        skeleton = source.skeleton()
        found = find_ffns(skeleton)
    except CannotRunError as error:
        # Some models need real weights to run; they are looked at again once these are there.
        logger.info("%s could not be traced without weights: %s", name, error)
    else:
        for recipe in recipes:
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


def prepare(
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
    attention = _attention(model, found, recipe)
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
    job.attention = attention
    if recipe.planner is None:
        job.settle(recipe.methods_for(len(shapes)))
        if recipe.recovery is not None:
            check_masks(recipe.recovery, {ffn.name: ffn.spec for ffn in job.plan.ffns}, job.plan.dense_parameters)
    # After the hash, which is that of the model as it came.
    if recipe.fold_norms:
        if recipe.centre_norms:
            check_centring(model)  # before anything changes: who hands in a model gets it back as it was
        job.folds = fold(model)
    if recipe.centre_norms:
        job.centrings = centre(model)
    return job


def _attention(model: PreTrainedModel, found: FFNs, recipe: Recipe) -> tuple[AttentionSite, ...]:
    """The attentions that may be left out, if the recipe's planner looks at them."""
    if recipe.planner is None or not recipe.planner.looks_at_attention:
        return ()
    attentions = find_attention(model, found).sites
    sites = tuple(site for site in attentions if any(sites_in(block.path, [site]) for block in found.blocks))
    verify_attention(model, sites)
    return sites


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
