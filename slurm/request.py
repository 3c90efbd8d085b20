"""What `crosslift submit` submits: options of the command line become runs, job settings and job specs.

A sweep (`--array "seed=0,1,2"`, several of them multiplied) is one job array; `--then` commands follow the run.
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slurm.errors import SlurmError, mistakes
from slurm.site import load_settings
from slurm.spec import Element, JobSettings, JobSpec, printable

RUN_PLACEHOLDER = "{run}"  # in a command that follows: the run's folder
MAX_NAME = 80  # characters of a sweep element's folder
MAX_ELEMENTS = 1000  # Slurm's own default limit of an array (MaxArraySize)
OPENING, CLOSING, QUOTES = "([{", ")]}", "\"'"
ORIGINS = {"after": "--after", "elements": "output_dir", "folder": "output_dir", "chdir": "current folder"}


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """The options of `crosslift submit`."""

    config: Path
    overrides: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # of JobSettings, by key; None: not given
    array: tuple[str, ...] = ()  # of a sweep: key=v1,v2
    array_limit: int | None = None
    after: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    offline: bool = False
    accept_changes: bool = False  # resume even if data or config changed
    profile: int | None = None  # steps of which rank 0 writes a profile


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run with its validated run file."""

    folder: Path  # its output_dir, absolute
    values: dict[str, Any]  # of the run file, every default filled in
    readable: tuple[Path, ...] = ()  # files and folders that it reads


@dataclass(frozen=True, slots=True)
class Request:
    """One run, or the runs of a sweep as a job array, and what follows."""

    folder: Path  # of the run, or the parent folder of a sweep's runs
    runs: tuple[PlannedRun, ...]
    settings: JobSettings
    then: tuple[tuple[str, ...], ...]  # words of crosslift commands
    options: SubmitOptions

    @property
    def array(self) -> bool:
        """Whether it is a sweep."""
        return bool(self.options.array)


def load_values(config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Every value of a run file, defaults included.

    Raises:
        ConfigError: a mistake in it, or an address with a login, which the job's copy would lack.
    """
    from training.run_file import load_config, refuse_logins, resolved

    settings = load_config(config, overrides)
    refuse_logins(settings, config)
    return resolved(settings)


def check_values(values: dict[str, Any], settings: JobSettings, accept_changes: bool) -> Iterator[str]:
    """Run `crosslift check` with the environment and size of the job; its lines.

    Raises:
        ConfigError, DataError, ModelError: what the run would raise.
    """
    from training.prefetch import use_variables

    use_variables(settings.environment)  # model and data as the job sees them, HF_HUB_OFFLINE included
    from training.check import check_run
    from training.run_file import validate

    memory = settings.gpu_memory_gib if settings.gpus else None  # ranks on CPUs share the memory of the node
    yield from check_run(
        validate(values, "run file"), nodes=settings.nodes, gpus_per_node=settings.gpus,
        nproc_per_node=settings.ranks, gpu_memory_gib=memory, accept_changes=accept_changes,
    )  # fmt: skip


def build_request(options: SubmitOptions, commands: Collection[str]) -> Request:
    """Load the run files and settings that the options name.

    Args:
        commands: names of crosslift commands that `--then` may queue.

    Raises:
        SlurmError: a mistake in an option or in a settings file.
        ConfigError: a mistake in the run file.
    """
    from training.checks.inputs import paths_read

    given = dict(options.settings)
    if options.offline:
        given["environment"] = {"HF_HUB_OFFLINE": "1"}
    settings = load_settings(given)
    if settings.gpus_per_node is None:
        raise SlurmError("--gpus-per-node: not given, nor in slurm.yaml; 0 means ranks on CPUs")
    if options.array_limit and not options.array:
        raise SlurmError("--array-limit: needs --array")
    then = following_commands(options.then, commands)
    base = load_values(options.config, options.overrides)
    folder = Path(base["output_dir"]).absolute()
    runs = []
    for name, overrides in (sweep_points(options.array) if options.array else {"": ()}).items():
        values = load_values(options.config, [*options.overrides, *overrides]) if overrides else base
        run_folder = folder / name
        readable = tuple(paths_read(values))
        runs.append(PlannedRun(run_folder, {**values, "output_dir": str(run_folder)}, readable))
    return Request(folder, tuple(runs), settings, then, options)


def job_specs(request: Request, folder: Path) -> list[JobSpec]:
    """The jobs of a request, the run first. Those that follow lack the number of the previous job, not known yet.

    Args:
        folder: of the submission.

    Raises:
        SlurmError: a path, name or job number that a batch script cannot contain.
    """
    try:
        name = printable(request.folder.name)
    except ValueError as error:
        raise SlurmError(f"output_dir: {error}") from None
    chosen = request.settings
    python = chosen.python or ("python3" if chosen.container else sys.executable)
    common: dict[str, Any] = {
        "settings": chosen, "folder": folder, "code": folder / "code", "chdir": Path.cwd(), "python": python,
    }  # fmt: skip
    passed = ("--accept-changes",) if request.options.accept_changes else ()
    if request.options.profile:
        passed = (*passed, "--profile", str(request.options.profile))
    configs = config_files(request, folder)
    try:
        elements = tuple(
            Element(run_dir=run.folder, arguments=(str(config), *passed), readable=(config, *run.readable))
            for run, config in zip(request.runs, configs, strict=True)
        )
        train = JobSpec(
            name=name, kind="train", stem="train", array=request.array, array_limit=request.options.array_limit,
            after=request.options.after, elements=elements, **common,
        )  # fmt: skip
        return [train, *(_command_spec(request, words, number, common) for number, words in enumerate(request.then, 1))]
    except ValidationError as error:
        raise mistakes(error, JobSpec, ORIGINS) from None


def config_files(request: Request, folder: Path) -> list[Path]:
    """Where the frozen run files of a submission are."""
    if not request.array:
        return [folder / "config.yaml"]
    return [folder / "configs" / f"{number}.yaml" for number in range(len(request.runs))]


def following_commands(texts: Sequence[str], commands: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """The words of `--then` commands.

    Raises:
        SlurmError: a text is not a crosslift command.
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


def sweep_points(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The overrides of each element of a sweep, by the name of its folder: the product of all `key=v1,v2` texts.

    Raises:
        SlurmError: a text is not such a list, or a key is given twice.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, equals, rest = text.partition("=")
        values = _split(rest)
        if not equals or not re.fullmatch(r"[\w.-]+", key) or not all(values):
            raise SlurmError(f"--array {text!r}: must be key.sub=value,value, such as seed=0,1,2")
        if key in axes:
            raise SlurmError(f"--array {text!r}: {key} is given twice; put all its values into one")
        if key == "output_dir":
            raise SlurmError(f"--array {text!r}: every element gets its own folder below output_dir")
        axes[key] = values
    found = {}
    for number, chosen in enumerate(itertools.product(*axes.values())):
        overrides = tuple(f"{key}={value}" for key, value in zip(axes, chosen, strict=True))
        plain = re.sub(r"[^A-Za-z0-9_.=+-]", "_", "+".join(overrides))[:MAX_NAME]  # no comma: containers mount it
        found[f"{number}-{plain}"] = overrides
    if len(found) > MAX_ELEMENTS:
        raise SlurmError(f"--array: {len(found)} elements; at most {MAX_ELEMENTS}")
    return found


def _command_spec(request: Request, words: tuple[str, ...], number: int, common: dict[str, Any]) -> JobSpec:
    """A command after the run; in a sweep one per element if it names the run's folder."""
    per_element = request.array and any(RUN_PLACEHOLDER in word for word in words)
    folders = [run.folder for run in request.runs] if per_element else [request.folder]
    elements = tuple(
        Element(run_dir=folder, arguments=tuple(word.replace(RUN_PLACEHOLDER, str(folder)) for word in words))
        for folder in folders
    )
    name = f"{printable(request.folder.name)}: {words[0]}"
    return JobSpec(
        name=name, kind="command", stem=f"then-{number}", array=per_element, elements=elements, **common
    )  # fmt: skip


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES:
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]
