"""The run file of one `crosslift xtreme run`: composed from the sections of `configs/xtreme.yaml` (base, kind, model,
task and method), compared with an earlier call's, and written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.atomic import write_text
from data_pipeline.config import merged
from data_pipeline.records import DataError
from data_pipeline.settings import difference
from data_pipeline.xtreme.tasks import XtremeTask, xtreme_task
from data_pipeline.yaml_values import read_yaml, write_yaml
from evals.errors import EvalError
from evals.xtreme.predict import MixupMode
from evals.xtreme.prepared import check_training, count_rows, filled_columns, split_files
from training.run_file import apply_override, read_values

RUN_YAML = "run.yaml"
SECTIONS = ("base", "kinds", "models", "tasks", "methods")
CONDITIONS = ("kinds", "models", "tasks")  # conditions that a section may have
PLAN_KEYS = ("epochs", "checkpoints", "train", "select")
LANGUAGES = ("dominant", "all")

Values = dict[str, Any]
Which = Literal["dominant", "all"]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The settings around one training: epochs, checkpoints, languages. `values`: the run file so far."""

    task: XtremeTask
    epochs: float
    checkpoints: int
    train: Which
    select: Which
    values: Values

    @property
    def dominant(self) -> str:
        return str(self.values["data"]["dominant"])

    @property
    def tracking(self) -> Values:
        """The run file's `tracking` section."""
        return dict(self.values.get("tracking") or {})


def read_plan(config: Path, task: str, model: str, method: str, overrides: Sequence[str] = ()) -> RunPlan:
    """The sections for one run, merged. Raises EvalError, and DataError for the task's name."""
    sections = _read(config)
    found = xtreme_task(task)
    if found.kind == "retrieval":
        raise DataError(f"task {task!r} is not trained for; `crosslift xtreme retrieve` scores a model on it")
    names = {"kinds": found.kind, "models": model, "tasks": task}
    values: Values = {}
    _merge_section(values, sections.get("base") or {}, names, f"{config}: base")
    for part, name in (*names.items(), ("methods", method)):
        for section, where in _chain(config, sections, part, name):
            _merge_section(values, section, names, where)
    for override in overrides:
        apply_override(values, override)
    plan = {key: values.pop(key, None) for key in PLAN_KEYS}
    _check_plan(config, plan, values)
    return RunPlan(found, **plan, values=values)


def compose(plan: RunPlan, data_dir: Path, output_dir: Path, files: Mapping[str, str], rows: int) -> Values:
    """The values of a complete run file.

    files: the training file of each language, as an address or below `data_dir`; `rows`: their total number of rows.
    max_steps, checkpoint.every and checkpoint.keep of sections or overrides are kept.
    """
    values: Values = {"data_dir": str(data_dir), "output_dir": str(output_dir)}
    data: Values = {"languages": list(files), "task": {"kind": plan.task.kind}}
    if plan.task.labels:
        data["task"]["labels"] = list(plan.task.labels)
    values = merged(merged(values, {"data": data}), plan.values)
    values["data"]["sources"] = [
        {**source, "files": list(files.values())} for source in values["data"].get("sources") or []
    ]
    values.setdefault("max_steps", steps_of(plan.epochs, rows, values["data"]["slots_per_step"]))
    kept = {"every": max(math.ceil(values["max_steps"] / plan.checkpoints), 1), "keep": plan.checkpoints}
    values["checkpoint"] = merged(kept, values.get("checkpoint") or {})
    values["tracking"] = plan.tracking
    return values


def steps_of(epochs: float, rows: int, slots_per_step: int) -> int:
    """Number of steps that read every row `epochs` times; the last step may read some more."""
    return max(math.ceil(epochs * rows / slots_per_step), 1)


def _read(config: Path) -> Values:
    sections, mistakes = read_values(config)
    if mistakes:
        raise EvalError("\n".join(mistakes))
    if "methods" not in sections:
        raise EvalError(f"{config}: not a file of sections {', '.join(SECTIONS)}; use configs/xtreme.yaml")
    if unknown := [key for key in sections if key not in SECTIONS]:
        raise EvalError(f"{config}: {unknown[0]!r} is not a section; there are {', '.join(SECTIONS)}")
    return sections


def _chain(config: Path, sections: Values, part: str, name: str) -> list[tuple[Values, str]]:
    """The section of that name, preceded by those that it extends, each with its name for messages."""
    found: list[tuple[Values, str]] = []
    named: str | None = name
    while named is not None:
        known = sections.get(part) or {}
        if named not in known:
            raise EvalError(f"{config}: {part} has no {named!r}; there are {', '.join(map(str, known)) or 'none'}")
        where = f"{config}: {part}.{named}"
        if any(where == earlier for _, earlier in found):
            raise EvalError(f"{where}: extends itself")
        section = _mapping(known[named], where)
        found.append(({key: value for key, value in section.items() if key != "extends"}, where))
        named = section.get("extends")
    return found[::-1]


def _merge_section(values: Values, section: Any, names: Mapping[str, str], where: str) -> None:
    """Merge in place a section's own keys, then those it has for this kind, this model and this task."""
    section = _mapping(section, where)
    own = {key: value for key, value in section.items() if key not in CONDITIONS}
    values.update(merged(values, own))
    for condition in CONDITIONS:
        inner = _mapping(section.get(condition), f"{where}.{condition}")
        if names[condition] in inner:
            _merge_section(values, inner[names[condition]], names, f"{where}.{condition}.{names[condition]}")


def _mapping(section: Any, where: str) -> Values:
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise EvalError(f"{where}: holds {section!r}; it must hold keys of a run file")
    return section


def _check_plan(config: Path, plan: Values, values: Values) -> None:
    for key, least in (("epochs", 0), ("checkpoints", 1)):
        number = plan[key]
        whole = key != "checkpoints" or isinstance(number, int)
        if type(number) not in (int, float) or not whole or not math.isfinite(number) or number < least or number == 0:
            raise EvalError(f"{config}: {key} is {number!r}; it must be a number above 0")
    for key in ("train", "select"):
        if plan[key] not in LANGUAGES:
            raise EvalError(f"{config}: {key} is {plan[key]!r}; it must be {' or '.join(LANGUAGES)}")
    if not isinstance(values.get("model"), dict) or not values["model"].get("path"):
        raise EvalError(f"{config}: no section gives model.path; add model.path=DIR, a pretrained encoder's directory")
    for path in ("data.dominant", "data.slots_per_step", "objective.name"):
        section, key = path.split(".")
        if not isinstance(values.get(section), dict) or values[section].get(key) is None:
            raise EvalError(f"{config}: no section gives {path}")
    slots = values["data"]["slots_per_step"]
    if type(slots) is not int or slots < 1:
        raise EvalError(f"{config}: data.slots_per_step is {slots!r}; it must be a whole number above 0")


@dataclass(frozen=True, slots=True)
class XtremeRun:
    """The options of a run. `data_dir`: XTREME's files in any layout, or a folder of `crosslift xtreme prepare`."""

    config: Path
    task: str
    model: str
    method: str
    data_dir: Path
    output: Path
    translations: Path | None = None
    layout: str = "auto"
    soft_labels: Path | None = None  # taggers: training rows of `teacher.py`, which replace those of the same language
    nproc: int | None = None
    overrides: tuple[str, ...] = ()
    mixup: MixupMode = "auto"
    baseline: Path | None = None  # another run's output
    unlabelled: bool = False  # test labels are erased: predictions only
    max_bad_rows: int = 0  # limit of questions per file with misplaced answers


def composed(run: XtremeRun, plan: RunPlan, data: Path) -> Values:
    """The run file's values. Raises EvalError: rows that the method cannot learn from, or the folder of another run."""
    objective = plan.values["objective"]
    files = _training_files(run, plan, data)
    check_training(
        files, plan.task, several=plan.train == "all", dominant=plan.dominant,
        wants_back=objective["name"] == "xmixup" and objective.get("source_schedule", 0) is not None,
    )  # fmt: skip
    rows = sum(count_rows(file) for file in files.values())
    addresses = {
        language: str(file.relative_to(data) if file.is_relative_to(data) else file.resolve())
        for language, file in files.items()
    }
    values = compose(plan, data.resolve(), (run.output / "training").resolve(), addresses, rows)
    for source in values["data"]["sources"]:
        source["columns"] = filled_columns(source["columns"], plan.task, files.values())
    values["tracking"]["run_name"] = f"{plan.tracking.get('run_name') or run.output.resolve().name}-training"
    file = run.output / RUN_YAML
    if file.is_file() and (run.output / "training").is_dir():  # otherwise it never started and may be corrected
        before = read_yaml(file.read_text(encoding="utf-8"))
        now = read_yaml(write_yaml(values))  # as read from the file: without tuples
        if keys := difference({**before, "tracking": None}, {**now, "tracking": None}):
            key = next(iter(keys))
            raise EvalError(f"{file}: belongs to a run with another {key}; name a new --output, or use its settings")
    return values


def write_run_file(run: XtremeRun, values: Values) -> None:
    heading = f"# {run.task}, {run.model}, {run.method}; written by `crosslift xtreme run`, read by `crosslift train`\n"
    write_text(run.output / RUN_YAML, heading + write_yaml(values))


def _training_files(run: XtremeRun, plan: RunPlan, data: Path) -> dict[str, Path]:
    """The training file of each language that the method learns from, the dominant one first."""
    files = split_files(data, "train", plan.task)
    if run.soft_labels is not None:
        if plan.task.kind != "tagging":
            raise EvalError(f"--soft-labels {run.soft_labels}: for taggers only; {run.task} is {plan.task.kind}")
        found = {each: run.soft_labels / f"{each}.jsonl" for each in plan.task.languages if each != plan.dominant}
        labelled = {language: file for language, file in found.items() if file.is_file()}
        if not labelled:
            raise EvalError(f"--soft-labels {run.soft_labels}: holds no <language>.jsonl of {run.task}'s languages")
        files |= labelled
    if plan.dominant not in files:
        raise EvalError(f"{data / 'train' / plan.dominant}.jsonl: missing, or empty; training needs it")
    order = [plan.dominant, *(language for language in files if language != plan.dominant)]
    return {language: files[language] for language in order[: 1 if plan.train == "dominant" else None]}
