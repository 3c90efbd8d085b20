"""Tracking that never stops a run: what rank 0 says goes to a file, and from there to MLflow.

In: a run's config, metrics, artifacts and end. Out: `record.jsonl` in the run folder, at once; an MLflow run,
when the store can be reached. Next: `crosslift ui` shows the store, `evals` reads metrics from the record.

`Tracker` writes the record (`run_record.py`) and wakes a daemon thread that feeds it to the store
(`mlflow_feed.py`). The training loop never waits for MLflow; only `finish` does, for a bounded time.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import threading
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from data_pipeline.settings import Section
from training.errors import ConfigError
from training.provenance import git_state, source_tags, versions
from training.tracking.mlflow_feed import RecordFeeder, SyncResult
from training.tracking.mlflow_feed import sync_record as sync_to
from training.tracking.mlflow_store import (
    MAX_PARAM,
    checked_address,
    default_store,
    is_server,
    reason,
    run_page,
    without_password,
)
from training.tracking.run_record import PARAMS_NAME, RECORD_NAME, RunRecord, Status, flatten, number, read_starts, say
from training.tracking.target import DEFAULT_EXPERIMENT, LONGEST_EXPERIMENT, TrackingTarget, tracking_target

log = logging.getLogger(__name__)
_LONGEST_WAIT = 60.0  # seconds between two tries to reach a store that is away


class TrackingConfig(Section):
    """The `tracking:` section of the run file."""

    enabled: bool = Field(default=True, description="Feed MLflow. If false, only record.jsonl is written.")
    uri: str | None = Field(
        default=None,
        description="Address of the MLflow store, such as http://host:5000 or sqlite:////path/mlflow.db. "
        "Default: MLFLOW_TRACKING_URI, else what an earlier start of the run used, else mlflow.db in the run folder; "
        "none if that is on a network disk, where SQLite does not work (`crosslift ui` builds the store from the "
        "records).",
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=LONGEST_EXPERIMENT,
        description="MLflow's experiment. Default: MLFLOW_EXPERIMENT_NAME, else crosslift.",
    )
    run_name: str | None = Field(default=None, description="The run's name in MLflow. Default: the run folder's name.")
    sync_seconds: float = Field(default=5.0, gt=0, le=86400, description="Seconds between two batches to the store.")
    parent: str | None = Field(
        default=None, description="Record id of the run that this one is part of; `crosslift xtreme run` sets it."
    )

    @field_validator("uri")
    @classmethod
    def _an_address(cls, uri: str | None) -> str | None:
        return None if uri is None else checked_address(uri)


def target_of(config: TrackingConfig, output_dir: Path) -> TrackingTarget:
    """The store and experiment of the run in a folder. Raises ConfigError where a variable holds what cannot work."""
    starts = list(read_starts(output_dir / RECORD_NAME))
    earlier = starts[-1][1].get("uri") if starts else None
    return tracking_target(config.uri, config.experiment, output_dir, earlier)


class Tracker:
    """The training process's end of tracking; made on rank 0 only. Not thread-safe."""

    def __init__(self, output_dir: Path, config: TrackingConfig) -> None:
        self._output_dir = output_dir
        self._config = config
        self._record: RunRecord | None = None
        self._feeder: RecordFeeder | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._trouble: str | None = None
        self._target: TrackingTarget | None = None
        self.id = ""  # the record's, once started

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], resumed_step: int | None) -> None:
        """Opens the record, and goes on with the same MLflow run if the folder has a record already.

        `params` is the nested config, flattened to dotted names. `resumed_step` is the number of steps the
        loaded checkpoint had done; None: the run begins at its beginning. Raises ConfigError if the run
        folder cannot be written or a variable names no store; nothing after this raises for the disk or MLflow.
        """
        if self._record is not None:
            raise RuntimeError("a Tracker starts once")
        config = self._config
        self._target = target_of(config, self._output_dir) if config.enabled else None
        self._record = RunRecord(self._output_dir)
        _, earlier = next(read_starts(self._record.path), (0, None))
        self.id = earlier["id"] if earlier else uuid.uuid4().hex
        self._append_start(resumed_step)
        values = flatten(params)
        self._record.append("params", values=values)
        self._record.append("tags", values={**source_tags(tags), **{name: str(value) for name, value in tags.items()}})
        self._keep_long(values)
        if self._target is None:
            return
        server = self._target.uri is not None and is_server(self._target.uri)
        page = "" if server else f"; crosslift ui {shlex.quote(str(self._output_dir))} shows it"
        log.info("%s%s", self._target, page)
        if self._target.uri is None:
            return
        self._feeder = RecordFeeder(self._output_dir, self._target.uri)
        self._thread = threading.Thread(target=self._feed_until_stopped, name="mlflow-feeder", daemon=True)
        self._thread.start()

    def rewind(self, step: int) -> None:
        """The run went back to where `step` steps were done; what was logged behind them comes anew."""
        self._append_start(step)

    def _keep_long(self, params: Mapping[str, str]) -> None:
        """Params that MLflow cannot hold whole, as an artifact. Never raises for the disk."""
        if all(len(value) <= MAX_PARAM for value in params.values()):
            return
        path = self._output_dir / PARAMS_NAME
        try:
            path.write_text(json.dumps(params, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            say(f"{path}: {error.strerror}; {RECORD_NAME} has the params whole")
        else:
            self.artifact(path)

    def _append_start(self, resumed_step: int | None) -> None:
        config, target = self._config, self._target
        uri = config.uri if target is None else target.uri if target.named else None
        self._open_record.append(
            "start",
            id=self.id,
            parent=config.parent,
            experiment=target.experiment if target is not None else config.experiment or DEFAULT_EXPERIMENT,
            run_name=config.run_name or self._output_dir.resolve().name,
            uri=None if uri is None else without_password(uri),
            resumed_step=resumed_step,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step. Costs microseconds, whatever becomes of MLflow."""
        values = {name: number(value) for name, value in metrics.items()}
        self._open_record.append("metrics", step=int(step), values=values)

    def tags(self, values: Mapping[str, str]) -> None:
        """Records tags of the run."""
        self._open_record.append("tags", values=dict(values))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Records that a file or folder below the run folder belongs to the run; uploaded in its own time.

        Raises ValueError for a path outside the run folder.
        """
        inside = path.resolve().relative_to(self._output_dir.resolve()).as_posix()
        self._open_record.append("artifact", path=inside, folder=folder)

    def sync(self) -> None:
        """Forces the record to the disk; called with each checkpoint."""
        self._open_record.sync()

    def finish(self, status: Status, timeout: float = 30.0) -> None:
        """Records the end, gives the store `timeout` seconds to take what is left, says what it did not.

        `SCHEDULED` is a run that stopped with a checkpoint to be requeued: no end time, and RUNNING again when it
        goes on.
        """
        record = self._open_record
        record.append("finish", status=status)
        record.close()
        self._record = None
        if self._thread is None or self._feeder is None:
            return
        self._stop.set()
        self._thread.join(timeout)
        refused, left = dict(self._feeder.refused), self._feeder.left()
        if refused:
            count = sum(refused.values())
            say(f"MLflow does not have {count} items of {record.path}, such as {min(refused)}")
        if left:
            say(
                f"{left} lines of {record.path} have not reached MLflow at {self._store_name} "
                f"({self._trouble or 'out of time'}); `crosslift ui` or a resume sends them"
            )

    @property
    def _open_record(self) -> RunRecord:
        if self._record is None:
            raise RuntimeError("the Tracker has not started or has finished")
        return self._record

    @property
    def _store_name(self) -> str:
        return without_password(self._target.uri or "") if self._target is not None else ""

    def _feed_until_stopped(self) -> None:
        """The feeder thread: never raises; tries a store that is away ever less often, and at the end."""
        assert self._feeder is not None
        wait, stopping, shown = 0.0, False, False
        while not stopping:
            stopping = self._stop.wait(wait)
            try:
                self._feeder.feed()
            except Exception as error:  # whatever MLflow throws: the run is not to know
                why = reason(error)
                if self._trouble is None:
                    say(f"MLflow at {self._store_name}: {why}; {RECORD_NAME} keeps what is not sent")
                self._trouble = why
                wait = min(max(2 * wait, self._config.sync_seconds), _LONGEST_WAIT)
            else:
                if self._trouble is not None:
                    say(f"MLflow at {self._store_name} is back and has everything")
                elif not shown and is_server(self._store_name) and self._feeder.experiment_id:
                    log.info("MLflow: %s", run_page(self._store_name, self._feeder.experiment_id, self._feeder.run_id))
                    shown = True
                self._trouble = None
                wait = self._config.sync_seconds


@contextmanager
def run_of_runs(
    output_dir: Path, section: Mapping[str, Any], params: Mapping[str, Any]
) -> Iterator[tuple[Tracker, dict[str, Any]]]:
    """Follows what is made of several runs, such as a training and the scores of what it trained, as one MLflow run.

    `section` holds the values of a run file's `tracking`. Gives the tracker, started, and the values with which a run
    inside becomes part of it: the same store and experiment, and the parent. Raises ConfigError for a wrong value.
    """
    try:
        config = TrackingConfig.model_validate(dict(section))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"tracking.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    target = target_of(config, output_dir)
    if config.enabled:
        say(str(target))
    tracker = Tracker(output_dir, config)
    tracker.start(params, {**versions(), **git_state()}, resumed_step=None)
    uri = _login_to_environment(target.uri)
    inside = {"enabled": config.enabled, "uri": uri, "experiment": target.experiment, "parent": tracker.id}
    status: Status = "FAILED"
    try:
        yield tracker, inside
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def _login_to_environment(uri: str | None) -> str | None:
    """The address as the run file of a run inside may hold it; a server's login goes to that run by the environment.

    Raises ConfigError for a database's password, which has no such way.
    """
    login = urllib.parse.urlsplit(uri or "")
    if uri is None or login.password is None:
        return uri
    if not login.scheme.startswith("http"):
        raise ConfigError(
            "tracking.uri: holds a password, which would be written into the training's run file; leave it out there "
            "and give it as the database's driver reads it (such as PGPASSWORD), or name a server"
        )
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", urllib.parse.unquote(login.username or ""))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", urllib.parse.unquote(login.password))
    return without_password(uri)


def sync_record(output_dir: Path, uri: str | None = None) -> SyncResult:
    """Feeds the store at `uri` what it lacks of a run's record. Default: the store that the run itself used.

    Idempotent. A store that is away is no exception: the result says what is left and why. Raises ConfigError
    if the folder has no record.
    """
    starts = list(read_starts(output_dir / RECORD_NAME))
    if not starts:
        raise ConfigError(f"{output_dir}: holds no run: {RECORD_NAME} is missing or empty")
    return sync_to(output_dir, uri or starts[-1][1].get("uri") or default_store(output_dir))
