"""Running a model block by block over a fixed set of batches, without knowing its family.

The model's own ``forward`` is called for every block; blocks that are already done are replaced by a stub that returns
the cached output of the latest one, and the run stops as soon as the current block has answered. So embeddings, masks,
position encodings, the hand-over from encoder to decoder and whatever else the family does between its blocks is the
model's own code, and only one block's weights and activations are at work at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ffsplit.calibrate.cache import Activations, TensorCache
from ffsplit.families.attention_site import SubLayer
from ffsplit.families.blocks import Block
from ffsplit.families.site import FFNSite

Batch = Mapping[str, Tensor]
Progress = Callable[[str, int, int], None]
# What a block may return beside tensors (Swin v2: the size of the image that is left); kept as it is.
PLAIN = (int, float, str, torch.Size)


class _BlockDoneError(Exception):
    """Leaves the model's forward once the current block has done its work. Never escapes this file."""


def rows_of(x: Tensor, mask: Bool[Tensor, "batch tokens"] | None, sequences: int = 1) -> Iterator[Tensor]:
    """The unpadded rows of each sequence of ``x``, ``[batch, tokens, d]`` or flattened to ``[batch * tokens, d]``.

    Rows that cannot be told apart by sequence (a model that removed the padding itself) come as one chunk.
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == len(rows):
        for sequence, keep in zip(rows.view(*mask.shape, -1), mask, strict=True):
            yield sequence[keep]
    elif len(rows) % sequences == 0:
        yield from rows.view(sequences, -1, x.shape[-1])
    else:
        yield rows


class BlockReplay:
    """One stream of activations through a model, advanced block by block.

    Args:
        model: in eval mode; its blocks may live elsewhere than ``device`` and are moved for their turn.
        batches: keyword arguments of ``model.forward``; attention masks are respected.
        cache: where activations wait; several streams need caches of their own.
        device: compute device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        cache: TensorCache,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.cache = cache
        self.device = device
        self.progress = progress
        self._done: list[Block] = []
        self._latest: dict[str, pytree.TreeSpec] = {}
        self._plain: dict[str, list[object]] = {}

    def capture(self, block: Block, label: str = "in") -> dict[str, Activations]:
        """The inputs of a block's FFNs, by site name, padded positions removed.

        Args:
            block: any that is not finished; what lies between it and the finished ones runs as it is now.
            label: what is kept at one time needs labels of its own.
        """
        stores = {site.name: Activations(self.cache, f"{label}-{index}-") for index, site in enumerate(block.sites)}
        with self._at_work(block):
            for index in self._indices(f"capture {block.path or 'model'}"):
                self._capture_batch(index, block, stores)
        return stores

    def _capture_batch(self, index: int, block: Block, stores: dict[str, Activations]) -> None:
        missing = set(stores)

        def keep(site: FFNSite, x: Tensor) -> None:
            for rows in self.rows(index, site, x):
                stores[site.name].append(rows)
            missing.discard(site.name)
            if not missing and block.path:
                raise _BlockDoneError

        with ExitStack() as stack:
            for site in block.sites:
                stack.enter_context(_watch(self.model, site, keep))
            self._run(index, block)

    def advance(self, block: Block) -> None:
        """Run a block as it is now and cache its outputs as the input of what follows."""
        if not block.path:
            return
        with self._at_work(block):
            for index in self._indices(f"advance {block.path}"):
                leaves, self._latest[block.list_path] = pytree.tree_flatten(self._output(index, block))
                key = f"block-{block.list_path}-{index}"
                self._plain[key] = [leaf if isinstance(leaf, PLAIN) else None for leaf in leaves]
                self.cache.put(key, [_as_tensor(leaf) for leaf in leaves])
        self._done.append(block)

    def outputs(self, block: Block, limit: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The hidden states that a block as it is now gives for each batch, without going on from them."""
        with self._at_work(block):
            for index in range(len(self.batches) if limit is None else limit):
                yield index, pytree.tree_leaves(self._output(index, block))[0]

    def finish(
        self, block: Block, options: Callable[[int], Mapping[str, object]] | None = None, limit: int | None = None
    ) -> Iterator[tuple[int, object]]:
        """The model's own outputs for each batch: finished blocks answer from the cache, the rest runs as it is now.

        Args:
            block: the first that is not finished.
            options: further arguments of the model's forward for a batch.
            limit: run only so many batches.
        """
        with self._at_work(block):
            for index in range(len(self.batches) if limit is None else limit):
                yield index, self._forward(index, {} if options is None else options(index))

    def _output(self, index: int, block: Block) -> object:
        """What a block returns for one batch."""
        kept: list[object] = []

        def store(_module: nn.Module, _args: object, output: object) -> None:
            kept.append(output)
            raise _BlockDoneError

        handle = self.model.get_submodule(block.path).register_forward_hook(store)
        try:
            self._run(index, block)
        finally:
            handle.remove()
        return kept[0]

    def block_output(self, block: Block, index: int) -> Tensor:
        """The hidden states that the latest block of a list gave for a batch."""
        return self.cache.get(f"block-{block.list_path}-{index}")[0]

    def _indices(self, label: str) -> Iterator[int]:
        for index in range(len(self.batches)):
            yield index
            if self.progress is not None:
                self.progress(label, index + 1, len(self.batches))

    def mask(self, index: int, site: SubLayer) -> Tensor | None:
        """Which positions of a batch are real for a site, or None when all are."""
        batch = self.batches[index]
        inside_decoder = self.model.config.is_encoder_decoder and ".decoder." in f".{site.down}"
        mask = batch.get("decoder_attention_mask" if inside_decoder else "attention_mask")
        return None if mask is None else mask.bool().to(self.device)

    def rows(self, index: int, site: SubLayer, x: Tensor) -> Iterator[Tensor]:
        """The real rows of what a batch gave at a site, one chunk a sequence."""
        batch = self.batches[index]
        sequences = next(iter(batch.values())).shape[0]
        mask = self.mask(index, site)
        text_alone = not any(tensor.is_floating_point() for tensor in batch.values())
        if mask is not None and mask.dim() == 2 and text_alone and x.dim() == 3 and x.shape[0] == sequences:
            # Some encoders (Longformer, BigBird) pad on the right by themselves, to a multiple of their window.
            mask = pad(mask, (0, max(0, x.shape[1] - mask.shape[1])))
        return rows_of(x, mask, sequences)

    def _run(self, index: int, block: Block) -> None:
        try:
            self._forward(index, {})
        except _BlockDoneError:
            return
        if block.path:
            raise RuntimeError(f"the forward of {type(self.model).__name__} never reached {block.path}")

    @torch.no_grad()
    def _forward(self, index: int, options: Mapping[str, object]) -> object:
        batch = {name: tensor.to(self.device) for name, tensor in self.batches[index].items()}
        answers = functools.cache(lambda list_path: self._cached(list_path, index))
        with _stubs(self.model, self._done, lambda done: answers(done.list_path)):
            return self.model(**batch, **options)

    def _cached(self, list_path: str, index: int) -> object:
        key = f"block-{list_path}-{index}"
        # Copies: a block may work on its input in place, and the cached one is needed again.
        leaves = [
            plain if _stands_for_no_tensor(tensor) else tensor.to(self.device, copy=True)
            for tensor, plain in zip(self.cache.get(key), self._plain[key], strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._latest[list_path])

    @contextmanager
    def _at_work(self, block: Block) -> Iterator[None]:
        module = self.model.get_submodule(block.path)
        # A block whose attention and FFN are both gone may have no parameter left.
        home = next((parameter.device for parameter in module.parameters()), self.device)
        module.to(self.device)
        try:
            yield
        finally:
            module.to(home)


def _as_tensor(leaf: object) -> Tensor:
    """A cacheable form of one leaf of a block's output; what is no tensor becomes an empty boolean one."""
    return leaf if isinstance(leaf, Tensor) else torch.empty(0, dtype=torch.bool)


def _stands_for_no_tensor(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool and not tensor.numel()


@contextmanager
def _watch(model: nn.Module, site: FFNSite, keep: Callable[[FFNSite, Tensor], None]) -> Iterator[None]:
    """Hand the input of a site's FFN to ``keep`` whenever the model computes it."""
    handle = model.get_submodule(site.up).register_forward_pre_hook(lambda _module, args: keep(site, args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _stubs(model: nn.Module, done: Sequence[Block], answer: Callable[[Block], object]) -> Iterator[None]:
    """Let finished blocks answer from the cache. Only the latest of a list matters; the earlier repeat its answer."""
    modules = [model.get_submodule(block.path) for block in done]
    # Some tools (accelerate) give a module a forward of its own, beside its class's.
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module, block in zip(modules, done, strict=True):
            module.forward = lambda *_args, _block=block, **_kwargs: answer(_block)  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]
