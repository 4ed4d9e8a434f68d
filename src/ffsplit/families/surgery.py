"""Reading the dense weights of an FFN, putting a replacement into its place, and putting dense weights back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ffsplit.errors import ModelError
from ffsplit.families.projection import get_weight, is_projection, set_weight
from ffsplit.families.site import FFNSite
from ffsplit.families.tripwire import Tripwire
from ffsplit.ffn.weights import FFNWeights


def read(model: nn.Module, site: FFNSite) -> FFNWeights:
    """The dense weights of a site in one layout, detached; they share memory with the model.

    Raises:
        ModelError: the model does not have what the site says.
    """
    up, up_bias = get_weight(projection_at(model, site.up))
    down, down_bias = get_weight(projection_at(model, site.down))
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    if site.fused is not None:
        up, gate = _halves(up, site.fused)
        up_bias, gate_bias = (None, None) if up_bias is None else _halves(up_bias, site.fused)
    elif site.gate is not None:
        gate, gate_bias = get_weight(projection_at(model, site.gate))
    act = activation(model, site)
    return FFNWeights(up, down, act, gate, up_bias, gate_bias, down_bias)


def weight_dtype(model: nn.Module, site: FFNSite) -> torch.dtype:
    """In what dtype the model holds the FFN, which what takes its place is cast to."""
    dtype: torch.dtype = next(projection_at(model, site.down).parameters()).dtype
    return dtype


def activation(model: nn.Module, site: FFNSite) -> nn.Module:
    """A copy of the site's activation, in eval mode and without hooks.

    Raises:
        ModelError: there is none of that name, or it has parameters per neuron, so that neurons cannot be dealt with
            one by one.
    """
    if site.act is None:
        if site.act_name not in ACT2FN:
            raise ModelError(f"{site.name}: transformers has no activation {site.act_name!r}")
        act: nn.Module = ACT2FN[site.act_name]
    else:
        act = deepcopy(module_at(model, site.act))
    for name, tensor in (*act.named_parameters(), *act.named_buffers()):
        if tensor.numel() > 1:
            raise ModelError(
                f"{site.act}.{name} has shape {list(tensor.shape)}: only one value for all neurons is supported"
            )
    return act.requires_grad_(False).eval()


def replace(model: nn.Module, site: FFNSite, module: nn.Module) -> dict[str, nn.Module]:
    """Put ``module``, which maps ``[..., d_model]`` to ``[..., d_model]``, into the place of an FFN.

    ``down`` becomes a `Tripwire`; inside ``module`` when that takes the place of the whole FFN module.

    Returns:
        The modules that were taken out, by path, for `restore`.

    Raises:
        ModelError: the site is not there, or ``module`` already has something where the tripwire belongs.
    """
    down = next(_tensors(module_at(model, site.down)))
    tripwire = Tripwire(site.d_model, down.dtype, down.device)
    taken = originals(model, site)
    if site.kind == "module":
        plant(module, site.down.removeprefix(f"{site.name}."), tripwire)
        set_everywhere(model, site.name, module)
        return taken
    set_everywhere(model, site.name, module)
    set_everywhere(model, site.down, tripwire)
    if _act_remains(site):
        assert site.act is not None
        model.set_submodule(site.act, nn.Identity())
    return taken


def originals(model: nn.Module, site: FFNSite) -> dict[str, nn.Module]:
    """The modules that `replace` takes out, by path. Those of an untouched model can restore another one.

    Raises:
        ModelError: the site is not there.
    """
    paths = [site.name]
    if site.kind == "inline":
        paths += [site.down, *([site.act] if _act_remains(site) and site.act is not None else [])]
    return {path: module_at(model, path) for path in paths}


def restore(model: nn.Module, taken: Mapping[str, nn.Module]) -> None:
    """Put modules from `replace` or `originals` back into their places."""
    for path, module in taken.items():
        set_everywhere(model, path, module)


def write(model: nn.Module, site: FFNSite, weights: FFNWeights) -> None:
    """Write dense weights, of any number of neurons, into the projections of an FFN that was not replaced.

    The model keeps its layout (fused, transposed), its dtype and which biases it has; a bias that the weights lack is
    written as zero. ``config`` is the caller's to change.

    Raises:
        ModelError: the weights have a gate or a bias that the model has no place for, or another ``d_model``.
    """
    if weights.gated != site.gated or weights.d_model != site.d_model:
        raise ModelError(
            f"{site.name}: weights with d_model={weights.d_model}, gated={weights.gated} do not fit the model's "
            f"d_model={site.d_model}, gated={site.gated}"
        )
    up, gate, down = (projection_at(model, path) for path in (site.up, site.gate or site.up, site.down))
    for module, bias, path in (
        (up, weights.up_bias, site.up),
        (gate, weights.gate_bias, site.gate),
        (down, weights.down_bias, site.down),
    ):
        if bias is not None and module.bias is None:
            raise ModelError(f"{path}: the weights have a bias and the model has no place for it")
    if site.fused is not None:
        assert weights.gate is not None
        set_weight(up, *_fuse(weights, site.fused), site.up)
    else:
        set_weight(up, weights.up, weights.up_bias, site.up)
        if weights.gate is not None:
            set_weight(gate, weights.gate, weights.gate_bias, str(site.gate))
    set_weight(down, weights.down, weights.down_bias, site.down)
    if site.act is not None and any(True for _ in _tensors(weights.act)):
        model.set_submodule(site.act, deepcopy(weights.act))


def _fuse(weights: FFNWeights, order: str) -> tuple[Tensor, Tensor | None]:
    assert weights.gate is not None
    biases: list[Tensor] | None = None
    if weights.up_bias is not None or weights.gate_bias is not None:
        zero = weights.up.new_zeros(weights.d_ff)
        biases = [zero if bias is None else bias for bias in (weights.gate_bias, weights.up_bias)]
    parts = [weights.gate, weights.up]
    if order == "up_gate":
        parts, biases = parts[::-1], None if biases is None else biases[::-1]
    return torch.cat(parts), None if biases is None else torch.cat(biases)


def _halves(fused: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """``(up, gate)`` of a fused weight or bias."""
    first, second = fused.chunk(2)
    return (second, first) if order == "gate_up" else (first, second)


def _act_remains(site: FFNSite) -> bool:
    """Whether the model still calls the activation after ``name`` was replaced."""
    return site.kind == "inline" and site.name == site.up


def plant(module: nn.Module, path: str, tripwire: Tripwire) -> None:
    """Put a tripwire inside a replacement, at the path that the tensor which it stands for had.

    Raises:
        ModelError: the replacement has something of its own there.
    """
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    if hasattr(module, last) and not isinstance(getattr(module, last), Tripwire):
        raise ModelError(f"the replacement {type(module).__name__} has a {last!r} of its own where {path!r} is kept")
    module.add_module(last, tripwire)


def set_everywhere(model: nn.Module, path: str, new: nn.Module) -> None:
    """Replace a module under each of the names that it is registered by (layers may share one)."""
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is old:
                parent.add_module(name, new)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path. Raises ModelError when there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no module {path!r}") from error


def projection_at(model: nn.Module, path: str) -> nn.Module:
    """The dense projection at a path. Raises ModelError when there is none."""
    module = module_at(model, path)
    if not is_projection(module):
        raise ModelError(
            f"{path} is a {type(module).__name__}, not a dense projection (replaced or quantised already?)"
        )
    return module
