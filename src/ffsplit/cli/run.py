"""One call of ``ffsplit compress``: where things are, and the two long steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ffsplit.cli.progress import Report
from ffsplit.cli.writing import write_compressed

if TYPE_CHECKING:
    import torch

    from ffsplit.checkpoint.save import SavedCheckpoint
    from ffsplit.pipeline.recipe import Recipe
    from ffsplit.pipeline.result import CompressionResult


@dataclass(frozen=True)
class Run:
    """What the command line said, checked.

    Attributes:
        model: hub id, folder or GGUF file.
        out: directory to write.
        device: to compute on.
        dtype: to load the model in.
        cache_dir: for activations.
        measured: for measurements that outlast the run.
        verify: reload and compare what is saved.
        overwrite: replace an earlier output.
    """

    model: str
    out: Path
    device: torch.device
    dtype: torch.dtype | None
    cache_dir: Path | None
    measured: Path | None
    verify: bool
    overwrite: bool

    @cached_property  # once saved, "." is no directory any more
    def journal(self) -> Path:
        """Beside the output, so that what is finished can be moved there."""
        target = self.out.resolve()
        return target.with_name(f"{target.name}.ffsplit-journal")

    def compressed(self, recipe: Recipe, journal: Path, report: Report) -> CompressionResult:
        """Compress the model; ``journal`` lets a killed run go on."""
        from ffsplit.pipeline.compress import compress

        return compress(
            self.model,
            recipe=recipe,
            device=self.device,
            dtype=self.dtype,
            journal=journal,
            cache_dir=self.cache_dir,
            measured=self.measured,
            progress=report,
        )

    def save(self, result: CompressionResult, out: Path, *, overwrite: bool = False) -> SavedCheckpoint:
        """Write the checkpoint, whole or not at all."""
        return write_compressed(result, out, verify=self.verify, overwrite=overwrite)
