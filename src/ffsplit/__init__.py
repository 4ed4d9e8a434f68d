"""ffsplit: make the feed-forward networks of a Hugging Face model smaller and faster, and prove it with numbers.

Importing this package registers its storage format with transformers, so that the usual ``from_pretrained`` loads
checkpoints that were written by :func:`save`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ffsplit.checkpoint.decompress import decompress
from ffsplit.checkpoint.save import SavedCheckpoint, save
from ffsplit.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    FFSplitError,
    ModelError,
    RecipeError,
    ResumeError,
)
from ffsplit.families import FFNSite, find_ffns
from ffsplit.ffn.sum import Branch, SumFFN
from ffsplit.ffn.weights import FFNWeights
from ffsplit.methods.registry import methods as available_methods
from ffsplit.pipeline.compress import compress
from ffsplit.pipeline.plan import Plan
from ffsplit.pipeline.recipe import Recipe, load_recipe
from ffsplit.pipeline.result import CompressionResult

try:
    __version__ = version("ffsplit")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"

__all__ = [
    "Branch",
    "BudgetError",
    "CheckpointError",
    "CompressionResult",
    "DataError",
    "FFNSite",
    "FFNWeights",
    "FFSplitError",
    "ModelError",
    "Plan",
    "Recipe",
    "RecipeError",
    "ResumeError",
    "SavedCheckpoint",
    "SumFFN",
    "__version__",
    "available_methods",
    "compress",
    "decompress",
    "find_ffns",
    "load_recipe",
    "save",
]
