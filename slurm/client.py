"""Slurm's programs: the only file that starts sbatch, squeue, scontrol, sacct and scancel.

In: arguments. Out: what they printed, in this package's own words. Next: `submit.py`, `jobs.py`.

What differs between Slurm's versions and sites is met here: job numbers with and without `--parsable`'s form,
warnings around them, jobs that Slurm has forgotten, clusters without accounting.
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

SECONDS = 60.0  # for one answer
PLAIN_NUMBER = re.compile(r"(\d+)(?:;([\w.-]+))?")
SENTENCE = re.compile(r"Submitted batch job (\d+)(?: on cluster ([\w.-]+))?")
# What sbatch would read from the shell although the script rests on its own; besides, whatever a script's options say.
SCRIPTS_OWN = re.compile(
    r"SBATCH_(ARRAY_INX|CHDIR|DEPENDENCY|ERROR|EXPORT|GPUS.*|INPUT|JOB_NAME|MEM_.*|NO_REQUEUE|OPEN_MODE|OUTPUT|REQUEUE"
    r"|SIGNAL|WAIT.*|CPUS_PER_.*)"
)
RENAMED = {"TIME": "TIMELIMIT"}  # variables with another name than the option
CHECKPOINT_FIRST = ("--batch", "--signal=ALRM")  # what the batch script of a training waits for; see `render.py`
ENDED = ("Invalid job id", "already completing or completed")
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True, slots=True)
class JobId:
    """A job's number, such as 12, or 12_3 for an element of an array; and its cluster where there are several."""

    number: str
    cluster: str | None = None

    def __str__(self) -> str:
        return self.number


@dataclass(frozen=True, slots=True)
class JobState:
    """What Slurm knows of a job or of an element of an array."""

    job: str
    state: str
    reason: str | None = None
    elapsed: str | None = None
    nodes: str | None = None
    restarts: int | None = None
    exit: str | None = None


def submit(script: str, options: Collection[str] = (), cluster: str | None = None) -> JobId:
    """`sbatch SCRIPT`, to a cluster of several where one is named.

    `options` are the names of those that the script sets. sbatch would rather go by a variable of the shell.

    Raises:
        SlurmError: it was refused, with Slurm's reason; or there is no sbatch.
    """
    upper = (option.upper().replace("-", "_") for option in options)
    said = {f"SBATCH_{RENAMED.get(name, name)}" for name in upper}
    # A job that is submitted from within another one must not take over that one's shape.
    clean = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith(("SLURM_", *FOREIGN)) and name not in KEPT)
        and not SCRIPTS_OWN.fullmatch(name)
        and name not in said
    }
    answer = _call(sbatch_command(script, cluster), clean)
    if answer.returncode != 0:
        raise SlurmError(f"sbatch refused the job: {_reason(answer.stderr) or 'it gave no reason'}")
    return job_id(answer.stdout)


def sbatch_command(script: str, cluster: str | None = None) -> list[str]:
    """The command that submits a script."""
    return ["sbatch", "--parsable", *_cluster(cluster), script]


def job_id(output: str) -> JobId:
    """The number in what sbatch printed: `12`, `12;cluster` or the older sentence, among warnings."""
    found = []
    for line in map(str.strip, output.splitlines()):
        if match := PLAIN_NUMBER.fullmatch(line) or SENTENCE.fullmatch(line.rstrip(".")):
            found.append(JobId(match[1], match[2]))
    if len(set(found)) != 1:
        said = " | ".join(output.splitlines()) or "nothing"
        raise SlurmError(f"sbatch gave no job number, but {said!r}; look with squeue whether the job is queued")
    return found[0]


def queued(jobs: Sequence[JobId]) -> list[JobState]:
    """Those of the jobs that are not at an end: pending, running, completing; each element of an array by itself."""
    found = []
    for cluster, numbers in _by_cluster(jobs):
        answer = _call(["squeue", "--noheader", "--array", *_cluster(cluster), f"--jobs={','.join(numbers)}",
                        "--format=%i|%T|%r|%M|%N"])  # fmt: skip
        if answer.returncode != 0 and "Invalid job id" not in answer.stderr:  # that one: forgotten, hence not queued
            raise SlurmError(f"squeue: {_reason(answer.stderr)}")
        for line in answer.stdout.splitlines():
            if line.count("|") == 4:  # a cluster's headline has none
                job, state, reason, elapsed, nodes = line.split("|")
                found.append(JobState(job, state, _known(reason), _known(elapsed), _known(nodes)))
    return found


def past(job: JobId) -> list[JobState]:
    """What is known of a job that is no longer queued: from accounting, else from the controller's memory."""
    return _from_accounting(job) or _from_controller(job)


def _from_accounting(job: JobId) -> list[JobState]:
    if shutil.which("sacct") is None:
        return []
    answer = _call(["sacct", "--noheader", "--parsable2", "--allocations", *_cluster(job.cluster), "--jobs", job.number,
                    "--format=JobID,State,Elapsed,NodeList,ExitCode,Restarts"])  # fmt: skip
    if answer.returncode != 0 and "Restarts" in answer.stderr:  # a field that older versions do not know
        answer = _call(["sacct", "--noheader", "--parsable2", "--allocations", *_cluster(job.cluster), "--jobs",
                        job.number, "--format=JobID,State,Elapsed,NodeList,ExitCode"])  # fmt: skip
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
        # The first line holds the job's name, which may say anything; all others are Slurm's.
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
    """Where Slurm writes a job's output, as far as the controller still knows the job."""
    answer = _call(["scontrol", "show", *_cluster(job.cluster), "job", job.number])
    found = re.search(r"(?m)^ *StdOut=(.*)$", answer.stdout) if answer.returncode == 0 else None
    return found[1] if found else None


def cancel(jobs: Sequence[JobId], *options: str) -> None:
    """`scancel`, with options such as CHECKPOINT_FIRST; jobs that have ended meanwhile are no error."""
    for cluster, numbers in _by_cluster(jobs):
        answer = _call(["scancel", *options, *_cluster(cluster), *numbers])
        if answer.returncode != 0 and not any(each in answer.stderr for each in ENDED):
            raise SlurmError(f"scancel: {_reason(answer.stderr)}")


def _by_cluster(jobs: Sequence[JobId]) -> list[tuple[str | None, list[str]]]:
    clusters = dict.fromkeys(job.cluster for job in jobs)
    return [(cluster, [job.number for job in jobs if job.cluster == cluster]) for cluster in clusters]


def _cluster(cluster: str | None) -> list[str]:
    return [f"--clusters={cluster}"] if cluster else []


def _known(value: str) -> str | None:
    return None if value in ("", "None", "(null)", "N/A", "None assigned") else value


def _reason(stderr: str) -> str:
    """The telling part of Slurm's messages, on one line."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line).strip() for line in stderr.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def _call(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """One program's answer."""
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: not found on PATH; is this a login node of a Slurm cluster?") from None
    except PermissionError:
        raise SlurmError(f"{command[0]}: must not be run here") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer in {SECONDS:.0f} s; is Slurm's controller away?") from None
