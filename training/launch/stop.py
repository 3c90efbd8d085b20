"""Asked to stop: by a signal, or because the allocation is about to end. Ranks agree on it at a step boundary.

In: USR1, USR2, TERM (Slurm's warnings, a preemption, a person's `kill`), and `CROSSLIFT_DEADLINE`, the unix time when
the allocation ends. Out: `StopRequest.reason`. Next: `fit.py` saves and ends with status 75, and the job is requeued.

Further signals change nothing: one that comes while a checkpoint is saved must not tear it.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from types import FrameType

from training.errors import ConfigError

STOPPED = 75  # exit status (sysexits' "temporary failure"): the same command goes on
DEADLINE = "CROSSLIFT_DEADLINE"
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
UNMEASURED_SAVE_SECONDS = 60.0  # taken for a checkpoint's time until one was written
SPARE_SECONDS = 15.0  # to end the processes and the job's own script


class StoppedOnRequest(Exception):
    """The run was saved and has ended before its last step, as asked."""

    exit_status = STOPPED


def allocation_end() -> float:
    """Unix time at which the allocation ends, by `CROSSLIFT_DEADLINE`; infinity where it is not set.

    Raises:
        ConfigError: it is no such time, or one that has passed, which would stop the run before its first step.
    """
    text = os.environ.get(DEADLINE) or "inf"
    try:
        end = float(text)
    except ValueError:
        end = math.nan
    if not end > 0:
        raise ConfigError(f"{DEADLINE}={text}: must be the unix time (in seconds) at which the allocation ends")
    if (past := time.time() - end) > 0:
        raise ConfigError(
            f"{DEADLINE}={text}: lies {past:.0f} s in the past, so it is another allocation's; unset it, or set the "
            "unix time at which this one ends"
        )
    return end


class StopRequest:
    """Catches the signals of this process; before the first step and after the last one they end it at once."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._training = False
        self._deadline = allocation_end()
        self._longest_step = 0.0
        self._longest_save = 0.0
        self.ends = "the same command goes on"

    def install(self) -> None:
        """Take the signals over; to be called in the main thread, as early as possible."""
        for each in SIGNALS:
            signal.signal(each, self._caught)

    def begin_training(self) -> None:
        """From here on there is something to save: signals only set the request."""
        self._training = True

    def end_training(self) -> None:
        """Nothing is left that a checkpoint would not have."""
        self._training = False

    def took(self, step_seconds: float) -> None:
        """How long a step took; the deadline is met by the longest ones."""
        self._longest_step = max(self._longest_step, step_seconds)

    def saved(self, seconds: float) -> None:
        """How long a checkpoint took from its beginning until it was complete."""
        self._longest_save = max(self._longest_save, seconds)

    @property
    def reason(self) -> str | None:
        """Why this rank should stop now, or None. Once there is one it stays: other ranks may have heard of it."""
        save = 1.5 * self._longest_save if self._longest_save else UNMEASURED_SAVE_SECONDS
        if self._reason is None and time.time() + 2 * self._longest_step + save + SPARE_SECONDS >= self._deadline:
            self._reason = "the end of the allocation"
        return self._reason

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self._training:
            self._reason = signal.Signals(number).name
            return
        name = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            os.write(sys.stderr.fileno(), f"crosslift: stopped by {name} outside of training; {self.ends}\n".encode())
        os._exit(STOPPED)
