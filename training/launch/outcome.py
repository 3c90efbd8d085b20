"""Outcome of a run: exit statuses, the failure that caused the others, and how it is described.

Exit statuses: 0 finished; 2 a mistake that the user can correct; 3 and 4 finished, but the export failed its check or
there is none (node 0 only: the other ranks have ended by then); 75 stopped on request after a checkpoint, the same
command resumes; 1 anything else. Every node returns the status of the whole run.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from training.errors import ConfigError, ExportCheckFailed, NotExported

FAILED = 1
USER_ERROR = ConfigError.exit_status
INTERRUPTED = 128 + signal.SIGINT
FINISHED = (0, ExportCheckFailed.exit_status, NotExported.exit_status)  # all steps are done and saved


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank that failed."""

    rank: int
    host: str
    status: int  # exit status; negative: the signal that killed it
    time: float = field(default_factory=time.time)
    described: bool = False  # it has been reported already

    def __str__(self) -> str:
        if self.status >= 0:
            return f"rank {self.rank} on {self.host} was the first to end, with status {self.status}"
        name = signal.Signals(-self.status).name
        hint = ", often sent by the kernel when memory runs out" if name == "SIGKILL" else ""
        return f"rank {self.rank} on {self.host} was killed by signal {-self.status} ({name}{hint})"


def root_cause(failures: Iterable[Failure]) -> Failure:
    """The failure that caused the others.

    A rank that was killed or ended with a user error is the cause, whenever that was detected: the others then fail
    with a broken connection. Otherwise it is the earliest failure.
    """
    return min(failures, key=lambda each: (each.status >= 0, each.status != USER_ERROR, each.time))
