"""Ready-made batches for tiny models of every kind: with padding where the family masks it."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.tiny import VOCABULARY

DECODERS = ("llama", "gemma2", "gpt2", "opt", "bloom", "falcon", "phi3")
ENCODERS = ("bert", "modernbert", "distilbert", "deberta-v2")
SEQ2SEQ = ("t5", "bart", "marian", "whisper")
VISION = ("vit",)
WHOLE = ("albert", "xlm")
"""Families whose FFNs are worked on in one stage, with the whole model."""
FAMILIES = (*DECODERS, *ENCODERS, *SEQ2SEQ, *VISION, *WHOLE)

Batch = dict[str, Tensor]


def token_ids(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random ids without the special ones, ``[rows, columns]``."""
    return torch.randint(5, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padding_mask(*lengths: int, columns: int) -> Tensor:
    """1 for the first tokens of each row, 0 for the padding behind them."""
    return (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()


def family_batches(family: str, count: int = 2, rows: int = 2, columns: int = 24) -> list[Batch]:
    """Batches of ``rows`` sequences; the last one of each is shorter wherever the family knows padding."""
    return [_batch(family, seed, rows, columns) for seed in range(count)]


def _batch(family: str, seed: int, rows: int, columns: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    if family in VISION:
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    if family == "whisper":
        features = torch.randn(rows, 8, 16, generator=generator)
        return {"input_features": features, "decoder_input_ids": token_ids(rows, 9, seed)}
    ids = token_ids(rows, columns, seed)
    if family in DECODERS:
        return {"input_ids": ids}
    mask = padding_mask(*[columns] * (rows - 1), columns - 7 - seed, columns=columns)
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if family not in SEQ2SEQ:
        return batch
    short = padding_mask(*[columns - 4] * (rows - 1), columns - 9, columns=columns - 4)
    return batch | {"decoder_input_ids": token_ids(rows, columns - 4, seed + 50), "decoder_attention_mask": short}
