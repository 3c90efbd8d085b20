"""Exceptions of training whose message is complete; `crosslift.py` and `__main__.py` print them without a traceback."""

from __future__ import annotations

from pathlib import Path


class ConfigError(Exception):
    """A mistake in a file, key or argument. The message names the place, the mistake and the remedy."""

    exit_status = 2


class NonFiniteStep(Exception):
    """A NaN or infinite loss or gradient, or a loss spike; names step, ranks and sample ids."""


class CheckpointFailed(Exception):
    """The run cannot be saved; names the rank, its host and the reason. All ranks raise it together."""


class ExportCheckFailed(Exception):
    """Training finished, but the export failed its check; it is kept and marked."""

    exit_status = 3


class NotExported(Exception):
    """Training finished, but no export could be written; the last checkpoint holds the final state."""

    exit_status = 4


class TrainingEnded(Exception):
    """A training started by another command ended early; the launcher has printed the reason."""

    def __init__(self, config: Path, status: int) -> None:
        super().__init__(f"{config}: training ended with status {status}; its messages are above")
        self.exit_status = status
