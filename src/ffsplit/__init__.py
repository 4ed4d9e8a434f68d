"""ffsplit: make the feed-forward networks of a Hugging Face model smaller and faster, and prove it with numbers.

Importing this package makes the usual ``from_pretrained`` load checkpoints that were written by :func:`save`. The
public names are imported when they are first used, so that ``import ffsplit`` itself is quick.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ffsplit._register import register_storage_format

if TYPE_CHECKING:
    from ffsplit.checkpoint.decompress import decompress as decompress
    from ffsplit.checkpoint.save import SavedCheckpoint as SavedCheckpoint
    from ffsplit.checkpoint.save import save as save
    from ffsplit.checkpoint.slice import load as load
    from ffsplit.errors import BudgetError as BudgetError
    from ffsplit.errors import CheckpointError as CheckpointError
    from ffsplit.errors import DataError as DataError
    from ffsplit.errors import FFSplitError as FFSplitError
    from ffsplit.errors import ModelError as ModelError
    from ffsplit.errors import RecipeError as RecipeError
    from ffsplit.errors import ResumeError as ResumeError
    from ffsplit.evaluate.evaluate import Evaluation as Evaluation
    from ffsplit.evaluate.evaluate import evaluate as evaluate_model  # noqa: F401
    from ffsplit.families import FFNSite as FFNSite
    from ffsplit.families import find_ffns as find_ffns
    from ffsplit.families.centring import NormCentring as NormCentring
    from ffsplit.families.centring import centre_norms as centre_norms
    from ffsplit.families.norms import NormFold as NormFold
    from ffsplit.families.norms import fold_norms as fold_norms
    from ffsplit.ffn.sum import Branch as Branch
    from ffsplit.ffn.sum import SumFFN as SumFFN
    from ffsplit.ffn.weights import FFNWeights as FFNWeights
    from ffsplit.methods.registry import methods as available_methods  # noqa: F401
    from ffsplit.pipeline.compress import compress as compress
    from ffsplit.pipeline.inspect import inspect as inspect_model  # noqa: F401
    from ffsplit.pipeline.plan import Plan as Plan
    from ffsplit.pipeline.recipe import Recipe as Recipe
    from ffsplit.pipeline.recipe import load_recipe as load_recipe
    from ffsplit.pipeline.recover import recover as recover_checkpoint  # noqa: F401
    from ffsplit.pipeline.result import CompressionResult as CompressionResult

# Where each public name lives. Names that are also rooms of the package (methods, evaluate) get one of their own.
_PUBLIC = {
    "Branch": "ffsplit.ffn.sum:Branch",
    "BudgetError": "ffsplit.errors:BudgetError",
    "CheckpointError": "ffsplit.errors:CheckpointError",
    "CompressionResult": "ffsplit.pipeline.result:CompressionResult",
    "DataError": "ffsplit.errors:DataError",
    "Evaluation": "ffsplit.evaluate.evaluate:Evaluation",
    "FFNSite": "ffsplit.families:FFNSite",
    "FFNWeights": "ffsplit.ffn.weights:FFNWeights",
    "FFSplitError": "ffsplit.errors:FFSplitError",
    "ModelError": "ffsplit.errors:ModelError",
    "NormCentring": "ffsplit.families.centring:NormCentring",
    "NormFold": "ffsplit.families.norms:NormFold",
    "Plan": "ffsplit.pipeline.plan:Plan",
    "Recipe": "ffsplit.pipeline.recipe:Recipe",
    "RecipeError": "ffsplit.errors:RecipeError",
    "ResumeError": "ffsplit.errors:ResumeError",
    "SavedCheckpoint": "ffsplit.checkpoint.save:SavedCheckpoint",
    "SumFFN": "ffsplit.ffn.sum:SumFFN",
    "available_methods": "ffsplit.methods.registry:methods",
    "centre_norms": "ffsplit.families.centring:centre_norms",
    "compress": "ffsplit.pipeline.compress:compress",
    "decompress": "ffsplit.checkpoint.decompress:decompress",
    "evaluate_model": "ffsplit.evaluate.evaluate:evaluate",
    "find_ffns": "ffsplit.families:find_ffns",
    "fold_norms": "ffsplit.families.norms:fold_norms",
    "inspect_model": "ffsplit.pipeline.inspect:inspect",
    "load": "ffsplit.checkpoint.slice:load",
    "load_recipe": "ffsplit.pipeline.recipe:load_recipe",
    "recover_checkpoint": "ffsplit.pipeline.recover:recover",
    "save": "ffsplit.checkpoint.save:save",
}

try:
    __version__ = version("ffsplit")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ffsplit' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register_storage_format()
