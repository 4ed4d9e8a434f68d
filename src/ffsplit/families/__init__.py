"""Finding the FFNs of any transformers model, reading their weights, and putting replacements back."""

from ffsplit.families.attention import find_attention
from ffsplit.families.attention_site import AttentionSite
from ffsplit.families.blocks import Block, blocks_of
from ffsplit.families.dropped_attention import DroppedAttention, drop_attention
from ffsplit.families.find import Coverage, FFNs, find_ffns
from ffsplit.families.site import FFNSite
from ffsplit.families.surgery import activation, originals, read, replace, restore, write
from ffsplit.families.ties import link_ties
from ffsplit.families.tripwire import Tripwire
from ffsplit.families.verify import check_dtypes, check_finite, verify
from ffsplit.families.verify_attention import verify_attention

__all__ = [
    "AttentionSite",
    "Block",
    "Coverage",
    "DroppedAttention",
    "FFNSite",
    "FFNs",
    "Tripwire",
    "activation",
    "blocks_of",
    "check_dtypes",
    "check_finite",
    "drop_attention",
    "find_attention",
    "find_ffns",
    "link_ties",
    "originals",
    "read",
    "replace",
    "restore",
    "verify",
    "verify_attention",
    "write",
]
