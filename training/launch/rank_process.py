"""One rank's process: how it is started, what it is told, and how it is reached.

In: a command and the rank's place. Out: a process whose output is read. Next: `launcher.py`, which watches over it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from training.launch.heartbeat import FOLDER, LAUNCHER, STARTING, read_beat
from training.launch.logs import TERMINAL, Secrets
from training.launch.rank_output import RankOutput


class RankProcess:
    """A rank of this node."""

    process: subprocess.Popen[bytes]
    output: RankOutput

    def __init__(
        self,
        command: Sequence[str],
        number: int,
        local_rank: int,
        place: Mapping[str, str],
        beats: Path,
        output_dir: Path | None,
    ) -> None:
        """`place` holds the variables that tell a rank where it stands, by torchrun's names."""
        self.number = number
        self.local_rank = local_rank
        self._command = list(command)
        self._place = place
        self._beats = beats
        self._output_dir = output_dir
        self._alone = False  # nothing that it started is left

    def start(self, first_to_say: Callable[[str, int], bool]) -> None:
        """Start it, and read what it writes."""
        terminal = os.dup(sys.stderr.fileno())
        try:
            # A session of its own: Ctrl-C reaches the launcher alone, which sends it once.
            self.process = subprocess.Popen(
                self._command, env=self._environment(terminal), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                pass_fds=[terminal], start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(terminal)
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        self.output = RankOutput(
            self.process.stderr, self.process.stdout, self.number, self._output_dir, Secrets(os.environ), first_to_say,
            self._step,
        )  # fmt: skip

    def ended(self) -> int | None:
        """Exit status, negative for a signal; None while it runs. What it started ends with it."""
        status = self.process.poll()
        if status is not None and not self._alone:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._alone = True  # not once more: its number may be another's by then
        return status

    def began(self) -> bool:
        """Whether it has come to its first step, as far as one can know."""
        beat = read_beat(self._beats, self.local_rank)
        return beat is None or beat.state != STARTING

    def send(self, number: signal.Signals) -> None:
        """To the rank alone: a process that it started need not know what USR1 means."""
        if self.ended() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """The rank and what it started, which are a process group of their own."""
        if self.ended() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _step(self) -> int:
        beat = read_beat(self._beats, self.local_rank)
        return beat.step if beat is not None else -1

    def _environment(self, terminal: int) -> dict[str, str]:
        """What torchrun sets, so that a rank need not know who started it, and what only our launcher gives."""
        source = str(Path(__file__).resolve().parents[2])
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return {
            "PYTHONUNBUFFERED": "1",  # stdout is a pipe: what it prints shall be seen at once, and outlive a SIGKILL
            "OMP_NUM_THREADS": str(max(cpus // int(self._place["LOCAL_WORLD_SIZE"]), 1)),
            **os.environ,
            **self._place,
            "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher holds the store, rank 0 only talks to it
            "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
            LAUNCHER: str(os.getpid()),
            FOLDER: str(self._beats),
            TERMINAL: str(terminal),
        }
