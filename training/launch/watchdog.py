"""Watchdog: detects a stalled rank, finds the rank that the others wait for, and reports its stack.

When one rank hangs, the others soon wait for it in a collective call. The cause is therefore not the rank that was
silent first but the one that is furthest behind, over all nodes. A rank is watched from its first step until it
reports its end.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from data_pipeline.secrets import Redactor
from data_pipeline.settings import Section
from training.launch.heartbeat import STACKS_SIGNAL, STEPPING, HeartbeatState, read_heartbeat, stacks_file
from training.launch.logs import Appender, event_line, events_part, logs_folder, rank_log
from training.messages import print_message
from training.run_folder.lock import process_of

if TYPE_CHECKING:
    from training.launch.status_exchange import StatusExchange

STACK_TIMEOUT_S = 8.0  # for a rank that still responds to dump its stacks, on a busy machine too
OTHER_NODES_TIMEOUT_S = 20.0  # for the other nodes to collect their ranks' states
POLL_S = 0.1
PRINTED_FRAMES = 8
PROCESS_STATES = {"T": "stopped", "t": "traced", "D": "waiting for a disk", "Z": "a zombie", "R": "running",
                  "S": "sleeping"}  # fmt: skip


class WatchdogConfig(Section):
    """Detection of stalled and slow ranks."""

    stall_minutes: float = Field(
        15.0, ge=0,
        description="minutes without a heartbeat after which a rank counts as stalled and the run ends with its stack; "
        "0 disables it. More than the longest single phase takes, such as writing a checkpoint",
    )  # fmt: skip
    straggler_every: int = Field(
        50, ge=0, description="steps between two comparisons of the ranks' speed; 0 disables them"
    )


@dataclass(frozen=True, slots=True)
class RankSnapshot:
    """The state of one rank at a stall."""

    rank: int
    host: str
    pid: int
    step: int
    phases: int  # done in the step
    phase: str
    silent_seconds: float  # since the last heartbeat
    state: str  # the kernel's letter; "?" if unknown
    stack: list[str]  # of the main thread, innermost call first; empty if it could not be dumped

    @property
    def in_collective(self) -> bool:
        """Whether it waits for other ranks, judged by its innermost calls."""
        return any("torch/distributed" in line for line in self.stack[:4])

    def __str__(self) -> str:
        """One line, and the innermost calls of the stack."""
        text = (
            f"rank {self.rank} on {self.host} is stalled: no heartbeat for {_duration(self.silent_seconds)}; "
            f"step {self.step + 1}, phase '{self.phase}', process {self.pid} is "
            f"{PROCESS_STATES.get(self.state, self.state)}"
        )
        lines = self.stack or ["(no stack available)"]
        return "\n".join([text, *(f"    {line}" for line in lines[:PRINTED_FRAMES])])


@dataclass
class Watchdog:
    """Watches the heartbeats of one node's ranks."""

    folder: Path  # of the heartbeats
    pids: Mapping[int, int]  # by local rank
    host: str
    stall_seconds: float  # 0: no rank counts as stalled
    first_rank: int
    # By local rank: the last heartbeat's counter, and when it was first seen.
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict, init=False)

    def stalled(self) -> bool:
        """Whether a watched rank has sent no heartbeat for too long. Must be called more often than that."""
        if not self.stall_seconds:
            return False
        heartbeats = [(local_rank, read_heartbeat(self.folder, local_rank)) for local_rank in self.pids]
        silent = [self._silent_seconds(each, beat) for each, beat in heartbeats if beat and beat.state == STEPPING]
        return any(seconds > self.stall_seconds for seconds in silent)

    def snapshots(self) -> list[RankSnapshot]:
        """The state of every rank of this node that has a heartbeat. Takes at most `STACK_TIMEOUT_S`.

        A stopped process is continued, as it could not dump its stacks otherwise; the caller kills it afterwards.
        """
        processes = {local_rank: process_of(pid) for local_rank, pid in self.pids.items()}
        states = {local_rank: process[0] if process else "?" for local_rank, process in processes.items()}
        before = {local_rank: len(self.all_stacks(local_rank)) for local_rank in self.pids}
        heartbeats = {each: beat for each in self.pids if (beat := read_heartbeat(self.folder, each)) is not None}
        for local_rank, pid in self.pids.items():
            if states[local_rank] in ("T", "t"):
                _send_to_main_thread(pid, STACKS_SIGNAL)
                _send(pid, signal.SIGCONT)
            else:  # to any thread, as the main one may be waiting for a disk
                _send(pid, STACKS_SIGNAL)
        stacks = self._wait_for_stacks(before, heartbeats)
        return [
            RankSnapshot(
                rank=self.first_rank + local_rank, host=self.host, pid=self.pids[local_rank], step=beat.step,
                phases=beat.phases, phase=beat.phase, silent_seconds=self._silent_seconds(local_rank, beat),
                state=states[local_rank], stack=stacks[local_rank],
            )
            for local_rank, beat in heartbeats.items()
        ]  # fmt: skip

    def all_stacks(self, local_rank: int) -> str:
        """The dumped stacks of all threads of a rank."""
        try:
            return stacks_file(self.folder, local_rank).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def _silent_seconds(self, local_rank: int, heartbeat: HeartbeatState) -> float:
        now = time.monotonic()
        counter, since = self._seen.get(local_rank, (-1, now))
        if heartbeat.counter != counter:
            self._seen[local_rank] = (heartbeat.counter, now)
            return 0.0
        return now - since

    def _wait_for_stacks(
        self, before: Mapping[int, int], heartbeats: Mapping[int, HeartbeatState]
    ) -> dict[int, list[str]]:
        """The main threads' stacks, once each dump has one, which comes last, and nothing more is written.

        `before`: the length of each rank's earlier dumps.
        """
        until = time.monotonic() + STACK_TIMEOUT_S
        dumps: dict[int, str] = {}
        while True:
            time.sleep(2 * POLL_S)
            last, dumps = (
                dumps,
                {local_rank: self.all_stacks(local_rank)[start:] for local_rank, start in before.items()},
            )
            stacks = {local_rank: main_stack(dumps[local_rank], beat.thread) for local_rank, beat in heartbeats.items()}
            if (dumps == last and all(stacks.values())) or time.monotonic() >= until:
                return stacks


def find_culprit(watchdog: Watchdog, exchange: StatusExchange, output_dir: Path) -> RankSnapshot | None:
    """The rank furthest behind, from the snapshots of all nodes; None if no rank has a heartbeat.

    This node's stacks are written to its ranks' logs, its snapshots to `logs/stall-node-N.json`.
    """
    snapshots = watchdog.snapshots()
    _write_snapshots(snapshots, watchdog, output_dir, exchange.place.node)
    exchange.publish("stalled", [asdict(each) for each in snapshots])
    until = time.monotonic() + OTHER_NODES_TIMEOUT_S
    while len(exchange.received("stalled")) < exchange.place.nodes and not exchange.lost and time.monotonic() < until:
        time.sleep(POLL_S)
    all_nodes = [RankSnapshot(**each) for node in exchange.received("stalled").values() for each in node]
    return furthest_behind(all_nodes) if all_nodes else None


def report_culprit(culprit: RankSnapshot, exchange: StatusExchange, output_dir: Path) -> None:
    """Report the stalled rank on its own node: at the terminal, in `run.log` and in the events."""
    text = str(culprit)
    missing = sorted(set(range(exchange.place.nodes)) - set(exchange.received("stalled")))
    if missing:
        text += f"\n    no answer from node(s) {missing} in {OTHER_NODES_TIMEOUT_S:.0f} s: the cause may be there"
    text += f"\n    all stacks: {rank_log(output_dir, culprit.rank)} and the other ranks' logs"
    text = Redactor(os.environ).redact(text)
    print_message(text)
    events = Appender(events_part(output_dir, f"launcher-{exchange.place.node}"))
    events.write(event_line(None, "CRITICAL", culprit.step, text))


def main_stack(dump: str, thread: int) -> list[str]:
    """The lines of one thread in faulthandler's output, innermost call first."""
    parts = re.split(r"^(?:Current thread|Thread) (0x[0-9a-f]+).*$", dump, flags=re.MULTILINE)
    for ident, lines in zip(parts[1::2], parts[2::2], strict=True):
        if int(ident, 16) == thread:
            return [line.strip() for line in lines.splitlines() if line.strip()]
    return []


def furthest_behind(ranks: Iterable[RankSnapshot]) -> RankSnapshot:
    """The rank that the others wait for.

    By steps, then by phases within the step. If these are equal, a process that is stopped or waits for a disk; then
    one that is not itself waiting in a collective call; then the one that has been silent longest.
    """
    return min(
        ranks,
        key=lambda each: (
            each.step, each.phases, each.state not in ("T", "t", "D", "Z"), each.in_collective, -each.silent_seconds
        ),
    )  # fmt: skip


def _write_snapshots(snapshots: list[RankSnapshot], watchdog: Watchdog, output_dir: Path, node: int) -> None:
    redactor = Redactor(os.environ)
    for each in snapshots:
        text = f"{each}\nall threads:\n{watchdog.all_stacks(each.rank - watchdog.first_rank)}\n"
        Appender(rank_log(output_dir, each.rank)).write(redactor.redact(text))
    file = logs_folder(output_dir) / f"stall-node-{node}.json"
    try:
        file.write_text(json.dumps([asdict(each) for each in snapshots], indent=1), encoding="utf-8")
    except OSError as error:
        print_message(f"{file}: cannot be written: {error.strerror}")


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _send_to_main_thread(pid: int, number: signal.Signals) -> None:
    """Signals the main thread, whose id is the pid, so that a stopped process dumps the stack at which it stopped.

    Otherwise another thread could handle the signal while the main one continues. glibc before 2.30 has no tgkill.
    """
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None:
        _send(pid, number)
    else:
        tgkill(pid, pid, int(number))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} s"
