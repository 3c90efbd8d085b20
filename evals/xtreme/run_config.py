"""Compose one run file from the sections of `configs/xtreme.yaml`: base, kind, model, task and method.

Nothing of `training` is imported: the command that reads the run file validates it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from data_pipeline.config import merged
from data_pipeline.records import DataError
from data_pipeline.xtreme.tasks import XtremeTask, xtreme_task
from data_pipeline.yaml_values import read_yaml
from evals.errors import EvalError

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
    _put(values, sections.get("base") or {}, names, f"{config}: base")
    for part, name in (*names.items(), ("methods", method)):
        for section, where in _chain(config, sections, part, name):
            _put(values, section, names, where)
    for override in overrides:
        _override(values, override)
    plan = {key: values.pop(key, None) for key in PLAN_KEYS}
    _check_plan(config, plan, values)
    return RunPlan(found, **plan, values=values)


def compose(plan: RunPlan, data_dir: Path, output_dir: Path, files: Mapping[str, str], rows: int) -> Values:
    """The values of a complete run file.

    files: the training file of each language, as an address or below `data_dir`; `rows`: their total number of rows.
    max_steps, checkpoint.every and checkpoint.keep keep the values of sections or overrides.
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
    try:
        sections = read_yaml(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{config}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f":{place.line + 1}" if place else ""
        raise EvalError(f"{config}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(sections, dict) or "methods" not in sections:
        raise EvalError(f"{config}: not a file of sections {', '.join(SECTIONS)}; take configs/xtreme.yaml")
    if unknown := [key for key in sections if key not in SECTIONS]:
        raise EvalError(f"{config}: {unknown[0]!r} is no section; there are {', '.join(SECTIONS)}")
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


def _put(values: Values, section: Any, names: Mapping[str, str], where: str) -> None:
    """Merge in place a section's own keys, then those it has for this kind, this model and this task."""
    section = _mapping(section, where)
    own = {key: value for key, value in section.items() if key not in CONDITIONS}
    values.update(merged(values, own))
    for condition in CONDITIONS:
        inner = _mapping(section.get(condition), f"{where}.{condition}")
        if names[condition] in inner:
            _put(values, inner[names[condition]], names, f"{where}.{condition}.{names[condition]}")


def _mapping(section: Any, where: str) -> Values:
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise EvalError(f"{where}: holds {section!r}; it must hold keys of a run file")
    return section


def _override(values: Values, text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise EvalError(f"override {text!r}: must be key.sub=value, e.g. objective.layer=7")
    try:
        value = read_yaml(raw)
    except yaml.YAMLError as error:
        raise EvalError(f"override {text!r}: the value is not valid YAML") from error
    for name in reversed(key.split(".")):
        value = {name: value}
    values.update(_checked_merge(values, value, text))


def _checked_merge(below: Values, above: Values, text: str) -> Values:
    """`merged`, but a key below a value that is not a section is a mistake."""
    for key, value in above.items():
        inner = below.get(key)
        if isinstance(value, dict) and inner is not None and not isinstance(inner, dict):
            raise EvalError(f"override {text!r}: {key!r} holds {type(inner).__name__}, not a section")
        if isinstance(value, dict) and isinstance(inner, dict):
            _checked_merge(inner, value, text)
    return merged(below, above)


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
