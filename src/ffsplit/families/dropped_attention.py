"""What takes the place of an attention that is left out, and putting it there."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from ffsplit.errors import ModelError
from ffsplit.families.attention_site import AttentionSite
from ffsplit.families.projection import get_weight
from ffsplit.families.surgery import module_at, plant, projection_at, set_everywhere
from ffsplit.families.tripwire import Tripwire


class DroppedAttention(nn.Module):
    """Zeros where an attention gave its output; no keys, no values, no weights.

    A model asks its key-value cache how many tokens it has seen, and asks layer 0 for it. So the cache is still told,
    by one number a token in place of its keys and one of its values.

    Args:
        site: what is replaced.
    """

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.site = site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x: Tensor = args[0] if self.site.x is None else kwargs[self.site.x]
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        for cache in caches:
            self._count(cache, x)
        zeros = x.new_zeros(*x.shape[:-1], self.site.width)
        return (zeros, *[None] * (self.site.returns - 1)) if self.site.returns else zeros

    def _count(self, cache: Cache, x: Tensor) -> None:
        """Let a cache know of the tokens."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        place = self.site.layer
        if place is None:
            raise ModelError(f"{self.site.name} was left out, and its place in the key-value cache is not known")
        one = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
        known = cache.layers[place] if place < len(cache.layers) else None
        if known is None or not known.is_initialized or known.keys.dim() != 4:
            cache.update(one, one, place)
            return
        # Memory that was laid out beforehand (static caches for export) has the shape of the attention's own keys.
        sizes = ((known.keys.shape[1], known.keys.shape[3]), (known.values.shape[1], known.values.shape[3]))
        keys, values = (one.expand(-1, heads, -1, width) for heads, width in sizes)
        cache.update(keys, values, place)

    def extra_repr(self) -> str:
        return f"width={self.site.width}, layer={self.site.layer}"


def drop_attention(model: nn.Module, site: AttentionSite) -> dict[str, nn.Module]:
    """Leave an attention out. The projection ``out`` becomes a `Tripwire`, as the ``down`` of an FFN does.

    Returns:
        The modules that were taken out, by path, for `restore`.

    Raises:
        ModelError: the site is not there, or not dense.
    """
    weight, _ = get_weight(projection_at(model, site.out))
    taken = {path: module_at(model, path) for path in ([site.name] if site.kind == "module" else [site.name, site.out])}
    tripwire, dropped = Tripwire(site.d_model, weight.dtype, weight.device), DroppedAttention(site)
    if site.kind == "module":
        plant(dropped, site.out.removeprefix(f"{site.name}."), tripwire)
        set_everywhere(model, site.name, dropped)
        return taken
    set_everywhere(model, site.name, dropped)
    set_everywhere(model, site.out, tripwire)
    return taken
