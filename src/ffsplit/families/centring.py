"""Taking the mean over d_model out of what FFNs return, where every reader subtracts it; a model computes the same.

LayerNorm does not see a multiple of the all-ones vector: ``n(x + c 1) = n(x)``. If nothing but LayerNorms reads the
residual stream, ``down`` and its bias can be replaced by ``M down`` and ``M b`` with ``M = I - 1 1^T / d_model``: every
column then has mean zero. ``down`` keeps a rank of d_model - 1 at most, and a fit spends nothing on a direction that
no one reads. RMSNorm does read it, so there is nothing to gain in a Llama.

Whether an FFN qualifies is not told from names: a large multiple of the all-ones vector, another one for every token,
is added to its output, and nothing behind it may change.

Reference: SliceGPT, arXiv 2401.15024, section 3 (the same matrix, as the step from LayerNorm to RMSNorm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families.affine import RefusedError
from ffsplit.families.find import FFNs, find_ffns
from ffsplit.families.forward import Inputs, drive
from ffsplit.families.in_place import Changed, check_unshared, overwrite, undone_on_error
from ffsplit.families.outputs import Outputs, allowed_change, outputs_of, refuse_change, relative_change
from ffsplit.families.projection import get_weight, is_projection
from ffsplit.families.site import FFNSite

FULL = (torch.float64, torch.float32)
ALLOWED = 1e-4
"""Of any output in full precision, relative; most norms compute in float32. A reader of the mean gives about 1."""
ALLOWED_PROBE_IN_HALF = 0.1
"""In half precision the probe rounds every number of the stream once more, to 8 bits in bfloat16."""


@dataclass(frozen=True)
class NormCentring:
    """What became of one FFN.

    Attributes:
        ffn: its name.
        down: path of the projection that was centred.
        refused: why it was left as it is; None when it was centred.
    """

    ffn: str
    down: str
    refused: str | None = None


@torch.no_grad()
def centre_norms(model: PreTrainedModel, inputs: Inputs | None = None) -> tuple[NormCentring, ...]:
    """Take the mean over d_model out of every FFN's ``down`` and its bias where all readers subtract it, in place.

    Nothing but numbers changes: the model still saves and loads as a plain transformers model, and in evaluation it
    returns the same but for rounding. In half precision every changed weight is rounded once. Hidden states in front of
    a norm (``output_hidden_states`` of pre-norm models) lose a mean that no module reads.

    Args:
        model: with weights, not compressed.
        inputs: keyword arguments of its ``forward``; tiny ones are made up when not given.

    Returns:
        one entry an FFN, in execution order, with the reason for each that was left.

    Raises:
        ModelError: no FFN can be centred; or the model gives other outputs afterwards, and has been put back.
    """
    found = find_ffns(model, inputs)
    watched = _readers(model, found.sites)
    before = outputs_of(model, watched, inputs)
    results = _proved(model, found, before, inputs)
    with undone_on_error() as changed:
        for result in results:
            if result.refused is None:
                _centre(model.get_submodule(result.down), changed)
        allowed = ALLOWED if model.dtype in FULL else allowed_change(model)
        refuse_change(model, before, outputs_of(model, watched, inputs), "centring its FFNs", allowed)
    return results


@torch.no_grad()
def check_centring(model: PreTrainedModel, inputs: Inputs | None = None) -> tuple[NormCentring, ...]:
    """What `centre_norms` would do; the model is left alone.

    Args:
        model: with weights, not compressed.
        inputs: keyword arguments of its ``forward``; tiny ones are made up when not given.

    Raises:
        ModelError: no FFN can be centred.
    """
    found = find_ffns(model, inputs)
    return _proved(model, found, outputs_of(model, _readers(model, found.sites), inputs), inputs)


def centred(columns: Float[Tensor, "d_model *d_ff"]) -> Float[Tensor, "d_model *d_ff"]:
    """``(I - 1 1^T / d_model) columns``, float64: the mean over the first axis is zero afterwards."""
    wide = columns.double()
    return wide - wide.mean(dim=0)


def _readers(model: nn.Module, sites: Sequence[FFNSite]) -> Callable[[nn.Module], bool]:
    """Everything that must not notice: models and projections, except the ``down`` of FFNs."""
    downs = {model.get_submodule(site.down) for site in sites}
    return lambda module: module not in downs and (isinstance(module, PreTrainedModel) or is_projection(module))


def _proved(model: PreTrainedModel, found: FFNs, before: Outputs, inputs: Inputs | None) -> tuple[NormCentring, ...]:
    sizes = _stream_sizes(model, found, inputs)
    results = tuple(_judge(model, site, sizes[site.name], before, found.sites, inputs) for site in found.sites)
    if all(result.refused for result in results):
        reasons = "".join(f"\n  {result.ffn}: {result.refused}" for result in results)
        raise ModelError(
            f"no FFN of {type(model).__name__} can be centred: that takes readers that subtract the mean over d_model "
            f"(LayerNorm does, RMSNorm keeps it), so the model was left as it is:{reasons}"
        )
    return results


def _judge(
    model: PreTrainedModel,
    site: FFNSite,
    size: float,
    before: Outputs,
    sites: Sequence[FFNSite],
    inputs: Inputs | None,
) -> NormCentring:
    try:
        check_unshared(model, [site.down])
        with _shifted(model.get_submodule(site.down), size) as shifts:
            after = outputs_of(model, _readers(model, sites), inputs)
        if not shifts:
            raise RefusedError("it did not run, so nothing is known of its readers")
        _check_unread(model, before, after)
    except RefusedError as error:
        return NormCentring(site.name, site.down, str(error))
    return NormCentring(site.name, site.down)


@contextmanager
def _shifted(down: nn.Module, size: float) -> Iterator[list[Tensor]]:
    """Add to what a projection returns a multiple of the all-ones vector, for every token one of about this size.

    Yields:
        what was added, one entry a call.
    """
    generator = torch.Generator().manual_seed(0)
    shifts: list[Tensor] = []

    def shift(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        factors = 1 + torch.rand(output.shape[:-1], generator=generator)
        signs = torch.randint(0, 2, output.shape[:-1], generator=generator) * 2 - 1
        shifts.append((size * factors * signs).unsqueeze(-1).to(output))
        return output + shifts[-1]

    handle = down.register_forward_hook(shift)
    try:
        yield shifts
    finally:
        handle.remove()


def _check_unread(model: PreTrainedModel, before: Outputs, after: Outputs) -> None:
    allowed = ALLOWED if model.dtype in FULL else ALLOWED_PROBE_IN_HALF
    for path, tensors in before.items():  # in execution order, so that the first reader is named
        for old, new in zip(tensors, after[path], strict=True):
            change = _moved(old, new)
            if not change <= allowed:  # NaN must not pass
                raise RefusedError(
                    f"the mean over d_model of its output is read: another one changes what {path or 'the model'} "
                    f"returns by {change:.2g} (relative)"
                )


def _moved(old: Tensor, new: Tensor) -> float:
    """How far an output has moved, as a whole or at its median token: one huge token would hide all others."""
    whole = relative_change(old, new)
    if old.dim() == 0 or old.numel() == 0:
        return whole
    tokens = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(torch.finfo(old.dtype).tiny)
    return max(whole, float(tokens.median()))


class _SizeRecorder:
    """Context manager around one forward: typical sizes of a token's numbers, behind each FFN and behind its block."""

    def __init__(self, model: nn.Module, found: FFNs) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._places = [(site.name, site.down, site.d_model) for site in found.sites]
        self._places += [(s.name, block.path, s.d_model) for block in found.blocks if block.path for s in block.sites]
        self.sizes: dict[str, float] = {}

    def __enter__(self) -> Self:
        for name, path, width in self._places:

            def keep(_module: nn.Module, _args: Any, output: Any, name: str = name, width: int = width) -> None:
                leaf = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
                if leaf is not None and leaf.shape[-1:] == (width,):
                    # The median: the first token of a trained model is often a thousand times as large.
                    size = float(leaf.float().square().mean(dim=-1).sqrt().median())
                    self.sizes[name] = max(size, self.sizes.get(name, 0.0))

            self._handles.append(self._model.get_submodule(path).register_forward_hook(keep))
        return self

    def __exit__(self, *_exception: object) -> None:
        for handle in self._handles:
            handle.remove()


def _stream_sizes(model: PreTrainedModel, found: FFNs, inputs: Inputs | None) -> Mapping[str, float]:
    """By an FFN's name: the root mean square of what a token has in the residual stream behind it."""
    recorders = drive(model, lambda _kwargs: _SizeRecorder(model, found), inputs).values()
    sizes: dict[str, float] = {}
    for recorder in recorders:
        for name, size in recorder.sizes.items():
            sizes[name] = max(size, sizes.get(name, 0.0))
    return {site.name: sizes.get(site.name) or 1.0 for site in found.sites}


def _centre(down: nn.Module, changed: Changed) -> None:
    weight, bias = get_weight(down)
    overwrite(weight, centred(weight), changed)
    if bias is not None:
        overwrite(bias, centred(bias), changed)
