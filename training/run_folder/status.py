"""The state of a run, read from its folder: `crosslift status` and `logs` for a run outside Slurm."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.console import duration
from training.checkpoints.checkpoint import complete, step_of
from training.launch.logs import logs_folder, read_event, read_lines
from training.run_folder.lock import LOCK_FILE, SILENT_SECONDS, Holder, holder_of
from training.tracking.run_record import RECORD_NAME, read_events, run_folders

RATE_STEPS = 20  # number of latest steps over which the rate is computed
State = Literal["starting", "running", "finished", "stopped", "interrupted", "failed", "killed"]
_ENDS: dict[str, State] = {
    "FINISHED": "finished", "SCHEDULED": "stopped", "KILLED": "interrupted", "FAILED": "failed",
}  # fmt: skip
_DESCRIPTIONS = {
    "starting": "starting, no step is done yet",
    "running": "running",
    "finished": "finished",
    "stopped": "stopped after a checkpoint; the same command resumes it",
    "interrupted": "interrupted; the same command resumes it from its last checkpoint",
    "failed": "failed",
    "killed": "killed, or its machine went down; the same command resumes it from its last checkpoint",
}


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The state and progress of a run. Times are in seconds, `updated` since 1970."""

    run: str  # its folder
    state: State
    host: str | None  # of the launcher, while it runs
    pid: int | None
    job: str | None  # Slurm's
    since: str | None
    step: int
    max_steps: int | None
    seconds_per_step: float | None  # over the latest steps of the latest start
    seconds_left: float | None  # at that rate; None unless it runs
    checkpoint: str | None  # newest complete checkpoint
    updated: float | None  # time of the last write to its record or log
    error: str | None  # last error of a start that failed

    @property
    def log(self) -> Path:
        """The log of rank 0, with the warnings of all ranks."""
        return logs_folder(Path(self.run)) / "run.log"

    def alive(self) -> bool:
        """Whether the run has a live process now."""
        return _live_holder(Path(self.run)) is not None

    def __str__(self) -> str:
        """Two or three lines to print."""
        where = f" on {self.host} (pid {self.pid}) since {self.since}" if self.host else ""
        rate = f", {self.seconds_per_step:.2f} s a step" if self.seconds_per_step is not None else ""
        left = f", {duration(self.seconds_left)} left" if self.seconds_left is not None else ""
        lines = [
            f"{self.run}: {_DESCRIPTIONS[self.state]}{where}",
            f"  step {self.step} of {'?' if self.max_steps is None else self.max_steps}{rate}{left}; "
            f"newest checkpoint: {self.checkpoint or 'none'}",
        ]
        return "\n".join([*lines, *([f"  {self.error}"] if self.error else [])])


def local_runs(folder: Path) -> list[RunStatus]:
    """The status of the run in a folder, or of the runs below it; empty if there is none."""
    if (status := run_status(folder)) is not None:
        return [status]
    return [status for each in sorted(run_folders(folder)) if (status := run_status(each)) is not None]


def run_status(run: Path) -> RunStatus | None:
    """The status of the run in a folder; None if it holds no run. Reads no checkpoint content, so it is fast."""
    record, logs = run / RECORD_NAME, logs_folder(run)
    if not record.is_file() and not logs.is_dir():
        return None
    start = _latest_start(record)
    holder = _live_holder(run)
    error, restarted = _last_error(logs / "events.jsonl", start.began, start.ended)
    state: State = "failed" if error else "killed"  # unless the record has its end
    if holder is not None:
        state = "running" if start.times else "starting"
    elif start.end is not None and not restarted:
        state = _ENDS.get(start.end, "failed")
    rate = None
    if len(start.times) > 1:
        (first, began), (last, now) = start.times[0], start.times[-1]
        rate = (now - began) / max(last - first, 1) / 1000
    checkpoint = next(complete(run), None)
    step = max(start.step, step_of(checkpoint) if checkpoint else 0)  # it may be of a step that did not log
    left = rate * (start.total - step) if state == "running" and rate is not None and start.total else None
    return RunStatus(
        str(run), state, holder.host if holder else None, holder.pid if holder else None,
        holder.job or None if holder else None, holder.since if holder else None, step, start.total, rate, left,
        str(checkpoint) if checkpoint else None, _updated(record, logs), error if state == "failed" else None,
    )  # fmt: skip


@dataclass
class _LatestStart:
    """The latest start of a run, from its record."""

    step: int = 0
    total: int | None = None
    began: int = 0  # times are milliseconds since 1970
    end: str | None = None  # MLflow's status; None: the start has not ended, or was killed
    ended: int = 0
    times: tuple[tuple[int, int], ...] = ()  # (step, time) of the latest logged steps


def _latest_start(record: Path) -> _LatestStart:
    start = _LatestStart()
    for _, event in read_events(record) if record.is_file() else ():
        kind = event["kind"]
        if kind == "start":
            start.began, start.end, start.times = event["time"], None, ()
            start.step = event.get("resumed_step") or 0
        elif kind == "params" and str(event["values"].get("max_steps", "")).isdigit():
            start.total = int(event["values"]["max_steps"])
        elif kind == "metrics":
            start.step, start.times = event["step"], (*start.times, (event["step"], event["time"]))[-RATE_STEPS:]
        elif kind == "finish":
            start.end, start.ended = event["status"], event["time"]
    return start


def _live_holder(run: Path) -> Holder | None:
    """The process that holds the folder's lock, if it is alive; on another machine it is while it renews the lock."""
    if (holder := holder_of(run)) is None:
        return None
    alive = holder.alive(Holder.here(0))
    if alive is None:
        try:
            alive = time.time() - (run / LOCK_FILE).stat().st_mtime < SILENT_SECONDS
        except OSError:
            alive = False
    return holder if alive else None


def _last_error(events: Path, since: int, ended: int) -> tuple[str | None, bool]:
    """The last error after `since`, and whether ranks were started again after the run `ended`.

    The error is crosslift's own message on why a rank failed, otherwise the last line of a traceback. Ranks that were
    started again and failed early have left nothing in the record.
    """
    own: str | None = None
    other: str | None = None
    restarted = False
    for line in read_lines(events, 0)[0]:
        event = read_event(line)
        if event is None or event["time"] < since or not (message := str(event["message"]).strip()):
            continue
        if 0 < ended < event["time"] and message.startswith("preflight:"):
            own, other, restarted = None, None, True
        elif event["level"] == "CRITICAL":
            own = message.removeprefix("crosslift: ").splitlines()[-1]
        elif event["level"] in ("STDERR", "ERROR"):
            other = message.splitlines()[-1]
    return own or other, restarted


def _updated(record: Path, logs: Path) -> float | None:
    files = [file for file in (record, logs / "run.log", logs / "events.jsonl") if file.is_file()]
    return max((file.stat().st_mtime for file in files), default=None)
