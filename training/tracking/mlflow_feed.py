"""Sends a run's record to an MLflow store: in order, in batches, each event once.

One record becomes one MLflow run, in any number of stores. How much of the record each store has is kept in
`tracking.json` beside it. `tracker.py` feeds a running run from a thread, `crosslift ui` feeds finished ones.

Everything here may be interrupted at any point and repeated: the MLflow run is found by its tag, events keep the time
of the record, and a store keeps only one metric with the same name, step, time and value.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.atomic import write_text
from data_pipeline.secrets import without_login
from training.errors import ConfigError
from training.tracking.mlflow_runs import find_or_create_run, link_run, run_exists
from training.tracking.mlflow_store import (
    MAX_METRICS,
    MAX_PARAM,
    MAX_TAG,
    default_store,
    error_line,
    metric_name,
    mlflow_key,
    open_client,
    truncate,
)
from training.tracking.run_record import RECORD_NAME, SCORES_NAME, is_line_start, latest_start, read_events, read_starts

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

STATE_NAME = "tracking.json"


@dataclass
class StoreState:
    """How much of the record one store has; kept in tracking.json, so that nothing is sent twice."""

    run_id: str = ""  # empty: none yet
    cursor: int = 0  # bytes of the record that were sent
    scores: int = 0  # bytes of scores.jsonl that were sent
    pending: list[list[str]] = field(default_factory=list)  # artifacts still to be uploaded: [path, folder]


class RecordFeeder:
    """Feeds one record to one store. Not thread-safe; imports mlflow at the first `feed`."""

    def __init__(self, output_dir: Path, uri: str) -> None:
        self._output_dir = output_dir.resolve()
        self._record = self._output_dir / RECORD_NAME
        self._scores = self._output_dir / SCORES_NAME
        self._address = uri
        self.uri = without_login(uri)
        self._state = read_states(self._output_dir).get(self.uri, StoreState())
        self._opened = False
        self._unlinked: dict[str, Any] | None = None  # the record's first start, until the run is linked
        self._clear_batch()
        self._known_params: dict[str, str] = {}
        self._replayed: dict[int, dict[str, Any]] = {}  # step -> values recorded before the last resume
        self.experiment_id = ""  # in the store; empty: not known yet
        self.fed = 0  # lines sent
        self.refused: Counter[str] = Counter()  # what cannot be sent (damaged, invalid or deleted), and how often
        self.error: str | None = None  # why the last `feed` failed

    @property
    def run_id(self) -> str:
        """The run in the store; empty: none yet."""
        return self._state.run_id

    @cached_property
    def _client(self) -> MlflowClient:
        return open_client(self._address)

    @property
    def left(self) -> int:
        """Number of lines and artifacts still to be sent."""
        if not self._record.exists():
            return 0
        lines = sum(1 for _ in read_events(self._record, self._state.cursor))
        if self._scores.exists():
            lines += sum(1 for _ in read_events(self._scores, self._state.scores))
        return lines + len(self._state.pending)

    def feed(self) -> None:
        """Send everything that the record holds. Passes on MLflow's errors; the next call continues there."""
        try:
            if self._opened or self._open():
                self._feed_record()
                self._feed_scores()
                if self._unlinked is not None:
                    self.experiment_id = link_run(self._client, self._state.run_id, self._unlinked)
                    self._unlinked = None
                self._upload()
        except Exception as error:
            # The next call looks up what the store has, and reads again what was not sent.
            self.error = error_line(error)
            self._opened = False
            self._clear_batch()
            self._state = read_states(self._output_dir).get(self.uri, StoreState())
            raise
        self.error = None

    def _feed_record(self) -> None:
        sent = self._state.cursor
        for end, event in read_events(self._record, sent):
            if len(self._batch["metrics"]) + len(event.get("values", ())) > MAX_METRICS:
                self._flush(sent)
            self._take(event, sent)
            sent = end
            self._taken += 1
        self._flush(sent)

    def _feed_scores(self) -> None:
        """Send what other processes have added to the run in scores.jsonl."""
        if not self._scores.exists():
            return
        sent = self._state.scores
        for end, event in read_events(self._scores, sent):
            if event["kind"] in ("metrics", "artifact"):
                self._take(event, sent)
            self._taken += 1
            sent = end
        self._send_taken()
        if sent != self._state.scores:
            self._state.scores = sent
            self._save()

    def _open(self) -> bool:
        """Find or create the MLflow run and determine what it already has. False: nothing is recorded yet."""
        _, first = next(read_starts(self._record), (0, None))
        if first is None:
            return False
        client = self._client  # imports mlflow as a whole, before parts of it are imported: see `open_client`
        if not is_line_start(self._record, self._state.cursor):  # a power cut has removed lines that were sent
            self._state.cursor = 0
        known = self._state.run_id
        if not known or not run_exists(client, known, self.left > 0, self._address):
            self._state = StoreState(find_or_create_run(client, first, self._output_dir, self._address))
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

    def _expect_replay(self, start: dict[str, Any], before: int) -> None:
        """After a resume, the steps behind the checkpoint are recorded again: look up their earlier values."""
        resumed_step = start.get("resumed_step") or 0
        self._replayed = {}
        for _, event in read_events(self._record, stop=before):
            if event["kind"] == "metrics" and event["step"] >= resumed_step:
                self._replayed.setdefault(event["step"], {}).update(event["values"])

    def _take(self, event: dict[str, Any], offset: int) -> None:
        """Convert one event, which begins at `offset`, for the store."""
        from mlflow.entities import Metric, RunTag

        kind = event["kind"]
        if kind == "metrics":
            before = self._replayed.get(event["step"], {})
            for name, value in event["values"].items():
                if (key := metric_name(name)) is not None and (name not in before or before[name] != value):
                    self._batch["metrics"].append(Metric(key, float(value), event["time"], event["step"]))
        elif kind == "params":
            self._take_params(event["values"])
        elif kind == "tags":
            values = event["values"].items()
            self._batch["tags"] += [RunTag(mlflow_key(name), truncate(value, MAX_TAG)) for name, value in values]
        elif kind == "artifact":
            self._state.pending.append([event["path"], event["folder"]])
        elif kind == "start" and offset > 0:  # a resume
            self._flush(offset)
            self._client.update_run(self._state.run_id, "RUNNING")
            self._expect_replay(event, before=offset)
        elif kind == "finish":
            self._flush(offset)
            if event["status"] == "SCHEDULED":  # waits for its next job, so it has no end time yet
                self._client.update_run(self._state.run_id, "SCHEDULED")
            else:
                self._client.set_terminated(self._state.run_id, event["status"], event["time"])
        elif kind == "damaged":
            self.refused[f"a damaged line of {RECORD_NAME}"] += 1

    def _take_params(self, values: dict[str, str]) -> None:
        """MLflow's params cannot change: a value that a resume changed becomes the tag `resumed.<name>`."""
        from mlflow.entities import Param, RunTag

        for name, value in values.items():
            if name not in self._known_params:
                self._batch["params"].append(Param(mlflow_key(name), truncate(value, MAX_PARAM)))
            elif self._known_params[name] != value:
                self._batch["tags"].append(RunTag(mlflow_key(f"resumed.{name}"), truncate(value, MAX_TAG)))
        self._known_params.update(values)

    def _flush(self, cursor: int) -> None:
        """Send what was taken and note that the first `cursor` bytes of the record were sent."""
        self._send_taken()
        if cursor != self._state.cursor:
            self._state.cursor = cursor
            self._save()

    def _send_taken(self) -> None:
        for kind, items in self._batch.items():
            self._send(kind, items)
        self.fed += self._taken
        self._clear_batch()

    def _clear_batch(self) -> None:
        self._batch: dict[str, list[Any]] = {"metrics": [], "params": [], "tags": []}  # converted, but not sent yet
        self._taken = 0  # lines of the record in it

    def _send(self, kind: str, items: list[Any]) -> None:
        """Send items. If MLflow refuses a batch, the invalid items are found by bisection and left out."""
        from mlflow.exceptions import MlflowException

        batch: dict[str, Any] = {kind: items}
        try:
            self._client.log_batch(self._state.run_id, **batch)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if self._client.get_run(self._state.run_id).info.lifecycle_stage == "deleted":
                raise  # the values are valid: the next round restores the run
            if len(items) == 1:
                self.refused[f"{kind}: {items[0].key}"] += 1
                return
            half = len(items) // 2
            self._send(kind, items[:half])
            self._send(kind, items[half:])

    def _upload(self) -> None:
        """Upload pending artifacts. One that fails moves to the end of the queue."""
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
        """Write tracking.json; the entries of other stores are kept."""
        states = read_states(self._output_dir) | {self.uri: self._state}
        text = json.dumps({"stores": {store: vars(state) for store, state in states.items()}}, indent=1)
        write_text(self._output_dir / STATE_NAME, text)


def sync_record(output_dir: Path, uri: str | None = None) -> RecordFeeder:
    """Send the rest of a run's record to the store at `uri`, by default the store that the run itself used.

    May be repeated. An unreachable store is not an exception: the feeder says what is left and why.

    Raises:
        ConfigError: the folder has no record.
    """
    start = latest_start(output_dir / RECORD_NAME)
    if start is None:
        raise ConfigError(f"{output_dir}: holds no run: {RECORD_NAME} is missing or empty")
    uri = uri or start.get("uri") or default_store(output_dir)
    feeder = RecordFeeder(output_dir, uri)
    with suppress(Exception):  # the feeder keeps the reason
        feeder.feed()
    return feeder


def read_states(output_dir: Path) -> dict[str, StoreState]:
    """What each store has, from tracking.json; nothing if that is missing or damaged: it can be determined again."""
    try:
        stores = json.loads((output_dir / STATE_NAME).read_text(encoding="utf-8"))["stores"]
        return {uri: StoreState(**state) for uri, state in stores.items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}
