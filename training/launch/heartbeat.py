"""Heartbeat of a rank: step and phase in a few bytes of shared memory, read by the node's launcher.

Each rank maps a file in a folder that the launcher made on a local disk, and writes its state there at the start of
every phase. A write takes a microsecond: no system call, no lock. No background thread writes heartbeats, because it
would keep writing in a rank that hangs. Without a crosslift launcher (`torchrun -m training`) there is no folder and
no watchdog.

File layout: counter, pid, step, phases since the step began, main thread, state, phase.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Batch = TypeVar("Batch")
HEARTBEAT_DIR = "CROSSLIFT_HEARTBEAT_DIR"  # environment variable: folder of the heartbeat files; unset: no launcher
LAUNCHER_PID = "CROSSLIFT_LAUNCHER_PID"
STACKS_SIGNAL = signal.SIGURG  # ignored by default, so it does not harm a rank that has no handler yet
STARTING, STEPPING, ENDED = 0, 1, 2
WAITING_FOR_DATA = "waiting for data"  # the first phase of a step

_FORMAT = struct.Struct("<QQqQQB64s")
_PR_SET_PDEATHSIG = 1  # from Linux' prctl.h


@dataclass(frozen=True, slots=True)
class HeartbeatState:
    """The last heartbeat of a rank."""

    counter: int  # increases with every heartbeat
    pid: int
    step: int  # 0-based; -1 before the first step
    phases: int  # phases since the step began; comparable between ranks, which run the same phases
    thread: int  # id of the main thread, as faulthandler prints it
    state: int  # STARTING, STEPPING or ENDED
    phase: str


class Heartbeat:
    """Writes the heartbeat of this process; before `attach` it only keeps the state."""

    def __init__(self) -> None:
        self.step = -1
        self.listener: Callable[[str], None] | None = None  # is told every phase, by the thread that reports it
        self._counter = 0
        self._phases = 0
        self._forwards = 0
        self._state = STARTING
        self._map: mmap.mmap | None = None
        self._pid = os.getpid()
        self._thread = threading.main_thread().ident or 0

    def attach(self) -> None:
        """Connect to the launcher: write heartbeats, end with it, dump stacks on its signal. In the main thread."""
        if (folder := os.environ.get(HEARTBEAT_DIR)) is None:
            return
        _die_with_launcher()
        local_rank = int(os.environ["LOCAL_RANK"])
        stacks = stacks_file(Path(folder), local_rank).open("w", encoding="utf-8")
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)  # it keeps the file open
        with heartbeat_file(Path(folder), local_rank).open("w+b") as file:
            file.truncate(_FORMAT.size)
            self._map = mmap.mmap(file.fileno(), _FORMAT.size)
        self.phase("starting")

    def steps(self, batches: Iterable[Batch], start: int) -> Iterator[Batch]:
        """Yield the batch of each step and report the phases around it. The watchdog watches from the first step on."""
        iterator = iter(batches)
        for step in itertools.count(start):
            self.step, self._phases, self._forwards = step, 0, 0
            if self._state == STARTING:
                self._state = STEPPING
            self.phase(WAITING_FOR_DATA)
            try:
                batch = next(iterator)
            except StopIteration:
                self.step = step - 1
                self.phase("all steps done")
                return
            self.phase("agreeing on the step")
            yield batch

    def forward(self) -> None:
        """Report the start of a forward pass; forward passes are numbered within a step."""
        self._forwards += 1
        self.phase(f"forward {self._forwards}")

    def phase(self, name: str) -> None:
        """Report the start of a phase, such as "backward"; short, in ASCII."""
        self._counter += 1
        self._phases += 1
        if self._map is not None:
            values = (self._counter, self._pid, self.step, self._phases, self._thread, self._state)
            _FORMAT.pack_into(self._map, 0, *values, name.encode()[:64])
        if self.listener is not None:
            self.listener(name)

    def end(self) -> None:
        """Report the end of the steps. What follows (an export) may take long and is not watched."""
        self._state = ENDED
        self.phase("ended")


heartbeat = Heartbeat()


def heartbeat_file(folder: Path, local_rank: int) -> Path:
    """The file of a rank's heartbeats."""
    return folder / f"{local_rank}.heartbeat"


def stacks_file(folder: Path, local_rank: int) -> Path:
    """The file to which a rank dumps its stacks, one dump after the other."""
    return folder / f"{local_rank}.stacks"


def read_heartbeat(folder: Path, local_rank: int) -> HeartbeatState | None:
    """The last heartbeat of a rank; None before its first."""
    try:
        content = heartbeat_file(folder, local_rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _FORMAT.size:
        return None
    counter, pid, step, phases, thread, state, phase = _FORMAT.unpack(content)
    if not counter:
        return None
    return HeartbeatState(counter, pid, step, phases, thread, state, phase.rstrip(b"\0").decode(errors="replace"))


def die_with_parent() -> None:
    """On Linux, have the kernel kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _die_with_launcher() -> None:
    """On Linux, end this rank when its launcher dies: nothing else would end one that waits in a collective call."""
    die_with_parent()
    launcher = int(os.environ.get(LAUNCHER_PID, os.getppid()))
    if sys.platform == "linux" and os.getppid() != launcher:  # it died before the call above
        os._exit(1)
