"""Scores of a run's model are added to the run in MLflow, from any process, exactly once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evals import commands, quickstart
from evals.mgsm.numbers import HEADLINE
from evals.mgsm.report import score_metrics, write_score_files
from training.errors import ConfigError
from training.tracking.config import TrackingConfig
from training.tracking.mlflow_feed import sync_record
from training.tracking.mlflow_store import default_store, open_client
from training.tracking.run_record import RECORD_NAME, SCORES_NAME, read_events
from training.tracking.scores import run_of, track_scores
from training.tracking.tracker import Tracker

METRICS = {"accuracy/en": 0.5, "n/en": 10.0, "accuracy/sw": 0.25, "n/sw": 10.0}


def export_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    description = {"format": 1, "objective": "sft", "languages": ["en", "sw"], "step": 7}
    (folder / "crosslift.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its own store, which MLflow takes seconds to create."""
    run = tmp_path_factory.mktemp("runs") / "a"
    tracker = Tracker(run, TrackingConfig(sync_seconds=0.05))
    tracker.start({}, {}, None)
    tracker.log(7, {"train/loss": 1.0})
    tracker.finish("FINISHED", timeout=120)
    export_in(run / "model")
    return run


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """A copy of that run's folder whose `tracking.json` has nothing recorded as sent."""
    shutil.copytree(
        finished, tmp_path / "a", ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts", "tracking.json")
    )
    tracked = json.loads((finished / "tracking.json").read_text())
    (state,) = tracked["stores"].values()
    text = json.dumps({"stores": {default_store(tmp_path / "a"): {**state, "run_id": "", "cursor": 0}}})
    (tmp_path / "a" / "tracking.json").write_text(text)
    shutil.copy(finished / "mlflow.db", tmp_path / "a" / "mlflow.db")
    return tmp_path / "a"


def page(run: Path) -> tuple[Any, Any]:
    client = open_client(default_store(run))
    experiment = client.get_experiment_by_name("crosslift")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def test_scores_and_files_are_on_the_page_of_the_run_that_exported_the_model(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "elsewhere" / "table.txt"
    table.parent.mkdir()
    table.write_text("en 50 %")
    line = track_scores(run / "model", "mgsm", METRICS, [table])
    assert line == f"scores: on the run's MLflow page at {default_store(run)}"
    client, found = page(run)
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {
        "train/loss": 1.0, "validation/mgsm/accuracy/en": 0.5, "validation/mgsm/n/en": 10.0,
        "validation/mgsm/accuracy/sw": 0.25, "validation/mgsm/n/sw": 10.0,
    }  # fmt: skip
    (point,) = client.get_metric_history(found.info.run_id, "validation/mgsm/accuracy/sw")
    assert point.step == 7  # of the export
    (artifact,) = client.list_artifacts(found.info.run_id, "scores/mgsm")
    assert artifact.path == "scores/mgsm/table.txt"

    track_scores(run / "model", "mgsm", METRICS, [table])  # the same evaluation again
    assert len(client.get_metric_history(found.info.run_id, "validation/mgsm/accuracy/sw")) == 1
    track_scores(run / "model", "mgsm", {**METRICS, "accuracy/sw": 0.5}, [table])  # another one
    assert len(client.get_metric_history(found.info.run_id, "validation/mgsm/accuracy/sw")) == 2


def test_scores_survive_the_loss_of_the_store(run: Path) -> None:
    track_scores(run / "model", "mgsm", METRICS, [])
    for name in ("mlflow.db", "tracking.json"):
        (run / name).unlink()
    assert sync_record(run).left == 0
    assert page(run)[1].data.metrics["validation/mgsm/accuracy/sw"] == 0.25


def test_scores_do_not_change_the_record_of_a_run_that_is_training(tmp_path: Path) -> None:
    """A record has one writer: scores of an earlier checkpoint are written to a separate file."""
    tracker = Tracker(tmp_path, TrackingConfig(enabled=False))
    tracker.start({}, {}, None)
    before = (tmp_path / RECORD_NAME).read_bytes()
    line = track_scores(export_in(tmp_path / "exports" / "step-7"), "mgsm", METRICS, [])
    assert (tmp_path / RECORD_NAME).read_bytes() == before
    assert line is not None
    assert "crosslift ui" in line
    assert not (tmp_path / "mlflow.db").exists()  # its tracking is off
    (event,) = [event for _, event in read_events(tmp_path / SCORES_NAME)]
    assert (event["kind"], event["step"]) == ("metrics", 7)
    assert event["values"]["score/mgsm/n/en"] == 10.0


def test_an_unreachable_store_loses_no_score(tmp_path: Path) -> None:
    run = tmp_path / "a"
    tracker = Tracker(run, TrackingConfig(uri="http://127.0.0.1:9", sync_seconds=0.05))
    tracker.start({}, {}, None)
    tracker.finish("FINISHED", timeout=0.1)
    line = track_scores(export_in(run / "model"), "mgsm", METRICS, [])
    assert line is not None
    assert "http://127.0.0.1:9 does not have them yet: " in line
    assert (run / SCORES_NAME).is_file()


def test_the_run_of_a_model_is_the_one_that_exported_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RECORD_NAME).touch()
    assert run_of(export_in(tmp_path / "run" / "model")) == tmp_path / "run"
    assert run_of(export_in(tmp_path / "alone")) is None
    (tmp_path / "run" / "initial_model").mkdir()  # in the run's folder, but not exported by the run
    assert run_of(tmp_path / "run" / "initial_model") is None
    assert track_scores(tmp_path / "alone", "mgsm", METRICS, []) is None
    with pytest.raises(ConfigError, match="holds no run"):
        track_scores(tmp_path / "alone", "mgsm", METRICS, [], run=tmp_path)


def results(languages: dict[str, int]) -> dict[str, Any]:
    accuracy = {HEADLINE: {"correct": 1, "value": 0.5, "low": 0.1, "high": 0.9}}
    scores = {
        language: {"n": n, "available": 250, "partial": n < 250, "accuracy": accuracy, "shifted": True}
        for language, n in languages.items()
    }
    averages = {"all": {HEADLINE: 0.5}}
    return {
        "run": None, "headline": HEADLINE, "languages": scores, "averages": averages, "missing": {}, "partial": ["all"]
    }  # fmt: skip


def test_an_evaluation_has_accuracy_and_n_by_language_a_table_and_a_plot(tmp_path: Path) -> None:
    found = results({"en": 250, "বাংলা": 2})
    assert score_metrics(found) == {
        "accuracy/en": 0.5, "n/en": 250.0, "accuracy/বাংলা": 0.5, "n/বাংলা": 2.0, "accuracy/mean_all": 0.5,
    }  # fmt: skip
    _, table, plot = write_score_files(found, tmp_path, "mgsm")
    assert "problems: en 250, বাংলা 2 of 250" in table.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def track_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of `track_scores`, which is replaced."""
    calls: list[Any] = []

    def track(*given: Any) -> str:
        calls.append(given)
        return "scores: there"

    monkeypatch.setattr("training.tracking.scores.track_scores", track)
    return calls


def test_eval_tracks_its_scores(
    tmp_path: Path, track_calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    described = {"task": "mgsm", "model": {"path": str(tmp_path / "model"), "objective": "sft"}}
    monkeypatch.setattr("evals.opening.open_model", lambda *_, **__: (None, None))
    monkeypatch.setattr("evals.mgsm.mgsm.find_files", lambda *_: {})
    monkeypatch.setattr("evals.mgsm.mgsm.evaluate_mgsm", lambda *_: {**results({"sw": 10}), "run": described})
    commands.eval(str(tmp_path / "model"), output=tmp_path, data_dir=tmp_path)
    ((model, name, metrics, files),) = track_calls
    assert (model, name, metrics["n/sw"]) == (tmp_path / "model", "mgsm", 10.0)
    assert [file.name for file in files] == ["results.json", "table.txt", "accuracy.png"]
    assert capsys.readouterr().err.endswith("scores: there\n")


def test_the_quickstart_tracks_the_scores_of_each_model(
    tmp_path: Path, track_calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"task": "mgsm", "model": {"path": str(tmp_path / "msft" / "model"), "objective": "sft"}}
    monkeypatch.setattr(quickstart, "open_model", lambda path: (None, None))
    monkeypatch.setattr(
        quickstart, "evaluate_mgsm", lambda *_, **__: (tmp_path / "scores" / "msft" / "test_seen").mkdir(parents=True)
        or {**results({"sw": 10}), "run": described},
    )  # fmt: skip
    monkeypatch.setattr(quickstart, "find_files", lambda *_: {})
    quickstart._answers(tmp_path, "msft", "test_seen")
    ((model, name, metrics, files),) = track_calls
    assert (model, name, metrics["accuracy/sw"]) == (tmp_path / "msft" / "model", "test_seen", 0.5)
    assert "accuracy.png" in [file.name for file in files]
