"""Errors that ffsplit raises on purpose.

Every one of them names the field, the value, what is allowed and, where it applies, the layer. The command line
prints the message without a traceback and exits with code 2.
"""

from __future__ import annotations


class FFSplitError(Exception):
    """Base of every deliberate refusal. The command line turns it into exit code 2."""


class ModelError(FFSplitError):
    """The model cannot be worked on: no FFN found, partly covered, NaN in weights, wrong output on verification."""


class CannotRunError(ModelError):
    """The model rejects every input that was made up for it, so its FFNs cannot be looked for."""


class DataError(FFSplitError):
    """Calibration or evaluation text is missing, empty, too short, or does not fit the tokenizer."""


class RecipeError(FFSplitError):
    """A recipe, a method's field or a command-line value is unknown or out of range."""


class BudgetError(FFSplitError):
    """The budget cannot be reached by the chosen method; the message says the smallest that can."""


class CheckpointError(FFSplitError):
    """A stored checkpoint is damaged, incompatible, or did not survive its own reload."""


class ResumeError(FFSplitError):
    """A journal of an interrupted run exists but belongs to other inputs."""
