"""Running a model once on tiny inputs, whatever its kind, and leaving it exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ffsplit.errors import CannotRunError
from ffsplit.families.inputs import candidate_inputs
from ffsplit.families.skeleton import skeleton

Inputs = Mapping[str, Any]
W = TypeVar("W", bound=AbstractContextManager[Any])


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """No dropout; afterwards every module trains, or not, as before. One put in meanwhile follows its model."""
    modes = [(model, {name: module.training for name, module in model.named_modules()}) for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in modes:
            for name, module in model.named_modules():
                module.training = training.get(name, training[""])


@contextmanager
def without_cache(model: PreTrainedModel) -> Iterator[None]:
    """No key-value cache unless a call asks for one; the setting is put back."""
    use_cache = getattr(model.config, "use_cache", None)
    if use_cache is None:
        yield
        return
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = use_cache


def drive(model: PreTrainedModel, watch: Callable[[Inputs], W], inputs: Inputs | None = None) -> dict[str, W]:
    """Run the model under a watcher; sub-models that the run did not reach are run each on their own.

    Args:
        model: on any device, the meta device included.
        watch: makes the context manager that a run happens in; one that fails is thrown away.
        inputs: keyword arguments of the model's ``forward``; made up when not given.

    Returns:
        The watchers of the runs that worked, by the path of what was run; the model itself has the empty path.

    Raises:
        ModelError: neither the model nor any of its sub-models could be run.
    """
    failures: list[str] = []
    with evaluating(model), torch.no_grad(), skeleton(model):
        watchers = _drive(model, "", watch, inputs, failures)
    if not watchers:
        place = " on the meta device (without weights)" if model.device.type == "meta" else ""
        raise CannotRunError(
            f"{type(model).__name__} could not be run{place} on made-up inputs, so its FFNs cannot be found; "
            f"pass inputs=... with keyword arguments that its forward accepts. Tried:\n  "
            + ("\n  ".join(failures) or "nothing, it takes none of the usual inputs")
        )
    return watchers


def _drive(
    model: PreTrainedModel, path: str, watch: Callable[[Inputs], W], inputs: Inputs | None, failures: list[str]
) -> dict[str, W]:
    for kwargs in [inputs] if inputs is not None else candidate_inputs(model):
        watcher = watch(kwargs)
        try:
            with _reached(model) as reached, watcher:
                model(**kwargs)
        except _FAILURES as error:
            failures.append(f"{path or type(model).__name__}({', '.join(kwargs)}): {type(error).__name__}: {error}")
            continue
        found = {path: watcher}
        missed = dict(_unreached(model, path, reached))
        break
    else:
        found, missed = {}, _sub_models(model, path)
    if inputs is None or found:
        for name, sub in missed.items():
            found |= _drive(sub, name, watch, None, failures)
    return found


# Whatever a forward raises when it dislikes its inputs. Each failure ends up in the message if no run works.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def _reached(model: PreTrainedModel) -> Iterator[set[nn.Module]]:
    """The models inside a model that a forward calls."""
    reached: set[nn.Module] = set()
    handles = [
        module.register_forward_pre_hook(lambda called, _args: reached.add(called))
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    ]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def _unreached(model: PreTrainedModel, path: str, reached: set[nn.Module]) -> Iterator[tuple[str, PreTrainedModel]]:
    for name, sub in _sub_models(model, path).items():
        if any(module in reached for module in sub.modules()):  # a head may call the decoder inside its base
            yield from _unreached(sub, name, reached)
        else:
            yield name, sub


def _sub_models(model: nn.Module, path: str) -> dict[str, PreTrainedModel]:
    """The outermost models inside a model: the base of a task head, the towers of a multimodal model."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and isinstance(module, PreTrainedModel) and not inside:
            found[name] = module
    return {f"{path}.{name}".lstrip("."): module for name, module in found.items()}
