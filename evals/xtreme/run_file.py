"""The run file of one `crosslift xtreme run`: its training rows, composed, compared with an earlier call's, written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_text
from data_pipeline.yaml_values import read_yaml, write_yaml
from evals.errors import EvalError
from evals.xtreme.predict import MixupMode
from evals.xtreme.prepared import check_training, count_rows, filled_columns, split_files
from evals.xtreme.run_config import RunPlan, Values, compose, read_plan

RUN_YAML = "run.yaml"


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
    max_bad_rows: int = 0  # limit of questions per file whose answers are not where it says

    def plan(self) -> RunPlan:
        """The run's sections of the config file. Raises EvalError, DataError."""
        return read_plan(self.config, self.task, self.model, self.method, self.overrides)


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
    if file.is_file() and (run.output / "training").is_dir():  # else it was refused and may be corrected
        before = read_yaml(file.read_text(encoding="utf-8"))
        now = read_yaml(_as_yaml(values))  # as it would be read from the file: no tuples
        if key := _difference({**before, "tracking": None}, {**now, "tracking": None}):
            raise EvalError(f"{file}: belongs to a run with another {key}; name a new --output, or use its settings")
    return values


def write_run_file(run: XtremeRun, values: Values) -> None:
    heading = f"# {run.task}, {run.model}, {run.method}; written by `crosslift xtreme run`, read by `crosslift train`\n"
    write_text(run.output / RUN_YAML, heading + _as_yaml(values))


def _as_yaml(values: Values) -> str:
    return write_yaml(values)


def _training_files(run: XtremeRun, plan: RunPlan, data: Path) -> dict[str, Path]:
    """The training file of each language that the method learns from, the dominant one first."""
    files = split_files(data, "train", plan.task)
    if run.soft_labels is not None:
        if plan.task.kind != "tagging":
            raise EvalError(f"--soft-labels {run.soft_labels}: of taggers; {run.task} is {plan.task.kind}")
        found = {each: run.soft_labels / f"{each}.jsonl" for each in plan.task.languages if each != plan.dominant}
        labelled = {language: file for language, file in found.items() if file.is_file()}
        if not labelled:
            raise EvalError(f"--soft-labels {run.soft_labels}: holds no <language>.jsonl of {run.task}'s languages")
        files |= labelled
    if plan.dominant not in files:
        raise EvalError(f"{data / 'train' / plan.dominant}.jsonl: missing, or empty; training needs it")
    order = [plan.dominant, *(language for language in files if language != plan.dominant)]
    return {language: files[language] for language in order[: 1 if plan.train == "dominant" else None]}


def _difference(before: Any, now: Any) -> str:
    """The first key, such as "data.slots_per_step", in which two nested dicts differ; empty: none."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return ""
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            rest = _difference(before.get(key), now.get(key))
            return f"{key}.{rest}" if rest else str(key)
    return ""
