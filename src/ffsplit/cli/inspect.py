"""``ffsplit inspect``: what there is to compress, before anything is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import print_json, quiet
from ffsplit.cli.progress import reporting
from ffsplit.cli.tables import line, percent, show, show_facts, size

if TYPE_CHECKING:
    from ffsplit.pipeline.footprint import Footprint
    from ffsplit.pipeline.inspect import Concentration, FFNGroup, Inspection


def inspect(
    model: options.Model,
    calibration: options.Source = "builtin",
    field: options.Field = None,
    samples: options.Samples = None,
    seq_len: options.SeqLen = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Show the FFNs of a model, how concentrated their neurons are, and what compressing it will take."""
    checks.check_model_name(model)
    place = checks.torch_device(device)
    text = calibration or "builtin"
    with quiet(), reporting() as report:
        loading.register()
        checks.check_text(text, field, "calibration")
        from ffsplit.pipeline.inspect import inspect as run

        inspection = run(
            model, calibration=text, field=field, samples=samples, seq_len=seq_len, device=place, progress=report
        )
    if as_json:
        print_json(inspection.to_dict())
    else:
        show_inspection(inspection)


def show_inspection(inspection: Inspection) -> None:
    """The tables of an inspection."""
    place = Path(inspection.model)
    name = place.name if place.exists() else inspection.model
    show_facts(f"{name} ({inspection.model_class})", _coverage(inspection))
    show(
        "FFNs",
        ("first", "last", "kind", "activation", "count", "d_model", "d_ff"),
        [_group(group) for group in inspection.groups],
        words=4,
    )
    if inspection.not_run is not None:
        line(f"Heavy hitters were not measured: {inspection.not_run}.\n")
    else:
        _show_layers(inspection)
    plan = inspection.footprint
    show_facts(f"Memory to compress it on {plan.samples} windows of {plan.seq_len} tokens", _memory(plan))
    show_facts("Weights on disk", [(label, size(count)) for label, count in plan.disk_bytes.items()])


def _coverage(inspection: Inspection) -> Iterator[tuple[str, str]]:
    yield "FFNs", f"{inspection.ffns} with {inspection.ffn_parameters:,} parameters"
    yield "of all FFN parameters", percent(inspection.covered_share_of_ffn)
    yield "of the model's parameters", f"{percent(inspection.ffn_share_of_model)} of {inspection.model_parameters:,}"
    for note in inspection.notes:
        yield "not covered", note


def _group(group: FFNGroup) -> tuple[str, ...]:
    kind = f"{'gated' if group.gated else 'plain'}{', fused' if group.fused else ''}, {group.kind}"
    return group.first, group.last, kind, group.act, str(group.count), f"{group.d_model:,}", f"{group.d_ff:,}"


def _show_layers(inspection: Inspection) -> None:
    data = inspection.calibration or {}
    show(
        f"Heavy hitters on {data.get('samples')} windows of {data.get('source')} ({data.get('tokens'):,} tokens)",
        ("FFN", "top 1 %", "top 3 %", "top 10 %", "Gini", "active, top 3 %", "active, all", "dead"),
        [_layer(layer) for layer in inspection.layers],
    )
    line("top n %: share of the squared output norms in the n % largest neurons. active: share of tokens on which a")
    line("neuron's output is above the token's mean.\n")


def _layer(layer: Concentration) -> tuple[str, ...]:
    shares = (layer.top_1, layer.top_3, layer.top_10)
    active = (layer.heavy_active, layer.mean_active)
    return layer.ffn, *map(percent, shares), f"{layer.gini:.3f}", *map(percent, active), str(layer.dead)


def _memory(plan: Footprint) -> Iterator[tuple[str, str]]:
    yield "model", size(plan.model_bytes)
    yield "statistics of the largest layer", size(plan.statistics_bytes)
    yield "activation cache", f"{size(plan.activation_cache_bytes)} (on disk with --cache-dir)"
    yield "fit of the largest layer", size(plan.fit_bytes)
    yield "estimated peak", f"{size(plan.peak_bytes)}, and the libraries themselves"
