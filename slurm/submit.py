"""Submits a request: freezes source and run files, writes the script, runs sbatch, records the jobs. All or nothing.

Later edits of the source or the run file do not reach a queued job. Files under `<output_dir>/slurm/<submission>/`:

    20260131-120000/
        code/               the source that the job runs
        config.yaml         the run file with every value in it (arrays: configs/0.yaml, ...)
        train.sh            the batch script; then-1.sh, ... of the commands that follow
        train-1234.out      Slurm's output
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.atomic import atomic_folder
from data_pipeline.yaml_values import write_yaml
from slurm import client
from slurm.client import JobId
from slurm.errors import SlurmError
from slurm.history import SubmittedJob, add_jobs, read_jobs, slurm_folder, submission_lock
from slurm.render import options, render
from slurm.request import Request, config_files, job_specs
from slurm.spec import JobSpec
from training.provenance import NOTED as GIT_STATE
from training.provenance import git_state

SOURCE = Path(__file__).resolve().parent.parent
PACKAGES = ("training", "modeling", "data_pipeline", "evals", "slurm")
ENTRY_POINT = "crosslift.py"
SUFFIXES = (".py", ".yaml")  # yaml: the data of packages


def submit(request: Request) -> list[SubmittedJob]:
    """Queue the run and what follows it.

    Raises:
        SlurmError: the run is queued already, or Slurm refused a job. Then nothing is queued or left behind.
    """
    with submission_lock(request.folder):
        refuse_if_queued(request)
        number = _new_submission(request.folder)
        folder = slurm_folder(request.folder) / number
        specs = job_specs(request, folder)
        submitted: list[SubmittedJob] = []
        try:
            with atomic_folder(folder, exclusive=True) as incomplete:
                _freeze(request, incomplete)
            for spec in specs:
                submitted.append(_queue(spec, submitted))
            _record(request, submitted)
        except BaseException as error:
            _undo(submitted, folder)
            if isinstance(error, OSError):
                raise SlurmError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
            raise
    return submitted


def refuse_if_queued(request: Request) -> None:
    """Check that the run has no pending or running job, because two jobs would write the same checkpoints.

    Raises:
        SlurmError: it has one; names the job.
    """
    for folder in dict.fromkeys((request.folder, *(run.folder for run in request.runs))):
        # Only jobs that train: a command queued behind a run only reads it.
        jobs = [job for job in read_jobs(folder) if job.trains]
        if jobs and (active := client.queued([job.id for job in jobs])):
            first = active[0]
            raise SlurmError(
                f"{folder}: job {first.job} of this run is {first.state.lower()}; wait for it, end it with "
                f"`crosslift cancel {shlex.quote(str(folder))}`, or give another output_dir"
            )


def dry_run(request: Request) -> Iterator[tuple[str, list[str]]]:
    """(script, command that would submit it) for each job; nothing is written."""
    specs = job_specs(request, slurm_folder(request.folder) / _new_submission(request.folder))
    for number, spec in enumerate(specs):
        linked = spec if number == 0 else spec.model_copy(update={"after": (f"JOB_OF_{specs[number - 1].stem}",)})
        yield render(linked), client.sbatch_command(str(spec.script))


def freeze_source(target: Path, git: dict[str, str], source: Path = SOURCE) -> int:
    """Copy crosslift.py and all packages into the new folder `target`. Returns the number of files.

    Only source files are copied, by their suffix: no hidden files and no other files of a checkout.

    Args:
        git: commit and whether it is dirty, written into the copy, which is not a checkout; empty: unknown.
    """
    files = [source / ENTRY_POINT]
    for package in PACKAGES:
        for folder, names, found in os.walk(source / package):
            names[:] = sorted(name for name in names if not name.startswith((".", "__pycache__")))
            files += [Path(folder, name) for name in sorted(found) if _is_source(Path(folder, name))]
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    if git:
        (target / GIT_STATE).write_text(json.dumps(git), encoding="utf-8")
    return len(files)


def _is_source(file: Path) -> bool:
    return file.suffix in SUFFIXES and not file.name.startswith(".") and not file.is_symlink()


def _freeze(request: Request, folder: Path) -> None:
    freeze_source(folder / "code", git_state())
    for run, config in zip(request.runs, config_files(request, folder), strict=True):
        config.parent.mkdir(exist_ok=True)
        config.write_text(write_yaml(run.values), encoding="utf-8")
        run.folder.mkdir(parents=True, exist_ok=True)


def _queue(spec: JobSpec, before: Sequence[SubmittedJob]) -> SubmittedJob:
    """Write the script and submit it, to start after the job before."""
    if before:
        spec = JobSpec.model_validate({**dict(spec), "after": (before[-1].job,)})
    spec.script.write_text(render(spec), encoding="utf-8")
    cluster = before[-1].cluster if before else None  # a job's number is valid on its own cluster only
    job = client.submit(str(spec.script), [name for name, _ in options(spec)], cluster)
    what = "train" if spec.kind == "train" else shlex.join(spec.elements[0].arguments)
    output = str(spec.output() if spec.array else spec.output(job.number))
    return SubmittedJob(job.number, what, output, spec.folder.name, job.cluster, len(spec.elements), spec.array)


def _record(request: Request, jobs: Sequence[SubmittedJob]) -> None:
    """Record the jobs in the run's folder, and each element's job in the element's folder."""
    add_jobs(request.folder, jobs)
    for number, run in enumerate(request.runs if request.array else ()):
        add_jobs(run.folder, [job.element(f"{job.job}_{number}") for job in jobs if job.array])


def _undo(jobs: Sequence[SubmittedJob], folder: Path) -> None:
    """Delete the submission's folder and cancel its jobs."""
    shutil.rmtree(folder, ignore_errors=True)
    if jobs:
        client.cancel([JobId(job.job, job.cluster) for job in jobs])


def _new_submission(run: Path) -> str:
    """Name of a new submission's folder: the time, with a number if that name is taken."""
    name = time.strftime("%Y%m%d-%H%M%S")
    folder = slurm_folder(run)
    return next(each for each in (name, *(f"{name}-{n}" for n in range(2, 1000))) if not (folder / each).exists())
