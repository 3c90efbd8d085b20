"""Tracking that never stops a run: what rank 0 says goes to a file, and from there to MLflow.

In: a run's config, metrics, artifacts and end. Out: `record.jsonl` in the run folder, at once; an MLflow run,
when the store can be reached. Next: `crosslift ui` shows the store, `evals` reads metrics from the record.

`Tracker` writes the record (`run_record.py`) and wakes a daemon thread that feeds it to the store
(`mlflow_feed.py`). The training loop never waits for MLflow; only `finish` does, for a bounded time.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import uuid
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from data_pipeline.settings import Section
from training.errors import ConfigError
from training.mlflow_feed import RecordFeeder, SyncResult
from training.mlflow_feed import sync_record as sync_to
from training.mlflow_store import (
    QUIET,
    checked_address,
    default_store,
    on_shared_disk,
    reason,
    server_answers,
    without_password,
)
from training.provenance import git_state, versions
from training.run_record import RECORD_NAME, RunRecord, Status, flatten, number, read_starts, say

_LONGEST_WAIT = 60.0  # seconds between two tries to reach a store that is away


class TrackingConfig(Section):
    """The `tracking:` section of the run file."""

    enabled: bool = Field(default=True, description="Feed MLflow. If false, only record.jsonl is written.")
    uri: str | None = Field(
        default=None,
        description="Address of the MLflow store, such as http://host:5000 or sqlite:////path/mlflow.db. "
        "Default: mlflow.db in the run folder; none if that is on a network disk, which SQLite does not bear "
        "(`crosslift ui` builds the store from the records).",
    )
    experiment: str = Field(default="crosslift", min_length=1, max_length=500, description="MLflow's experiment.")
    run_name: str | None = Field(default=None, description="The run's name in MLflow. Default: the run folder's name.")
    sync_seconds: float = Field(default=5.0, gt=0, le=86400, description="Seconds between two batches to the store.")
    parent: str | None = Field(
        default=None, description="Record id of the run that this one is part of; `crosslift xtreme run` sets it."
    )

    @field_validator("uri")
    @classmethod
    def _an_address(cls, uri: str | None) -> str | None:
        return None if uri is None else checked_address(uri)


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
        self.id = ""  # the record's, once started

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], resumed_step: int | None) -> None:
        """Opens the record, and goes on with the same MLflow run if the folder has a record already.

        `params` is the nested config, flattened to dotted names. `resumed_step` is the number of steps the
        loaded checkpoint had done; None: the run begins at its beginning. Raises ConfigError if the run
        folder cannot be written; nothing after this raises for the disk or MLflow.
        """
        if self._record is not None:
            raise RuntimeError("a Tracker starts once")
        config = self._config
        self._record = RunRecord(self._output_dir)
        _, earlier = next(read_starts(self._record.path), (0, None))
        self.id = earlier["id"] if earlier else uuid.uuid4().hex
        self._append_start(resumed_step)
        self._record.append("params", values=flatten(params))
        self._record.append("tags", values={name: str(value) for name, value in tags.items()})
        if not config.enabled:
            return
        if config.uri is None and on_shared_disk(self._output_dir):
            say(f"{self._output_dir} is on a network disk: `crosslift ui` shows its {RECORD_NAME} in MLflow")
            return
        self._feeder = RecordFeeder(self._output_dir, config.uri or default_store(self._output_dir))
        self._thread = threading.Thread(target=self._feed_until_stopped, name="mlflow-feeder", daemon=True)
        self._thread.start()

    def rewind(self, step: int) -> None:
        """The run went back to where `step` steps were done; what was logged behind them comes anew."""
        self._append_start(step)

    def _append_start(self, resumed_step: int | None) -> None:
        config = self._config
        self._open_record.append(
            "start",
            id=self.id,
            parent=config.parent,
            experiment=config.experiment,
            run_name=config.run_name or self._output_dir.resolve().name,
            uri=None if config.uri is None else without_password(config.uri),
            resumed_step=resumed_step,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step. Costs microseconds, whatever becomes of MLflow."""
        values = {name: number(value) for name, value in metrics.items()}
        self._open_record.append("metrics", step=int(step), values=values)

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
        return without_password(self._config.uri or default_store(self._output_dir))

    def _feed_until_stopped(self) -> None:
        """The feeder thread: never raises; tries a store that is away ever less often, and at the end."""
        assert self._feeder is not None
        wait = 0.0
        stopping = False
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
    uri = config.uri
    if uri is None and not on_shared_disk(output_dir):
        uri = default_store(output_dir)
    tracker = Tracker(output_dir, config)
    tracker.start(params, {**versions(), **git_state()}, resumed_step=None)
    uri = _login_to_environment(uri)
    inside = {"enabled": config.enabled, "uri": uri, "experiment": config.experiment, "parent": tracker.id}
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


def serve_ui(runs_dir: Path, port: int = 5000, host: str = "127.0.0.1", open_browser: bool = False) -> int:
    """Shows all runs below a folder: builds `mlflow.db` there from the records and serves MLflow's page.

    A run whose own server answers is caught up there instead. Returns the server's exit status when it ends.
    Raises ConfigError if the folder has no records or the port is taken.
    """
    folders = sorted(_run_folders(runs_dir))
    if not folders:
        raise ConfigError(f"{runs_dir}: no {RECORD_NAME} below it; give the folder that holds the run folders")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror} on {host}; choose another port") from None
    store = default_store(runs_dir)
    for folder in folders:
        print(_synced(folder, store), flush=True)
    return _serve(store, runs_dir, port, host, open_browser)


def _synced(folder: Path, store: str) -> str:
    """Syncs one run for the page; returns the line to print about it."""
    starts = list(read_starts(folder / RECORD_NAME))
    if not starts:
        return f"{folder}: empty record, left out"
    own = starts[-1][1].get("uri")
    result = sync_record(folder, own if own and server_answers(own) else store)
    where = "" if result.uri == store else f" at {result.uri}"
    line = f"{folder}: {result.fed} new lines{where}"
    if result.refused:
        line += f", {sum(result.refused.values())} refused, such as {min(result.refused)}"
    return f"{line}, {result.left} left ({result.error})" if result.error else line


def _serve(store: str, runs_dir: Path, port: int, host: str, open_browser: bool) -> int:
    """Runs MLflow's server until it ends or we are told to end."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--artifacts-destination", str(runs_dir.resolve() / "mlartifacts")]
    command += ["--host", host, "--port", str(port)]
    # The page needs none of MLflow's job runners, which would be five more processes.
    environment = {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    server = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    address = f"http://{host}:{port}"
    try:
        while server.poll() is None and not server_answers(address, timeout=1.0):
            threading.Event().wait(0.2)
        if server.poll() is None:
            print(f"{address} shows the runs; Ctrl-C ends it", flush=True)
            if open_browser:
                webbrowser.open(address)
        return server.wait()
    except KeyboardInterrupt:  # the server got it too
        return server.wait()


def _run_folders(runs_dir: Path) -> Iterator[Path]:
    """Folders with a record. Inside one, only the runs that it is made of: checkpoints are large trees."""
    for folder, below, files in os.walk(runs_dir):
        if RECORD_NAME in files:
            below[:] = [name for name in below if Path(folder, name, RECORD_NAME).is_file()]
            yield Path(folder)
