"""Select the checkpoint with the best dev score as the run's model.

Writes `model/`, the export of the chosen checkpoint, and `selection.json` with the dev score of each. Every kept
checkpoint is exported by `crosslift export`, scored by the task's metric (mean over the dev languages that the method
may use), and its export deleted. A later call does not repeat scores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.atomic import replaced_path, swap, write_text
from data_pipeline.xtreme.tasks import XtremeTask
from evals.errors import EvalError
from evals.xtreme.predict import EncoderPredictor, MixupMode, write_predictions
from evals.xtreme.prepared import gold_file, read_records, write_gold
from evals.xtreme.score import score_directory

SELECTION_FILE = "selection.json"


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen step, and each step's mean dev score on these languages, 0 to 100; none: the last step was taken."""

    step: int
    languages: tuple[str, ...]
    mixup: MixupMode
    scores: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        scores = {str(step): score for step, score in self.scores.items()}
        return {"step": self.step, "languages": list(self.languages), "mixup": self.mixup, "scores": scores}


def checkpoints(training: Path) -> dict[int, Path]:
    """Complete checkpoints of a run by step (`training.checkpoints`), oldest first. Raises EvalError: none."""
    found = sorted(marker.parent for marker in (training / "checkpoints").glob("step-*/COMPLETE"))
    if not found:
        raise EvalError(f"{training}: holds no complete checkpoint; train first")
    return {int(path.name.removeprefix("step-")): path for path in found}


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


def select(
    training: Path,
    output: Path,
    task: XtremeTask,
    dev: Mapping[str, Path],
    mixup: MixupMode,
    export: Callable[[Path, Path], None],
    say: Callable[[str], None],
) -> Selection:
    """Score every checkpoint without a score and keep the best one's export at `output/model`; ties: the earliest.

    `export(checkpoint, folder)` writes a Hugging Face directory. Without dev files the last checkpoint is used.
    """
    found = checkpoints(training)
    known = _earlier(output / SELECTION_FILE, list(dev), mixup)
    selection = Selection(max(found), tuple(dev), mixup, {})
    for step, checkpoint in found.items() if dev else ():
        score = known.get(step)
        if score is None:
            with_export = _exported(training / "model", step) or output / ".checkpoint"
            if with_export == output / ".checkpoint":
                shutil.rmtree(with_export, ignore_errors=True)
                export(checkpoint, with_export)
            score = dev_score(EncoderPredictor.open(with_export), task, dev, output / "dev" / f"step-{step:08d}", mixup)
            shutil.rmtree(output / ".checkpoint", ignore_errors=True)
        scores = {**selection.scores, step: score}
        selection = Selection(max(scores, key=lambda at: (scores[at], -at)), tuple(dev), mixup, scores)
        write_text(output / SELECTION_FILE, json.dumps(selection.to_json(), indent=1) + "\n")
        say(f"step {step}: {score:.2f} on dev ({', '.join(dev)})")
    model = output / "model"
    if _exported(model, selection.step) is None:
        temporary = output / ".model"
        shutil.rmtree(temporary, ignore_errors=True)
        export(found[selection.step], temporary)
        swap(temporary, model, replaced_path(model))
        shutil.rmtree(replaced_path(model), ignore_errors=True)
    return selection


def _exported(folder: Path, step: int) -> Path | None:
    """The folder, if it holds the export of that step."""
    from modeling.export_info import ExportInfo

    return folder if folder.is_dir() and ExportInfo.read(folder).step == step else None


def _earlier(file: Path, languages: list[str], mixup: MixupMode) -> dict[int, float]:
    """Dev scores of an earlier call on the same languages; none if the file is absent or another's."""
    try:
        content = json.loads(file.read_bytes())
        if content["languages"] == languages and content["mixup"] == mixup:
            return {int(step): float(score) for step, score in content["scores"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}
