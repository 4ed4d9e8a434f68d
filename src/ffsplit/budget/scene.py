"""What a decision over layers may look at: the dense model, its FFNs, and calibration text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ffsplit.calibrate.batches import Batches
from ffsplit.calibrate.cache import TensorCache
from ffsplit.calibrate.devices import visiting, whole_model_at_work
from ffsplit.calibrate.gradients import NeuronGradients
from ffsplit.calibrate.layer import LayerData
from ffsplit.calibrate.replay import BlockReplay
from ffsplit.families import AttentionSite, FFNs, FFNSite, read
from ffsplit.families.attention import sites_in
from ffsplit.families.attention_site import SubLayer
from ffsplit.families.blocks import Block
from ffsplit.families.surgery import weight_dtype
from ffsplit.ffn.shape import FFNShape
from ffsplit.methods.registry import MethodConfig

Progress = Callable[[str, int, int], None]
Trial = Callable[[Sequence[MethodConfig | None], Callable[[], float]], float]


@dataclass(frozen=True)
class Scene:
    """The dense model before anything is compressed.

    Attributes:
        model: in eval mode; whatever a planner puts in, it takes out again.
        found: its FFNs.
        shapes: of the FFNs, in execution order.
        data: calibration batches.
        device: where to compute.
        seed: of everything random.
        store: directory for measurements that a resumed run shall not repeat, or None.
        progress: called with (what, done, total).
        trial: carries a decision out (one method or None for every FFN), returns what the given function measures
            then, and puts the dense FFNs back; None where decisions cannot be tried.
        notes: what the report shall say about the decision, as plain values; filled by the planner.
        gradients: of the dense model's loss, by the FFN's name; empty unless the planner's configuration needs them.
        attention: the model's attentions that can be left out; empty unless the configuration looks at them.
        settled: what the recipe's overrides say of some FFNs, whatever is decided, by their place in the execution
            order; None leaves one as it is.
        left_out: those that shall be, by their place in `attention`; filled by the planner.
    """

    model: PreTrainedModel
    found: FFNs
    shapes: tuple[FFNShape, ...]
    data: Batches
    device: torch.device
    seed: int = 0
    store: Path | None = None
    progress: Progress | None = None
    trial: Trial | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    gradients: Mapping[str, NeuronGradients] = field(default_factory=dict)
    attention: tuple[AttentionSite, ...] = ()
    settled: Mapping[int, MethodConfig | None] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)

    def batches(self, count: int | None = None) -> list[dict[str, torch.Tensor]]:
        """The first ``count`` batches, all for None."""
        return self.data.batches[:count]

    def index_of(self, site: FFNSite) -> int:
        """The place of a site among all FFNs."""
        return [found.name for found in self.found.sites].index(site.name)

    @property
    def sub_layers(self) -> tuple[SubLayer, ...]:
        """The FFNs, and after them the attentions that can be left out. A place in here tells both."""
        return (*self.found.sites, *self.attention)

    def inside(self, block: Block) -> list[tuple[int, SubLayer]]:
        """The FFNs and then the attentions of a block, each with its place among all."""
        count = len(self.found.sites)
        inside = sites_in(block.path, self.attention)
        return [
            *((self.index_of(site), site) for site in block.sites),
            *((count + self.attention.index(site), site) for site in inside),
        ]

    def act(self, index: int) -> nn.Module:
        """The activation of one FFN."""
        return read(self.model, self.found.sites[index]).act

    def layer_data(self, site: FFNSite, inputs: object) -> LayerData:
        """One FFN's dense weights on the compute device, with its inputs."""
        dense = read(self.model, site).map(lambda tensor: tensor.to(device=self.device, dtype=torch.float32))
        dense.act.to(self.device)
        seed, gradients = self.seed + self.index_of(site), self.gradients.get(site.name)
        dtype = weight_dtype(self.model, site)
        return LayerData(dense, inputs, site.name, seed, gradients=gradients, dtype=dtype)  # type: ignore[arg-type]

    def walk(
        self, count: int | None = None, label: str = "measure", *, to_the_end: bool = False
    ) -> Generator[tuple[Block, BlockReplay]]:
        """Every block in turn, with a replay of the dense model that has finished all blocks before it.

        The caller may capture inputs and run the model to its end; the replay then moves on over the dense block.

        Args:
            count: batches; all for None.
            label: for the progress display.
            to_the_end: the caller will run the model to its end, so all blocks must be able to work on the device.
        """
        with TensorCache(None, self.device) as cache:
            replay = BlockReplay(self.model, self.batches(count), cache, self.device)
            with ExitStack() as stack:
                stack.enter_context(visiting(self.model, self.found.blocks, self.device))
                if to_the_end:
                    stack.enter_context(whole_model_at_work(self.model, self.found.blocks, self.device))
                for number, block in enumerate(self.found.blocks):
                    yield block, replay
                    replay.advance(block)
                    if self.progress is not None:
                        self.progress(label, number + 1, len(self.found.blocks))

    def layers(self, count: int | None = None, label: str = "statistics") -> Iterator[tuple[int, LayerData]]:
        """Every FFN in execution order with its inputs in the dense model: for decisions from statistics alone."""
        for block, replay in self.walk(count, label):
            inputs = replay.capture(block)
            for site in block.sites:
                yield self.index_of(site), self.layer_data(site, inputs[site.name])
                inputs[site.name].drop()
