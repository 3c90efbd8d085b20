"""What a job is: `JobSettings`, which a site or a user chooses, and `JobSpec`, from which the batch script is rendered.

All values end up in a batch script. They may contain spaces, quotes, `$(...)` and any letters, because they are quoted.
What cannot be quoted (line breaks and other control characters) is refused here, by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from data_pipeline.secrets import is_secret_name, without_login
from data_pipeline.settings import PathText, Plain, Section

GRACE_SECONDS = 300
TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
NO_LIMIT = re.compile(r"UNLIMITED|INFINITE", re.IGNORECASE)
GPUS = re.compile(r"(?:gpu:)?(?:(?P<type>[A-Za-z][\w.-]*):)?(?P<number>\d+)")
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
OPTION = re.compile(r"[a-z][a-z0-9-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NOT_IN_SCRIPTS = "and job scripts are files; set it in the shell that submits, from which jobs inherit it"
# Prefixes of variables that belong to the processes of another job, launcher or MPI. If the submitting shell has some,
# the job's ranks would inherit another allocation's deadline, rank or address.
FOREIGN = (
    "CROSSLIFT_", "SRUN_", "SALLOC_", "PMI", "OMPI_", "PRTE_", "HYDI_", "MPI_LOCAL", "MV2_COMM_", "TORCHELASTIC_",
    "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_",
)  # fmt: skip
JOB = re.compile(r"\d+(_\d+)?")
# Options of sbatch that crosslift sets itself, and the key to use instead, if there is one.
OWN_OPTIONS = {
    "nodes": "nodes", "ntasks-per-node": "nproc_per_node", "ntasks": "nproc_per_node", "gpus-per-node": "gpus_per_node",
    "time": "time", "partition": "partition", "account": "account", "qos": "qos", "cpus-per-task": "cpus_per_task",
    "mem": "mem", "signal": "grace_seconds", "array": "--array", "dependency": "--after", "export": "environment",
    "job-name": None, "output": None, "error": None, "open-mode": None, "requeue": None, "no-requeue": None,
    "chdir": None, "parsable": None, "wrap": None, "wait": None, "kill-on-invalid-dep": None,
}  # fmt: skip


def printable(text: str) -> str:
    """The text itself, if it is one line of printable characters."""
    if not text:
        raise ValueError("must not be empty")
    if bad := [each for each in text if not each.isprintable()]:
        raise ValueError(f"{text!r} holds {bad[0]!r}; must be one line without control characters")
    return text


def _path(path: Path) -> Path:
    printable(str(path))
    if "\\" in str(path):
        raise ValueError(
            f"{str(path)!r} holds a backslash, which prevents Slurm from putting job numbers into file names"
        )
    return path


def _time(value: object) -> object:
    text = str(value)  # a number is minutes
    if not (TIME.fullmatch(text) or NO_LIMIT.fullmatch(text)):
        raise ValueError(f"{text!r}: must be minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S (such as 12:00:00) or UNLIMITED")
    return text


def _gpus(value: object) -> object:
    """Validate [TYPE:]NUMBER, as Slurm reads it."""
    found = GPUS.fullmatch(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if found is None:
        raise ValueError(f"{value!r}: must be a number of GPUs, or TYPE:NUMBER such as a100:4")
    return ":".join(filter(None, (found["type"], str(int(found["number"])))))


def _memory(text: str) -> str:
    if not MEMORY.fullmatch(text):
        raise ValueError(f"{text!r}: must be a number with K, M, G or T, such as 500G; 0 is all of a node")
    return text


def _line(text: str) -> str:
    return printable(text.replace("\t", " "))


def _lines(value: object) -> object:
    """Split a block of text into lines."""
    return tuple(value.splitlines()) if isinstance(value, str) else value


def seconds(time: str) -> int | None:
    """Seconds of a time limit as Slurm writes it; None for no limit, which 0 also means to Slurm."""
    if NO_LIMIT.fullmatch(time):
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(each) for each in rest.split(":")]
    if dash:
        hours, minutes, last = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, last = parts
    else:
        hours, (minutes, last) = 0, (*parts, 0)[:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + last or None


Word = Annotated[str, AfterValidator(printable)]
PathWord = Annotated[PathText, AfterValidator(printable)]  # expanded on submission, because scripts quote it
Line = Annotated[str, AfterValidator(_line)]
PlainPath = Annotated[Path, AfterValidator(_path)]


class Container(Section):
    """A container image in which everything on a node runs."""

    image: PathWord = Field(description="file or address of the image")
    mounts: tuple[PathWord, ...] = Field((), description="SOURCE:TARGET, as the container's program expects them")
    command: Annotated[
        tuple[Word, ...], BeforeValidator(lambda value: value.split() if isinstance(value, str) else value)
    ] = Field(("apptainer", "exec", "--nv"), description="program that starts it; `srun`: Slurm's own options (pyxis)")


class JobSettings(Section):
    """Settings of jobs from a site, a project or the command line."""

    partition: Word | None = Field(None, description="Slurm's partition")
    account: Word | None = Field(None, description="Slurm's account")
    qos: Word | None = Field(None, description="Slurm's quality of service")
    time: Annotated[str, BeforeValidator(_time)] | None = Field(
        None, description="time limit of one job, such as 12:00:00; 0 or UNLIMITED: none"
    )
    nodes: int = Field(1, ge=1, description="nodes of a job")
    gpus_per_node: Annotated[str, BeforeValidator(_gpus)] | None = Field(
        None, description="GPUs of each node, such as 8, or with Slurm's name of their type a100:8; 0: ranks on CPUs"
    )
    nproc_per_node: int | None = Field(
        None, ge=1, description="ranks of each node; by default its number of GPUs, or 1"
    )
    cpus_per_task: int | None = Field(
        None, ge=1, description="CPU cores of each node: Slurm's task is a node's launcher"
    )
    mem: Annotated[str, AfterValidator(_memory)] | None = Field(None, description="memory of each node, such as 500G")
    setup: Annotated[tuple[Line, ...], BeforeValidator(_lines)] = Field((), description="shell lines that run first")
    python: PathWord | None = Field(
        None, description="Python interpreter on the nodes; by default the one that submits"
    )
    container: Container | None = Field(None, description="container in which everything on a node runs")
    environment: dict[str, PathText] = Field(
        {}, description="environment variables of the job; no secrets: they are written to files"
    )
    gpu_memory_gib: float | None = Field(None, gt=0, description="memory of a GPU, compared with what the run needs")
    grace_seconds: int | None = Field(
        None, ge=1, le=65535,
        description="seconds before the time limit at which ranks are stopped; by default 300, or a quarter of it",
    )  # fmt: skip
    max_requeues: int = Field(20, ge=0, description="how often a stopped job requeues itself")
    sbatch: Plain[dict[str, str | int | bool]] = Field(
        {}, description="further options of sbatch, such as constraint: a100"
    )

    @model_validator(mode="after")
    def _consistent(self) -> JobSettings:
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"environment: {name!r} is not a valid name of a variable")
            if is_secret_name(name):
                raise ValueError(f"environment: {name} looks like a secret, {NOT_IN_SCRIPTS}")
            if without_login(self.environment[name]) != self.environment[name]:
                raise ValueError(f"environment: {name} holds an address with a login, {NOT_IN_SCRIPTS}")
            if "\0" in self.environment[name]:
                raise ValueError(f"environment: {name} holds a NUL character")
        for name, value in self.sbatch.items():
            if name in OWN_OPTIONS:
                instead = OWN_OPTIONS[name]
                raise ValueError(f"sbatch: {name} is set by crosslift" + (f"; use {instead}" if instead else ""))
            if not OPTION.fullmatch(name):
                raise ValueError(
                    f"sbatch: {name!r} is not an option; write it as sbatch does, such as constraint: a100"
                )
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"sbatch: {name}: {value!r} is not one line without control characters")
        if self.gpus and (self.nproc_per_node or 0) > self.gpus:
            raise ValueError(f"nproc_per_node: {self.nproc_per_node} ranks for {self.gpus} GPUs; at most one each")
        if self.time_limit is not None and self.time_limit <= (self.grace_seconds or 0):
            raise ValueError(f"grace_seconds: {self.grace_seconds} is not less than the time limit, {self.time}")
        return self

    @property
    def time_limit(self) -> int | None:
        """Seconds of a job's time limit; None if it is not given or unlimited."""
        return seconds(self.time) if self.time else None

    @property
    def grace(self) -> int:
        """Seconds before the time limit at which ranks are stopped."""
        quarter = self.time_limit // 4 if self.time_limit else GRACE_SECONDS
        return self.grace_seconds or max(min(GRACE_SECONDS, quarter), 1)

    @property
    def ranks(self) -> int:
        """Ranks of each node."""
        return self.nproc_per_node or self.gpus or 1

    @property
    def gpus(self) -> int:
        """GPUs of each node; 0: ranks on CPUs."""
        return int((self.gpus_per_node or "0").rpartition(":")[2])


class Element(Section):
    """The work of a job, or of one element of its array."""

    run_dir: PlainPath = Field(description="the run's folder, absolute")
    arguments: tuple[str, ...] = Field(min_length=1, description="train: [CONFIG]; command: words of a crosslift line")
    readable: tuple[Path, ...] = Field((), description="files and folders that each node must be able to read")

    @model_validator(mode="after")
    def _arguments_are_text(self) -> Element:
        for word in self.arguments:
            if "\0" in word:
                raise ValueError(f"{word!r} holds a NUL character")
        return self


class JobSpec(Section):
    """One job, from which a batch script is rendered."""

    name: Word = Field(description="name in squeue")
    stem: str = Field(pattern=r"[a-z0-9-]+", description="first part of its files' names")
    kind: Literal["train", "command"] = Field(description="ranks of a run on all nodes, or one process on one")
    settings: JobSettings
    folder: PlainPath = Field(description="folder of the submission, with script and Slurm's output files")
    code: PlainPath = Field(description="the frozen source")
    chdir: PlainPath = Field(description="folder to which relative paths of the run file refer")
    python: Word = Field(description="interpreter on the nodes")
    elements: tuple[Element, ...] = Field(min_length=1)
    array: bool = Field(False, description="whether it is a job array of the elements")
    array_limit: int | None = Field(None, ge=1, description="elements that run at the same time")
    after: tuple[Annotated[str, AfterValidator(printable)], ...] = Field((), description="jobs that must succeed first")

    @model_validator(mode="after")
    def _consistent(self) -> JobSpec:
        for job in self.after:
            if not JOB.fullmatch(job):
                raise ValueError(f"--after {job}: must be a job's number, such as 1234 or 1234_5")
        if self.settings.container is not None:
            for path in (self.folder, self.chdir, *(each.run_dir for each in self.elements)):
                if bad := set(str(path)) & set(":,"):
                    raise ValueError(f"{path}: {bad.pop()!r} in a path that has to be mounted into the container")
        return self

    @property
    def script(self) -> Path:
        """Path of the batch script."""
        return self.folder / f"{self.stem}.sh"

    def output(self, job: str | None = None) -> Path:
        """Slurm's output file of a job, or (None) the pattern for it."""
        return self.folder / f"{self.stem}-{job or ('%A_%a' if self.array else '%j')}.out"
