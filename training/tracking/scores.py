"""Scores of a run's model on the run's MLflow page: `scores.jsonl` beside the run's record.

In: a model of a run, its scores, and files about them. Out: events as in `record.jsonl`, in a file of their own: a
record has one writer, and a run may be training while a checkpoint of it is scored. Next: `mlflow_feed.py` sends them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling.export_info import EXPORT_FILE, ExportInfo
from training.errors import ConfigError
from training.tracking.mlflow_feed import STATE_NAME
from training.tracking.mlflow_store import default_store
from training.tracking.run_record import RECORD_NAME, SCORES_NAME, number, read_events, read_starts
from training.tracking.tracker import sync_record

FOLDER = "scores"  # in the run's folder, and among its artifacts


def run_of(model: Path) -> Path | None:
    """The folder of the run that exported a model: the nearest around it with a record. None: there is none."""
    model = model.resolve()
    if not (model / EXPORT_FILE).is_file():
        return None
    return next((folder for folder in model.parents if (folder / RECORD_NAME).is_file()), None)


def track_scores(
    model: Path, name: str, metrics: Mapping[str, float], files: Sequence[Path], run: Path | None = None
) -> str | None:
    """Adds scores to the page of the run that exported `model`, or of `run`; a line about it. None: of no run.

    Args:
        name: of the test, such as mgsm; a metric `accuracy/sw` becomes `score/NAME/accuracy/sw`, at the model's step.
        files: tables and plots. They are copied into the run's folder.

    Raises:
        ConfigError: `run` is none, or its folder cannot be written. Never for MLflow: what it lacks is sent later.
    """
    if run is not None and not (run / RECORD_NAME).is_file():
        raise ConfigError(f"{run}: holds no run: {RECORD_NAME} is missing")
    if (run := run or run_of(model)) is None:
        return None
    step = ExportInfo.read(model).step or 0 if (model / EXPORT_FILE).is_file() else 0
    values = {f"score/{name}/{metric}": number(value) for metric, value in metrics.items()}
    events: list[dict[str, Any]] = [{"kind": "metrics", "step": step, "values": values}]
    try:
        folder = run / FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)
            inside = (folder / file.name).relative_to(run).as_posix()
            events.append({"kind": "artifact", "path": inside, "folder": f"{FOLDER}/{name}"})
        _append(run / SCORES_NAME, events)
    except OSError as error:
        raise ConfigError(f"{run}: scores cannot be added: {error.filename}: {error.strerror}") from None
    return _sent(run)


def _append(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Writes the events behind one another, but not scores that are there already: two points would be drawn."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = [(event["step"], event["values"]) for _, event in read_events(path) if event["kind"] == "metrics"]
        for event in events:
            if (event.get("step"), event.get("values")) in known[-1:] and event["kind"] == "metrics":
                continue
            line = {"time": time.time_ns() // 1_000_000, **event}
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _sent(run: Path) -> str:
    """Feeds the store that the run itself used; the line about it."""
    starts = list(read_starts(run / RECORD_NAME))
    own = starts[-1][1].get("uri") if starts else None
    if own is None and not _has_store(run):  # tracking was off, or the folder is on a network disk
        return f"scores: in {run / SCORES_NAME}; `crosslift ui {run}` shows them on the run's MLflow page"
    result = sync_record(run)
    if result.error or not result.run_id:
        why = f"MLflow at {result.uri} lacks them: {result.error}"
        return f"scores: in {run / SCORES_NAME}; {why}; `crosslift ui` sends them"
    return f"scores: on the run's MLflow page at {result.uri}"


def _has_store(run: Path) -> bool:
    """Has the store in the run's folder got the run?"""
    try:
        return default_store(run) in json.loads((run / STATE_NAME).read_text(encoding="utf-8"))["stores"]
    except (OSError, ValueError, KeyError):
        return False
