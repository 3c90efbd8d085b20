"""A run's jobs: what Slurm says of them, what they printed, and their end.

In: a run's folder, or a job's number. Out: JobReports, lines of logs. Next: `commands.py` prints them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slurm import client
from slurm.client import JobId, JobState
from slurm.errors import SlurmError
from slurm.history import FOLDER, NAME, SubmittedJob, read_jobs
from slurm.spec import JOB

FOLLOW_SECONDS = 0.5
ASK_SECONDS = 15.0  # between two questions to Slurm while a log is followed
FORGOTTEN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class JobReport:
    """A job, or an element of an array, as it stands."""

    job: str
    what: str  # "train", or a crosslift command
    state: str  # Slurm's; UNKNOWN where Slurm has forgotten the job
    reason: str | None
    elapsed: str | None
    nodes: str | None
    restarts: int | None
    exit: str | None  # STATUS:SIGNAL
    output: str


@dataclass(frozen=True, slots=True)
class Target:
    """What a command was pointed at."""

    run: Path  # the run's folder, or a sweep's
    jobs: tuple[SubmittedJob, ...]  # of the newest submission


def find(text: str) -> Target:
    """A run by its folder, or one of its jobs by number.

    Raises:
        SlurmError: there is no such run or job.
    """
    run = Path(text)
    if not JOB.fullmatch(text) or run.is_dir():
        jobs = read_jobs(run)
        if not jobs:
            raise SlurmError(
                f"{text}: no run there, neither jobs (slurm/jobs.jsonl) nor a record (record.jsonl); give a run's "
                "folder or a job's number"
            )
        return Target(run, tuple(job for job in jobs if job.submission == jobs[-1].submission))
    output = client.output_file(JobId(text))
    home = Path(output).parents[2] if output and len(Path(output).parents) > 2 else None
    jobs = [job for job in read_jobs(home) if job.job == text.partition("_")[0]] if home else []
    if home is None or not jobs:
        raise SlurmError(f"{text}: Slurm knows no such job of a run; give the run's folder")
    whole = jobs[-1]
    if whole.job == text:
        return Target(home, (whole,))
    return Target(element_folders(home).get(text, home), (whole.element(text),))


def element_folders(sweep: Path) -> dict[str, Path]:
    """The runs of a sweep: their folders, by the number of their jobs such as 12_3; none where it is a single run."""
    homes = [file.parents[1] for file in sorted(sweep.glob(f"*/{FOLDER}/{NAME}"))]
    return {job.job: home for home in homes for job in read_jobs(home) if job.trains}


def report(target: Target) -> list[JobReport]:
    """Every job of the newest submission, elements of arrays one by one."""
    active = client.queued([job.id for job in target.jobs])
    found = []
    for job in target.jobs:
        states = [each for each in active if belongs(each, job)]
        known = {each.job for each in states}
        if len(states) < job.elements:  # the others have ended
            past = [each for each in client.past(job.id) if each.job not in known and belongs(each, job)]
            states = [*past, *states]
        found += [_report(job, state) for state in states or [JobState(job.job, FORGOTTEN)]]
    return found


def belongs(state: JobState, job: SubmittedJob) -> bool:
    """Is it the job's own state, or that of one of its elements?"""
    return state.job == job.job or state.job.startswith(f"{job.job}_")


def _report(job: SubmittedJob, state: JobState) -> JobReport:
    return JobReport(
        state.job, job.what, state.state, state.reason, state.elapsed, state.nodes, state.restarts, state.exit,
        job.output.replace("%A_%a", state.job),
    )  # fmt: skip


def cancel(target: Target) -> tuple[list[str], list[str]]:
    """End what is pending or running of these jobs: numbers of those that ended, and of those that save first."""
    at_once: list[JobId] = []
    saving: list[JobId] = []
    for job in reversed(target.jobs):  # what waits for a job goes first, or it would be cancelled by Slurm in between
        states = [each for each in client.queued([job.id]) if belongs(each, job)]
        running = [JobId(each.job, job.cluster) for each in states if job.trains and each.state == "RUNNING"]
        saving += running
        if running:
            at_once += [JobId(each.job, job.cluster) for each in states if each.state != "RUNNING"]
        elif states:
            at_once.append(job.id)
    client.cancel(at_once)
    client.cancel(saving, *client.CHECKPOINT_FIRST)
    return [job.number for job in at_once], [job.number for job in saving]


def log_file(target: Target, rank: int | None) -> Path:
    """A rank's log, or what the newest job of the run itself printed.

    Raises:
        SlurmError: it is not there (yet), or an array's element has to be chosen.
    """
    job = next(job for job in target.jobs)
    if job.array:
        raise SlurmError(f"job {job.job} is an array of {job.elements} runs; give one run's folder, or {job.job}_0")
    if rank is None:
        return Path(job.output)
    return rank_file(target.run, rank)


def rank_file(run: Path, rank: int) -> Path:
    """One rank's log.

    Raises:
        SlurmError: it is not there (yet).
    """
    file = run / "logs" / f"rank-{rank:05d}.log"
    if not file.is_file():
        there = sorted(int(each.stem.rpartition("-")[2]) for each in file.parent.glob("rank-*.log"))
        known = f"ranks with a log: 0 to {there[-1]}" if there else "no rank has a log yet"
        raise SlurmError(f"--rank {rank}: {file} is not there; {known}")
    return file


def read_log(file: Path, target: Target, follow: bool) -> Iterator[str]:
    """The text of a log in pieces; with `follow`, what comes after it, until the job is over.

    Raises:
        SlurmError: without `follow`, where there is no log yet.
    """
    if not follow and not file.is_file():
        states = ", ".join(f"job {each.job} is {each.state.lower()}" for each in report(target))
        raise SlurmError(f"{file}: not there yet; {states}")
    job = [job.id for job in target.jobs[:1]]
    yield from follow_file(file, (lambda: not client.queued(job)) if follow else None, ASK_SECONDS)


def follow_file(file: Path, ended: Callable[[], bool] | None, ask_seconds: float) -> Iterator[str]:
    """The text of a file in pieces, and what comes after it until `ended`, which is asked every `ask_seconds`; None:
    only what is there."""
    position, asked, over = 0, time.monotonic(), ended is None
    while True:
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace", newline="") as log:
                log.seek(position)
                while piece := log.read(1 << 16):
                    yield piece
                position = log.tell()
        if over or ended is None:
            return
        time.sleep(FOLLOW_SECONDS)
        if time.monotonic() - asked > ask_seconds:
            asked = time.monotonic()
            over = ended()  # then what is left is read once more
