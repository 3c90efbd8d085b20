"""Stop requests: by a signal, or because the allocation is about to end. The ranks agree on one at a step boundary.

Signals: USR1, USR2, TERM (Slurm's warnings, a preemption, `kill`). The end of the allocation is the unix time in
`CROSSLIFT_DEADLINE`. The ranks then save a checkpoint and end with status 75, and the job is requeued. Further signals
change nothing: one that arrives while a checkpoint is written must not interrupt it.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from types import FrameType

from training.errors import ConfigError

STOPPED = 75  # exit status (EX_TEMPFAIL of sysexits.h): the same command resumes
DEADLINE = "CROSSLIFT_DEADLINE"
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
DEFAULT_SAVE_S = 60.0  # assumed duration of a checkpoint until one was written
EXIT_S = 15.0  # for the processes and the job's script to end


class StoppedOnRequest(Exception):
    """The run was stopped on request before its last step, after a checkpoint."""

    exit_status = STOPPED


def allocation_end() -> float:
    """Unix time at which the allocation ends, from `CROSSLIFT_DEADLINE`; infinity if it is not set.

    Raises:
        ConfigError: it is not a time, or it has passed, which would stop the run before its first step.
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
            f"{DEADLINE}={text}: is {past:.0f} s in the past, so it belongs to another allocation; unset it, or set "
            "the unix time at which this one ends"
        )
    return end


class StopRequest:
    """Whether this rank was asked to stop. Outside of training a signal ends the process at once."""

    def __init__(self) -> None:
        self.training = False  # whether there is state to save: signals then only set the request
        self._reason: str | None = None
        self._deadline = allocation_end()
        self._longest_step = 0.0
        self._longest_save = 0.0

    def install(self) -> None:
        """Install the signal handlers; in the main thread, as early as possible."""
        for each in SIGNALS:
            signal.signal(each, self._handle)

    def record_step(self, seconds: float) -> None:
        """Record the duration of a step; the longest one counts towards the deadline."""
        self._longest_step = max(self._longest_step, seconds)

    def record_save(self, seconds: float) -> None:
        """Record how long a checkpoint took, from its start until it was complete."""
        self._longest_save = max(self._longest_save, seconds)

    @property
    def reason(self) -> str | None:
        """Why this rank should stop now, or None. A reason is never withdrawn: other ranks may act on it already."""
        save = 1.5 * self._longest_save if self._longest_save else DEFAULT_SAVE_S
        if self._reason is None and time.time() + 2 * self._longest_step + save + EXIT_S >= self._deadline:
            self._reason = "the end of the allocation"
        return self._reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.training:
            self._reason = signal.Signals(number).name
            return
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            text = f"crosslift: stopped by {name} outside of training; the same command resumes the run\n"
            os.write(sys.stderr.fileno(), text.encode())  # not print: a handler may interrupt another print
        os._exit(STOPPED)
