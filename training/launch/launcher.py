"""A node's launcher: watches over the node's ranks, passes signals on to them, and says which one failed first.

In: a command that is one rank. Out: an exit status. Next: `rank_process.py`, `stall.py`.

Exit status: 0 finished; 2 what the user can mend; 3 and 4 finished, but the export failed its check, or there is none
(node 0 alone: other ranks are gone by then); 75 stopped on request after a checkpoint, the same command goes on; 1
anything else. It is the status of the whole run, the same on every node.

USR1, USR2, TERM (and HUP) are passed on: ranks checkpoint and end with 75. Ctrl-C ends everything at once. When a
rank dies, the others have a few seconds to end by themselves, on all nodes, and are then killed. Where a signal was
passed on and a rank ended with 75, ranks that fail have lost their connection to it: the run was stopped.

Why not torch's elastic agent: it ends on each of these signals instead of passing them on, asks the other ranks of
a failed one to end by the very TERM that here means "checkpoint first" and then waits 30 s that cannot be set, and
does not tell other nodes. What a rank sees (variables, a store held by the launcher) is as torchrun has it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from training.errors import ExportCheckFailed, NotExported
from training.launch import stall
from training.launch.logs import Secrets
from training.launch.merged_logs import MergedLogs
from training.launch.nodes import NodeLost, Nodes
from training.launch.rank_process import RankProcess
from training.launch.stop import STOPPED
from training.launch.watchdog import Watchdog

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
FINISHED = (0, ExportCheckFailed.exit_status, NotExported.exit_status)  # all steps are done and saved

POLL_SECONDS = 0.1
FAILED_GRACE = 10.0  # for what a rank does when it sees that another is gone
USER_ERROR_GRACE = 45.0  # all ranks meet the same error, and rank 0 first gives MLflow 30 s
STOPPED_GRACE = 300.0  # the last ranks of a stopped run still write
KILL_SECONDS = 30.0  # a process in a disk wait outlives even SIGKILL
OTHERS_SECONDS = {True: 300.0, False: 20.0}  # ended well or not: how long node 0 holds the store for other nodes
NEWS_SECONDS = 1.5  # in which a failure on one node is heard of on all

PASSED_ON = {name: signal.SIGTERM if name == "SIGHUP" else signal.Signals[name]
             for name in ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGHUP")}  # fmt: skip
AT_ONCE = ("SIGINT", "SIGQUIT")


class Launcher:
    """Watches over the ranks of one node."""

    def __init__(
        self, nodes: Nodes, command: Sequence[str], nproc: int, output_dir: Path | None = None, stall_seconds: float = 0
    ) -> None:
        """`command` starts one rank. Without `output_dir` there are no logs; `stall_seconds` 0 means no watchdog."""
        self.nodes = nodes
        self.command = list(command)
        self.nproc = nproc
        self.output_dir = output_dir
        self.stall_seconds = stall_seconds
        self.ranks: list[RankProcess] = []
        self._secrets = Secrets(os.environ)
        self._asked: list[signal.Signals] = []  # signals that came and are not passed on yet
        self._stop: signal.Signals | None = None  # the first that asked for a stop
        self._interrupted: signal.Signals | None = None
        self._deadline: float | None = None  # when what still runs is killed
        self._killed: set[int] = set()  # ranks that this launcher killed: no failures of their own

    def run(self) -> int:
        """From rendezvous to exit status."""
        with self._signals():
            try:
                if not self.nodes.connect(still_wanted=lambda: not self._asked):
                    return self._before_ranks()
            except NodeLost as lost:
                say(str(lost))
                return FAILED
            with self._logs(), TemporaryDirectory(prefix="crosslift-") as beats:
                self.beats = Path(beats)
                try:
                    self._start()
                    self._watch()
                finally:
                    self._kill()
                for rank in self.ranks:
                    rank.output.close()
                return self._finish()

    def _start(self) -> None:
        place = self.nodes.place
        common = {
            "WORLD_SIZE": str(place.nodes * self.nproc),
            "GROUP_RANK": str(place.node),
            "GROUP_WORLD_SIZE": str(place.nodes),
            "MASTER_ADDR": self.nodes.host,
            "MASTER_PORT": str(self.nodes.port),
        }
        for local_rank in range(self.nproc):
            number = place.node * self.nproc + local_rank
            own = {"RANK": str(number), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(self.nproc)}
            rank = RankProcess(self.command, number, local_rank, {**common, **own}, self.beats, self.output_dir)
            rank.start(self.nodes.first_to_say)
            self.ranks.append(rank)
        pids = {rank.local_rank: rank.process.pid for rank in self.ranks}
        first = place.node * self.nproc
        self.watchdog = Watchdog(self.beats, pids, self.nodes.name, self.stall_seconds, first)

    def _watch(self) -> None:
        """Until no rank runs any more."""
        killed_at: float | None = None
        while any(rank.ended() is None for rank in self.ranks):
            self._pass_on()
            self._look_for_failure()
            self._look_for_stall()
            now = time.monotonic()
            if self._deadline is not None and now > self._deadline:
                self._kill()
                killed_at = killed_at or now
            if killed_at is not None and now > killed_at + KILL_SECONDS:
                left = [rank.number for rank in self.ranks if rank.ended() is None]
                say(f"ranks {left} on {self.nodes.name} outlive SIGKILL: they wait for a disk or a device")
                return
            time.sleep(POLL_SECONDS)
        self._look_for_failure()

    def _pass_on(self) -> None:
        while self._asked:
            number = self._asked.pop(0)
            if number.name in AT_ONCE:
                if self._interrupted is not None:  # once more: no patience is left
                    self._kill()
                self._interrupted = number
                self._end_within(FAILED_GRACE)
                number = signal.SIGINT
            else:
                self._stop = self._stop or number
                number = PASSED_ON[number.name]
            for rank in self.ranks:
                rank.send(number)

    def _look_for_failure(self) -> None:
        """Tell the other nodes of a failed rank here, and end the ranks here when one failed anywhere."""
        ended = [
            (rank, status)
            for rank in self.ranks
            if (status := rank.ended()) is not None and rank.number not in self._killed
        ]
        now = time.time()
        failed = [
            {"rank": rank.number, "host": self.nodes.name, "status": status, "time": now}
            for rank, status in ended
            if self._judge(status) not in (*FINISHED, STOPPED)
        ]
        stopped = [rank for rank, status in ended if self._judge(status) == STOPPED]
        if stopped and self._stop is not None:
            # Where one has not begun its steps, nobody has done one, and nothing is left to be written.
            began = all(rank.began() for rank in stopped)
            self.nodes.tell("stopped", STOPPED_GRACE if began else FAILED_GRACE)
        if failed:
            told = self.nodes.heard("failed").get(self.nodes.place.node)
            self.nodes.tell("failed", cause([*([told] if told else []), *failed]))
        elif stopped:
            self._end_within(STOPPED_GRACE)
        for seconds in self.nodes.heard("stopped").values():
            self._end_within(seconds)
        if self.nodes.lost is not None:
            self._end_within(FAILED_GRACE)
        for failure in self.nodes.heard("failed").values():
            self._end_within(USER_ERROR_GRACE if failure["status"] == USER_ERROR else FAILED_GRACE)

    def _look_for_stall(self) -> None:
        """Where a rank of any node stands still: find out which, say so on its node, and end the run."""
        if self._deadline is not None or not (self.nodes.heard("stalled") or self.watchdog.stalled()):
            return
        culprit = stall.find_culprit(self.nodes, self.watchdog, self.output_dir, self._secrets)
        if culprit is None:
            return
        here = any(rank.number == culprit.rank for rank in self.ranks)
        if here:
            stall.report(culprit, self.nodes, self.output_dir, self._secrets)
        word = {"rank": culprit.rank, "host": culprit.host, "status": FAILED, "time": time.time(), "said": True}
        self.nodes.tell("failed", word)
        self._end_within(0.0 if here else NEWS_SECONDS)  # whose job's end takes the others along lets it speak first

    def _judge(self, status: int) -> int:
        """A rank's status; one that a stop's signal killed had not come so far as to handle it, or to save."""
        asked = self._stop is not None and -status in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
        return STOPPED if asked else status

    def _end_within(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._deadline = until if self._deadline is None else min(self._deadline, until)

    def _kill(self) -> None:
        for rank in self.ranks:
            if rank.ended() is None:
                self._killed.add(rank.number)
                rank.kill()

    def _finish(self) -> int:
        """Exit status of the run; node 0 stays until the others have read what it holds."""
        if self.nodes.heard("failed") and self.nodes.place.nodes > 1:
            time.sleep(NEWS_SECONDS)
        status = self._status()
        self.nodes.tell("ended", status)
        place = self.nodes.place
        if place.node == 0:
            until = time.monotonic() + OTHERS_SECONDS[status in (*FINISHED, STOPPED)]
            while len(self.nodes.heard("ended")) < place.nodes and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
        self.nodes.close()
        return status

    def _status(self) -> int:
        if self._interrupted is not None:
            say(f"stopped by {self._interrupted.name}; the same command goes on from the last checkpoint")
            return INTERRUPTED
        stopped = bool(self.nodes.heard("stopped"))
        if (failures := list(self.nodes.heard("failed").values())) and not stopped:
            return self._say_failure(cause(failures))
        statuses = {
            rank.number: self._judge(rank.ended() or 0) for rank in self.ranks if rank.number not in self._killed
        }
        if stopped or STOPPED in statuses.values():
            late = f"; ranks {sorted(self._killed)} did not end and were killed" if self._killed else ""
            if failed := [number for number, status in statuses.items() if status not in (0, STOPPED)]:
                late += f"; ranks {failed} failed when others had ended"
            by = self._stop.name if self._stop else "request"
            if late or not any(rank.output.spoke for rank in self.ranks):  # the ranks have said it as a rule
                say(f"stopped by {by}{late}; the same command goes on from the last checkpoint")
            return STOPPED
        if self._killed:
            say(f"node {self.nodes.place.node} ({self.nodes.name}): node 0's launcher is gone: {self.nodes.lost}")
            return FAILED
        return max(statuses.values(), default=0)

    def _say_failure(self, first: dict[str, Any]) -> int:
        """One line about the rank that failed first, on its own node; what a user can mend it has said itself."""
        status: int = first["status"]
        here = any(rank.number == first["rank"] for rank in self.ranks)
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", which is often the kernel's when memory is short" if name == "SIGKILL" else ""
            text = f"rank {first['rank']} on {first['host']} was killed by signal {-status} ({name}{hint})"
        else:
            text = f"rank {first['rank']} on {first['host']} ended first, with status {status}"
        if here and status != USER_ERROR and not first.get("said"):
            say(text)
        return USER_ERROR if status == USER_ERROR else FAILED

    def _before_ranks(self) -> int:
        number = self._asked[0]
        say(f"stopped by {number.name} before any rank was started; the same command goes on")
        return INTERRUPTED if number.name in AT_ONCE else STOPPED

    @contextmanager
    def _logs(self) -> Iterator[None]:
        """Inside, node 0 merges the logs of all ranks."""
        merged = MergedLogs(self.output_dir) if self.output_dir and self.nodes.place.node == 0 else None
        try:
            yield
        finally:
            if merged is not None:
                merged.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, signals are noted for the loop; one that the caller ignores (nohup) stays ignored."""

        def note(number: int, _: FrameType | None) -> None:
            self._asked.append(signal.Signals(number))

        before = {}
        in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere, signals are not ours
        for name in (*PASSED_ON, *AT_ONCE) if in_main_thread else ():
            if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN:
                before[name] = signal.signal(signal.Signals[name], note)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(signal.Signals[name], handler)


def cause(failures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The failure that the others followed from: a killed rank and one that says what the user can mend know why they
    ended, wherever they were seen first (what they leave to the others is a broken connection); else the earliest."""
    return min(failures, key=lambda each: (each["status"] >= 0, each["status"] != USER_ERROR, each["time"]))


def say(text: str) -> None:
    """One line to the person at the terminal."""
    print(f"crosslift: {text}", file=sys.stderr, flush=True)
