"""Errors that say all there is to say: what the user can mend, and what ends a run.

In: nothing. Out: exceptions. Next: every file of `training` raises them; `crosslift.py` and `__main__.py` print them.
"""

from __future__ import annotations

from pathlib import Path


class ConfigError(Exception):
    """One line that names the file, key or argument, what is wrong and what would be right."""

    exit_status = 2


class NonFiniteStep(Exception):
    """A loss or gradient that is not a number, or a loss that leapt; names step, ranks and sample ids."""


class CheckpointFailed(Exception):
    """The run cannot be saved; names the rank, its host and the reason. All ranks raise it together."""


class ExportCheckFailed(Exception):
    """Training finished and the export is kept, marked as one that did not pass its check."""

    exit_status = 3


class NotExported(Exception):
    """Training finished, but no export could be written; the last checkpoint has all of it."""

    exit_status = 4


class TrainingEnded(Exception):
    """A training that another command needs ended early; the launcher has printed why."""

    def __init__(self, config: Path, status: int) -> None:
        super().__init__(f"{config}: training ended with status {status}; its messages are above")
        self.exit_status = status
