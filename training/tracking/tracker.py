"""Tracking of a run by its training process: everything goes to the record, and from there to MLflow.

`Tracker` writes `record.jsonl` (`run_record.py`) and wakes a daemon thread that sends it to the store
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

import tenacity
from pydantic import ValidationError

from data_pipeline.secrets import without_login
from training.errors import ConfigError
from training.messages import print_message
from training.provenance import description, source_tags
from training.tracking.config import DEFAULT_EXPERIMENT, TrackingConfig, TrackingTarget, tracking_target
from training.tracking.mlflow_feed import RecordFeeder
from training.tracking.mlflow_store import MAX_PARAM, is_server, run_page
from training.tracking.run_record import (
    PARAMS_NAME,
    RECORD_NAME,
    RunRecord,
    Status,
    flatten,
    json_number,
    read_starts,
)

log = logging.getLogger(__name__)
MAX_RETRY_WAIT_S = 60.0  # between two attempts to reach a store


class Tracker:
    """Records a run and feeds it to MLflow; on rank 0 only. Not thread-safe."""

    def __init__(self, output_dir: Path, config: TrackingConfig) -> None:
        self._output_dir = output_dir
        self._config = config
        self._record: RunRecord | None = None
        self._feeder: RecordFeeder | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._page_logged = False
        self._target: TrackingTarget | None = None
        self.id = ""  # the record's id, once started

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], resumed_step: int | None) -> None:
        """Open the record and start feeding MLflow; in a folder with a record, the same MLflow run continues.

        Nothing after this raises for the disk or MLflow.

        Args:
            params: the nested config; it is flattened to dotted names.
            resumed_step: number of steps that the loaded checkpoint had done; None: the run starts from the beginning.

        Raises:
            ConfigError: the run folder cannot be written, or an environment variable is not a store's address.
        """
        config = self._config
        self._target = tracking_target(config, self._output_dir) if config.enabled else None
        self._record = RunRecord(self._output_dir)
        _, first = next(read_starts(self._record.path), (0, None))
        self.id = first["id"] if first else uuid.uuid4().hex
        self._append_start(resumed_step)
        values = flatten(params)
        self._record.append("params", values=values)
        self._record.append("tags", values={**source_tags(tags), **{name: str(value) for name, value in tags.items()}})
        self._keep_long_params(values)
        if self._target is None:
            return
        has_page = self._target.uri is not None and is_server(self._target.uri)
        hint = "" if has_page else f"; crosslift ui {shlex.quote(str(self._output_dir))} shows it"
        log.info("%s%s", self._target, hint)
        if self._target.uri is None:
            return
        self._feeder = RecordFeeder(self._output_dir, self._target.uri)
        self._thread = threading.Thread(
            target=self._feed_until_stopped, args=(self._feeder,), name="mlflow-feeder", daemon=True
        )
        self._thread.start()

    def rewind(self, step: int) -> None:
        """Record that the run was rolled back to `step` done steps; metrics of later steps are logged again."""
        self._append_start(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step. Takes microseconds, whatever MLflow does."""
        values = {name: json_number(value) for name, value in metrics.items()}
        self._open_record.append("metrics", step=int(step), values=values)

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags of the run."""
        self._open_record.append("tags", values=dict(values))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or folder below the run folder as an artifact; it is uploaded in the background.

        Raises:
            ValueError: the path is outside the run folder.
        """
        inside = path.resolve().relative_to(self._output_dir.resolve()).as_posix()
        self._open_record.append("artifact", path=inside, folder=folder)

    def sync(self) -> None:
        """Sync the record to disk; called with each checkpoint."""
        self._open_record.sync()

    def finish(self, status: Status, timeout: float = 30.0) -> None:
        """Record the end, give the store `timeout` seconds to accept the rest, and report what it has not accepted.

        Args:
            status: SCHEDULED for a run that stopped with a checkpoint and will be requeued: it has no end time, and is
                RUNNING again when it resumes.
        """
        record = self._open_record
        record.append("finish", status=status)
        record.close()
        self._record = None
        if self._thread is None or self._feeder is None:
            return
        self._stop.set()
        self._thread.join(timeout)
        refused, left = dict(self._feeder.refused), self._feeder.left
        if refused:
            count = sum(refused.values())
            print_message(f"MLflow does not have {count} items of {record.path}, such as {min(refused)}")
        if left:
            print_message(
                f"{left} lines of {record.path} have not reached MLflow at {self._feeder.uri} "
                f"({self._feeder.error or 'out of time'}); `crosslift ui` or a resume sends them"
            )

    def _append_start(self, resumed_step: int | None) -> None:
        config, target = self._config, self._target
        uri = config.uri if target is None else None if target.is_default else target.uri
        self._open_record.append(
            "start",
            id=self.id,
            parent=config.parent,
            experiment=target.experiment if target is not None else config.experiment or DEFAULT_EXPERIMENT,
            run_name=config.run_name or self._output_dir.resolve().name,
            uri=None if uri is None else without_login(uri),
            resumed_step=resumed_step,
        )

    def _keep_long_params(self, params: Mapping[str, str]) -> None:
        """If a param is too long for MLflow, keep all params in an artifact. Does not raise if the disk fails."""
        if all(len(value) <= MAX_PARAM for value in params.values()):
            return
        path = self._output_dir / PARAMS_NAME
        try:
            path.write_text(json.dumps(params, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            print_message(f"{path}: {error.strerror}; {RECORD_NAME} has the complete params")
        else:
            self.artifact(path)

    @property
    def _open_record(self) -> RunRecord:
        if self._record is None:
            raise RuntimeError("the Tracker has not started or has finished")
        return self._record

    def _feed_until_stopped(self, feeder: RecordFeeder) -> None:
        """The feeder thread; never raises. Retries with back-off while the store is unreachable."""
        retrying = tenacity.Retrying(
            wait=tenacity.wait_exponential(multiplier=self._config.sync_seconds, max=MAX_RETRY_WAIT_S),
            sleep=tenacity.sleep_using_event(self._stop),
            stop=tenacity.stop_when_event_set(self._stop),
        )
        stopping = False
        while not stopping:
            stopping = self._stop.is_set()  # the record is complete: feed it once more
            try:
                retrying(self._feed, feeder)
            except tenacity.RetryError:  # `finish` reports what is left
                return
            self._stop.wait(self._config.sync_seconds)

    def _feed(self, feeder: RecordFeeder) -> None:
        """One attempt; reports the beginning and the end of an outage."""
        outage = feeder.error is not None
        try:
            feeder.feed()
        except Exception:
            if not outage:
                print_message(f"MLflow at {feeder.uri}: {feeder.error}; {RECORD_NAME} keeps what is not sent")
            raise
        if outage:
            print_message(f"MLflow at {feeder.uri} is reachable again and has everything")
        elif not self._page_logged and is_server(feeder.uri) and feeder.experiment_id:
            log.info("MLflow: %s", run_page(feeder.uri, feeder.experiment_id, feeder.run_id))
            self._page_logged = True


@contextmanager
def parent_run(
    output_dir: Path, section: Mapping[str, Any], params: Mapping[str, Any]
) -> Iterator[tuple[Tracker, dict[str, Any]]]:
    """Track a run that consists of several, such as a training and the evaluation of its model.

    Yields the started tracker, and the `tracking` section of child runs: the same store and experiment, and the parent.

    Args:
        section: values of a run file's `tracking`.

    Raises:
        ConfigError: a wrong value in the section.
    """
    try:
        config = TrackingConfig.model_validate(dict(section))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"tracking.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    target = tracking_target(config, output_dir)
    if config.enabled:
        print_message(str(target))
    tracker = Tracker(output_dir, config)
    tracker.start(params, description(), resumed_step=None)
    uri = _login_to_environment(target.uri)
    child = {"enabled": config.enabled, "uri": uri, "experiment": target.experiment, "parent": tracker.id}
    status: Status = "FAILED"
    try:
        yield tracker, child
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def _login_to_environment(uri: str | None) -> str | None:
    """The address as a child's run file may contain it; a server's login is passed on by the environment.

    Raises:
        ConfigError: a database's password, which cannot be passed on like that.
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
    return without_login(uri)
