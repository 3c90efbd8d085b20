"""The commands `submit`, `status`, `logs` and `cancel`.

In: the command line, and from the front door what belongs to other rooms (`Rooms`). Out: jobs, and lines about them.
No heavy import here: `--help` answers at once.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from slurm.history import SubmittedJob
    from slurm.jobs import JobReport
    from slurm.spec import JobSettings
    from slurm.submit import Request

LOOK_SECONDS = 2.0  # between two looks at whether a local run is alive, while its log is followed
Target = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or a job's number")]


class LocalRun(Protocol):
    """A run that is no Slurm job, as it stands; `str` gives lines for people. One: `training.run_folder.status`."""

    @property
    def log(self) -> Path: ...

    @property
    def job(self) -> str | None: ...

    def alive(self) -> bool: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Rooms:
    """What the front door hands over, since no room imports another."""

    load: Callable[[Path, Sequence[str]], dict[str, Any]]  # run file, overrides -> every value; its own errors
    # lines; raises what the run would have raised; True: although data or config differ from a checkpoint's
    check: Callable[[dict[str, Any], JobSettings, bool], Iterator[str]]
    readable: Callable[[dict[str, Any]], list[Path]]  # files and folders that a run reads
    progress: Callable[[Path], str | None]  # of a run's folder, such as "step 120 of 1500"
    local: Callable[[Path], Sequence[LocalRun]]  # the run in a folder, or those below it
    commands: Callable[[], Collection[str]]  # what may follow a run
    git_state: Callable[[], dict[str, str]]  # commit of the source


def add_commands(app: typer.Typer, rooms: Rooms) -> None:
    """Put the commands into the front door's app."""
    _add_submit(app, rooms)
    _add_job_commands(app, rooms)


def _add_submit(app: typer.Typer, rooms: Rooms) -> None:
    @app.command()
    def submit(
        config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run file, YAML")],
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="override its keys")
        ] = None,
        nodes: Annotated[int | None, typer.Option(help="nodes of the job")] = None,
        gpus_per_node: Annotated[
            str | None, typer.Option(metavar="[TYPE:]N", help="GPUs, and ranks, a node; 0: CPUs")
        ] = None,
        nproc_per_node: Annotated[int | None, typer.Option(help="ranks a node, where not one a GPU")] = None,
        cpus_per_task: Annotated[int | None, typer.Option(help="CPU cores a node")] = None,
        mem: Annotated[str | None, typer.Option(help="memory a node, such as 500G")] = None,
        partition: Annotated[str | None, typer.Option()] = None,
        account: Annotated[str | None, typer.Option()] = None,
        qos: Annotated[str | None, typer.Option()] = None,
        time: Annotated[str | None, typer.Option(help="limit of one job, such as 12:00:00")] = None,
        setup: Annotated[list[str] | None, typer.Option(help="shell line before all else; repeatable")] = None,
        container: Annotated[str | None, typer.Option(metavar="IMAGE", help="image to run in")] = None,
        after: Annotated[list[str] | None, typer.Option(metavar="JOB", help="start when it succeeded")] = None,
        array: Annotated[list[str] | None, typer.Option(metavar="KEY=V1,V2", help="a sweep; repeatable")] = None,
        array_limit: Annotated[int | None, typer.Option(min=1, help="runs of a sweep at a time")] = None,
        then: Annotated[list[str] | None, typer.Option(metavar="COMMAND", help="crosslift command that follows "
                                                       "success, {run} being the run's folder; repeatable")] = None,
        offline: Annotated[bool, typer.Option(help="no Hugging Face hub on the nodes")] = False,
        accept_changes: Annotated[bool, typer.Option(help="as train: although data or config differ")] = False,
        dry_run: Annotated[bool, typer.Option(help="print the script; write and queue nothing")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="the jobs as JSON")] = False,
    ) -> None:  # fmt: skip
        """Queue a run on a Slurm cluster. Example: crosslift submit CONFIG --nodes 4 --gpus-per-node 8 --time 12:00:00

        What a site always wants stands in ~/.config/crosslift/slurm.yaml or ./slurm.yaml.
        """
        options = {
            "nodes": nodes, "gpus_per_node": gpus_per_node, "nproc_per_node": nproc_per_node, "partition": partition,
            "cpus_per_task": cpus_per_task, "mem": mem, "account": account, "qos": qos, "time": time,
            "setup": tuple(setup) if setup else None, "container": {"image": container} if container else None,
        }  # fmt: skip
        sweep = _Sweep(tuple(array or ()), array_limit, tuple(after or ()), tuple(then or ()), offline, accept_changes)
        request = _request(rooms, config, overrides or [], options, sweep)
        if dry_run:
            _print_scripts(request, as_json)
        else:
            _submit(rooms, request, as_json)


def _add_job_commands(app: typer.Typer, rooms: Rooms) -> None:
    @app.command()
    def status(run: Target, as_json: Annotated[bool, typer.Option("--json", help="the jobs as JSON")] = False) -> None:
        """What a run, or its jobs, is doing. Example: crosslift status runs/llama-8b-shifcon"""
        from slurm.jobs import element_folders, find, report

        if local := _local(rooms, run):
            if as_json:
                print(json.dumps({"runs": [each.to_json() for each in local]}, ensure_ascii=False))
            else:
                print("\n".join(map(str, local)))
            return
        target = find(run)
        reports = report(target)
        progress = rooms.progress(target.run)
        of_elements = {job: rooms.progress(folder) for job, folder in element_folders(target.run).items()}
        if as_json:
            found = [{**asdict(each), "progress": of_elements.get(each.job)} for each in reports]
            print(json.dumps({"progress": progress, "jobs": found}, ensure_ascii=False))
            return
        for each in reports:
            steps = of_elements.get(each.job)
            print(f"{_line(each)}; {steps}" if steps else _line(each))
        if progress:
            print(progress)
        for here in rooms.local(target.run):  # after its jobs it may have been started without Slurm
            if here.alive() and not here.job:
                print(here)

    @app.command()
    def logs(
        run: Target,
        rank: Annotated[int | None, typer.Option(min=0, help="this rank's log instead of the job's output")] = None,
        follow: Annotated[bool, typer.Option(help="go on until the job, or the run, ends")] = False,
    ) -> None:
        """What a run, or its newest job, printed. Example: crosslift logs runs/llama-8b-shifcon --follow"""
        from slurm.jobs import find, log_file, read_log

        if local := _local(rooms, run):
            for piece in _local_log(local, Path(run), rank, follow):
                print(piece, end="", flush=True)
            return
        target = find(run)
        for piece in read_log(log_file(target, rank), target, follow):
            print(piece, end="", flush=True)

    @app.command()
    def cancel(run: Target) -> None:
        """End a run's jobs, after a checkpoint. Example: crosslift cancel runs/llama-8b-shifcon"""
        from slurm.errors import SlurmError
        from slurm.jobs import cancel, find

        if _local(rooms, run):
            raise SlurmError(
                f"{run}: is no Slurm job; `kill -TERM` the pid that `crosslift status {shlex.quote(run)}` names, on "
                "its host: the run saves a checkpoint and ends"
            )
        ended, saving = cancel(find(run))
        if ended:
            print(f"cancelled: {', '.join(f'job {job}' for job in ended)}")
        for job in saving:
            print(f"job {job} saves a checkpoint and ends (`scancel {job}` does not wait for it)")
        if not ended and not saving:
            print("no job is pending or running")


def _local(rooms: Rooms, text: str) -> Sequence[LocalRun]:
    """The runs in or below a folder from which nothing was submitted."""
    from slurm.history import read_jobs

    folder = Path(text)
    return rooms.local(folder) if folder.is_dir() and not read_jobs(folder) else ()


def _local_log(local: Sequence[LocalRun], folder: Path, rank: int | None, follow: bool) -> Iterator[str]:
    """Raises SlurmError where the log is not there, or of several runs."""
    from slurm.errors import SlurmError
    from slurm.jobs import follow_file, rank_file

    if len(local) > 1:
        raise SlurmError(f"{folder}: holds {len(local)} runs; give one run's folder, such as {local[0].log.parents[1]}")
    run = local[0]
    file = run.log if rank is None else rank_file(run.log.parents[1], rank)
    if not file.is_file() and not (follow and run.alive()):
        raise SlurmError(f"{file}: not there; the run has written no log")
    yield from follow_file(file, (lambda: not run.alive()) if follow else None, LOOK_SECONDS)


@dataclass(frozen=True, slots=True)
class _Sweep:
    """Options of `submit` that are no settings of a site."""

    array: tuple[str, ...]
    array_limit: int | None
    after: tuple[str, ...]
    then: tuple[str, ...]
    offline: bool
    accept_changes: bool


def _request(rooms: Rooms, config: Path, overrides: Sequence[str], options: dict[str, Any], sweep: _Sweep) -> Request:
    from slurm.errors import SlurmError
    from slurm.site import load_settings
    from slurm.submit import Request, Run, following
    from slurm.sweep import points

    if sweep.offline:
        options = {**options, "environment": {"HF_HUB_OFFLINE": "1"}}
    settings = load_settings(options)
    if settings.gpus_per_node is None:
        raise SlurmError("--gpus-per-node: not given, nor in slurm.yaml; 0 means ranks on CPUs")
    if sweep.array_limit and not sweep.array:
        raise SlurmError("--array-limit: needs --array")
    then = following(sweep.then, rooms.commands())
    base = rooms.load(config, overrides)
    folder = Path(base["output_dir"]).absolute()
    runs = []
    for point in points(sweep.array) if sweep.array else (None,):
        values = rooms.load(config, [*overrides, *point.overrides]) if point else base
        home = folder / point.name if point else folder
        runs.append(Run(home, {**values, "output_dir": str(home)}, tuple(rooms.readable(values))))
    return Request(
        folder, tuple(runs), settings, array=bool(sweep.array), array_limit=sweep.array_limit, after=sweep.after,
        then=then, git=rooms.git_state(), accept_changes=sweep.accept_changes,
    )  # fmt: skip


def _print_scripts(request: Request, as_json: bool) -> None:
    from slurm.submit import dry_run

    jobs = list(dry_run(request))
    if as_json:
        print(json.dumps([{"script": script, "command": command} for script, command in jobs], ensure_ascii=False))
        return
    for script, command in jobs:
        print(script)
        print(f"# {shlex.join(command)}\n")
    print("nothing was written or queued; the run file is valid, data and model were not looked at", file=sys.stderr)


def _submit(rooms: Rooms, request: Request, as_json: bool) -> None:
    from slurm.submit import job_specs, refuse_if_queued, submit

    job_specs(request, request.folder)  # its errors, and a job of this run, come before the long check
    refuse_if_queued(request)
    for run in request.runs:
        for line in rooms.check(run.values, request.settings, request.accept_changes):
            print(line, file=sys.stderr if as_json else sys.stdout)
    jobs = submit(request)
    if as_json:
        print(json.dumps([asdict(job) for job in jobs], ensure_ascii=False))
        return
    for number, job in enumerate(jobs):
        print(f"job {job.job}{f' after {jobs[number - 1].job}' if number else ''}: {_what(job, request)}")
        print(f"  log: {job.output}")
    folder = shlex.quote(str(request.folder))
    print(
        f"  MLflow: crosslift ui {folder}\n  how it goes: crosslift status {folder}; crosslift logs {folder} --follow"
    )


def _what(job: SubmittedJob, request: Request) -> str:
    if not job.trains:
        return job.what
    chosen = request.settings
    many = f"{job.elements} runs below " if request.array else ""
    return f"train {many}{request.folder}, {chosen.nodes} node(s) of {chosen.ranks} rank(s)"


def _line(job: JobReport) -> str:
    """One job for people."""
    details = [
        job.state.lower() if job.state != "UNKNOWN" else "forgotten by Slurm; its log and record tell how it ended",
        job.reason and f"({job.reason})",
        job.elapsed and f"for {job.elapsed}",
        job.nodes and f"on {job.nodes}",
        job.restarts and f"restarted {job.restarts} times",
        job.exit and job.exit != "0:0" and f"exit {job.exit}",
    ]
    return f"job {job.job} ({job.what}): {' '.join(each for each in details if each)}"
