"""From the run's record to an MLflow store: what has not arrived yet, in order, in batches, at any time.

In: `record.jsonl` (`run_record.py`). Out: one MLflow run a record, in any number of stores; how far each
store has got lies in `tracking.json` beside the record. Next: `tracking/tracker.py` feeds a live run from a thread,
and `crosslift ui` feeds finished ones.

Everything here may be interrupted anywhere and done again: the MLflow run is found by its tag, events carry
the time of the record, and a store keeps a metric with the same name, step, time and value once.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.atomic import write_text
from training.tracking.mlflow_store import (
    EXPERIMENT_KIND,
    MAX_METRICS,
    MAX_PARAM,
    MAX_TAG,
    StoreError,
    artifact_root,
    cut,
    metric_name,
    mlflow_key,
    open_client,
    reason,
    without_password,
)
from training.tracking.run_record import PARAMS_NAME, RECORD_NAME, SCORES_NAME, on_a_line, read_events, read_starts

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

STATE_NAME = "tracking.json"
RECORD_TAG = "crosslift.record"  # holds the record's id; finds the run again when tracking.json is gone
PARENT_RECORD_TAG = "crosslift.parent_record"  # of a run inside another one: the other's record's id


@dataclass(frozen=True, slots=True)
class SyncResult:
    """How far a store has got with a record."""

    uri: str
    run_id: str  # empty: no run there yet
    fed: int  # lines that arrived by this call
    left: int  # lines and artifacts that have still to arrive
    refused: dict[str, int]  # what will never arrive (damaged, invalid or deleted), and how often
    error: str | None  # why something is left


@dataclass
class _StoreState:
    """What one store has: kept in tracking.json, so that nothing is fed twice."""

    run_id: str = ""  # none yet
    cursor: int = 0  # bytes of the record that have arrived
    scores: int = 0  # and of scores.jsonl
    pending: list[list[str]] = field(default_factory=list)  # artifacts still to be uploaded: [path, folder]


class RecordFeeder:
    """Feeds one record into one store. Not thread-safe; imports mlflow at the first `feed`."""

    def __init__(self, output_dir: Path, uri: str) -> None:
        self._output_dir = output_dir.resolve()
        self._record = self._output_dir / RECORD_NAME
        self._scores = self._output_dir / SCORES_NAME
        self._uri = uri
        self._store = without_password(uri)
        self._state = _read_states(self._output_dir).get(self._store, _StoreState())
        self._opened = False
        self._unlinked: dict[str, Any] | None = None  # the record's first start, until `_link` is done with it
        self._metrics: list[Metric] = []
        self._params: list[Param] = []
        self._tags: list[RunTag] = []
        self._known_params: dict[str, str] = {}
        self._replayed: dict[int, dict[str, Any]] = {}  # step -> values recorded before the last resume
        self._taken = 0
        self.experiment_id = ""  # in the store; empty: not known yet
        self.fed = 0  # lines that arrived
        self.refused: Counter[str] = Counter()  # see SyncResult

    @property
    def run_id(self) -> str:
        """The run in the store; empty: none yet."""
        return self._state.run_id

    @cached_property
    def _client(self) -> MlflowClient:
        return open_client(self._uri)

    def left(self) -> int:
        """Lines and artifacts that have still to arrive."""
        if not self._record.exists():
            return 0
        lines = sum(1 for _ in read_events(self._record, self._state.cursor))
        if self._scores.exists():
            lines += sum(1 for _ in read_events(self._scores, self._state.scores))
        return lines + len(self._state.pending)

    def feed(self) -> None:
        """Feeds all the record holds. What MLflow raises is raised; the next call goes on from there."""
        try:
            if not self._opened and not self._open():
                return
            arrived = self._state.cursor
            for end, event in read_events(self._record, self._state.cursor):
                if len(self._metrics) + len(event.get("values", ())) > MAX_METRICS:
                    self._flush(arrived)
                self._take(event, arrived)
                arrived = end
                self._taken += 1
            self._flush(arrived)
            self._feed_scores()
            self._link()
            self._upload()
        except Exception:
            # Whatever the store holds now is found out anew; what was not yet sent is read again.
            self._opened, self._taken = False, 0
            self._metrics, self._params, self._tags = [], [], []
            self._state = _read_states(self._output_dir).get(self._store, _StoreState())
            raise

    def _feed_scores(self) -> None:
        """What was added to the run by others than its own process; there is little of it."""
        if not self._scores.exists():
            return
        arrived = self._state.scores
        for end, event in read_events(self._scores, arrived):
            if event["kind"] in ("metrics", "artifact"):
                self._take(event, arrived)
            self._taken += 1
            arrived = end
        self._send_taken()
        if arrived != self._state.scores:
            self._state.scores = arrived
            self._save()

    def _open(self) -> bool:
        """Finds or creates the MLflow run and works out what it already has. False: nothing recorded yet."""
        _, first = next(read_starts(self._record), (0, None))
        if first is None:
            return False
        _ = self._client  # mlflow as a whole, before anything below imports a part of it: see `open_client`
        if not on_a_line(self._record, self._state.cursor):  # a power cut took lines that were fed: begin again
            self._state.cursor = 0
        if not self._state.run_id or not self._run_exists(self._state.run_id):
            self._state = _StoreState(self._find_or_create_run(first))
            self._save()
        self._unlinked = first
        self._known_params = {}
        for _, event in read_events(self._record, stop=self._state.cursor):
            if event["kind"] == "params":
                self._known_params.update(event["values"])
        for offset, start in list(read_starts(self._record, stop=self._state.cursor))[-1:]:
            self._expect_replay(start, before=offset)
        self._opened = True
        return True

    def _run_exists(self, run_id: str) -> bool:
        """True if the store has the run. One deleted there is restored only if there is news for it."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        if run.info.lifecycle_stage == "deleted" and self.left():
            self._refuse_deleted(self._client.get_experiment(run.info.experiment_id))
            self._client.restore_run(run_id)
        return True

    def _find_or_create_run(self, first: dict[str, Any]) -> str:
        experiment_id = self._find_or_create_experiment(first["experiment"])
        if found := self._runs_tagged(RECORD_TAG, first["id"], experiment_id):
            return found[0]
        tags = {RECORD_TAG: first["id"]}
        if parent := first.get("parent"):
            tags[PARENT_RECORD_TAG] = parent
        run = self._client.create_run(experiment_id, first["time"], tags, run_name=first["run_name"])
        return str(run.info.run_id)

    def _find_or_create_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            tags = dict([EXPERIMENT_KIND])
            try:
                return str(self._client.create_experiment(name, artifact_root(self._output_dir, self._uri), tags))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = self._client.get_experiment_by_name(name)  # another run was quicker
            assert experiment is not None
        self._refuse_deleted(experiment)
        return str(experiment.experiment_id)

    def _refuse_deleted(self, experiment: Experiment) -> None:
        """Raises StoreError for an experiment that was deleted: its name is taken, and no run can be seen in it."""
        if experiment.lifecycle_stage == "deleted":
            store, number = shlex.quote(self._store), experiment.experiment_id
            raise StoreError(
                f"the experiment {experiment.name!r} is deleted there: restore it (MLFLOW_TRACKING_URI={store} "
                f"mlflow experiments restore -x {number}), or name another (tracking.experiment)"
            )

    def _runs_tagged(self, tag: str, record_id: str, experiment_id: str) -> list[str]:
        runs = self._client.search_runs([experiment_id], f"tags.`{tag}` = '{record_id}'")
        return [str(run.info.run_id) for run in runs]

    def _link(self) -> None:
        """Says of which kind the experiment is, if nobody has; nests this run under the one that it is part of, and
        under this one those that are part of it.

        A run's tags are there before it looks for its parent, and before the parent looks for it: whichever comes
        second finds the other, though the first may have ended by then.
        """
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        if (first := self._unlinked) is None:
            return
        mine = self._state.run_id
        experiment_id = self.experiment_id = self._client.get_run(mine).info.experiment_id
        if EXPERIMENT_KIND[0] not in self._client.get_experiment(experiment_id).tags:
            self._client.set_experiment_tag(experiment_id, *EXPERIMENT_KIND)
        for inner in self._runs_tagged(PARENT_RECORD_TAG, first["id"], experiment_id):
            self._client.set_tag(inner, MLFLOW_PARENT_RUN_ID, mine)
        if (parent := first.get("parent")) and (found := self._runs_tagged(RECORD_TAG, parent, experiment_id)):
            self._client.set_tag(mine, MLFLOW_PARENT_RUN_ID, found[0])
        self._unlinked = None

    def _expect_replay(self, start: dict[str, Any], before: int) -> None:
        """After a resume the steps behind the checkpoint come again: looks up what was recorded for them."""
        resumed_step = start.get("resumed_step") or 0
        self._replayed = {}
        for _, event in read_events(self._record, stop=before):
            if event["kind"] == "metrics" and event["step"] >= resumed_step:
                self._replayed.setdefault(event["step"], {}).update(event["values"])

    def _take(self, event: dict[str, Any], offset: int) -> None:
        """Turns one event, which begins at `offset`, into what the store is to be told."""
        from mlflow.entities import Metric, RunTag

        kind = event["kind"]
        if kind == "metrics":
            before = self._replayed.get(event["step"], {})
            for name, value in event["values"].items():
                if (key := metric_name(name)) is not None and (name not in before or before[name] != value):
                    self._metrics.append(Metric(key, float(value), event["time"], event["step"]))
        elif kind == "params":
            self._take_params(event["values"])
        elif kind == "tags":
            self._tags += [RunTag(mlflow_key(k), cut(v, MAX_TAG, PARAMS_NAME)) for k, v in event["values"].items()]
        elif kind == "artifact":
            self._state.pending.append([event["path"], event["folder"]])
        elif kind == "start" and offset > 0:  # a resume: the run is alive again
            self._flush(offset)
            self._client.update_run(self._state.run_id, "RUNNING")
            self._expect_replay(event, before=offset)
        elif kind == "finish":
            self._flush(offset)
            if event["status"] == "SCHEDULED":  # waits for its next job: it has no end yet
                self._client.update_run(self._state.run_id, "SCHEDULED")
            else:
                self._client.set_terminated(self._state.run_id, event["status"], event["time"])
        elif kind == "damaged":
            self.refused[f"a damaged line of {RECORD_NAME}"] += 1

    def _take_params(self, values: dict[str, str]) -> None:
        """MLflow's params never change: what a resume changed is told by the tag `resumed.<name>`."""
        from mlflow.entities import Param, RunTag

        for name, value in values.items():
            if name not in self._known_params:
                self._params.append(Param(mlflow_key(name), cut(value, MAX_PARAM, PARAMS_NAME)))
            elif self._known_params[name] != value:
                self._tags.append(RunTag(mlflow_key(f"resumed.{name}"), cut(value, MAX_TAG, PARAMS_NAME)))
        self._known_params.update(values)

    def _flush(self, arrived: int) -> None:
        """Sends what was taken and notes that the record's first `arrived` bytes have arrived."""
        self._send_taken()
        if arrived != self._state.cursor:
            self._state.cursor = arrived
            self._save()

    def _send_taken(self) -> None:
        self._send("metrics", self._metrics)
        self._send("params", self._params)
        self._send("tags", self._tags)
        self._metrics, self._params, self._tags = [], [], []
        self.fed, self._taken = self.fed + self._taken, 0

    def _send(self, kind: str, items: list[Any]) -> None:
        """Sends items, in requests as large as MLflow takes. Those it refuses are searched for by halving and
        left out, so that they do not block the rest.
        """
        from mlflow.exceptions import MlflowException

        batch: dict[str, Any] = {kind: items}
        try:
            self._client.log_batch(self._state.run_id, **batch)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if self._client.get_run(self._state.run_id).info.lifecycle_stage == "deleted":
                raise  # nothing is wrong with the values: the next round restores the run
            if len(items) == 1:
                self.refused[f"{kind}: {items[0].key}"] += 1
                return
            half = len(items) // 2
            self._send(kind, items[:half])
            self._send(kind, items[half:])

    def _upload(self) -> None:
        """Uploads pending artifacts. One that fails goes to the end of the queue, behind the others."""
        while self._state.pending:
            name, folder = self._state.pending.pop(0)
            path = (self._output_dir / name).resolve()
            try:
                if not path.is_relative_to(self._output_dir) or not path.exists():
                    self.refused[f"artifact: {name} is no longer there"] += 1
                elif path.is_dir():
                    self._client.log_artifacts(self._state.run_id, str(path), folder or None)
                else:
                    self._client.log_artifact(self._state.run_id, str(path), folder or None)
            except Exception:
                self._state.pending.append([name, folder])
                raise
            finally:
                self._save()

    def _save(self) -> None:
        """Writes tracking.json whole or not at all; other stores' entries are kept."""
        states = _read_states(self._output_dir) | {self._store: self._state}
        text = json.dumps({"stores": {store: vars(state) for store, state in states.items()}}, indent=1)
        write_text(self._output_dir / STATE_NAME, text)


def sync_record(output_dir: Path, uri: str) -> SyncResult:
    """Feeds the store at `uri` what it does not have yet of the record in `output_dir`. Idempotent.

    A store that is away, or an artifact it would not take, is no exception: `error` and `left` tell.
    """
    feeder, error = RecordFeeder(output_dir, uri), None
    try:
        feeder.feed()
    except Exception as trouble:
        error = reason(trouble)
    store, refused = without_password(uri), dict(feeder.refused)
    return SyncResult(store, feeder.run_id, feeder.fed, feeder.left(), refused, error)


def _read_states(output_dir: Path) -> dict[str, _StoreState]:
    """What tracking.json holds; nothing if it is missing or damaged: all of it can be found out again."""
    try:
        stores = json.loads((output_dir / STATE_NAME).read_text(encoding="utf-8"))["stores"]
        return {uri: _StoreState(**state) for uri, state in stores.items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}
