"""A run's jobs: their state in Slurm, their output, and their cancellation."""

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
from training.tracking.run_record import RECORD_NAME, read_events

FOLLOW_INTERVAL_S = 0.5
QUERY_INTERVAL_S = 15.0  # between two queries of Slurm while a log is followed
UNLISTED = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Target:
    """The run and jobs that a command refers to."""

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
    folder = Path(output).parents[2] if output and len(Path(output).parents) > 2 else None
    jobs = [job for job in read_jobs(folder) if job.job == text.partition("_")[0]] if folder else []
    if folder is None or not jobs:
        raise SlurmError(f"{text}: Slurm has no such job of a run; give the run's folder")
    job = jobs[-1]
    if job.job == text:
        return Target(folder, (job,))
    return Target(element_folders(folder).get(text, folder), (job.element(text),))


def element_folders(sweep: Path) -> dict[str, Path]:
    """Folders of a sweep's runs by the number of their jobs, such as 12_3; none for a single run."""
    folders = [file.parents[1] for file in sorted(sweep.glob(f"*/{FOLDER}/{NAME}"))]
    return {job.job: folder for folder in folders for job in read_jobs(folder) if job.trains}


def progress(run: Path) -> str | None:
    """The last step in a run's record, such as "step 120 of 1500"; None without a record."""
    record, step, total = run / RECORD_NAME, 0, "?"
    if not record.is_file():
        return None
    for _, event in read_events(record):
        if event["kind"] == "metrics":
            step = event["step"]
        elif event["kind"] == "params":
            total = event["values"].get("max_steps", total)
    return f"step {step} of {total}"


def report(target: Target) -> list[tuple[SubmittedJob, JobState]]:
    """Every job of the newest submission with its state, elements of arrays one by one.

    The state of a job that Slurm no longer lists is UNLISTED.
    """
    active = client.queued([job.id for job in target.jobs])
    found = []
    for job in target.jobs:
        states = [each for each in active if belongs_to(each, job)]
        known = {each.job for each in states}
        if len(states) < job.elements:  # the others have ended
            past = [each for each in client.past(job.id) if each.job not in known and belongs_to(each, job)]
            states = [*past, *states]
        found += [(job, state) for state in states or [JobState(job.job, UNLISTED)]]
    return found


def belongs_to(state: JobState, job: SubmittedJob) -> bool:
    """Whether it is the state of the job itself or of one of its elements."""
    return state.job == job.job or state.job.startswith(f"{job.job}_")


def cancel(target: Target) -> tuple[list[str], list[str]]:
    """Cancel these jobs: numbers of those cancelled at once, and of those that save a checkpoint first."""
    at_once: list[JobId] = []
    saving: list[JobId] = []
    for job in reversed(target.jobs):  # dependent jobs first, as Slurm would cancel them itself
        states = [each for each in client.queued([job.id]) if belongs_to(each, job)]
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
    """The log of a rank, or the output of the run's newest job.

    Raises:
        SlurmError: it does not exist (yet), or an element of an array must be chosen.
    """
    job = target.jobs[0]
    if job.array:
        raise SlurmError(f"job {job.job} is an array of {job.elements} runs; give one run's folder, or {job.job}_0")
    return Path(job.output) if rank is None else rank_file(target.run, rank)


def rank_file(run: Path, rank: int) -> Path:
    """The log of one rank.

    Raises:
        SlurmError: it does not exist (yet).
    """
    file = run / "logs" / f"rank-{rank:05d}.log"
    if not file.is_file():
        ranks = sorted(int(each.stem.rpartition("-")[2]) for each in file.parent.glob("rank-*.log"))
        known = f"ranks with a log: 0 to {ranks[-1]}" if ranks else "no rank has a log yet"
        raise SlurmError(f"--rank {rank}: {file} does not exist; {known}")
    return file


def read_log(file: Path, target: Target, follow: bool) -> Iterator[str]:
    """The text of a log in pieces; with `follow`, also what is appended until the job has ended.

    Raises:
        SlurmError: without `follow`, if there is no log yet.
    """
    if not follow and not file.is_file():
        states = ", ".join(f"job {state.job} is {state.state.lower()}" for _, state in report(target))
        raise SlurmError(f"{file}: does not exist yet; {states}")
    job = [job.id for job in target.jobs[:1]]
    yield from follow_file(file, (lambda: not client.queued(job)) if follow else None, QUERY_INTERVAL_S)


def follow_file(file: Path, has_ended: Callable[[], bool] | None, query_interval: float) -> Iterator[str]:
    """The text of a file in pieces, and what is appended until `has_ended`, which is called every `query_interval`
    seconds; None: only the present content."""
    position, queried, ended = 0, time.monotonic(), has_ended is None
    while True:
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace", newline="") as log:
                log.seek(position)
                while piece := log.read(1 << 16):
                    yield piece
                position = log.tell()
        if ended or has_ended is None:
            return
        time.sleep(FOLLOW_INTERVAL_S)
        if time.monotonic() - queried > query_interval:
            queried = time.monotonic()
            ended = has_ended()  # the end of the file is read in one more pass
