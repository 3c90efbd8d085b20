"""The state of a run, read from its folder: `crosslift status` and `logs` for a run outside Slurm."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from training.checkpoints.checkpoint import complete
from training.launch.logs import logs_folder, read_event, read_lines
from training.run_folder.lock import LOCK_FILE, SILENT_SECONDS, Holder, holder_of
from training.tracking.run_record import RECORD_NAME, read_events, run_folders

RATE_STEPS = 20  # newest steps, from whose times the rate is taken
State = Literal["starting", "running", "finished", "stopped", "interrupted", "failed", "killed"]
_ENDS: dict[str, State] = {
    "FINISHED": "finished", "SCHEDULED": "stopped", "KILLED": "interrupted", "FAILED": "failed",
}  # fmt: skip
_MEANS = {
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
    """A run as it stands. Times are seconds, `updated` since 1970."""

    run: str  # its folder
    state: State
    host: str | None  # of the launcher, while it runs
    pid: int | None
    job: str | None  # Slurm's
    since: str | None
    step: int
    max_steps: int | None
    seconds_per_step: float | None  # of the newest steps of its newest start
    seconds_left: float | None  # at that rate, while it runs
    checkpoint: str | None  # the newest complete one
    updated: float | None  # when its record or log last grew
    error: str | None  # the last one of a start that failed

    @property
    def log(self) -> Path:
        """What rank 0 logged, and the warnings of all."""
        return logs_folder(Path(self.run)) / "run.log"

    def alive(self) -> bool:
        """Whether it runs now."""
        return _alive(Path(self.run)) is not None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """Two or three lines for people."""
        where = f" on {self.host} (pid {self.pid}) since {self.since}" if self.host else ""
        rate = f", {self.seconds_per_step:.2f} s a step" if self.seconds_per_step is not None else ""
        left = f", {_duration(self.seconds_left)} left" if self.seconds_left is not None else ""
        lines = [
            f"{self.run}: {_MEANS[self.state]}{where}",
            f"  step {self.step} of {'?' if self.max_steps is None else self.max_steps}{rate}{left}; "
            f"newest checkpoint: {self.checkpoint or 'none'}",
        ]
        return "\n".join([*lines, *([f"  {self.error}"] if self.error else [])])


def local_runs(folder: Path) -> list[RunStatus]:
    """The run in a folder, or those below it; none where there is none."""
    if (status := run_status(folder)) is not None:
        return [status]
    return [status for each in sorted(run_folders(folder)) if (status := run_status(each)) is not None]


def run_status(run: Path) -> RunStatus | None:
    """None where the folder holds no run. No checksum is computed: it answers at once."""
    record, logs = run / RECORD_NAME, logs_folder(run)
    if not record.is_file() and not logs.is_dir():
        return None
    told = _Told.of(record)
    holder = _alive(run)
    error, restarted = _last_error(logs / "events.jsonl", told.began, told.ended)
    state: State = "failed" if error else "killed"  # it ended before it could say how
    if holder is not None:
        state = "running" if told.times else "starting"
    elif told.end is not None and not restarted:
        state = _ENDS.get(told.end, "failed")
    rate = None
    if len(told.times) > 1:
        rate = (told.times[-1] - told.times[0]) / (len(told.times) - 1) / 1000
    checkpoint = next(complete(run), None)
    left = rate * (told.total - told.step) if state == "running" and rate is not None and told.total else None
    return RunStatus(
        str(run), state, holder.host if holder else None, holder.pid if holder else None,
        holder.job or None if holder else None, holder.since if holder else None, told.step, told.total, rate, left,
        str(checkpoint) if checkpoint else None, _updated(record, logs), error if state == "failed" else None,
    )  # fmt: skip


@dataclass
class _Told:
    """What a record says of the run's newest start."""

    step: int = 0
    total: int | None = None
    began: int = 0  # times are milliseconds since 1970
    end: str | None = None  # MLflow's word; None: the start has not ended, or was killed
    ended: int = 0
    times: tuple[int, ...] = ()  # of the newest steps

    @classmethod
    def of(cls, record: Path) -> _Told:
        told = cls()
        for _, event in read_events(record) if record.is_file() else ():
            told._take(event)
        return told

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "start":
            self.began, self.end, self.times = event["time"], None, ()
            self.step = event.get("resumed_step") or 0
        elif kind == "params" and str(event["values"].get("max_steps", "")).isdigit():
            self.total = int(event["values"]["max_steps"])
        elif kind == "metrics":
            self.step, self.times = event["step"], (*self.times, event["time"])[-RATE_STEPS:]
        elif kind == "finish":
            self.end, self.ended = event["status"], event["time"]


def _alive(run: Path) -> Holder | None:
    """The process that holds the folder, if it lives; one on another machine does while it renews its lock."""
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
    """The last line of a rank that failed after `since`: our own word if there is one, else a traceback's.

    Also whether ranks were started once more after the run had `ended`, and came to nothing that the record has.
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


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "under 1 min"
