"""Slurm's programs: the only file that runs sbatch, squeue, scontrol, sacct and scancel.

It handles the differences between Slurm's versions and sites: job numbers with and without `--parsable`'s form,
warnings around them, jobs that Slurm no longer lists, clusters without accounting.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from slurm.errors import SlurmError
from slurm.spec import FOREIGN

TIMEOUT_S = 60.0  # of one call
PLAIN_NUMBER = re.compile(r"(\d+)(?:;([\w.-]+))?")
SENTENCE = re.compile(r"Submitted batch job (\d+)(?: on cluster ([\w.-]+))?")
# Variables that would override options on which the script relies; those that a script sets are added to them.
RESERVED_VARIABLES = re.compile(
    r"SBATCH_(ARRAY_INX|CHDIR|DEPENDENCY|ERROR|EXPORT|GPUS.*|INPUT|JOB_NAME|MEM_.*|NO_REQUEUE|OPEN_MODE|OUTPUT|REQUEUE"
    r"|SIGNAL|WAIT.*|CPUS_PER_.*)"
)
RENAMED = {"TIME": "TIMELIMIT"}  # variables whose name differs from the option's
CHECKPOINT_FIRST = ("--batch", "--signal=ALRM")  # handled by the batch script of a training; see `render.py`
HAS_ENDED = ("Invalid job id", "already completing or completed")
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True, slots=True)
class JobId:
    """A job's number, such as 12, or 12_3 for an element of an array; and its cluster if there are several."""

    number: str
    cluster: str | None = None

    def __str__(self) -> str:
        return self.number


@dataclass(frozen=True, slots=True)
class JobState:
    """Slurm's state of a job or of an element of an array."""

    job: str
    state: str
    reason: str | None = None
    elapsed: str | None = None
    nodes: str | None = None
    restarts: int | None = None
    exit: str | None = None


def submit(script: str, options: Collection[str] = (), cluster: str | None = None) -> JobId:
    """Run `sbatch SCRIPT`.

    Args:
        options: names of the options that the script sets; variables of the shell for them, which sbatch would
            prefer, are removed.
        cluster: one of several clusters.

    Raises:
        SlurmError: the job was refused, with Slurm's reason; or there is no sbatch.
    """
    upper = (option.upper().replace("-", "_") for option in options)
    overridden = {f"SBATCH_{RENAMED.get(name, name)}" for name in upper}
    # A job that is submitted from within another one must not inherit its variables.
    clean = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith(("SLURM_", *FOREIGN)) and name not in KEPT_VARIABLES)
        and not RESERVED_VARIABLES.fullmatch(name)
        and name not in overridden
    }
    answer = _call(sbatch_command(script, cluster), clean)
    if answer.returncode != 0:
        raise SlurmError(f"sbatch refused the job: {_reason(answer.stderr) or 'no reason given'}")
    return job_id(answer.stdout)


def sbatch_command(script: str, cluster: str | None = None) -> list[str]:
    """The command that submits a script."""
    return ["sbatch", "--parsable", *_cluster(cluster), script]


def job_id(output: str) -> JobId:
    """The job number in sbatch's output: `12`, `12;cluster` or the older sentence, among warnings."""
    found = []
    for line in map(str.strip, output.splitlines()):
        if match := PLAIN_NUMBER.fullmatch(line) or SENTENCE.fullmatch(line.rstrip(".")):
            found.append(JobId(match[1], match[2]))
    if len(set(found)) != 1:
        printed = " | ".join(output.splitlines()) or "nothing"
        raise SlurmError(f"sbatch printed no job number, but {printed!r}; check with squeue whether the job is queued")
    return found[0]


def queued(jobs: Sequence[JobId]) -> list[JobState]:
    """States of those jobs that have not ended: pending, running, completing; elements of arrays one by one."""
    found = []
    for cluster, numbers in _by_cluster(jobs):
        answer = _call(["squeue", "--noheader", "--array", *_cluster(cluster), f"--jobs={','.join(numbers)}",
                        "--format=%i|%T|%r|%M|%N"])  # fmt: skip
        if (
            answer.returncode != 0 and "Invalid job id" not in answer.stderr
        ):  # Slurm no longer lists the job: not queued
            raise SlurmError(f"squeue: {_reason(answer.stderr)}")
        for line in answer.stdout.splitlines():
            if line.count("|") == 4:  # not a cluster's header line
                job, state, reason, elapsed, nodes = line.split("|")
                found.append(JobState(job, state, _known(reason), _known(elapsed), _known(nodes)))
    return found


def past(job: JobId) -> list[JobState]:
    """States of a job that is no longer queued: from accounting, else from the controller."""
    return _from_accounting(job) or _from_controller(job)


def _from_accounting(job: JobId) -> list[JobState]:
    if shutil.which("sacct") is None:
        return []
    command = ["sacct", "--noheader", "--parsable2", "--allocations", *_cluster(job.cluster), "--jobs", job.number]
    fields = "JobID,State,Elapsed,NodeList,ExitCode"
    answer = _call([*command, f"--format={fields},Restarts"])
    if answer.returncode != 0 and "Restarts" in answer.stderr:  # a field that older versions lack
        answer = _call([*command, f"--format={fields}"])
    found = []
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        parts = line.split("|")
        if len(parts) >= 5:
            # "CANCELLED by 1000": the state is its first word.
            restarts = int(parts[5]) if len(parts) > 5 and parts[5].isdigit() else None
            state = parts[1].split()[0] if parts[1] else "UNKNOWN"
            found.append(JobState(parts[0], state, None, parts[2], _known(parts[3]), restarts, parts[4]))
    return found


def _from_controller(job: JobId) -> list[JobState]:
    answer = _call(["scontrol", "show", *_cluster(job.cluster), "job", job.number])
    found = []
    for text in re.split(r"(?m)^(?=JobId=)", answer.stdout if answer.returncode == 0 else ""):
        # The first line contains the job's name, which may be any text; the others are Slurm's own.
        first, _, rest = text.partition("\n")
        state = re.search(r"(?m)^ *JobState=(\S+) Reason=(\S+)", rest)
        if not first.startswith("JobId=") or state is None:
            continue
        counts = re.search(r"(?m)^ *Requeue=\d+ Restarts=(\d+) .*?ExitCode=(\S+)", rest)
        element = re.match(r"JobId=\d+ ArrayJobId=(\d+) ArrayTaskId=(\d+) ", first)
        number = f"{element[1]}_{element[2]}" if element else first.removeprefix("JobId=").split()[0]
        found.append(
            JobState(
                number, state[1], _known(state[2]), _field(rest, "RunTime"), _known(_field(rest, "NodeList") or ""),
                int(counts[1]) if counts else None, counts[2] if counts else None,
            )
        )  # fmt: skip
    return found


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"(?m)^ *{name}=(\S+)", text)
    return found[1] if found else None


def output_file(job: JobId) -> str | None:
    """Slurm's output file of a job; None if the controller no longer lists the job."""
    answer = _call(["scontrol", "show", *_cluster(job.cluster), "job", job.number])
    found = re.search(r"(?m)^ *StdOut=(.*)$", answer.stdout) if answer.returncode == 0 else None
    return found[1] if found else None


def cancel(jobs: Sequence[JobId], *options: str) -> None:
    """Run `scancel` with options such as CHECKPOINT_FIRST; jobs that have already ended are ignored."""
    for cluster, numbers in _by_cluster(jobs):
        answer = _call(["scancel", *options, *_cluster(cluster), *numbers])
        if answer.returncode != 0 and not any(each in answer.stderr for each in HAS_ENDED):
            raise SlurmError(f"scancel: {_reason(answer.stderr)}")


def _by_cluster(jobs: Sequence[JobId]) -> list[tuple[str | None, list[str]]]:
    clusters = dict.fromkeys(job.cluster for job in jobs)
    return [(cluster, [job.number for job in jobs if job.cluster == cluster]) for cluster in clusters]


def _cluster(cluster: str | None) -> list[str]:
    return [f"--clusters={cluster}"] if cluster else []


def _known(value: str) -> str | None:
    return None if value in ("", "None", "(null)", "N/A", "None assigned") else value


def _reason(stderr: str) -> str:
    """Slurm's messages without their prefixes, on one line."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line).strip() for line in stderr.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def _call(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one program."""
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: not found on PATH; is this a login node of a Slurm cluster?") from None
    except PermissionError:
        raise SlurmError(f"{command[0]}: no permission to run it") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer in {TIMEOUT_S:.0f} s; is Slurm's controller down?") from None
