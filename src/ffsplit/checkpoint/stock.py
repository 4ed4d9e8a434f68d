"""Stock first: a result that plain transformers can express is written so that it loads without this package."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ffsplit.errors import ModelError
from ffsplit.families import AttentionSite, FFNSite, write
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights

# Widths that some families leave at None and derive from the hidden size.
DERIVED_WIDTHS = ("n_inner", "ffn_dim", "intermediate_size", "ffn_hidden_size")


def stock_model(model: PreTrainedModel, sites: list[FFNSite]) -> PreTrainedModel | None:
    """The same function as a plain transformers model, or None where none exists.

    That is the case when every FFN is one dense branch, and some setting of the configuration's width fields gives
    every layer the width that it has. The fields are found by trying, not from a table of names.
    """
    sums = {site.name: model.get_submodule(site.name) for site in sites}
    weights: dict[str, FFNWeights] = {}
    for site in sites:
        module = sums[site.name]
        if not isinstance(module, SumFFN) or not _is_one_dense_branch(module):
            return None
        weights[site.name] = module.to_weights()
    widths = {site.name: weights[site.name].d_ff for site in sites}
    for config in _candidate_configs(model.config, sites, widths):
        skeleton = empty_model(type(model), config)
        if skeleton is None or not _fits(skeleton, sites, weights):
            continue
        if (made := filled(model, skeleton, sites, weights)) is not None:
            return made
    return None


def _is_one_dense_branch(module: SumFFN) -> bool:
    return module.spec.is_one_dense_branch


def _candidate_configs(
    config: PreTrainedConfig, sites: list[FFNSite], widths: Mapping[str, int]
) -> Iterator[PreTrainedConfig]:
    """Configurations in which some of the fields that hold an old width hold a new one."""
    changes = {(site.d_ff, widths[site.name]) for site in sites}
    if all(old == new for old, new in changes):
        yield copy.deepcopy(config)
        return
    old_widths = {old for old, _ in changes}
    fields = [name for name, value in config.to_dict().items() if type(value) is int and value in old_widths]
    fields += [name for name in DERIVED_WIDTHS if getattr(config, name, 0) is None]
    for count in range(1, len(fields) + 1):
        for chosen in combinations(fields, count):
            for values in _assignments(config, chosen, changes):
                candidate = copy.deepcopy(config)
                for name, value in values.items():
                    setattr(candidate, name, value)
                yield candidate


def _assignments(
    config: PreTrainedConfig, fields: tuple[str, ...], changes: set[tuple[int, int]]
) -> Iterator[dict[str, int]]:
    """New values for the fields: each takes a new width of the layers whose old width it holds."""
    options = []
    for name in fields:
        held = getattr(config, name)
        options.append(sorted({new for old, new in changes if held in (None, old)}))
    yield from _product(fields, options)


def _product(fields: tuple[str, ...], options: list[list[int]]) -> Iterator[dict[str, int]]:
    if not fields:
        yield {}
        return
    for value in options[0]:
        for rest in _product(fields[1:], options[1:]):
            yield {fields[0]: value, **rest}


def empty_model(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | None:
    """An empty model of a configuration, or None where the family rejects it."""
    try:
        with torch.device("meta"):
            return kind._from_config(config)  # type: ignore[no-any-return]
    except (ValueError, RuntimeError, TypeError, AttributeError):
        return None


def _fits(skeleton: PreTrainedModel, sites: list[FFNSite], weights: Mapping[str, FFNWeights]) -> bool:
    """Whether the empty model has exactly the wanted widths, and nothing else changed shape."""
    try:
        for site in sites:
            for path, shape in _shapes(site, weights[site.name]).items():
                if tuple(skeleton.get_parameter(path).shape) not in (shape, shape[::-1]):
                    return False
            has_bias = getattr(skeleton.get_submodule(site.down), "bias", None) is not None
            if weights[site.name].down_bias is not None and not has_bias:
                return False
    except AttributeError:
        return False
    return True


def _shapes(site: FFNSite, ffn: FFNWeights) -> dict[str, tuple[int, int]]:
    inner = (ffn.d_ff * (2 if site.fused else 1), ffn.d_model)
    shapes = {f"{site.up}.weight": inner, f"{site.down}.weight": (ffn.d_model, ffn.d_ff)}
    return shapes | ({f"{site.gate}.weight": inner} if site.gate else {})


def filled(
    model: PreTrainedModel,
    skeleton: PreTrainedModel,
    sites: list[FFNSite],
    weights: Mapping[str, FFNWeights],
    gone: Sequence[AttentionSite] = (),
) -> PreTrainedModel | None:
    """The empty model with the tensors of the compressed one and dense FFN weights; None if other shapes differ.

    Attentions that are gone get zeros, with which they do nothing.
    """
    for site in sites:
        # Not the whole skeleton: rotary frequencies stay in float32 whatever the weights are in.
        for path in site.projections:
            skeleton.get_submodule(path).to(weights[site.name].up.dtype)
        try:
            write(skeleton, site, weights[site.name])
        except ModelError:
            return None
    inside = tuple(f"{path}." for site in sites for path in (site.name, *site.projections))
    attention = tuple(f"{path}." for site in gone for path in (site.name, site.out))
    have: dict[str, Any] = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith((*inside, *attention))
    }
    have |= {
        name: torch.zeros(tensor.shape, dtype=model.dtype, device=model.device)
        for name, tensor in skeleton.state_dict().items()
        if name.startswith(attention)
    }
    wanted = {name: tensor for name, tensor in skeleton.state_dict().items() if not name.startswith(inside)}
    if {n: t.shape for n, t in wanted.items()} != {n: have[n].shape for n in wanted if n in have}:
        return None
    skeleton.load_state_dict(have, strict=False, assign=True)
    _copy_buffers(model, skeleton)
    skeleton.tie_weights()
    skeleton.generation_config = getattr(model, "generation_config", None)
    if any(parameter.is_meta for parameter in skeleton.parameters()):
        return None
    return skeleton.eval()


def _copy_buffers(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Buffers that are not stored (rotary frequencies, position ids) have no tensor in the state dict."""
    for path, module in skeleton.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[name] = getattr(model.get_submodule(path), name).clone()
