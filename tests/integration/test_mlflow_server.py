"""A real MLflow server that is killed and restarted during a run: nothing is lost or sent twice, no step is delayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import waiting
from ports import free_port

from training.tracking.config import TrackingConfig
from training.tracking.mlflow_feed import sync_record
from training.tracking.mlflow_store import QUIET, default_store, open_client, server_answers
from training.tracking.run_record import RECORD_NAME
from training.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parents[2]
wait_for = partial(waiting.wait_for, seconds=90, every=0.1)  # a server starts slowly


class Server:
    """`mlflow server` on one port and one SQLite store; it can be killed and restarted."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.uri = folder, port, f"http://127.0.0.1:{port}"
        self.store = default_store(folder)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            # Its own process group: the server has a child process that must end with it.
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: server_answers(self.uri, 1.0))

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            wait_for(lambda: not server_answers(self.uri, 1.0))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder, free_port())
    yield server
    server.kill()


def tracker_for(server: Server, folder: Path, resumed_step: int | None = None) -> Tracker:
    tracker = Tracker(folder, TrackingConfig(uri=server.uri, sync_seconds=0.2))
    tracker.start({"optimizer": {"lr": 1e-4}}, {"git": "abc"}, resumed_step)
    return tracker


def runs_at(uri: str) -> tuple[Any, list[Any]]:
    client = open_client(uri)
    experiment = client.get_experiment_by_name("crosslift")
    return client, [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def only_run(server: Server) -> tuple[Any, Any]:
    client, (found,) = runs_at(server.uri)
    return client, found


def losses(server: Server) -> list[tuple[int, float]]:
    client, found = only_run(server)
    return sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, "loss"))


def test_a_server_killed_during_a_run_has_everything_once(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.start()
    folder = tmp_path / "run"
    tracker = tracker_for(server, folder)
    tracker.log(1, {"loss": 1.0})
    wait_for(lambda: [run.data.metrics for run in runs_at(server.uri)[1]] == [{"loss": 1.0}])

    server.kill()
    slowest = 0.0
    for step in range(2, 40):  # some of it while the feeder fails
        began = time.monotonic()
        tracker.log(step, {"loss": float(step)})
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    (folder / "plot.txt").write_text("seen")
    tracker.artifact(folder / "plot.txt", "plots")
    server.start()
    tracker.log(40, {"loss": 40.0})
    tracker.finish("FINISHED")

    assert slowest < 0.5
    assert losses(server) == [(step, float(step)) for step in range(1, 41)]
    client, found = only_run(server)
    assert (found.info.status, found.data.params) == ("FINISHED", {"optimizer.lr": "0.0001"})
    assert [f.path for f in client.list_artifacts(found.info.run_id, "plots")] == ["plots/plot.txt"]
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(": ")[0] for line in err.splitlines()] == ["crosslift"] * len(err.splitlines())
    assert "is reachable again and has everything" in err

    # A job that resumes from step 38 continues the same run.
    tracker = tracker_for(server, folder, resumed_step=38)
    for step in (39, 40, 41):
        tracker.log(step, {"loss": float(step)})
    tracker.finish("FINISHED")
    assert only_run(server)[1].info.run_id == found.info.run_id
    assert losses(server) == [(step, float(step)) for step in range(1, 42)]


def test_a_run_whose_server_was_never_reachable_is_synced_later(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    began = time.monotonic()
    tracker = tracker_for(server, folder)
    for step in range(1500):
        tracker.log(step, {"loss": float(step)})
    tracker.finish("FINISHED")
    assert time.monotonic() - began < 30
    assert "1504 lines" in capfd.readouterr().err
    away = sync_record(folder)
    assert (away.left, away.fed, away.run_id) == (1504, 0, "")
    assert away.error is not None
    assert "refused" in away.error

    server.start()
    result = sync_record(folder)
    assert (result.left, result.fed, result.error) == (0, 1504, None)
    assert losses(server) == [(step, float(step)) for step in range(1500)]
    assert sync_record(folder).fed == 0


def test_ui_shows_local_runs_and_syncs_a_server_that_responds(server: Server, tmp_path: Path) -> None:
    """`crosslift ui`: three run folders, one of which has its own server."""
    runs = tmp_path / "runs"
    for name in ("a", "deep/b"):
        tracker = Tracker(runs / name, TrackingConfig(enabled=False))
        tracker.start({"name": name}, {}, None)
        tracker.log(1, {"loss": 1.0})
        (runs / name / "note.txt").write_text(name)
        tracker.artifact(runs / name / "note.txt")
        tracker.finish("FINISHED")
    away = tracker_for(server, runs / "own")
    away.log(1, {"loss": 2.0})
    away.finish("FINISHED", timeout=20)
    server.start()

    port = free_port()
    code = f"from pathlib import Path; from training.tracking.ui import serve_ui; serve_ui(Path({str(runs)!r}), {port})"
    with (tmp_path / "ui.log").open("wb") as log:
        page = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: page.poll() is not None or server_answers(address, 1.0))
        wait_for(lambda: page.poll() is not None or "Ctrl-C ends" in (tmp_path / "ui.log").read_text())
        printed = (tmp_path / "ui.log").read_text()
        assert page.poll() is None, printed
        with urllib.request.urlopen(address) as answer:
            assert b"<html" in answer.read()
        _, found = runs_at(address)
        assert {run.data.params["name"] for run in found} == {"a", "deep/b"}
        body = urllib.request.urlopen(f"{address}/get-artifact?run_id={found[0].info.run_id}&path=note.txt").read()
        assert body.decode() == found[0].data.params["name"]
    finally:
        page.terminate()
        page.wait(30)
    wait_for(lambda: not server_answers(address, 1.0))  # its server ended with it
    assert losses(server) == [(1, 2.0)]
    ids = {run.info.experiment_id for run in found}
    assert f"{address}/#/experiments/{ids.pop()}/runs?workflowType=machine_learning  (crosslift: 2 runs)" in printed
    assert f"{server.uri}/#/experiments/" in printed
    assert set(json.loads((runs / "a" / "tracking.json").read_text())["stores"]) == {default_store(runs)}
    assert (runs / "a" / RECORD_NAME).exists()
