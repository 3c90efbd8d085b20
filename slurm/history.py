"""The jobs of a run: `<output_dir>/slurm/jobs.jsonl`, one line per submitted job, and the lock for writing to it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from slurm.client import JobId
from slurm.errors import SlurmError

FOLDER, NAME, LOCK = "slurm", "jobs.jsonl", ".lock"


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """One line of the file."""

    job: str  # Slurm's number; 12_3 in the folder of an array's element
    what: str  # "train", or a crosslift command
    output: str  # Slurm's output file; for an array with %A and %a
    submission: str  # folder below slurm/
    cluster: str | None = None
    elements: int = 1
    array: bool = False  # an array may have a single element
    time: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    @property
    def id(self) -> JobId:
        return JobId(self.job, self.cluster)

    def element(self, job: str) -> SubmittedJob:
        """One element of the array, by its number such as 12_3."""
        return replace(self, job=job, output=self.output.replace("%A_%a", job), elements=1, array=False)

    @property
    def trains(self) -> bool:
        """Whether it is the run itself, not a command that follows it."""
        return self.what == "train"


def slurm_folder(run: Path) -> Path:
    """The folder of all files that this package writes for a run."""
    return run / FOLDER


def read_jobs(run: Path) -> list[SubmittedJob]:
    """A run's jobs, oldest first; none if nothing was submitted.

    Raises:
        SlurmError: the file is damaged.
    """
    file = slurm_folder(run) / NAME
    if not file.is_file():
        return []
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(SubmittedJob(**json.loads(line)))
        except (ValueError, TypeError):
            raise SlurmError(f"{file}:{number}: not a line of this file; remove it") from None
    return found


def add_jobs(run: Path, jobs: Sequence[SubmittedJob]) -> None:
    """Append jobs; the lines are synced to disk."""
    folder = slurm_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(job), ensure_ascii=False) + "\n" for job in jobs)
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def submission_lock(run: Path) -> Iterator[None]:
    """Prevent other processes from submitting this run at the same time.

    Raises:
        SlurmError: another process is submitting it, or the folder cannot be written.
    """
    folder = slurm_folder(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SlurmError(f"{folder}: cannot be written ({error.strerror}); choose another output_dir") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SlurmError(f"{run}: another crosslift submit is submitting this run; wait for it") from None
        except OSError:  # a disk without locks: submit unprotected
            pass
        yield
    finally:
        os.close(lock)
