"""Select the checkpoint with the best dev score as the run's model.

Writes `model/`, the export of the chosen checkpoint, and `selection.json` with the dev score of each. Every kept
checkpoint is exported by `crosslift export`, scored by the task's metric (mean over the dev languages that the method
may use), and its export deleted. A later call does not repeat scores.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_text
from data_pipeline.xtreme.tasks import XtremeTask
from evals.errors import EvalError
from evals.xtreme.predict import EncoderPredictor, MixupMode, write_predictions
from evals.xtreme.prepared import gold_file, read_records, write_gold
from evals.xtreme.score import score_directory
from modeling.export_info import RUN_EXPORT, ExportInfo
from training.checkpoints.checkpoint import complete, step_of
from training.checkpoints.export import export_checkpoint, export_newest
from training.errors import ExportCheckFailed

SELECTION_FILE = "selection.json"


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen step, and each step's mean dev score on these languages, 0 to 100; none: the last step is used."""

    step: int
    languages: tuple[str, ...]
    mixup: MixupMode
    scores: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        scores = {str(step): score for step, score in self.scores.items()}
        return {"step": self.step, "languages": list(self.languages), "mixup": self.mixup, "scores": scores}


def checkpoints(run: Path) -> dict[int, Path]:
    """Complete checkpoints of a training run by step, oldest first. Raises EvalError if there are none."""
    if not (found := {step_of(path): path for path in complete(run)}):
        raise EvalError(f"{run}: holds no complete checkpoint; train first")
    return dict(sorted(found.items()))


def dev_score(
    predictor: EncoderPredictor, task: XtremeTask, files: Mapping[str, Path], folder: Path, mixup: MixupMode
) -> float:
    """The task's score on dev files, mean over languages, 0 to 100. Labels and predictions stay in `folder`."""
    for language, file in files.items():
        records = read_records(file, task)
        if not write_gold(gold_file(folder / "labels", task, language), task, records):
            raise EvalError(f"{file}: no labels; dev rows need them, or remove the file to use the last checkpoint")
        values = predictor.predict(records, mixup).values
        write_predictions(gold_file(folder / "predictions", task, language), task.kind, records, values)
    return score_directory(folder / "predictions", folder / "labels", [task.name], list(files)).tasks[task.name].score


def select(training: Path, output: Path, task: XtremeTask, dev: Mapping[str, Path], mixup: MixupMode) -> Selection:
    """Score every checkpoint that is not scored yet, and leave the best one's export at `output/model`.

    Of equal scores the earliest checkpoint is chosen; without dev files the last one.
    """
    found = checkpoints(training)
    known = _earlier_scores(output / SELECTION_FILE, list(dev), mixup)
    selection = Selection(max(found), tuple(dev), mixup, {})
    for step, checkpoint in found.items() if dev else ():
        score = known.get(step)
        if score is None:
            with _export_of(checkpoint, step, training / RUN_EXPORT, output / ".checkpoint") as export:
                predictor = EncoderPredictor.open(export)
                score = dev_score(predictor, task, dev, output / "dev" / f"step-{step:08d}", mixup)
        scores = {**selection.scores, step: score}
        selection = Selection(max(scores, key=lambda at: (scores[at], -at)), tuple(dev), mixup, scores)
        write_text(output / SELECTION_FILE, json.dumps(selection.to_json(), indent=1) + "\n")
        print(f"     step {step}: {score:.2f} on dev ({', '.join(dev)})", file=sys.stderr, flush=True)
    if not _exported(output / "model", selection.step):
        with _report_failed_check():
            export_newest(found[selection.step], output / "model")
    return selection


@contextmanager
def _export_of(checkpoint: Path, step: int, existing: Path, temporary: Path) -> Iterator[Path]:
    """The run's own export if it is of this checkpoint, else one at `temporary`, deleted at the end."""
    if _exported(existing, step):
        yield existing
        return
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _report_failed_check():
            export_checkpoint(checkpoint, temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _report_failed_check() -> Iterator[None]:
    """Print the failed check of an export as one line; the export is kept and used."""
    try:
        yield
    except ExportCheckFailed as error:
        print(f"     {error}", file=sys.stderr, flush=True)


def _exported(folder: Path, step: int) -> bool:
    """Whether the folder holds the export of that step."""
    return folder.is_dir() and ExportInfo.read(folder).step == step


def _earlier_scores(file: Path, languages: list[str], mixup: MixupMode) -> dict[int, float]:
    """Dev scores of an earlier call on the same languages; none if the file is absent or of other settings."""
    try:
        content = json.loads(file.read_bytes())
        if content["languages"] == languages and content["mixup"] == mixup:
            return {int(step): float(score) for step, score in content["scores"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}
