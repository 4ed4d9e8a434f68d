"""Settings of the whole suite: one thread per worker, quiet transformers, deterministic property tests."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and the workers of a parallel run would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "120"  # tables are compared as text, whatever the terminal that runs the tests

settings.register_profile("ffsplit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("ffsplit"), max_examples=500)
settings.load_profile("ffsplit")


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """One thread of torch and nothing but results on the terminal.

    Both are imported here because the process that hands tests out to the workers needs neither.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def pytest_collection_finish() -> None:
    """Leave what was imported and collected, a million objects that stay, out of every later garbage collection."""
    gc.collect()
    gc.freeze()
