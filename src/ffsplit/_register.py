"""Telling transformers about ffsplit's storage format without importing transformers before anybody needs it.

`import ffsplit` promises that `from_pretrained` understands ffsplit checkpoints. Registering means importing torch and
transformers, which takes seconds; `ffsplit --help` should not. So if transformers' model code is loaded already, the
format is registered at once, and otherwise right after that code is loaded, which is before any `from_pretrained`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.modeling_utils"
FORMAT = "ffsplit.checkpoint.quantizer"


class _AfterModelCode(MetaPathFinder):
    """Finds the awaited module as usual, and imports the storage format after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        # It stays in place until the module has really run: code that only asks whether the module exists comes here
        # too, and an import may fail and be repeated.
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module(FORMAT)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_storage_format() -> None:
    """Make `from_pretrained` understand ffsplit checkpoints, now or as soon as transformers is loaded."""
    if AWAITED in sys.modules:
        importlib.import_module(FORMAT)
    elif not any(isinstance(finder, _AfterModelCode) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterModelCode())
