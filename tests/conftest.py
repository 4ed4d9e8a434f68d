"""Settings of the whole suite: one thread per worker, quiet transformers, deterministic property tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COLUMNS"] = "120"  # tables are compared as text, whatever the terminal that runs the tests

import torch
import transformers
from hypothesis import HealthCheck, settings

# Tiny models gain nothing from threads, and the workers of a parallel run would fight over the cores.
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
settings.register_profile("ffsplit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ffsplit")
