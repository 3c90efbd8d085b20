"""Scores of a run's model, added to the run's MLflow page through `scores.jsonl` beside the run's record.

The events are as in `record.jsonl`, but in a file of their own: a record has one writer, and a run may be training
while a checkpoint of it is evaluated. `mlflow_feed.py` sends them.
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
from training.tracking.mlflow_feed import read_states, sync_record
from training.tracking.mlflow_store import default_store
from training.tracking.run_record import RECORD_NAME, SCORES_NAME, json_number, latest_start, read_events

FOLDER = "scores"  # in the run's folder and among its artifacts


def run_of(model: Path) -> Path | None:
    """The folder of the run that exported a model: the nearest parent folder with a record; None if there is none."""
    model = model.resolve()
    if not (model / EXPORT_FILE).is_file():
        return None
    return next((folder for folder in model.parents if (folder / RECORD_NAME).is_file()), None)


def track_scores(
    model: Path, name: str, metrics: Mapping[str, float], files: Sequence[Path], run: Path | None = None
) -> str | None:
    """Add scores to the page of the run that exported `model`, or of `run`.

    Args:
        name: of the evaluation, such as mgsm; a metric `accuracy/sw` becomes `score/NAME/accuracy/sw`, at the model's
            step.
        files: tables and plots; they are copied into the run's folder.

    Returns:
        A line for the user; None if no run exported the model.

    Raises:
        ConfigError: `run` is not a run's folder, or cannot be written. Errors of MLflow are not raised: its scores are
            sent later.
    """
    if run is not None and not (run / RECORD_NAME).is_file():
        raise ConfigError(f"{run}: holds no run: {RECORD_NAME} is missing")
    if (run := run or run_of(model)) is None:
        return None
    step = ExportInfo.read(model).step or 0 if (model / EXPORT_FILE).is_file() else 0
    values = {f"score/{name}/{metric}": json_number(value) for metric, value in metrics.items()}
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
    """Append the events, except scores equal to the last ones: they would be drawn as two points."""
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
    """Send the scores to the store that the run itself used; the line for the user."""
    start = latest_start(run / RECORD_NAME) or {}
    # Without a store, tracking was off or the folder is on a network disk.
    if start.get("uri") is None and default_store(run) not in read_states(run):
        return f"scores: in {run / SCORES_NAME}; `crosslift ui {run}` shows them on the run's MLflow page"
    result = sync_record(run)
    if result.error or not result.run_id:
        why = f"MLflow at {result.uri} does not have them yet: {result.error}"
        return f"scores: in {run / SCORES_NAME}; {why}; `crosslift ui` sends them"
    return f"scores: on the run's MLflow page at {result.uri}"
