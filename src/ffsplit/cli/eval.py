"""``ffsplit eval``: how good a model is, alone and beside its dense one."""

from __future__ import annotations

from typing import Annotated

import typer

from ffsplit.cli import checks, loading, options
from ffsplit.cli.console import print_json, quiet
from ffsplit.cli.evaluation import show_evaluation
from ffsplit.cli.progress import reporting

Against = Annotated[str | None, typer.Option("--against", help="The dense model, to compare with.", metavar="DENSE")]


def evaluate(
    model: options.Model,
    against: Against = None,
    data: options.Data = "builtin",
    field: options.Field = None,
    samples: options.Samples = None,
    seq_len: options.SeqLen = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Measure a model: perplexity, masked-LM accuracy or hidden states, and with --against KL and top-1 agreement."""
    settings = loading.settings(device, dtype)
    with quiet(), reporting() as report:
        source = loading.source(model)
        dense = None if against is None else loading.source(against)
        checks.check_text(data, field, "evaluation")
        tokenizer = source.tokenizer() or (None if dense is None else dense.tokenizer())
        from ffsplit.calibrate.sources import TextSource
        from ffsplit.evaluate.evaluate import evaluate as run

        evaluation = run(
            settings.load(source),
            tokenizer,
            TextSource(data, field, "evaluation"),
            None if dense is None else settings.load(dense),
            seq_len=seq_len,
            samples=samples,
            batch_size=batch_size,
            progress=report,
        )
        disk = {name: loading.disk_bytes(name) for name in (model, against) if name is not None}
    if as_json:
        print_json({"model": model, "against": against, "disk": disk, **evaluation.to_dict()})
    else:
        show_evaluation(evaluation, disk.get(model), disk.get(against) if against is not None else None)
