"""Looking at a model before compressing it: its FFNs, its heavy hitters, and what a compression will take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ffsplit.calibrate.batches import Batches, make_batches
from ffsplit.calibrate.cache import TensorCache
from ffsplit.calibrate.devices import visiting
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.calibrate.statistics import FFNStatistics, collect
from ffsplit.calibrate.tokens import max_positions
from ffsplit.devices import default_device
from ffsplit.errors import CannotRunError, ModelError
from ffsplit.families import FFNs, FFNSite, find_ffns, read, verify
from ffsplit.families.forward import evaluating, without_cache
from ffsplit.ops.scores import output_norm
from ffsplit.pipeline.compress import refuse_compressed
from ffsplit.pipeline.footprint import Footprint, footprint
from ffsplit.pipeline.load import Source, open_source
from ffsplit.pipeline.recipe import Calibration

Progress = Callable[[str, int, int], None]
RUN_SAMPLES, RUN_SEQ_LEN = 8, 512
HEAVY_SHARE = 0.03
DEFAULT = Calibration.model_validate({})


@dataclass(frozen=True)
class FFNGroup:
    """FFNs of one shape.

    Attributes:
        count: how many.
        first: path of the first.
        last: path of the last.
        d_model: size of input and output.
        d_ff: neurons.
        gated: whether there is a gate.
        fused: order of the halves if up and gate are one projection.
        act: name of the activation.
        kind: ``module`` or ``inline``; see :class:`~ffsplit.families.site.FFNSite`.
    """

    count: int
    first: str
    last: str
    d_model: int
    d_ff: int
    gated: bool
    fused: str | None
    act: str
    kind: str


@dataclass(frozen=True)
class Concentration:
    """How unequal the neurons of one FFN are, by output norm ``||h_j|| ||down_j||`` over the calibration tokens.

    Attributes:
        ffn: the layer's path.
        tokens: that it was measured on.
        top_1: share of the squared output norms in the 1 % largest neurons (at least one neuron).
        top_3: in the 3 % largest.
        top_10: in the 10 % largest.
        gini: Gini coefficient of the output norms: 0 when all are equal, towards 1 when few have everything.
        heavy_active: share of tokens on which a neuron of the 3 % largest is above the token's mean, averaged.
        mean_active: the same for all neurons.
        dead: neurons that were zero on every token.
    """

    ffn: str
    tokens: int
    top_1: float
    top_3: float
    top_10: float
    gini: float
    heavy_active: float
    mean_active: float
    dead: int


@dataclass(frozen=True)
class Inspection:
    """What there is to know about a model before it is compressed.

    Attributes:
        model: as it was named.
        model_class: of transformers.
        groups: its FFNs by shape.
        ffns: how many FFNs.
        ffn_parameters: in them.
        model_parameters: in the whole model.
        covered_share_of_ffn: of all FFN parameters, those that can be worked on.
        ffn_share_of_model: of the model's parameters, those in these FFNs.
        notes: FFNs that are not covered, and why.
        layers: concentration of each FFN, in execution order; empty if nothing was run.
        calibration: the text they were measured on.
        not_run: why nothing was run.
        footprint: memory and disk of a compression.
    """

    model: str
    model_class: str
    groups: tuple[FFNGroup, ...]
    ffns: int
    ffn_parameters: int
    model_parameters: int
    covered_share_of_ffn: float
    ffn_share_of_model: float
    notes: tuple[str, ...]
    layers: tuple[Concentration, ...]
    calibration: dict[str, Any] | None
    not_run: str | None
    footprint: Footprint

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def inspect(
    model: str,
    *,
    calibration: str = "builtin",
    field: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Find the FFNs of a model and measure, on a few windows of text, how concentrated their outputs are.

    Args:
        model: hub id, folder or GGUF file.
        calibration: source of text.
        field: column of a structured source.
        samples: windows to run, 8 if not given; the footprint is then that of a compression's default.
        seq_len: tokens per window, 512 if not given, or what the model can take.
        device: where layers are run, one at a time.
        progress: called with (what, done, total).

    Raises:
        ModelError: the model cannot be read, is compressed already, or has no FFN.
        DataError: there is no usable text, for a model that reads text.
    """
    source = open_source(model)
    refuse_compressed(source.config, model)
    looked_at, found = _look(source)
    plan = footprint(
        looked_at,
        found,
        itemsize=_itemsize(source),
        samples=samples or DEFAULT.samples,
        seq_len=_limited(looked_at, seq_len or DEFAULT.seq_len),
    )
    tokenizer = source.tokenizer()
    not_run = _why_not(looked_at, tokenizer)
    layers: tuple[Concentration, ...] = ()
    data: Batches | None = None
    if not_run is None:
        loaded = source.load() if looked_at.device.type == "meta" else looked_at
        found = find_ffns(loaded)
        verify(loaded, found.sites)
        length = _limited(loaded, seq_len or RUN_SEQ_LEN)
        data = make_batches(
            loaded, tokenizer, calibration, field=field, seq_len=length, samples=samples or RUN_SAMPLES, batch_size=1
        )
        layers = concentrations(loaded, found, data, device or default_device(), progress)
    return _inspection(model, looked_at, found, layers, data, not_run, plan)


def concentrations(
    model: PreTrainedModel, found: FFNs, data: Batches, device: torch.device, progress: Progress | None = None
) -> tuple[Concentration, ...]:
    """Measure every FFN of the dense model, one block on the device at a time."""
    measured: list[Concentration] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(without_cache(model))
        stack.enter_context(torch.no_grad())
        cache = stack.enter_context(TensorCache())
        replay = BlockReplay(model, data.batches, cache, device, progress)
        stack.enter_context(visiting(model, found.blocks, device))
        for number, block in enumerate(found.blocks):
            inputs = replay.capture(block)
            for site in block.sites:
                ffn = read(model, site).map(lambda tensor: tensor.to(device=device, dtype=torch.float32))
                ffn.act.to(device)
                statistics = collect(ffn, inputs[site.name], device)
                statistics.check_finite(site.name)
                measured.append(concentration(site.name, statistics, ffn.down))
                inputs[site.name].drop()
            replay.advance(block)
            if progress is not None:
                progress("inspect", number + 1, len(found.blocks))
    return tuple(measured)


def concentration(name: str, statistics: FFNStatistics, down: Float[Tensor, "d_model d_ff"]) -> Concentration:
    """The figures of one layer.

    Raises:
        ModelError: no token reached it.
    """
    if not statistics.tokens:
        raise ModelError(f"{name}: the calibration text never reached this FFN")
    norms = output_norm(statistics.hidden_square_sum, down)
    order = norms.argsort(descending=True)
    energy = norms.square()[order]
    active = statistics.hidden_active[order] / statistics.tokens

    def top(share: float) -> slice:
        return slice(0, max(1, round(share * len(norms))))

    def of_energy(share: float) -> float:
        return float(energy[top(share)].sum() / energy.sum().clamp_min(torch.finfo(torch.float64).tiny))

    return Concentration(
        ffn=name,
        tokens=int(statistics.tokens),
        top_1=of_energy(0.01),
        top_3=of_energy(0.03),
        top_10=of_energy(0.10),
        gini=gini(norms),
        heavy_active=float(active[top(HEAVY_SHARE)].mean()),
        mean_active=float(active.mean()),
        dead=int((statistics.hidden_square_sum == 0).sum()),
    )


def gini(values: Float[Tensor, " n"]) -> float:
    """Gini coefficient of non-negative numbers: mean absolute difference of two of them over twice their mean."""
    ordered = values.double().sort().values
    total = float(ordered.sum())
    if total == 0:
        return 0.0
    count = len(ordered)
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=ordered.device)
    return float((2 * ranks - count - 1) @ ordered) / (count * total)


def _look(source: Source) -> tuple[PreTrainedModel, FFNs]:
    """The model without weights and its FFNs; with weights if its code needs them to run."""
    skeleton = source.skeleton()
    try:
        return skeleton, find_ffns(skeleton)
    except CannotRunError:
        loaded = source.load()
        return loaded, find_ffns(loaded)


def _why_not(model: PreTrainedModel, tokenizer: Any | None) -> str | None:
    """Why text cannot be run through a model, or None when it can."""
    if model.main_input_name != "input_ids":
        return f"{type(model).__name__} reads {model.main_input_name}, not text"
    return "the model has no tokenizer" if tokenizer is None else None


def _limited(model: PreTrainedModel, seq_len: int) -> int:
    return min(seq_len, max_positions(model) or seq_len)


def _itemsize(source: Source) -> int:
    stored = getattr(source.config, "dtype", None)
    if source.gguf_file is not None or not isinstance(stored, torch.dtype):
        stored = torch.float32
    return stored.itemsize


def _inspection(
    name: str,
    model: PreTrainedModel,
    found: FFNs,
    layers: tuple[Concentration, ...],
    data: Batches | None,
    not_run: str | None,
    plan: Footprint,
) -> Inspection:
    coverage = found.coverage
    return Inspection(
        model=name,
        model_class=type(model).__name__,
        groups=tuple(_groups(model, found)),
        ffns=len(found.sites),
        ffn_parameters=coverage.ffn_parameters,
        model_parameters=coverage.model_parameters,
        covered_share_of_ffn=coverage.covered_share_of_ffn,
        ffn_share_of_model=coverage.ffn_share_of_model,
        notes=coverage.notes,
        layers=layers,
        calibration=None if data is None else data.describe(),
        not_run=not_run,
        footprint=plan,
    )


def _groups(model: PreTrainedModel, found: FFNs) -> Iterator[FFNGroup]:
    grouped: dict[tuple[Any, ...], list[FFNSite]] = {}
    for site in found.sites:
        act = site.act_name or (type(model.get_submodule(site.act)).__name__ if site.act is not None else "unknown")
        key = (site.d_model, site.d_ff, site.gated, site.fused, act, site.kind)
        grouped.setdefault(key, []).append(site)
    for (d_model, d_ff, gated, fused, act, kind), sites in grouped.items():
        yield FFNGroup(len(sites), sites[0].name, sites[-1].name, d_model, d_ff, gated, fused, act, kind)
