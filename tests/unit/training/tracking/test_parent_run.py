"""Nested MLflow runs: a run that consists of several is their parent, whichever is synced first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.errors import ConfigError
from training.tracking.config import TrackingConfig
from training.tracking.mlflow_feed import sync_record
from training.tracking.mlflow_store import default_store, open_client
from training.tracking.run_record import RECORD_NAME, read_events, run_folders
from training.tracking.tracker import Tracker, parent_run

PARENT = "mlflow.parentRunId"


def finish(folder: Path, section: dict[str, Any]) -> None:
    """A child run, from start to end."""
    tracker = Tracker(folder, TrackingConfig.model_validate({**section, "run_name": "child"}))
    tracker.start({}, {}, resumed_step=None)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")


def runs(store: Path) -> dict[str, Any]:
    """The runs of a folder's store by name."""
    client = open_client(default_store(store))
    return {
        run.info.run_name: run for run in client.search_runs([e.experiment_id for e in client.search_experiments()])
    }


def test_the_child_run_is_nested(tmp_path: Path) -> None:
    outer = tmp_path / "whole"
    section = {"sync_seconds": 0.05, "experiment": "mine"}
    with parent_run(outer, section, {"task": "xnli", "soft_labels": None}) as (tracker, child):
        finish(outer / "training", child)
        tracker.log(4, {"test/accuracy": 80.0})
    found = runs(outer)  # one store, although the child run has its own folder
    assert set(found) == {"whole", "child"}
    assert found["child"].data.tags[PARENT] == found["whole"].info.run_id
    assert PARENT not in found["whole"].data.tags
    assert found["whole"].info.experiment_id == found["child"].info.experiment_id
    assert (found["whole"].info.status, found["whole"].data.metrics) == ("FINISHED", {"test/accuracy": 80.0})
    assert found["whole"].data.params == {"task": "xnli", "soft_labels": "None"}
    assert list(run_folders(tmp_path)) == [outer, outer / "training"]


@pytest.mark.parametrize("order", [("", "training"), ("training", "")], ids=["parent first", "child first"])
def test_runs_are_linked_whichever_is_synced_first(tmp_path: Path, order: tuple[str, str]) -> None:
    outer, store = tmp_path / "whole", default_store(tmp_path)
    with parent_run(outer, {"enabled": False}, {}) as (_, child):
        finish(outer / "training", child)
    for folder in order:
        assert PARENT not in {tag for run in runs(tmp_path).values() for tag in run.data.tags}
        sync_record(outer / folder, store)
    found = runs(tmp_path)
    assert found["child"].data.tags[PARENT] == found["whole"].info.run_id
    assert PARENT not in found["whole"].data.tags


def test_two_runs_that_create_their_experiment_at_the_same_time_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither finds one; the slower run uses the one that the faster run created and loses nothing."""
    from mlflow.tracking import MlflowClient

    store = default_store(tmp_path)
    for name in ("a", "b"):
        finish(tmp_path / name, {"enabled": False, "experiment": "mine"})
    create = MlflowClient.create_experiment

    def b_is_faster(client: Any, *args: Any) -> str:
        monkeypatch.setattr(MlflowClient, "create_experiment", create)
        assert sync_record(tmp_path / "b", store).left == 0
        return create(client, *args)

    monkeypatch.setattr(MlflowClient, "create_experiment", b_is_faster)
    result = sync_record(tmp_path / "a", store)
    assert (result.left, result.error) == (0, None)
    client = open_client(store)
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_a_second_call_continues_the_same_run(tmp_path: Path) -> None:
    parents = []
    for _ in range(2):
        with parent_run(tmp_path, {"enabled": False}, {}) as (_, child):
            parents.append(child["parent"])
    assert parents[0] == parents[1]
    assert child == {"enabled": False, "uri": child["uri"], "experiment": "crosslift", "parent": parents[0]}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_error_inside_ends_the_run_with_its_status(tmp_path: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), parent_run(tmp_path, {"enabled": False}, {}):
        raise error
    *_, (_, last) = read_events(tmp_path / RECORD_NAME)
    assert (last["kind"], last["status"]) == ("finish", status)


def test_an_invalid_section_writes_nothing(tmp_path: Path) -> None:
    wrong = pytest.raises(ConfigError, match=r"^tracking\.sync_seconds: .*greater than 0")
    with wrong, parent_run(tmp_path / "run", {"sync_seconds": 0}, {}):
        raise AssertionError
    assert not (tmp_path / "run").exists()
