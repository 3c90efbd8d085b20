"""Submission: freeze source and run files, write the script, `sbatch`, note the job down. All of it, or nothing.

In: checked run files, JobSettings. Out: SubmittedJobs, files under `<output_dir>/slurm/<submission>/`:

    20260131-120000/
        code/               the source that the job runs
        config.yaml         the run file with every value in it (arrays: configs/0.yaml, ...)
        train.sh            the batch script; then-1.sh, ... what comes after it
        train-1234.out      what Slurm writes

Next: `history.py` keeps the numbers; the nodes run `node.py` of the frozen source.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.atomic import atomic_folder
from slurm import client
from slurm.client import JobId
from slurm.errors import SlurmError, mistakes
from slurm.freeze import freeze_config, freeze_source
from slurm.history import SubmittedJob, add_jobs, one_submission, read_jobs, slurm_folder
from slurm.render import options, render
from slurm.spec import Element, JobSettings, JobSpec, printable

RUN = "{run}"  # in a command that follows: the run's folder
ORIGINS = {"after": "--after", "elements": "output_dir", "folder": "output_dir", "chdir": "current folder"}


@dataclass(frozen=True, slots=True)
class Run:
    """A checked run file."""

    folder: Path  # its output_dir, absolute
    values: dict[str, Any]  # of the run file, every default filled in
    readable: tuple[Path, ...] = ()  # files and folders that it reads


@dataclass(frozen=True, slots=True)
class Request:
    """What to submit: one run, or a sweep's runs as a job array."""

    folder: Path  # the run's, or the one that holds a sweep's
    runs: tuple[Run, ...]
    settings: JobSettings
    array: bool = False
    array_limit: int | None = None
    after: tuple[str, ...] = ()
    then: tuple[tuple[str, ...], ...] = ()  # words of crosslift commands
    git: dict[str, str] = field(default_factory=dict)  # state of the source: commit, dirty
    accept_changes: bool = False  # go on although data or config differ from a checkpoint's


def submit(request: Request) -> list[SubmittedJob]:
    """Queue the run and what follows it.

    Raises:
        SlurmError: the run is queued already, or Slurm refused a job. Then nothing is queued or left behind.
    """
    with one_submission(request.folder):
        refuse_if_queued(request)
        number = _submission(request.folder)
        folder = slurm_folder(request.folder) / number
        specs = job_specs(request, folder)
        done: list[SubmittedJob] = []
        try:
            with atomic_folder(folder, exclusive=True) as incomplete:
                _freeze(request, incomplete)
            for spec in specs:
                done.append(_queue(spec, done))
            _note(request, done)
        except BaseException as error:
            _take_back(done, folder)
            if isinstance(error, OSError):
                raise SlurmError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
            raise
    return done


def refuse_if_queued(request: Request) -> None:
    """A run has one job at a time: two would write the same checkpoints.

    Raises:
        SlurmError: naming the job.
    """
    for folder in dict.fromkeys((request.folder, *(run.folder for run in request.runs))):
        # Only jobs that train; what is queued behind a run reads it.
        jobs = [job for job in read_jobs(folder) if job.trains]
        if jobs and (active := client.queued([job.id for job in jobs])):
            first = active[0]
            raise SlurmError(
                f"{folder}: job {first.job} of this run is {first.state.lower()}; wait for it, end it with "
                f"`crosslift cancel {shlex.quote(str(folder))}`, or give another output_dir"
            )


def job_specs(request: Request, folder: Path) -> list[JobSpec]:
    """The jobs of a request, the run first; those behind it still lack the numbers of the jobs they wait for."""
    try:
        name = printable(request.folder.name)
    except ValueError as error:
        raise SlurmError(f"output_dir: {error}") from None
    chosen = request.settings
    python = chosen.python or ("python3" if chosen.container else sys.executable)
    common: dict[str, Any] = {
        "settings": chosen, "folder": folder, "code": folder / "code", "chdir": Path.cwd(), "python": python,
    }  # fmt: skip
    passed = ("--accept-changes",) if request.accept_changes else ()
    try:
        train = JobSpec(
            name=name, kind="train", stem="train", array=request.array, array_limit=request.array_limit,
            after=request.after, elements=tuple(
                Element(run_dir=run.folder, arguments=(str(config), *passed), readable=(config, *run.readable))
                for run, config in zip(request.runs, _configs(request, folder), strict=True)
            ), **common,
        )  # fmt: skip
        return [train, *(_follower(request, words, number, common) for number, words in enumerate(request.then, 1))]
    except ValidationError as error:
        raise mistakes(error, JobSpec, ORIGINS) from None


def _follower(request: Request, words: tuple[str, ...], number: int, common: dict[str, Any]) -> JobSpec:
    """A command after the run; one for each element of a sweep where it names the run's folder."""
    each = request.array and any(RUN in word for word in words)
    folders = [run.folder for run in request.runs] if each else [request.folder]
    elements = tuple(
        Element(run_dir=folder, arguments=tuple(word.replace(RUN, str(folder)) for word in words)) for folder in folders
    )
    name = f"{printable(request.folder.name)}: {words[0]}"
    return JobSpec(name=name, kind="command", stem=f"then-{number}", array=each, elementwise=each,
                   elements=elements, **common)  # fmt: skip


def following(texts: Sequence[str], commands: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """`--then` texts as words of crosslift commands.

    Raises:
        SlurmError: a text is no such command.
    """
    found = []
    for text in texts:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise SlurmError(f"--then {text!r}: {error}") from None
        words = words[1:] if words[:1] == ["crosslift"] else words
        if not words or words[0] not in commands:
            raise SlurmError(f"--then {text!r}: must be a crosslift command, one of {', '.join(sorted(commands))}")
        found.append(tuple(words))
    return tuple(found)


def dry_run(request: Request) -> Iterator[tuple[str, list[str]]]:
    """(script, command that would submit it) for each job; nothing is written."""
    specs = job_specs(request, slurm_folder(request.folder) / _submission(request.folder))
    for number, spec in enumerate(specs):
        waits = spec if number == 0 else spec.model_copy(update={"after": (f"JOB_OF_{specs[number - 1].stem}",)})
        yield render(waits), client.sbatch_command(str(spec.script))


def _queue(spec: JobSpec, before: Sequence[SubmittedJob]) -> SubmittedJob:
    """Write the script and submit it, after the job before."""
    if before:
        spec = JobSpec.model_validate({**dict(spec), "after": (before[-1].job,)})
    spec.script.write_text(render(spec), encoding="utf-8")
    # A job's number means nothing on another cluster.
    cluster = before[-1].cluster if before else None
    job = client.submit(str(spec.script), [name for name, _ in options(spec)], cluster)
    what = "train" if spec.kind == "train" else shlex.join(spec.elements[0].arguments)
    output = str(spec.output() if spec.array else spec.output(job.number))
    return SubmittedJob(job.number, what, output, spec.folder.name, job.cluster, len(spec.elements), spec.array)


def _freeze(request: Request, folder: Path) -> None:
    freeze_source(folder / "code", request.git)
    for run, config in zip(request.runs, _configs(request, folder), strict=True):
        config.parent.mkdir(exist_ok=True)
        freeze_config(config, run.values)
        run.folder.mkdir(parents=True, exist_ok=True)


def _configs(request: Request, folder: Path) -> list[Path]:
    if not request.array:
        return [folder / "config.yaml"]
    return [folder / "configs" / f"{number}.yaml" for number in range(len(request.runs))]


def _note(request: Request, jobs: Sequence[SubmittedJob]) -> None:
    """Into the run's folder, and each element's own job into the element's."""
    add_jobs(request.folder, jobs)
    for number, run in enumerate(request.runs if request.array else ()):
        add_jobs(run.folder, [job.element(f"{job.job}_{number}") for job in jobs if job.array])


def _take_back(jobs: Sequence[SubmittedJob], folder: Path) -> None:
    """Delete a submission's folder and cancel its jobs."""
    shutil.rmtree(folder, ignore_errors=True)
    if jobs:
        client.cancel([JobId(job.job, job.cluster) for job in jobs])


def _submission(run: Path) -> str:
    """A new folder's name: the time, and a number where that is taken."""
    name = time.strftime("%Y%m%d-%H%M%S")
    taken = slurm_folder(run)
    return next(each for each in (name, *(f"{name}-{n}" for n in range(2, 1000))) if not (taken / each).exists())
