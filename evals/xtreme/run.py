"""One task of XTREME from data to score: `crosslift xtreme run`.

From the names of a task, a model and a method (`configs/xtreme.yaml`) and the task's files, writes a folder with

    data/                   canonical rows (unless `data_dir` holds them already)
    run.yaml                the run file, readable by `crosslift train`
    training/               the training run: checkpoints, record
    selection.json, dev/    every checkpoint's score on dev
    model/                  the chosen checkpoint's export
    predictions/{task}/     ready to submit
    labels/{task}/          gold labels, if there are any
    scores.json             scores, the published row, the transfer gap
    table.txt               the printed table

A second call resumes an interrupted run.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_text
from data_pipeline.config import merged
from data_pipeline.xtreme.prepare import STAMP, PrepareOptions, prepare_task
from data_pipeline.xtreme.tasks import XtremeTask
from evals.errors import EvalError
from evals.xtreme.predict import EncoderPredictor, write_predictions
from evals.xtreme.prepared import gold_file, read_records, split_files, write_gold
from evals.xtreme.run_file import RUN_YAML, RunPlan, XtremeRun, composed, read_plan, write_run_file
from evals.xtreme.run_table import SCORES_FILE, read_scores, run_table, summary
from evals.xtreme.score import score_directory
from evals.xtreme.selection import Selection, select
from modeling.export_info import RUN_EXPORT
from training.checkpoints.card_sections import add_scores
from training.provenance import description
from training.start import train_to_end
from training.tracking.run_record import TABLE_FILE
from training.tracking.tracker import Tracker, parent_run

MADE_BY = "made_by.json"


def run_xtreme(run: XtremeRun) -> dict[str, Any]:
    """Run everything, from files to table, with printed progress. Returns what it wrote to `scores.json`.

    Raises EvalError, DataError, ModelError or ConfigError, one line each, and TrainingEnded. Tracking starts after the
    checks of data and folder.
    """
    plan = read_plan(run.config, run.task, run.model, run.method, run.overrides)
    baseline = read_scores(run.baseline, plan.task) if run.baseline is not None else None
    _report(f"1/5  rows of {run.task}")
    data = _data(run, plan)
    values = composed(run, plan, data)
    params = {
        "task": run.task, "model": run.model, "method": run.method, "mixup": run.mixup, "overrides": run.overrides,
        "data_dir": run.data_dir, "translations": run.translations, "soft_labels": run.soft_labels,
    }  # fmt: skip
    with parent_run(run.output, plan.tracking, params) as (tracker, child):
        write_run_file(run, merged(values, {"tracking": dict(child)}))
        return _train_and_score(run, plan, data, baseline, tracker)


def _train_and_score(
    run: XtremeRun, plan: RunPlan, data: Path, baseline: Mapping[str, Any] | None, tracker: Tracker
) -> dict[str, Any]:
    """Steps 2 to 5, once `run.yaml` exists."""
    _report(f"2/5  {run.model}, {run.method}: trains with {run.output / RUN_YAML}")
    _train(run)
    _report("3/5  every checkpoint on dev")
    dev = split_files(data, "dev", plan.task)
    if plan.select == "dominant":
        dev = {language: file for language, file in dev.items() if language == plan.dominant}
    if not dev:
        _report(f"     {data / 'dev'}: no rows that {run.method} may use; the last checkpoint is used")
    chosen = select(run.output / "training", run.output, plan.task, dev, run.mixup)
    _report(f"4/5  predictions of step {chosen.step} for the test rows: {run.output / 'predictions' / run.task}")
    predicted, labelled = _predict(run, plan.task, data, chosen.step)
    _report("5/5  scores")
    run_summary = table = None
    if labelled:
        scores = score_directory(run.output / "predictions", run.output / "labels", [run.task]).tasks[run.task]
        run_summary = summary(plan.task, scores, plan.dominant, run.model, run.method, baseline)
        table = run_table(plan.task, run_summary, plan.dominant)
    results = {
        "task": run.task, "model": run.model, "method": run.method, "selection": chosen.to_json(),
        "predicted": predicted, "summary": run_summary, "versions": description(),
    }  # fmt: skip
    write_text(run.output / SCORES_FILE, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    if table is not None:
        write_text(run.output / TABLE_FILE, table + "\n")
        add_scores(run.output / RUN_EXPORT, run.task, {"protocol": {"selected step": chosen.step}}, table)
    _track(tracker, run, chosen, results)
    if run_summary is None:
        print(f"\n{run.data_dir}: the test rows have no labels, so there are predictions and no scores")
    else:
        print(f"\n{run.task}, {run.model}, {run.method}\n\n{table}")
    return results


def _data(run: XtremeRun, plan: RunPlan) -> Path:
    """The folder of canonical rows: `data_dir` if it is one, otherwise made from it."""
    if any((run.data_dir / "test").glob("*.jsonl")):
        if run.translations is not None:
            raise EvalError(f"{run.data_dir}: is prepared already, so --translations cannot be added; prepare it again")
        _check_stamp(run.data_dir / STAMP, run.task)
        return run.data_dir
    options = PrepareOptions(
        layout=run.layout, translations=run.translations, allow_unlabelled_test=run.unlabelled,
        max_bad_rows=run.max_bad_rows,
        remedy="name a new --output, or run it with the previous data and options",
    )  # fmt: skip
    prepare_task(run.task, run.data_dir, run.output / "data", options)
    return run.output / "data"


def _check_stamp(stamp: Path, task: str) -> None:
    if stamp.is_file():
        prepared = json.loads(stamp.read_bytes())["made_from"]["task"]
        if prepared != task:
            raise EvalError(f"{stamp}: holds the rows of {prepared}, not of {task}")


def _train(run: XtremeRun) -> None:
    """Train, or resume; its output goes to stderr, because stdout is for this command's table."""
    with redirect_stdout(sys.stderr):
        train_to_end(run.output / RUN_YAML, nproc=run.nproc)


def _predict(run: XtremeRun, task: XtremeTask, data: Path, step: int) -> tuple[dict[str, Any], bool]:
    """Predictions and gold labels of every test language; {language: rows, mixed}, and whether there are labels."""
    folder = run.output / "predictions"
    stamp = {"step": step, "mixup": run.mixup}
    earlier = _earlier_predictions(folder, stamp)
    predictor: EncoderPredictor | None = None
    labelled = []
    for language, file in split_files(data, "test", task).items():
        records = read_records(file, task)
        labelled.append(write_gold(gold_file(run.output / "labels", task, language), task, records))
        if language in earlier and earlier[language]["rows"] == len(records):
            continue
        predictor = predictor or EncoderPredictor.open(run.output / "model")
        found = predictor.predict(records, run.mixup)
        write_predictions(gold_file(folder, task, language), task.kind, records, found.values)
        earlier[language] = {"rows": len(records), "mixed": found.mixed}
        write_text(folder / MADE_BY, json.dumps({**stamp, "languages": earlier}, indent=1) + "\n")
    if not labelled:
        raise EvalError(f"{data / 'test'}: no test rows of {task.name}")
    return earlier, all(labelled)


def _earlier_predictions(folder: Path, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Predictions of an earlier call with the same model; those of another model are removed."""
    try:
        content = json.loads((folder / MADE_BY).read_bytes())
        if {key: content[key] for key in stamp} == dict(stamp):
            return dict(content["languages"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return {}


def _track(tracker: Tracker, run: XtremeRun, chosen: Selection, results: Mapping[str, Any]) -> None:
    """Send scores as metrics: dev scores by step, the rest at the chosen step."""
    for step, score in chosen.scores.items():
        tracker.log(step, {"dev/score": score})
    run_summary = results["summary"]
    if run_summary is not None:
        metrics = {"test/score": run_summary["score"]}
        metrics |= {f"test/{metric}": value for metric, value in run_summary["average"].items()}
        for language, scores in run_summary["languages"].items():
            metrics |= {f"test/{metric}/{language}": value for metric, value in scores.items()}
        metrics |= {f"test/n/{language}": float(rows["rows"]) for language, rows in results["predicted"].items()}
        metrics |= {f"test/gap/{metric}": value for metric, value in (run_summary["gap"] or {}).items()}
        tracker.log(chosen.step, metrics)
    for name in (RUN_YAML, SCORES_FILE, *([TABLE_FILE] if run_summary is not None else [])):
        tracker.artifact(run.output / name)


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
