"""What the loss says about single neurons: one backward pass through the dense model, sums per neuron kept.

Parameters need no gradients for this. The graph starts at the first FFN, so what comes before it is not part of it. The
whole model and the activations of one batch have to be on the compute device at once, unlike in block replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ffsplit.calibrate.devices import visiting
from ffsplit.calibrate.loss import calibration_loss
from ffsplit.errors import DataError, ModelError
from ffsplit.families.projection import get_weight
from ffsplit.families.site import FFNSite
from ffsplit.ops.gradients import elementwise, products

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class NeuronGradients:
    """Sums over the calibration text, float64. A neuron's parameters are its rows of up and gate with their biases,
    and its column of down.

    Attributes:
        group: ``sum w dL/dw`` over a neuron's parameters.
        elementwise: ``sum |w dL/dw|`` over a neuron's parameters, the gradient taken a sequence at a time.
        mask: sum over sequences of ``|sum over tokens of h_j dL/dh_j|``, the gradient of a mask on the neuron.
    """

    group: Float[Tensor, " d_ff"]
    elementwise: Float[Tensor, " d_ff"]
    mask: Float[Tensor, " d_ff"]

    @classmethod
    def zeros(cls, d_ff: int, device: torch.device) -> NeuronGradients:
        return cls(*(torch.zeros(d_ff, dtype=torch.float64, device=device) for _ in fields(cls)))

    def check_finite(self, layer: str) -> None:
        """Raise DataError naming the first sum that holds NaN or Inf."""
        for field in fields(self):
            if not torch.isfinite(getattr(self, field.name)).all():
                raise DataError(
                    f"{layer}: the gradient sum {field.name} holds NaN or Inf: gradients overflow in this dtype; "
                    "calibrate in float32 or bfloat16"
                )


def collect_gradients(
    model: PreTrainedModel,
    sites: Sequence[FFNSite],
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, NeuronGradients]:
    """The gradient sums of every FFN, by the site's name; the model is left as it was.

    Args:
        model: dense, in eval mode.
        sites: its FFNs.
        batches: keyword arguments of its forward; so many of them as shall be looked at.
        device: compute device.
        progress: called with (what, done, total).

    Raises:
        ModelError: the model has no loss.
        DataError: a sum holds NaN or Inf.
    """
    sums = {site.name: NeuronGradients.zeros(site.d_ff, device) for site in sites}
    with visiting(model, [], device), parameters_at_rest(model):
        for number, batch in enumerate(batches):
            here = {name: tensor.to(device) for name, tensor in batch.items()}
            sequences = next(iter(here.values())).shape[0]
            with _watching(model, sites, sums, sequences), torch.enable_grad():
                loss = calibration_loss(model, here, model(**here))
                if not loss.requires_grad:
                    raise ModelError(f"the loss of {type(model).__name__} does not depend on any FFN")
                loss.backward()  # type: ignore[no-untyped-call]
            if progress is not None:
                progress("gradients", number + 1, len(batches))
    for name, found in sums.items():
        found.check_finite(name)
    return sums


@contextmanager
def parameters_at_rest(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _watching(
    model: nn.Module, sites: Sequence[FFNSite], sums: Mapping[str, NeuronGradients], sequences: int
) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            handles += _Watch(model, site, sums[site.name], sequences).handles()
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """The hooks of one FFN, which add to its sums while a batch runs back."""

    def __init__(self, model: nn.Module, site: FFNSite, sums: NeuronGradients, sequences: int) -> None:
        self.model, self.site, self.sums, self.sequences = model, site, sums, sequences

    def handles(self) -> list[RemovableHandle]:
        inner = {self.model.get_submodule(path) for path in self.site.projections[:-1]}
        down = self.model.get_submodule(self.site.down)
        return [
            *(module.register_forward_hook(self._inner) for module in inner),
            down.register_forward_pre_hook(self._hidden),
            down.register_forward_hook(self._output),
        ]

    def _inner(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)  # the first FFN: the graph starts here
        value, x = output.detach(), args[0].detach()

        def add(gradient: Tensor) -> None:
            rows, _ = elementwise(*get_weight(module), self._split(x), self._split(gradient))
            group = products(self._split(value), self._split(gradient)).sum(0)
            # A fused projection has two rows a neuron.
            self.sums.elementwise.add_(rows.view(-1, self.site.d_ff).sum(0))
            self.sums.group.add_(group.view(-1, self.site.d_ff).sum(0))

        output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    def _hidden(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        value = args[0].detach()

        def add(gradient: Tensor) -> None:
            by_sequence = products(self._split(value), self._split(gradient))
            self.sums.group.add_(by_sequence.sum(0))
            self.sums.mask.add_(by_sequence.abs().sum(0))

        args[0].register_hook(add)  # type: ignore[no-untyped-call]

    def _output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight = args[0].detach(), get_weight(module)[0]

        def add(gradient: Tensor) -> None:
            _, columns = elementwise(weight, None, self._split(x), self._split(gradient))
            self.sums.elementwise.add_(columns)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    def _split(self, x: Tensor) -> Tensor:
        """``[sequences, tokens, n]`` of flattened rows too; one sequence where they cannot be told apart."""
        rows = x.reshape(-1, x.shape[-1])
        return rows.view(self.sequences if len(rows) % self.sequences == 0 else 1, -1, x.shape[-1])
