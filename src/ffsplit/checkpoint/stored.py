"""Whether the files of a checkpoint hold exactly the tensors that its configuration promises.

transformers only warns about a missing tensor, which it leaves uninitialised, and about one that has no place; older
releases do not even compare shapes once a stored format is involved. All of these are a wrong model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ffsplit.errors import CheckpointError
from ffsplit.families.attention_site import SubLayer
from ffsplit.families.spelling import spellings

Shapes = Mapping[str, tuple[int, ...]]


def stored_shapes(files: Iterable[str]) -> Shapes:
    """Name and shape of every tensor in safetensors files; only their headers are read.

    Raises:
        CheckpointError: a file is cut off or damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                names = stored.keys()
                shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged or cut off: {error}") from error
    return shapes


def refuse_other_tensors(model: PreTrainedModel, sites: Sequence[SubLayer], stored: Shapes) -> None:
    """Compare the tensors of every compressed FFN, and of what stands for an attention, with those in the files.

    Args:
        model: with its FFNs replaced by empty sums and its attentions left out.
        sites: where they are.
        stored: the tensors in the files, which were perhaps stored from a model with or without this one's head.

    Raises:
        CheckpointError: a tensor of a compressed FFN is missing, has another shape, or there is one too many.
    """
    found = {site.name: _inside(model, site, stored) for site in sites}
    if not any(found.values()):
        return  # the family stores its modules under other names than it runs them
    for site in sites:
        wanted = {name: tuple(t.shape) for name, t in model.get_submodule(site.name).state_dict().items()}
        if wrong := sorted({name for name, _ in wanted.items() ^ found[site.name].items()}):
            promised, there = (shapes.get(wrong[0], "no such tensor") for shapes in (wanted, found[site.name]))
            raise CheckpointError(
                f"{site.name}: config.json and the stored tensors do not fit together: {wrong[0]!r} should be "
                f"{promised}, the files have {there}"
            )
    known = {f"{path}.weight" for site in sites for path in spellings(model, site.down)}
    if others := sorted(name for name, shape in stored.items() if _is_tripwire(name, shape) and name not in known):
        raise CheckpointError(f"{others[0]} belongs to a compressed FFN that config.json does not list")


def _inside(model: PreTrainedModel, site: SubLayer, stored: Shapes) -> Shapes:
    for path in spellings(model, site.name):
        if inside := {n.removeprefix(f"{path}."): shape for n, shape in stored.items() if n.startswith(f"{path}.")}:
            return inside
    return {}


def _is_tripwire(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and shape[1] == 0
