"""`import ffsplit` is quick, and makes itself known to transformers whenever that is loaded."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ffsplit
from ffsplit import _register

FRESH = """
import sys, ffsplit
assert not {"torch", "transformers", "scipy", "matplotlib"} & set(sys.modules), sorted(sys.modules)
print("light", flush=True)

import importlib.util
importlib.util.find_spec("transformers.modeling_utils")
from transformers import AutoModelForCausalLM
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "ffsplit" in AUTO_QUANTIZER_MAPPING, sorted(AUTO_QUANTIZER_MAPPING)
print("registered", flush=True)

import ffsplit.checkpoint.save, ffsplit.checkpoint.decompress, ffsplit.pipeline.compress
assert callable(ffsplit.save) and callable(ffsplit.decompress) and callable(ffsplit.compress)
assert callable(ffsplit.evaluate_model) and callable(ffsplit.available_methods)
print("named", flush=True)
"""


@pytest.fixture(scope="module")
def fresh() -> subprocess.CompletedProcess[str]:
    """One process of its own that imports the package first, then transformers, then rooms of the package.

    The other way round, transformers first, is between the processes of ``tests/e2e``.
    """
    return subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def module_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that stands for transformers' model code, and one for the storage format; neither is imported yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "_AfterModelCode"])
    monkeypatch.setattr(_register, "AWAITED", "awaited_code")
    monkeypatch.setattr(_register, "FORMAT", "storage_format")
    (tmp_path / "awaited_code.py").write_text("READY = True\n")
    (tmp_path / "storage_format.py").write_text("import awaited_code\nassert awaited_code.READY\n")
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("awaited_code", "storage_format"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("module_awaited")
def test_the_format_is_loaded_right_after_the_awaited_module() -> None:
    _register.register_storage_format()
    _register.register_storage_format()
    assert "storage_format" not in sys.modules
    importlib.import_module("awaited_code")
    assert "storage_format" in sys.modules
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_AfterModelCode"]


@pytest.mark.usefixtures("module_awaited")
def test_the_format_is_loaded_at_once_if_the_module_is_there() -> None:
    importlib.import_module("awaited_code")
    _register.register_storage_format()
    assert "storage_format" in sys.modules


@pytest.mark.usefixtures("module_awaited")
def test_asking_whether_the_module_exists_does_not_use_the_registration_up() -> None:
    _register.register_storage_format()
    assert importlib.util.find_spec("awaited_code") is not None
    assert "storage_format" not in sys.modules
    importlib.import_module("awaited_code")
    assert "storage_format" in sys.modules


def test_an_import_that_fails_can_be_repeated(module_awaited: Path) -> None:
    (module_awaited / "awaited_code.py").write_text("raise ImportError('not today')\n")
    _register.register_storage_format()
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module("awaited_code")
    (module_awaited / "awaited_code.py").write_text("READY = 'now it works'\n")
    importlib.invalidate_caches()
    importlib.import_module("awaited_code")
    assert "storage_format" in sys.modules


def test_a_module_that_does_not_exist_is_no_error(module_awaited: Path) -> None:
    (module_awaited / "awaited_code.py").unlink()
    importlib.invalidate_caches()
    _register.register_storage_format()
    assert importlib.util.find_spec("awaited_code") is None
    with pytest.raises(ModuleNotFoundError, match="awaited_code"):
        importlib.import_module("awaited_code")


def test_importing_the_package_loads_nothing_heavy_and_registers_later(
    fresh: subprocess.CompletedProcess[str],
) -> None:
    assert fresh.stdout.split()[:2] == ["light", "registered"], fresh.stderr


def test_public_names_are_still_right_when_their_rooms_were_imported_first(
    fresh: subprocess.CompletedProcess[str],
) -> None:
    """`ffsplit.save` is the function, although a module of that name exists below."""
    assert fresh.stdout.split()[2:] == ["named"], fresh.stderr
    assert fresh.returncode == 0, fresh.stderr


def test_every_public_name_exists() -> None:
    for name in ffsplit.__all__:
        assert getattr(ffsplit, name) is not None
    assert set(ffsplit.__all__) <= set(dir(ffsplit))
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = ffsplit.compres  # type: ignore[attr-defined]
