"""The MLflow run of a record: found by a tag or created, restored if it was deleted, linked to its parent run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.secrets import without_login
from training.tracking.mlflow_store import EXPERIMENT_KIND, StoreError, artifact_root

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

RECORD_TAG = "crosslift.record"  # the record's id; finds the run if tracking.json is lost
PARENT_RECORD_TAG = "crosslift.parent_record"  # on a child run: the id of the parent run's record


def run_exists(client: MlflowClient, run_id: str, has_news: bool, uri: str) -> bool:
    """Whether the store has the run. A run that was deleted there is restored if there is something to send.

    Raises:
        StoreError: its experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    if run.info.lifecycle_stage == "deleted" and has_news:
        _refuse_deleted(client.get_experiment(run.info.experiment_id), uri)
        client.restore_run(run_id)
    return True


def find_or_create_run(client: MlflowClient, start: dict[str, Any], output_dir: Path, uri: str) -> str:
    """Id of the MLflow run of the record whose first event is `start`.

    Raises:
        StoreError: its experiment was deleted.
    """
    experiment_id = _find_or_create_experiment(client, start["experiment"], output_dir, uri)
    if found := _runs_with_tag(client, RECORD_TAG, start["id"], experiment_id):
        return found[0]
    tags = {RECORD_TAG: start["id"]}
    if parent := start.get("parent"):
        tags[PARENT_RECORD_TAG] = parent
    run = client.create_run(experiment_id, start["time"], tags, run_name=start["run_name"])
    return str(run.info.run_id)


def link_run(client: MlflowClient, run_id: str, start: dict[str, Any]) -> str:
    """Set the kind of the run's experiment if it has none, and nest child runs under their parent. The experiment's id.

    Both runs are tagged before they are linked, and each of them searches for the other: the link is made by
    whichever is recorded second, even if the first has ended by then.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    experiment_id: str = client.get_run(run_id).info.experiment_id
    if EXPERIMENT_KIND[0] not in client.get_experiment(experiment_id).tags:
        client.set_experiment_tag(experiment_id, *EXPERIMENT_KIND)
    for child in _runs_with_tag(client, PARENT_RECORD_TAG, start["id"], experiment_id):
        client.set_tag(child, MLFLOW_PARENT_RUN_ID, run_id)
    if (parent := start.get("parent")) and (found := _runs_with_tag(client, RECORD_TAG, parent, experiment_id)):
        client.set_tag(run_id, MLFLOW_PARENT_RUN_ID, found[0])
    return experiment_id


def _find_or_create_experiment(client: MlflowClient, name: str, output_dir: Path, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_root(output_dir, uri), dict([EXPERIMENT_KIND])))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another run created it meanwhile
        assert experiment is not None
    _refuse_deleted(experiment, uri)
    return str(experiment.experiment_id)


def _refuse_deleted(experiment: Experiment, uri: str) -> None:
    """Raise StoreError for a deleted experiment: its name cannot be used again, and its runs are not shown."""
    if experiment.lifecycle_stage == "deleted":
        store, number = shlex.quote(without_login(uri)), experiment.experiment_id
        raise StoreError(
            f"the experiment {experiment.name!r} is deleted there: restore it (MLFLOW_TRACKING_URI={store} "
            f"mlflow experiments restore -x {number}), or name another (tracking.experiment)"
        )


def _runs_with_tag(client: MlflowClient, tag: str, value: str, experiment_id: str) -> list[str]:
    runs = client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'")
    return [str(run.info.run_id) for run in runs]
