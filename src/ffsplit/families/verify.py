"""Proof that an FFN was read correctly: its weights, run on their own, against the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families.forward import Inputs, drive
from ffsplit.families.site import FFNSite
from ffsplit.families.surgery import read
from ffsplit.ffn.weights import FFNWeights

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
HALF_TOLERANCE = 3e-2


class _Recorder:
    """The input of ``up`` and the output of ``down`` of every site's first call."""

    def __init__(self, model: nn.Module, sites: Sequence[FFNSite]) -> None:
        self._model = model
        self._sites = sites
        self._handles: list[RemovableHandle] = []
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        for site in self._sites:
            up, down = self._model.get_submodule(site.up), self._model.get_submodule(site.down)

            def keep_input(_module: nn.Module, args: Any, name: str = site.name) -> None:
                self.inputs.setdefault(name, args[0].clone())

            def keep_output(_module: nn.Module, _args: Any, output: Any, name: str = site.name) -> None:
                self.outputs.setdefault(name, output.clone())

            self._handles += [up.register_forward_pre_hook(keep_input), down.register_forward_hook(keep_output)]
        return self

    def __exit__(self, *_exception: object) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def verify(
    model: PreTrainedModel, sites: Sequence[FFNSite], inputs: Inputs | None = None, tolerance: float | None = None
) -> None:
    """Run the model once and compare each FFN with `read` of its site, in float32.

    Args:
        model: with weights, not replaced yet.
        sites: what `find_ffns` found.
        inputs: keyword arguments of its ``forward``; tiny ones are made up when not given.
        tolerance: allowed relative error; by default 1e-3, and 3e-2 for half precision.

    Raises:
        ModelError: weights are not finite, or an FFN computes something else than its weights say.
    """
    check_finite(model, sites)
    recorders = drive(model, lambda _kwargs: _Recorder(model, sites), inputs).values()
    for site in sites:
        recorder = next((r for r in recorders if site.name in r.outputs and site.name in r.inputs), None)
        if recorder is None:
            raise ModelError(f"{site.name}: the model's forward did not run this FFN, so it cannot be verified")
        x, output = recorder.inputs[site.name], recorder.outputs[site.name]
        weights = read(model, site)
        allowed = TOLERANCE.get(weights.up.dtype, HALF_TOLERANCE) if tolerance is None else tolerance
        error = _error(weights, x, output)
        if not error <= allowed:  # NaN must not pass
            raise ModelError(
                f"{site.name}: what the model computes differs from its FFN weights by {error:.3g} (relative, allowed "
                f"{allowed:.3g}); {site.down} is not a plain FFN of {site.up} with {site.act or site.act_name}"
            )


def _error(weights: FFNWeights, x: Tensor, output: Tensor) -> float:
    weights = weights.map(lambda tensor: tensor.float().to(x.device))
    act = deepcopy(weights.act).to(device=x.device, dtype=torch.float32)
    expected = FFNWeights(**{**weights.tensors(), "act": act})(x.float())  # type: ignore[arg-type]
    difference = (expected - output.float()).norm()
    return float(difference / output.float().norm().clamp_min(torch.finfo(torch.float32).tiny))


def check_dtypes(model: nn.Module, sites: Sequence[FFNSite]) -> None:
    """Refuse FFNs that are in two floating-point types at once (T5 in float16): a sum of branches has one.

    Raises:
        ModelError: names the first such FFN and its projections.
    """
    for site in sites:
        dtypes = {path: next(model.get_submodule(path).parameters()).dtype for path in site.projections}
        if len(set(dtypes.values())) > 1:
            listed = ", ".join(f"{path} {str(dtype).removeprefix('torch.')}" for path, dtype in dtypes.items())
            raise ModelError(f"{site.name} is in more than one dtype ({listed}): load the model in bfloat16 or float32")


def check_finite(model: nn.Module, sites: Sequence[FFNSite]) -> None:
    """Refuse NaN and infinity in the weights of the FFNs.

    Raises:
        ModelError: names the first such tensor.
    """
    for site in sites:
        for path in site.projections:
            for name, tensor in model.get_submodule(path).named_parameters():
                if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                    bad = int((~torch.isfinite(tensor)).sum())
                    raise ModelError(f"{path}.{name}: {bad} of {tensor.numel()} values are NaN or infinite")
