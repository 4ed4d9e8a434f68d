"""Finding the FFNs of any transformers model, reading their weights, and putting replacements back."""

from ffsplit.families.blocks import Block, blocks_of
from ffsplit.families.find import Coverage, FFNs, find_ffns
from ffsplit.families.site import FFNSite
from ffsplit.families.surgery import activation, originals, read, replace, restore, write
from ffsplit.families.ties import link_ties
from ffsplit.families.tripwire import Tripwire
from ffsplit.families.verify import check_dtypes, check_finite, verify

__all__ = [
    "Block",
    "Coverage",
    "FFNSite",
    "FFNs",
    "Tripwire",
    "activation",
    "blocks_of",
    "check_dtypes",
    "check_finite",
    "find_ffns",
    "link_ties",
    "originals",
    "read",
    "replace",
    "restore",
    "verify",
    "write",
]
