"""Sees that a rank stands still, and finds out which one, where and why.

In: the beats of a node's ranks. Out: the evidence (step, phase, process state, stack of every rank), and of all
nodes' evidence the rank that the others wait for. Next: `launcher.py` reports it and ends the run.

When one rank stands still, soon all do, in a collective: so the rank furthest behind is looked for, over all nodes,
and not the one that was silent first. A rank is watched from its first step until it says that it has ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from data_pipeline.settings import Section
from training.launch.heartbeat import STACKS_SIGNAL, STEPPING, Beat, read_beat, stacks_file

STACK_SECONDS = 8.0  # in which a rank that can answer at all has shown its stacks, on a busy machine too
SHOWN_FRAMES = 8
STATES = {"T": "stopped", "t": "traced", "D": "in a disk wait", "Z": "dead", "R": "running", "S": "sleeping"}


class WatchdogConfig(Section):
    """Ranks that stand still or are slow."""

    stall_minutes: float = Field(
        15.0, ge=0,
        description="a rank that shows no sign of life for so long ends the run, with its stack; 0: none does. "
        "More than the longest single phase takes, such as the writing of a checkpoint",
    )  # fmt: skip
    straggler_every: int = Field(50, ge=0, description="steps between two comparisons of the ranks' speed; 0: none")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one rank at a stall."""

    rank: int
    host: str
    pid: int
    step: int
    beats: int
    phase: str
    silent_seconds: float
    state: str  # the kernel's letter; "?" where it does not tell
    stack: tuple[str, ...]  # of the main thread, innermost call first; empty where it gave none

    @property
    def in_collective(self) -> bool:
        """Waiting for other ranks, as far as the innermost calls show."""
        return any("torch/distributed" in line or "deepspeed/comm" in line for line in self.stack[:4])

    def told(self) -> str:
        """For people: one line, and the stack."""
        state = STATES.get(self.state, self.state)
        text = (
            f"rank {self.rank} on {self.host} stands still: no sign of life for {_duration(self.silent_seconds)}; "
            f"step {self.step + 1}, phase '{self.phase}', process {self.pid} is {state}"
        )
        lines = self.stack or ("(it shows no stack)",)
        return "\n".join([text, *(f"    {line}" for line in lines[:SHOWN_FRAMES])])


class Watchdog:
    """Watches the beats of one node's ranks."""

    def __init__(self, folder: Path, pids: Mapping[int, int], host: str, stall_seconds: float, first_rank: int) -> None:
        """`pids` by local rank; `stall_seconds` 0 never finds a stall by itself."""
        self.folder = folder
        self.pids = pids
        self.host = host
        self.stall_seconds = stall_seconds
        self.first_rank = first_rank
        self._seen: dict[int, tuple[int, float]] = {}  # local rank: counter, when it was first seen

    def stalled(self) -> bool:
        """Whether a watched rank has been silent for too long; to be called more often than that."""
        if not self.stall_seconds:
            return False
        beats = [(local_rank, read_beat(self.folder, local_rank)) for local_rank in self.pids]
        silent = [self._silent(local_rank, beat) for local_rank, beat in beats if beat and beat.state == STEPPING]
        return any(seconds > self.stall_seconds for seconds in silent)

    def _silent(self, local_rank: int, beat: Beat) -> float:
        now = time.monotonic()
        counter, since = self._seen.get(local_rank, (-1, now))
        if beat.counter != counter:
            self._seen[local_rank] = (beat.counter, now)
            return 0.0
        return now - since

    def evidence(self) -> list[Evidence]:
        """Of every rank here that beats; all stacks are in its `.stacks` file. Takes `STACK_SECONDS` at most.

        A stopped process is let go on, since only so it can show its stacks: it is to be killed next.
        """
        states = {local_rank: _state(pid) for local_rank, pid in self.pids.items()}
        before = {local_rank: self._stacks_size(local_rank) for local_rank in self.pids}
        beats = {local_rank: read_beat(self.folder, local_rank) for local_rank in self.pids}
        for local_rank, pid in self.pids.items():
            if states[local_rank] in ("T", "t"):
                _send_to_main_thread(pid, STACKS_SIGNAL)
                _send(pid, signal.SIGCONT)
            else:  # whichever thread can take it, as the main one may be in a disk wait
                _send(pid, STACKS_SIGNAL)
        self._wait_for_stacks(before, beats)
        return [
            Evidence(
                self.first_rank + local_rank, self.host, self.pids[local_rank], beat.step, beat.beats, beat.phase,
                self._silent(local_rank, beat), states[local_rank], self._stack(local_rank, before[local_rank], beat),
            )
            for local_rank, beat in beats.items() if beat is not None
        ]  # fmt: skip

    def all_stacks(self, local_rank: int) -> str:
        """What a rank has shown of all its threads."""
        try:
            return stacks_file(self.folder, local_rank).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def _wait_for_stacks(self, before: Mapping[int, int], beats: Mapping[int, Beat | None]) -> None:
        """Until every main thread is among them, which comes last, and nothing more is written."""
        until = time.monotonic() + STACK_SECONDS
        sizes: dict[int, int] = {}
        while time.monotonic() < until:
            time.sleep(0.2)
            last, sizes = sizes, {local_rank: self._stacks_size(local_rank) for local_rank in before}
            waited_for = [(local_rank, beat) for local_rank, beat in beats.items() if beat is not None]
            if sizes == last and all(self._stack(each, before[each], beat) for each, beat in waited_for):
                return

    def _stacks_size(self, local_rank: int) -> int:
        try:
            return stacks_file(self.folder, local_rank).stat().st_size
        except FileNotFoundError:
            return 0

    def _stack(self, local_rank: int, before: int, beat: Beat) -> tuple[str, ...]:
        shown = self.all_stacks(local_rank).encode()[before:].decode(errors="replace")
        return main_stack(shown, beat.thread)


def main_stack(shown: str, thread: int) -> tuple[str, ...]:
    """The main thread's lines of faulthandler's output, innermost call first."""
    parts = re.split(r"^(?:Current thread|Thread) (0x[0-9a-f]+).*$", shown, flags=re.MULTILINE)
    for ident, lines in zip(parts[1::2], parts[2::2], strict=True):
        if int(ident, 16) == thread:
            return tuple(line.strip() for line in lines.splitlines() if line.strip())
    return ()


def furthest_behind(ranks: Iterable[Evidence]) -> Evidence:
    """The rank that the others wait for.

    By steps, then by phases done in the step. Where these are equal, a process that is stopped or waits for a disk
    is the cause; then one that does not wait for others itself; then the longest silent.
    """
    return min(
        ranks,
        key=lambda each: (
            each.step, each.beats, each.state not in ("T", "t", "D", "Z"), each.in_collective, -each.silent_seconds
        ),
    )  # fmt: skip


def to_json(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """For the other nodes and for a file."""
    return [asdict(each) for each in evidence]


def from_json(values: Iterable[Mapping[str, Any]]) -> list[Evidence]:
    """The way back from `to_json`."""
    return [Evidence(**{**each, "stack": tuple(each["stack"])}) for each in values]


def write_evidence(logs: Path, node: int, evidence: Sequence[Evidence]) -> Path:
    """`stall-node-R.json` in the run's folder of logs."""
    path = logs / f"stall-node-{node}.json"
    path.write_text(json.dumps(to_json(evidence), indent=1), encoding="utf-8")
    return path


def _state(pid: int) -> str:
    """The kernel's letter for a process; "?" where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "?"
    return stat.rpartition(")")[2].split()[0]


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _send_to_main_thread(pid: int, number: signal.Signals) -> None:
    """So that a stopped process, going on, shows where it was: another thread would take the signal while the main
    one runs away. The main thread's number is the process's. Before glibc 2.30 there is no such call."""
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None:
        _send(pid, number)
    else:
        tgkill(pid, pid, int(number))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} s"
