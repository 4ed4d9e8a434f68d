"""Which device to work on."""

from __future__ import annotations

import torch

from ffsplit.errors import RecipeError


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None and found.type != "mps" else torch.device("cpu")


def device_of(asked: str | torch.device | None, field: str = "device") -> torch.device:
    """The device that is asked for; an accelerator if there is one, when none is.

    Args:
        asked: a device or its name.
        field: what to call it in a message.

    Raises:
        RecipeError: it is not spelt like a device, or this machine has no such one.
    """
    if asked is None:
        return default_device()
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    available = "cpu" if found is None else f"cpu, {found.type}:0 to {found.type}:{count - 1}"
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError):
        raise RecipeError(f"{field} {asked!r}: not a device; this machine has {available}") from None
    here = device.type == "cpu" or (found is not None and device.type == found.type and (device.index or 0) < count)
    if not here:
        raise RecipeError(f"{field} {str(asked)!r}: not available; this machine has {available}")
    return device
