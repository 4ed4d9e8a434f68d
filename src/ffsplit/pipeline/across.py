"""What the fit of one FFN may see: its own data, and, for methods that work across layers, the other FFNs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from ffsplit.calibrate.cache import Activations
from ffsplit.calibrate.devices import whole_model_at_work
from ffsplit.calibrate.layer import LayerData
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.families import read
from ffsplit.families.surgery import weight_dtype
from ffsplit.ffn.sum import SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.pipeline.job import Job

T = TypeVar("T")


@dataclass(frozen=True)
class OnDemand(Mapping[int, T]):
    """Values that are made when they are asked for, and not kept: most methods never ask."""

    indices: tuple[int, ...]
    make: Callable[[int], T]

    def __getitem__(self, index: int) -> T:
        if index not in self.indices:
            raise KeyError(index)
        return self.make(index)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def inputs_ahead(job: Job, replay: BlockReplay, place: int) -> Activations:
    """The inputs of an FFN that is still dense, behind a finished prefix and whatever lies between as it is now."""
    name = job.found.sites[place].name
    block = next(block for block in job.found.blocks if any(site.name == name for site in block.sites))
    with whole_model_at_work(job.model, job.found.blocks, job.device):
        captured = replay.capture(block, f"ahead-{place}")
    for other, store in captured.items():
        if other != name:
            store.drop()
    return captured[name]


def layer_data(
    job: Job, index: int, inputs: Activations, corrections: Activations | None, replay: BlockReplay
) -> LayerData:
    """The dense FFN at a place in the execution order on the compute device, with its inputs.

    FFNs are replaced in that order, so those after it are still dense and those before it are sums unless the plan
    leaves them as they are.
    """
    sites = job.found.sites

    def dense(place: int) -> FFNWeights:
        ffn = read(job.model, sites[place]).map(lambda tensor: tensor.to(device=job.device, dtype=torch.float32))
        ffn.act.to(job.device)
        return ffn

    def compressed(place: int) -> SumFFN:
        module = job.model.get_submodule(sites[place].name)
        assert isinstance(module, SumFFN)
        return copy.deepcopy(module).to(device=job.device, dtype=torch.float32)

    before = tuple(place for place in range(index) if job.configs[place] is not None)
    after = tuple(range(index + 1, len(sites)))
    return LayerData(
        dense(index),
        inputs,
        sites[index].name,
        job.recipe.seed + index,
        corrections,
        job.gradients.get(sites[index].name),
        others=OnDemand(after, dense),
        fitted=OnDemand(before, compressed),
        dtype=weight_dtype(job.model, sites[index]),
        ahead=OnDemand(after, functools.partial(inputs_ahead, job, replay)),
    )
