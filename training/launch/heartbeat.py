"""A rank's sign of life: what it does, in a few bytes that its node's launcher can read at any time.

In: `heart.phase("forward")` at each phase's beginning. Out: a mapped file, one a rank, in a folder that the launcher
made on a disk of the node. Next: `watchdog.py` reads it; `logs.py` takes the step from it.

A beat costs a microsecond: no system call, no lock. Nothing beats in a thread of its own, which would go on beating
in a rank that stands still. Without a launcher of ours (`torchrun -m training`) there is no folder, and no watchdog.

The file: counter, pid, step, beats since the step began, main thread, state, phase.
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Batch = TypeVar("Batch")
FOLDER = "CROSSLIFT_BEATS"  # the launcher's folder of beats; absent: no launcher
LAUNCHER = "CROSSLIFT_LAUNCHER"  # its process id
STACKS_SIGNAL = signal.SIGURG  # ignored where nobody asked for it, so it harms no rank that has not come so far
STARTING, STEPPING, ENDED = 0, 1, 2

_FORMAT = struct.Struct("<QQqQQB64s")
_PR_SET_PDEATHSIG = 1  # of Linux' prctl.h


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank last said."""

    counter: int  # grows with each beat
    pid: int
    step: int  # 0-based; -1 before the first
    beats: int  # since that step began: comparable between ranks, which go through the same phases
    thread: int  # the main thread, as faulthandler names it
    state: int  # STARTING, STEPPING, ENDED
    phase: str


class Heart:
    """This process's beats; without `attach` they are only kept."""

    def __init__(self) -> None:
        self.step = -1
        self._counter = 0
        self._beats = 0
        self._forwards = 0
        self._state = STARTING
        self._map: mmap.mmap | None = None
        self._pid = os.getpid()
        self._thread = threading.main_thread().ident or 0

    def attach(self) -> None:
        """Beat into the launcher's folder, end with the launcher, and show stacks on its signal; once, in main."""
        if (folder := os.environ.get(FOLDER)) is None:
            return
        _end_with_launcher()
        local_rank = int(os.environ["LOCAL_RANK"])
        stacks = stacks_file(Path(folder), local_rank).open("w", encoding="utf-8")
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)  # it keeps the file open
        with beat_file(Path(folder), local_rank).open("w+b") as file:
            file.truncate(_FORMAT.size)
            self._map = mmap.mmap(file.fileno(), _FORMAT.size)
        self.phase("starting")

    def steps(self, batches: Iterable[Batch], start: int) -> Iterator[Batch]:
        """Each step's batch, with the beats of waiting for it; from the first one on, the rank is watched."""
        waiting = iter(batches)
        for step in itertools.count(start):
            self.step, self._beats, self._forwards = step, 0, 0
            if self._state == STARTING:
                self._state = STEPPING
            self.phase("waiting for data")
            try:
                batch = next(waiting)
            except StopIteration:
                self.step = step - 1
                self.phase("steps are done")
                return
            self.phase("agreeing on the step")
            yield batch

    def forward(self) -> None:
        """A forward pass begins; they are counted in a step."""
        self._forwards += 1
        self.phase(f"forward {self._forwards}")

    def phase(self, name: str) -> None:
        """What begins now, such as "backward"; short, in ASCII."""
        self._counter += 1
        self._beats += 1
        if self._map is not None:
            values = (self._counter, self._pid, self.step, self._beats, self._thread, self._state)
            _FORMAT.pack_into(self._map, 0, *values, name.encode()[:64])

    def end(self) -> None:
        """No steps are left: what follows (an export) takes its time, unwatched."""
        self._state = ENDED
        self.phase("ended")


heart = Heart()


def beat_file(folder: Path, local_rank: int) -> Path:
    """Where a rank's beats are."""
    return folder / f"{local_rank}.beat"


def stacks_file(folder: Path, local_rank: int) -> Path:
    """Where a rank's stacks are shown, one dump after the other."""
    return folder / f"{local_rank}.stacks"


def read_beat(folder: Path, local_rank: int) -> Beat | None:
    """A rank's last beat; None where it has not begun to beat."""
    try:
        content = beat_file(folder, local_rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _FORMAT.size:
        return None
    counter, pid, step, beats, thread, state, phase = _FORMAT.unpack(content)
    if not counter:
        return None
    return Beat(counter, pid, step, beats, thread, state, phase.rstrip(b"\0").decode(errors="replace"))


def end_with_parent() -> None:
    """On Linux, this process dies when the one that started it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_launcher() -> None:
    """On Linux, a rank dies when its launcher does: nobody else would end one that waits in a collective."""
    end_with_parent()
    if sys.platform == "linux" and os.getppid() != int(
        os.environ.get(LAUNCHER, os.getppid())
    ):  # it died before we asked
        os._exit(1)
