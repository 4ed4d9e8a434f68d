"""A subject with its weights: its FFNs one by one, and the whole model with dense, compressed and no FFNs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ffsplit.bench.fillings import Variant, filled, native, own, without_ffns
from ffsplit.bench.subject import Subject
from ffsplit.budget.cost import dense_spec
from ffsplit.families.site import FFNSite
from ffsplit.families.surgery import activation, read
from ffsplit.ffn.made_up import fill
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.ffn.sum import SumFFN, dense_branch


@dataclass(frozen=True)
class Group:
    """FFNs of one structure.

    Attributes:
        sites: where they are, in execution order.
        shape: of the dense FFN that each of them was.
        spec: what each became; ``None`` if it was left dense.
    """

    sites: tuple[FFNSite, ...]
    shape: FFNShape
    spec: SumSpec | None


@dataclass(frozen=True)
class Loaded:
    """A subject's models, on the device.

    Attributes:
        subject: what was looked at before.
        model: the model itself.
        against: the dense one, if it was given.
        against_sites: its FFNs, in the same order.
    """

    subject: Subject
    model: PreTrainedModel
    against: PreTrainedModel | None = None
    against_sites: tuple[FFNSite, ...] = ()

    @property
    def dense_source(self) -> str:
        """Where the dense FFNs come from, in words."""
        if self.subject.kind == "dense":
            return "the model itself"
        return "rebuilt in the same sizes, with made-up numbers" if self.against is None else "the dense model"

    def groups(self) -> list[Group]:
        """The FFNs by structure, in order of first appearance."""
        found: dict[tuple[FFNShape, str], list[FFNSite]] = {}
        specs: dict[tuple[FFNShape, str], SumSpec | None] = {}
        for site in self.subject.sites:
            spec, shape = self._spec(site), self._shape(site)
            key = (shape, "" if spec is None else spec.model_dump_json())
            found.setdefault(key, []).append(site)
            specs[key] = spec
        return [Group(tuple(sites), key[0], specs[key]) for key, sites in found.items()]

    def dense_ffn(self, group: Group) -> SumFFN:
        """The first dense FFN of a group on its own; its weights are the model's, or made up."""
        site = group.sites[0]
        model = self.model if self.subject.kind == "dense" else self.against
        if model is not None:
            return _alone(model, self._dense_site(site))
        return self._made_up(site, group.shape)

    def compressed_ffn(self, group: Group) -> nn.Module | None:
        """The first compressed FFN of a group on its own; ``None`` where it was left dense."""
        if group.spec is None:
            return None
        site = group.sites[0]
        return self.model.get_submodule(site.name) if site.name in self.subject.specs else _alone(self.model, site)

    def variants(self) -> dict[str, Variant]:
        """The whole model with its ``dense`` FFNs, as it is (``this``, unless it is dense), and with ``none``."""
        sites = self.subject.sites
        if self.subject.kind == "dense":
            return {"dense": own(self.model, sites), "none": without_ffns(self.model, sites)}
        this = own(self.model, sites)
        if self.against is not None:
            dense_sites = tuple(self._dense_site(site) for site in sites)
            return {
                "dense": own(self.against, dense_sites),
                "this": this,
                "none": without_ffns(self.against, dense_sites),
            }
        return {"dense": self._rebuilt(), "this": this, "none": without_ffns(self.model, sites)}

    def _rebuilt(self) -> Variant:
        """With dense FFNs of the architecture's own code; with sums of one dense branch where it has other sizes."""
        subject = self.subject
        changed = [site for site in subject.sites if self._spec(site) is not None]
        if subject.kind == "ffsplit":
            return Variant(self.model, {**own(self.model, subject.sites).modules,
                                        **native(self.model, changed, subject.architecture).modules})  # fmt: skip
        return filled(self.model, subject.sites, lambda site: self._made_up(site, self._shape(site)))

    def _made_up(self, site: FFNSite, shape: FFNShape) -> SumFFN:
        act = activation(self.subject.architecture, site)  # a replaced FFN's own may be gone
        made = SumFFN.empty(dense_spec(shape), act, self.model.dtype, "meta").to_empty(device=self.model.device)
        fill(made)
        return made.requires_grad_(False).eval()

    def _spec(self, site: FFNSite) -> SumSpec | None:
        if site.name in self.subject.specs:
            return self.subject.specs[site.name]
        if self.subject.kind != "stock" or self._shape(site) == _plain_shape(site, self._shape(site)):
            return None
        return dense_spec(_plain_shape(site, self._shape(site)))

    def _shape(self, site: FFNSite) -> FFNShape:
        if site.name in self.subject.dense:
            return self.subject.dense[site.name]
        return FFNShape.of(read(self.model, site))

    def _dense_site(self, site: FFNSite) -> FFNSite:
        """The same FFN in the dense model, which may spell it with or without its head."""
        others = self.against_sites or self.subject.sites
        return others[self.subject.sites.index(site)]


def load(subject: Subject, against: Subject | None, device: torch.device, dtype: torch.dtype | None) -> Loaded:
    """Load the weights."""

    def loaded(one: Subject) -> PreTrainedModel:
        model = one.source.load(dtype)
        return model.to(device).requires_grad_(False).eval()  # type: ignore[no-any-return]

    if against is None:
        return Loaded(subject, loaded(subject))
    return Loaded(subject, loaded(subject), loaded(against), against.sites)


def _alone(model: PreTrainedModel, site: FFNSite) -> SumFFN:
    """A dense FFN of a model as a sum of one branch that shares its weights."""
    ffn = read(model, site)
    return SumFFN(ffn.d_model, [dense_branch(ffn)], bias=ffn.down_bias).requires_grad_(False).eval()


def _plain_shape(site: FFNSite, dense: FFNShape) -> FFNShape:
    """What a plain checkpoint has at a site now: its own width, the biases of the dense one."""
    return replace(dense, d_ff=site.d_ff)
