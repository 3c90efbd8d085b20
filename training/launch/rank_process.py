"""The process of one rank: how it is started, its environment, and what it writes to stderr and stdout.

The launcher reads stderr, because a process that aborts (a traceback, a C++ abort, NCCL) cannot log its own last
lines. It prints them, appends them to the rank's log, and adds them to the events: level CRITICAL for crosslift's own
message on why the rank ends, otherwise STDERR. It copies stdout to its own. Secrets are redacted in both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from data_pipeline.console import TERMINAL
from data_pipeline.secrets import Redactor
from training.launch.heartbeat import HEARTBEAT_DIR, LAUNCHER_PID, STARTING, read_heartbeat
from training.launch.logs import Appender, event_line, events_part, rank_log
from training.messages import PREFIX

DRAIN_TIMEOUT_S = 2.0  # a process that a rank left behind may keep the pipe open
STDOUT = 1


class RankProcess:
    """A rank of this node, from its start on, and the threads that read its stderr and stdout."""

    def __init__(
        self,
        command: Sequence[str],
        place: Mapping[str, str],
        heartbeat_dir: Path,
        output_dir: Path,
        claim_line: Callable[[str, int], bool],
    ) -> None:
        """Start the process.

        Args:
            place: torchrun's variables of this rank: RANK, LOCAL_RANK, WORLD_SIZE and so on.
            claim_line: `claim_line(text, n)` returns whether to print crosslift's own line `text`, which the rank wrote
                n times.
        """
        self.rank = int(place["RANK"])
        self.local_rank = int(place["LOCAL_RANK"])
        self.has_message = False  # the rank has printed crosslift's own message on why it ends
        self._heartbeat_dir = heartbeat_dir
        self._claim_line = claim_line
        self._group_killed = False
        self._redactor = Redactor(os.environ)
        self._written: Counter[str] = Counter()
        self._log = Appender(rank_log(output_dir, self.rank))
        self._events = Appender(events_part(output_dir, f"stderr-{self.rank:05d}"))
        self._blocked = threading.Event()  # set while the reader of the launcher's stdout is slower than the rank
        terminal = os.dup(sys.stderr.fileno())
        try:
            # A session of its own: Ctrl-C reaches only the launcher, which forwards it once.
            self.process = subprocess.Popen(
                command, env=_environment(place, heartbeat_dir, terminal), stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, pass_fds=[terminal], start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(terminal)
        self._threads = [
            threading.Thread(target=self._read_stderr, name=f"stderr-{self.rank}", daemon=True),
            threading.Thread(target=self._copy_stdout, name=f"stdout-{self.rank}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def exit_status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs. Its child processes are killed when it has ended."""
        status = self.process.poll()
        if status is not None and not self._group_killed:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._group_killed = True  # only once: later the id may belong to another process
        return status

    def has_started_steps(self) -> bool:
        """Whether it has reached its first step, as far as is known."""
        heartbeat = read_heartbeat(self._heartbeat_dir, self.local_rank)
        return heartbeat is None or heartbeat.state != STARTING

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the rank alone: its child processes may not handle USR1."""
        if self.exit_status() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the rank and its child processes, which form a process group."""
        if self.exit_status() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def close_output(self) -> None:
        """After the rank's end: wait for the rest of its output, however slow the reader of stdout is."""
        for thread in self._threads:
            thread.join(DRAIN_TIMEOUT_S)
            while thread.is_alive() and self._blocked.is_set():
                thread.join(DRAIN_TIMEOUT_S)

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            text = self._text(line)
            self._print(text)
            text = text.rstrip("\r").rpartition("\r")[2]  # only the last state of a progress bar
            self._log.write(text + "\n")
            if text.strip():
                level = "CRITICAL" if text.startswith(PREFIX) else "STDERR"
                self._events.write(event_line(self.rank, level, self._step(), text))

    def _copy_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            rest = f"{self._text(line)}\n".encode(errors="backslashreplace")
            self._blocked.set()
            with suppress(OSError):  # the reader has ended; keep reading, since a full pipe would block the rank
                while rest:  # not through Python's buffer: its lock and final flush would block the launcher's exit
                    rest = rest[os.write(STDOUT, rest) :]
            self._blocked.clear()

    def _text(self, line: bytes) -> str:
        return self._redactor.redact(line.decode(errors="backslashreplace").rstrip("\n"))

    def _print(self, text: str) -> None:
        if text.startswith(PREFIX):
            self.has_message = True
            self._written[text] += 1
            if not self._claim_line(text, self._written[text]):
                return
        print(text, file=sys.stderr, flush=True)

    def _step(self) -> int:
        heartbeat = read_heartbeat(self._heartbeat_dir, self.local_rank)
        return heartbeat.step if heartbeat is not None else -1


def _environment(place: Mapping[str, str], heartbeat_dir: Path, terminal: int) -> dict[str, str]:
    """torchrun's variables, so that ranks work the same under any launcher, and those of crosslift's launcher."""
    source = str(Path(__file__).resolve().parents[2])
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "PYTHONUNBUFFERED": "1",  # stdout is a pipe: show lines at once, and keep them after a SIGKILL
        "OMP_NUM_THREADS": str(max(cpus // int(place["LOCAL_WORLD_SIZE"]), 1)),
        "TOKENIZERS_PARALLELISM": "false",  # `data.workers` threads tokenise, not one for each of the node's cores
        **os.environ,
        **place,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher holds the store, rank 0 only connects to it
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        LAUNCHER_PID: str(os.getpid()),
        HEARTBEAT_DIR: str(heartbeat_dir),
        TERMINAL: str(terminal),
    }
