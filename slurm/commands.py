"""The commands `submit`, `status`, `logs` and `cancel`. Heavy imports happen inside them: `--help` answers at once."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slurm.client import JobState
    from slurm.history import SubmittedJob
    from slurm.request import Request
    from training.run_folder.status import RunStatus

NOT_QUEUEABLE = ("submit", "status", "logs", "cancel", "ui")  # commands for the login node, not for `--then`
POLL_S = 2.0  # between two checks whether a local run is alive, while following its log
Target = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or a job's number")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for command in (submit, status, logs, cancel):
        app.command()(command)


def submit(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="run file, YAML")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="override keys of CONFIG")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="nodes of the job")] = None,
    gpus_per_node: Annotated[
        str | None, typer.Option(metavar="[TYPE:]N", help="GPUs, and ranks, of each node; 0: CPUs")
    ] = None,
    nproc_per_node: Annotated[int | None, typer.Option(help="ranks of each node, if not one per GPU")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPU cores of each node")] = None,
    mem: Annotated[str | None, typer.Option(help="memory of each node, such as 500G")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm's quality of service")] = None,
    time: Annotated[str | None, typer.Option(help="time limit of one job, such as 12:00:00")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="shell line that runs first; repeatable")] = None,
    container: Annotated[str | None, typer.Option(metavar="IMAGE", help="container image to run in")] = None,
    after: Annotated[list[str] | None, typer.Option(metavar="JOB", help="job that must succeed first")] = None,
    array: Annotated[list[str] | None, typer.Option(metavar="KEY=V1,V2", help="a sweep; repeatable")] = None,
    array_limit: Annotated[int | None, typer.Option(min=1, help="runs of a sweep at a time")] = None,
    then: Annotated[list[str] | None, typer.Option(metavar="COMMAND", help="crosslift command to run after success, "
                                                   "{run} being the run's folder; repeatable")] = None,
    offline: Annotated[bool, typer.Option(help="no Hugging Face hub on the nodes")] = False,
    accept_changes: Annotated[bool, typer.Option(help="as for train: even if data or config changed")] = False,
    profile: Annotated[int | None, typer.Option(min=1, metavar="N", help="as for train: steps to profile")] = None,
    dry_run: Annotated[bool, typer.Option(help="print the script; write and queue nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the jobs as JSON")] = False,
) -> None:  # fmt: skip
    """Queue a run on a Slurm cluster. Example: crosslift submit CONFIG --nodes 4 --gpus-per-node 8 --time 12:00:00

    Defaults of a site are read from ~/.config/crosslift/slurm.yaml and ./slurm.yaml.
    """
    from slurm.request import SubmitOptions, build_request

    options = SubmitOptions(
        config, tuple(overrides or ()),
        settings={
            "nodes": nodes, "gpus_per_node": gpus_per_node, "nproc_per_node": nproc_per_node, "partition": partition,
            "cpus_per_task": cpus_per_task, "mem": mem, "account": account, "qos": qos, "time": time,
            "setup": tuple(setup) if setup else None, "container": {"image": container} if container else None,
        },
        array=tuple(array or ()), array_limit=array_limit, after=tuple(after or ()), then=tuple(then or ()),
        offline=offline, accept_changes=accept_changes, profile=profile,
    )  # fmt: skip
    root = context.find_root().command
    queueable = [name for name in root.list_commands(context) if name not in NOT_QUEUEABLE]  # type: ignore[attr-defined]
    request = build_request(options, queueable)
    if dry_run:
        _print_scripts(request, as_json)
    else:
        _submit(request, as_json)


def status(
    run: Target, as_json: Annotated[bool, typer.Option("--json", help="print the state as JSON")] = False
) -> None:
    """Show the state of a run and its jobs. Example: crosslift status runs/llama-8b-shifcon"""
    from slurm.jobs import element_folders, find, progress, report
    from training.run_folder.status import local_runs

    if local := _local_runs(run):
        if as_json:
            print(json.dumps({"runs": [asdict(each) for each in local]}, ensure_ascii=False))
        else:
            print("\n".join(map(str, local)))
        return
    target = find(run)
    reports = report(target)
    steps = progress(target.run)
    element_steps = {job: progress(folder) for job, folder in element_folders(target.run).items()}
    if as_json:
        found = [
            {
                "job": state.job, "what": job.what, **asdict(state),
                "output": job.output.replace("%A_%a", state.job), "progress": element_steps.get(state.job),
            }
            for job, state in reports
        ]  # fmt: skip
        print(json.dumps({"progress": steps, "jobs": found}, ensure_ascii=False))
        return
    for job, state in reports:
        line, done = _job_line(job.what, state), element_steps.get(state.job)
        print(f"{line}; {done}" if done else line)
    if steps:
        print(steps)
    for started in local_runs(target.run):  # the run may also have been started without Slurm
        if started.alive() and not started.job:
            print(started)


def logs(
    run: Target,
    rank: Annotated[int | None, typer.Option(min=0, help="the log of this rank instead of the job's output")] = None,
    follow: Annotated[bool, typer.Option(help="continue until the job, or the run, ends")] = False,
) -> None:
    """Print the output of a run, or of its newest job. Example: crosslift logs runs/llama-8b-shifcon --follow"""
    from slurm.jobs import find, log_file, read_log

    if local := _local_runs(run):
        pieces = _local_log(local, Path(run), rank, follow)
    else:
        target = find(run)
        pieces = read_log(log_file(target, rank), target, follow)
    for piece in pieces:
        print(piece, end="", flush=True)


def cancel(run: Target) -> None:
    """Cancel a run's jobs, after a checkpoint. Example: crosslift cancel runs/llama-8b-shifcon"""
    from slurm.errors import SlurmError
    from slurm.jobs import cancel, find

    if _local_runs(run):
        raise SlurmError(
            f"{run}: is not a Slurm job; `kill -TERM` the pid that `crosslift status {shlex.quote(run)}` prints, on "
            "its host: the run saves a checkpoint and ends"
        )
    ended, saving = cancel(find(run))
    if ended:
        print(f"cancelled: {', '.join(f'job {job}' for job in ended)}")
    for job in saving:
        print(f"job {job} saves a checkpoint and ends (`scancel {job}` does not wait for it)")
    if not ended and not saving:
        print("no job is pending or running")


def _local_runs(text: str) -> Sequence[RunStatus]:
    """The runs in or below a folder from which nothing was submitted."""
    from slurm.history import read_jobs
    from training.run_folder.status import local_runs

    folder = Path(text)
    return local_runs(folder) if folder.is_dir() and not read_jobs(folder) else ()


def _local_log(local: Sequence[RunStatus], folder: Path, rank: int | None, follow: bool) -> Iterator[str]:
    """The log of a run that is not a Slurm job.

    Raises:
        SlurmError: there is no log, or there are several runs.
    """
    from slurm.errors import SlurmError
    from slurm.jobs import follow_file, rank_file

    if len(local) > 1:
        raise SlurmError(f"{folder}: holds {len(local)} runs; give one run's folder, such as {local[0].run}")
    run = local[0]
    file = run.log if rank is None else rank_file(Path(run.run), rank)
    if not file.is_file() and not (follow and run.alive()):
        raise SlurmError(f"{file}: does not exist; the run has written no log")
    yield from follow_file(file, (lambda: not run.alive()) if follow else None, POLL_S)


def _print_scripts(request: Request, as_json: bool) -> None:
    from slurm.submit import dry_run

    jobs = list(dry_run(request))
    if as_json:
        print(json.dumps([{"script": script, "command": command} for script, command in jobs], ensure_ascii=False))
        return
    for script, command in jobs:
        print(script)
        print(f"# {shlex.join(command)}\n")
    print("nothing was written or queued; the run file is valid, data and model were not checked", file=sys.stderr)


def _submit(request: Request, as_json: bool) -> None:
    from slurm.request import check_values, job_specs
    from slurm.submit import refuse_if_queued, submit

    job_specs(request, request.folder)  # its errors, and a queued job of this run, are reported before the long check
    refuse_if_queued(request)
    for run in request.runs:
        for line in check_values(run.values, request.settings, request.options.accept_changes):
            print(line, file=sys.stderr if as_json else sys.stdout)
    jobs = submit(request)
    if as_json:
        print(json.dumps([asdict(job) for job in jobs], ensure_ascii=False))
        return
    for number, job in enumerate(jobs):
        print(f"job {job.job}{f' after {jobs[number - 1].job}' if number else ''}: {_job_title(job, request)}")
        print(f"  log: {job.output}")
    folder = shlex.quote(str(request.folder))
    print(f"  MLflow: crosslift ui {folder}\n  state: crosslift status {folder}; crosslift logs {folder} --follow")


def _job_title(job: SubmittedJob, request: Request) -> str:
    if not job.trains:
        return job.what
    chosen = request.settings
    runs = f"{job.elements} runs below " if request.array else ""
    return f"train {runs}{request.folder}, {chosen.nodes} node(s) of {chosen.ranks} rank(s)"


def _job_line(what: str, job: JobState) -> str:
    """The state of one job in one line."""
    details = [
        job.state.lower()
        if job.state != "UNKNOWN"
        else "no longer listed by Slurm; its log and record show how it ended",
        job.reason and f"({job.reason})",
        job.elapsed and f"for {job.elapsed}",
        job.nodes and f"on {job.nodes}",
        job.restarts and f"restarted {job.restarts} times",
        job.exit and job.exit != "0:0" and f"exit {job.exit}",
    ]
    return f"job {job.job} ({what}): {' '.join(each for each in details if each)}"
