"""Launcher of one node: starts its ranks, forwards signals to them, and returns the run's exit status.

Exit statuses are listed in `outcome.py`. USR1, USR2, TERM (and HUP) are forwarded: ranks save a checkpoint and end with
75. Ctrl-C ends everything at once. When a rank fails, the ranks of all nodes get a few seconds to end by themselves and
are then killed. If a stop signal was forwarded and a rank ended with 75, ranks that fail afterwards have lost their
connection to it: the run counts as stopped.

torch's elastic agent does not fit: on each of these signals it ends instead of forwarding them, it ends the other
ranks of a failed one by TERM, which here means "save first", waits a fixed 30 s, and does not inform the other nodes.
A rank gets the same environment as from torchrun: the variables, and a store held by the launcher.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from training.config import RunConfig
from training.launch.logs import LogMerger, make_logs_folder
from training.launch.outcome import FAILED, FINISHED, INTERRUPTED, USER_ERROR, Failure, root_cause
from training.launch.rank_process import RankProcess
from training.launch.status_exchange import NodeLost, NodePlace, StatusExchange
from training.launch.stop import SIGNALS, STOPPED, allocation_end
from training.launch.watchdog import Watchdog, find_culprit, report_culprit
from training.messages import print_message
from training.run_file import load_config
from training.run_folder.lock import held, refuse_other
from training.tracking.config import tracking_target

POLL_S = 0.1
FAILURE_GRACE_S = 10.0  # for the other ranks to detect a failure and end
USER_ERROR_GRACE_S = 45.0  # all ranks hit the same error, and rank 0 first gives MLflow 30 s
STOP_GRACE_S = 300.0  # for the last ranks of a stopped run to finish writing
KILL_TIMEOUT_S = 30.0  # a process that waits for a disk outlives even SIGKILL
STORE_LIFETIME_S = {True: 300.0, False: 20.0}  # regular end or not: how long node 0 keeps the store for other nodes
PROPAGATION_S = 1.5  # until all nodes have received a failure message

FORWARDED = (*SIGNALS, signal.SIGHUP)  # the last one as TERM
IMMEDIATE = (signal.SIGINT, signal.SIGQUIT)


def launch(
    config: Path, overrides: Sequence[str], nproc: int, options: Sequence[str], place: NodePlace | None = None
) -> int:
    """Run this node's `nproc` ranks of `python -m training` to their end; returns the run's exit status.

    Args:
        options: passed on to `python -m training`, such as --resume.

    Raises:
        ConfigError: a mistake in the run file or in `place`; a run folder that cannot be written or belongs to another
            run; a port in use. Raised before any rank starts.
    """
    place = place or NodePlace()
    port = place.address()[1]
    command = [sys.executable, "-m", "training", str(config), *overrides, *options]
    settings: RunConfig = load_config(config, overrides)
    allocation_end()
    tracking_target(settings.tracking, settings.output_dir)
    with ExitStack() as stack:
        if place.node == 0:
            stack.enter_context(held(settings.output_dir, port))
        else:
            refuse_other(settings.output_dir, port)
        make_logs_folder(settings.output_dir)
        stall_seconds = settings.watchdog.stall_minutes * 60
        return Launcher(place, command, nproc, settings.output_dir, stall_seconds).run()


class Launcher:
    """Starts and supervises the ranks of one node."""

    def __init__(
        self,
        place: NodePlace,
        command: Sequence[str],
        nproc: int,
        output_dir: Path,
        stall_seconds: float = 0,
    ) -> None:
        """`command` starts one rank. With `stall_seconds` 0 there is no watchdog."""
        self.exchange = StatusExchange(place)
        self.command = list(command)
        self.nproc = nproc
        self.output_dir = output_dir
        self.stall_seconds = stall_seconds
        self.ranks: list[RankProcess] = []
        self._pending: list[signal.Signals] = []  # received, not handled yet
        self._stop_signal: signal.Signals | None = None  # the first one that requested a stop
        self._interrupt: signal.Signals | None = None
        self._deadline = math.inf  # when the ranks that still run are killed
        self._killed: set[int] = set()  # ranks that this launcher killed: they did not fail by themselves

    def run(self) -> int:
        """Connect the nodes, run the ranks, and return the run's exit status."""
        with self._signal_handlers():
            try:
                if not self.exchange.connect(cancelled=lambda: bool(self._pending)):
                    number = self._pending[0]
                    print_message(
                        f"stopped by {number.name} before any rank was started; the same command starts the run"
                    )
                    return INTERRUPTED if number in IMMEDIATE else STOPPED
            except NodeLost as lost:
                print_message(str(lost))
                return FAILED
            first_node = self.exchange.place.node == 0
            logs = closing(LogMerger(self.output_dir)) if first_node else nullcontext()
            with logs, TemporaryDirectory(prefix="crosslift-") as heartbeat_dir:
                try:
                    self._start(Path(heartbeat_dir))
                    self._supervise()
                finally:
                    self._kill()
                for rank in self.ranks:
                    rank.close_output()
                return self._finish()

    def _start(self, heartbeat_dir: Path) -> None:
        place = self.exchange.place
        common = {
            "WORLD_SIZE": str(place.nodes * self.nproc),
            "LOCAL_WORLD_SIZE": str(self.nproc),
            "GROUP_RANK": str(place.node),
            "GROUP_WORLD_SIZE": str(place.nodes),
            "MASTER_ADDR": self.exchange.host,
            "MASTER_PORT": str(self.exchange.port),
        }
        first_rank = place.node * self.nproc
        for local_rank in range(self.nproc):
            own = {"RANK": str(first_rank + local_rank), "LOCAL_RANK": str(local_rank)}
            self.ranks.append(
                RankProcess(self.command, {**common, **own}, heartbeat_dir, self.output_dir, self.exchange.claim_line)
            )
        pids = {rank.local_rank: rank.process.pid for rank in self.ranks}
        self.watchdog = Watchdog(heartbeat_dir, pids, self.exchange.hostname, self.stall_seconds, first_rank)

    def _supervise(self) -> None:
        """Until all ranks of this node have ended."""
        killed_at: float | None = None
        while any(rank.exit_status() is None for rank in self.ranks):
            self._forward_signals()
            self._check_failures()
            self._check_stall()
            now = time.monotonic()
            if now > self._deadline:
                self._kill()
                killed_at = killed_at or now
            if killed_at is not None and now > killed_at + KILL_TIMEOUT_S:
                left = [rank.rank for rank in self.ranks if rank.exit_status() is None]
                print_message(
                    f"ranks {left} on {self.exchange.hostname} survive SIGKILL: they wait for a disk or device"
                )
                return
            time.sleep(POLL_S)
        self._check_failures()

    def _forward_signals(self) -> None:
        while self._pending:
            number = self._pending.pop(0)
            if number in IMMEDIATE:
                if self._interrupt is not None:  # the second Ctrl-C
                    self._kill()
                self._interrupt = number
                self._end_within(FAILURE_GRACE_S)
                number = signal.SIGINT
            else:
                self._stop_signal = self._stop_signal or number
                number = signal.SIGTERM if number == signal.SIGHUP else number
            for rank in self.ranks:
                rank.send(number)

    def _check_failures(self) -> None:
        """Publish failed or stopped ranks to the other nodes, and limit the time of those that still run."""
        statuses = self._statuses()
        host = self.exchange.hostname
        failed = [
            Failure(rank, host, status) for rank, status in statuses.items() if status not in (*FINISHED, STOPPED)
        ]
        stopped = [rank for rank in self.ranks if statuses.get(rank.rank) == STOPPED]
        if stopped and self._stop_signal is not None:
            # If one of them had not reached its first step, no rank has done a step, and there is nothing to save.
            saves = all(rank.has_started_steps() for rank in stopped)
            self.exchange.publish("stopped", STOP_GRACE_S if saves else FAILURE_GRACE_S)
        if failed:
            known = self.exchange.received("failed").get(self.exchange.place.node)
            first = root_cause([*([Failure(**known)] if known else []), *failed])
            self.exchange.publish("failed", asdict(first))
        elif stopped:
            self._end_within(STOP_GRACE_S)
        for seconds in self.exchange.received("stopped").values():
            self._end_within(seconds)
        if self.exchange.lost is not None:
            self._end_within(FAILURE_GRACE_S)
        for failure in self._failures():
            self._end_within(USER_ERROR_GRACE_S if failure.status == USER_ERROR else FAILURE_GRACE_S)

    def _check_stall(self) -> None:
        """If a rank of any node is stalled: find the one that the others wait for, report it, end the run."""
        if self._deadline < math.inf or not (self.exchange.received("stalled") or self.watchdog.stalled()):
            return
        culprit = find_culprit(self.watchdog, self.exchange, self.output_dir)
        if culprit is None:
            return
        is_here = any(rank.rank == culprit.rank for rank in self.ranks)
        if is_here:
            report_culprit(culprit, self.exchange, self.output_dir)
        failure = Failure(culprit.rank, culprit.host, FAILED, described=True)
        self.exchange.publish("failed", asdict(failure))
        # Slurm may end the job when one node ends: the node that prints the report must end first.
        self._end_within(0.0 if is_here else PROPAGATION_S)

    def _failures(self) -> list[Failure]:
        return [Failure(**values) for values in self.exchange.received("failed").values()]

    def _statuses(self) -> dict[int, int]:
        """Exit statuses of this node's ranks that have ended by themselves.

        A rank that a stop signal killed counts as stopped: it had no handler yet, so there was nothing to save.
        """
        statuses = {}
        for rank in self.ranks:
            status = rank.exit_status()
            if status is not None and rank.rank not in self._killed:
                killed_by_stop = self._stop_signal is not None and -status in SIGNALS
                statuses[rank.rank] = STOPPED if killed_by_stop else status
        return statuses

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _kill(self) -> None:
        for rank in self.ranks:
            if rank.exit_status() is None:
                self._killed.add(rank.rank)
                rank.kill()

    def _finish(self) -> int:
        """The run's exit status; node 0 keeps the store open until the other nodes have read theirs from it."""
        if self._failures() and self.exchange.place.nodes > 1:
            time.sleep(PROPAGATION_S)
        status = self._run_status()
        self.exchange.publish("ended", status)
        place = self.exchange.place
        if place.node == 0:
            until = time.monotonic() + STORE_LIFETIME_S[status in (*FINISHED, STOPPED)]
            while len(self.exchange.received("ended")) < place.nodes and time.monotonic() < until:
                time.sleep(POLL_S)
        self.exchange.close()
        return status

    def _run_status(self) -> int:
        if self._interrupt is not None:
            print_message(f"stopped by {self._interrupt.name}; the same command resumes from the last checkpoint")
            return INTERRUPTED
        stopped = bool(self.exchange.received("stopped"))
        if (failures := self._failures()) and not stopped:
            failure = root_cause(failures)
            is_here = any(rank.rank == failure.rank for rank in self.ranks)
            if is_here and failure.status != USER_ERROR and not failure.described:  # the rank has printed a user error
                print_message(str(failure))
            return USER_ERROR if failure.status == USER_ERROR else FAILED
        statuses = self._statuses()
        if stopped or STOPPED in statuses.values():
            self._report_stop(statuses)
            return STOPPED
        if self._killed:
            node = f"node {self.exchange.place.node} ({self.exchange.hostname})"
            print_message(f"{node}: lost the launcher of node 0: {self.exchange.lost}")
            return FAILED
        return max(statuses.values(), default=0)

    def _report_stop(self, statuses: dict[int, int]) -> None:
        """Print one line, unless the ranks have reported the stop and there is nothing to add."""
        details = f"; ranks {sorted(self._killed)} did not end and were killed" if self._killed else ""
        if failed := [rank for rank, status in statuses.items() if status not in (0, STOPPED)]:
            details += f"; ranks {failed} failed after others had ended"
        if details or not any(rank.has_message for rank in self.ranks):
            cause = self._stop_signal.name if self._stop_signal else "request"
            print_message(f"stopped by {cause}{details}; the same command resumes from the last checkpoint")

    @contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        """Queue signals for the loop; one that the caller ignores (nohup) stays ignored."""

        def queue(number: int, _: FrameType | None) -> None:
            self._pending.append(signal.Signals(number))

        before = {}
        in_main_thread = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
        for number in (*FORWARDED, *IMMEDIATE) if in_main_thread else ():
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, queue)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
