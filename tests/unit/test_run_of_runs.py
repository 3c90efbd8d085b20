"""A run that is made of runs is one run in MLflow, with the others nested below it, whichever arrives first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.errors import ConfigError
from training.mlflow_store import default_store, open_client
from training.run_record import RECORD_NAME, read_events
from training.tracking import Tracker, TrackingConfig, _run_folders, run_of_runs, sync_record

PARENT = "mlflow.parentRunId"


def finish(folder: Path, section: dict[str, Any]) -> None:
    """A run inside, from start to end."""
    tracker = Tracker(folder, TrackingConfig.model_validate({**section, "run_name": "inside"}))
    tracker.start({}, {}, resumed_step=None)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")


def runs(store: Path) -> dict[str, Any]:
    """Those of a folder's store, by name."""
    client = open_client(default_store(store))
    return {
        run.info.run_name: run for run in client.search_runs([e.experiment_id for e in client.search_experiments()])
    }


def test_the_run_inside_is_nested(tmp_path: Path) -> None:
    outer = tmp_path / "whole"
    section = {"sync_seconds": 0.05, "experiment": "mine"}
    with run_of_runs(outer, section, {"task": "xnli", "soft_labels": None}) as (tracker, inside):
        finish(outer / "training", inside)
        tracker.log(4, {"test/accuracy": 80.0})
    found = runs(outer)  # one store, though the run inside has a folder of its own
    assert set(found) == {"whole", "inside"}
    assert found["inside"].data.tags[PARENT] == found["whole"].info.run_id
    assert PARENT not in found["whole"].data.tags
    assert found["whole"].info.experiment_id == found["inside"].info.experiment_id
    assert (found["whole"].info.status, found["whole"].data.metrics) == ("FINISHED", {"test/accuracy": 80.0})
    assert found["whole"].data.params == {"task": "xnli", "soft_labels": "None"}
    assert list(_run_folders(tmp_path)) == [outer, outer / "training"]

    elsewhere = default_store(tmp_path)
    sync_record(outer / "training", elsewhere)
    assert PARENT not in runs(tmp_path)["inside"].data.tags  # its parent is not there yet
    sync_record(outer, elsewhere)
    sync_record(outer / "training", elsewhere)
    found = runs(tmp_path)
    assert found["inside"].data.tags[PARENT] == found["whole"].info.run_id


def test_a_second_call_goes_on_with_the_same_run(tmp_path: Path) -> None:
    parents = []
    for _ in range(2):
        with run_of_runs(tmp_path, {"enabled": False}, {}) as (_, inside):
            parents.append(inside["parent"])
    assert parents[0] == parents[1]
    assert inside == {"enabled": False, "uri": inside["uri"], "experiment": "crosslift", "parent": parents[0]}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_error_inside_is_its_end(tmp_path: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), run_of_runs(tmp_path, {"enabled": False}, {}):
        raise error
    *_, (_, last) = read_events(tmp_path / RECORD_NAME)
    assert (last["kind"], last["status"]) == ("finish", status)


def test_a_wrong_section_writes_nothing(tmp_path: Path) -> None:
    wrong = pytest.raises(ConfigError, match=r"^tracking\.sync_seconds: .*greater than 0")
    with wrong, run_of_runs(tmp_path / "run", {"sync_seconds": 0}, {}):
        raise AssertionError
    assert not (tmp_path / "run").exists()
