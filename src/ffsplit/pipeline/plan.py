"""The plan: which FFN becomes which sum of branches. Made before any token is run, stored with the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny

from ffsplit.errors import BudgetError, RecipeError
from ffsplit.families.attention_site import AttentionSite
from ffsplit.families.site import FFNSite
from ffsplit.ffn.projections import TiedSpec
from ffsplit.ffn.shape import FFNShape
from ffsplit.ffn.spec import SumSpec
from ffsplit.methods.budgets import dense_branch_spec, sum_spec
from ffsplit.methods.fused import FusedConfig
from ffsplit.methods.registry import MethodConfig, get_method, method_config


def _step(value: object) -> object:
    """A stored method; a planner's step, which no recipe may name, included."""
    if not isinstance(value, dict):
        return value
    try:
        return method_config(value)
    except RecipeError as error:
        raise ValueError(str(error)) from error


class PlannedFFN(BaseModel):
    """One FFN: where it is, what happens to it, and what it becomes."""

    model_config = ConfigDict(frozen=True)

    site: dict[str, Any]
    shape: dict[str, Any]
    method: Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_step)] | None
    spec: SumSpec

    @property
    def name(self) -> str:
        return str(self.site["name"])

    @property
    def dense_shape(self) -> FFNShape:
        return FFNShape(**self.shape)


class PlannedAttention(BaseModel):
    """An attention that is left out.

    Attributes:
        site: where it is.
        parameters: that go with it.
        linear_parameters: those of them in linear layers.
    """

    model_config = ConfigDict(frozen=True)

    site: AttentionSite
    parameters: int
    linear_parameters: int


class Plan(BaseModel):
    """Every FFN of the model, in execution order, and the attentions that are left out.

    Attributes:
        ffns: what becomes of each FFN.
        attention: what goes besides; budgets do not count it.
    """

    version: int = 1
    ffns: tuple[PlannedFFN, ...]
    attention: tuple[PlannedAttention, ...] = ()

    @property
    def dense_parameters(self) -> int:
        """Of the FFNs of the dense model."""
        return sum(ffn.dense_shape.parameters for ffn in self.ffns)

    @property
    def parameters(self) -> int:
        """Of the FFNs as planned (numbers stored, whatever their bits)."""
        return sum(ffn.spec.parameters for ffn in self.ffns)

    @property
    def keep(self) -> float:
        """Share of the FFN parameters that stay (numbers stored, whatever their bits)."""
        return self.parameters / self.dense_parameters

    @property
    def bits(self) -> float:
        """Average stored bits per dense FFN weight, scales, zeros and biases counted, floats at 16 bits."""
        return sum(ffn.spec.stored_bits() for ffn in self.ffns) / sum(ffn.dense_shape.weights for ffn in self.ffns)

    def with_specs(self, specs: Mapping[str, SumSpec]) -> Plan:
        """The plan with other structures of some FFNs, by name: those that training has left."""
        ffns = tuple(ffn.model_copy(update={"spec": specs.get(ffn.name, ffn.spec)}) for ffn in self.ffns)
        return self.model_copy(update={"ffns": ffns})


def make_plan(
    sites: Sequence[FFNSite],
    shapes: Sequence[FFNShape],
    configs: Sequence[MethodConfig | None],
    attention: Sequence[PlannedAttention] = (),
) -> Plan:
    """Decide the structure of every FFN.

    Args:
        sites: of the FFNs.
        shapes: of the FFNs.
        configs: the method of each, None for one that stays as it is.
        attention: what is left out besides.

    Raises:
        RecipeError: nothing would change, or an FFN is tied to another that does not store such weights.
        BudgetError: a budget is out of reach for some layer; the message names it and the smallest reachable.
    """
    if not any(configs) and not attention:
        raise RecipeError(f"all {len(configs)} FFNs would stay as they are, so there is nothing to do")
    planned = []
    for site, shape, config in zip(sites, shapes, configs, strict=True):
        if config is None:
            spec = sum_spec(shape, [dense_branch_spec(shape, shape.d_ff)], bias=shape.down_bias)
        else:
            try:
                spec = get_method(config.method).plan(shape, config)
            except BudgetError as error:
                raise BudgetError(f"{site.name}: {error}") from error
        planned.append(PlannedFFN(site=site.to_dict(), shape=vars(shape), method=config, spec=spec))
    _check_ties(planned)
    _check_runs(configs)
    return Plan(ffns=tuple(planned), attention=tuple(attention))


def _check_ties(planned: Sequence[PlannedFFN]) -> None:
    """Owners come before what is tied to them, and store what is tied: an override may have changed that."""
    earlier: dict[str, SumSpec] = {}
    for ffn in planned:
        for tied in ffn.spec.projections:
            if isinstance(tied, TiedSpec) and not (tied.owner in earlier and _stores(earlier[tied.owner], tied)):
                raise RecipeError(
                    f"{ffn.name} is tied to {tied.owner}, which is not to store such weights; leave both or none of "
                    "them to the planner"
                )
        if ffn.method is not None:
            earlier[ffn.name] = ffn.spec


def _check_runs(configs: Sequence[MethodConfig | None]) -> None:
    """FFNs that run as one wide FFN go together: an override may have taken one out of its run."""
    for config in configs:
        if isinstance(config, FusedConfig):
            for place, index in enumerate(config.members):
                if configs[index] != FusedConfig(members=config.members, place=place):
                    raise RecipeError(
                        f"FFN {index} is fused with FFNs {', '.join(map(str, config.members))}, which an override "
                        "does not leave to the planner; leave all or none of them to it"
                    )


def _stores(owner: SumSpec, tied: TiedSpec) -> bool:
    if tied.branch >= len(owner.branches):
        return False
    found = getattr(owner.branches[tied.branch], tied.projection)
    return found is not None and not isinstance(found, TiedSpec) and found.shape == tied.shape
