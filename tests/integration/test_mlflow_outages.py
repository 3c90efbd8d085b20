"""MLflow slow, unresponsive, failing or full: every metric is stored once, with step and time; no step is delayed.

A real server runs behind a proxy that fails on demand.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from test_mlflow_server import ROOT, Server, wait_for

from training.tracking.config import TrackingConfig
from training.tracking.mlflow_feed import sync_record
from training.tracking.mlflow_store import default_store, open_client
from training.tracking.run_record import RECORD_NAME, read_events
from training.tracking.tracker import Tracker

LONGEST_LOG = 0.5  # seconds that a step may wait for the tracker, on a busy machine


class Proxy:
    """Forwards requests to a real server, or fails according to `mode`."""

    def __init__(self, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.recover()
        self.requests = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                proxy.requests += 1
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else None
                mode = proxy.mode
                if mode == "silent":
                    time.sleep(3)
                    return
                if mode.isdigit():
                    self._send(int(mode), b'{"message": "failed"}')
                    return
                if mode == "slow":
                    time.sleep(0.3)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                request = urllib.request.Request(target + self.path, body, headers, method=self.command)
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        status, content = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    status, content = error.code, error.read()
                if mode != "lost":
                    self._send(status, content)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET

            def _send(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def recover(self) -> None:
        """From now on forward requests, with the timeout of a run: the machine may be busy."""
        self.mode = "pass"
        self._monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

    def fail(self, mode: str) -> None:
        """`mode`: silent, lost (executed, but never answered), slow, 500, 507."""
        self._monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # shorter than the delay of mode silent
        self.mode = mode

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), free_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(server.uri, monkeypatch)
    yield proxy
    proxy.close()


class Logged:
    """A tracker whose calls are timed."""

    def __init__(self, folder: Path, uri: str | None, experiment: str) -> None:
        self.tracker = Tracker(folder, TrackingConfig(uri=uri, experiment=experiment, sync_seconds=0.1))
        self.tracker.start({"lr": 0.1}, {}, None)
        self.longest = 0.0

    def steps(self, steps: range, pause: float = 0.01) -> None:
        for step in steps:
            began = time.monotonic()
            self.tracker.log(step, {"loss": float(step)})
            self.longest = max(self.longest, time.monotonic() - began)
            time.sleep(pause)


def stored(uri: str, experiment: str) -> list[tuple[int, float, int]]:
    """(step, value, time) of every point of the only run's loss, in order; none before there is a run."""
    client = open_client(uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found is not None else []
    if not runs:
        return []
    (run,) = runs
    return sorted((m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, "loss"))


def recorded(folder: Path) -> list[tuple[int, float, int]]:
    """The same from the record."""
    events = [event for _, event in read_events(folder / RECORD_NAME) if event["kind"] == "metrics"]
    return sorted((event["step"], event["values"]["loss"], event["time"]) for event in events)


@pytest.mark.parametrize("mode", ["silent", "lost", "slow", "500", "507"])
def test_after_a_temporary_failure_the_server_has_everything_once(
    server: Server, proxy: Proxy, tmp_path: Path, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Logged(tmp_path / "run", proxy.uri, mode)
    run.steps(range(20))
    wait_for(lambda: len(stored(server.store, mode)) == 20 if proxy.requests > 3 else False)
    before = proxy.requests
    proxy.fail(mode)
    run.steps(range(20, 120), pause=0.02)
    wait_for(lambda: proxy.requests > before + 1)
    proxy.recover()
    run.steps(range(120, 140))
    began = time.monotonic()
    run.tracker.finish("FINISHED")
    assert time.monotonic() - began < 31
    assert run.longest < LONGEST_LOG
    assert [step for step, *_ in stored(server.store, mode)] == list(range(140))
    assert stored(server.store, mode) == recorded(tmp_path / "run")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("mode", ["silent", "500"])
def test_a_run_ends_while_the_server_is_unreachable_and_is_synced_later(
    server: Server, proxy: Proxy, tmp_path: Path, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name, folder = f"end {mode}", tmp_path / "run"
    proxy.fail(mode)
    run = Logged(folder, proxy.uri, name)
    run.steps(range(30))
    began = time.monotonic()
    run.tracker.finish("SCHEDULED", timeout=4)
    assert time.monotonic() - began < 5
    assert run.longest < LONGEST_LOG
    assert "have not reached MLflow" in capfd.readouterr().err
    proxy.recover()
    assert sync_record(folder).left == 0
    assert stored(server.store, name) == recorded(folder)
    assert [step for step, *_ in recorded(folder)] == list(range(30))


def test_a_full_disk_of_the_store_loses_nothing(
    small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(created_store(tmp_path), small_disk / "mlflow.db")
    filler = small_disk / "filler"
    run = Logged(tmp_path / "run", default_store(small_disk), "full store")
    run.steps(range(10))
    wait_for(lambda: len(stored(default_store(small_disk), "full store")) == 10)
    filler.write_bytes(b"x" * shutil.disk_usage(small_disk).free)
    run.steps(range(10, 2000), pause=0)
    wait_for(lambda: "mlflow.db" in capfd.readouterr().err)
    filler.unlink()
    run.steps(range(2000, 2020))
    run.tracker.finish("FINISHED")
    assert run.longest < LONGEST_LOG
    assert stored(default_store(small_disk), "full store") == recorded(tmp_path / "run")
    assert len(recorded(tmp_path / "run")) == 2020


def test_a_full_disk_of_the_record_loses_nothing(
    small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = default_store(created_store(tmp_path).parent)
    run = Logged(small_disk / "run", store, "full record")
    run.steps(range(10))
    wait_for(lambda: (small_disk / "run" / "tracking.json").exists())
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        file.write(b"x" * shutil.disk_usage(small_disk).free)
    run.steps(range(10, 400), pause=0)  # the last page of the record takes some
    assert len(recorded(small_disk / "run")) < 400
    filler.unlink()
    run.steps(range(400, 410))
    run.tracker.finish("FINISHED")
    assert run.longest < LONGEST_LOG
    assert [step for step, *_ in recorded(small_disk / "run")] == list(range(410))
    assert stored(store, "full record") == recorded(small_disk / "run")
    assert "are kept in memory" in capfd.readouterr().err


SWEEP = """
import sys, time
from pathlib import Path
from training.tracking.config import TrackingConfig
from training.tracking.tracker import Tracker
folder, uri = Path(sys.argv[1]), sys.argv[2]
tracker = Tracker(folder, TrackingConfig(uri=uri, experiment="sweep", sync_seconds=0.05))
tracker.start({"name": folder.name}, {}, None)
longest = 0.0
for step in range(150):
    began = time.monotonic()
    tracker.log(step, {"loss": float(step)})
    longest = max(longest, time.monotonic() - began)
    time.sleep(0.02)
tracker.finish("FINISHED", timeout=120)
print(longest)
"""


@pytest.mark.parametrize("where", ["server", "sqlite"])
def test_three_concurrent_runs_of_a_sweep(server: Server, tmp_path: Path, where: str) -> None:
    """They share a store and a folder; the SQLite store does not exist when they start."""
    sweep = tmp_path / "sweep"
    uri = server.uri if where == "server" else default_store(sweep)
    sweep.mkdir()
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SWEEP, str(sweep / name), uri], cwd=ROOT, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name in ("a", "b", "c")
    ]  # fmt: skip
    ends = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], ends
    assert max(float(out) for out, _ in ends) < LONGEST_LOG
    left = {name: sync_record(sweep / name).left for name in ("a", "b", "c")}
    assert set(left.values()) == {0}, ends
    client = open_client(uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "sweep"]
    found = client.search_runs([experiment.experiment_id])
    assert {run.data.params["name"] for run in found} == {"a", "b", "c"}
    assert len(found) == 3
    for run in found:
        history = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((m.step, m.value, m.timestamp) for m in history) == recorded(sweep / run.data.params["name"])
        assert run.info.status == "FINISHED"


def test_a_store_whose_creation_was_killed_is_created_by_the_next_process(tmp_path: Path) -> None:
    store = default_store(tmp_path)
    program = f"from training.tracking.mlflow_store import open_client; open_client({store!r})"
    creator = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    unfinished = tmp_path / ".incomplete-mlflow.db"
    wait_for(lambda: unfinished.exists() and unfinished.stat().st_size > 100_000)
    creator.kill()
    creator.wait()
    assert not (tmp_path / "mlflow.db").exists()
    assert [each.name for each in open_client(store).search_experiments()] == ["Default"]


def test_a_store_is_created_by_one_process_at_a_time(tmp_path: Path) -> None:
    """The second process waits, and finds the store."""
    import mlflow.tracking  # noqa: F401 -- its import must not be part of the three seconds

    with (tmp_path / ".mlflow.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        creator = threading.Thread(target=open_client, args=(default_store(tmp_path),), daemon=True)
        creator.start()
        creator.join(3)
        assert creator.is_alive()
        assert [path.name for path in tmp_path.iterdir()] == [".mlflow.db.lock"]
    creator.join(60)
    assert (tmp_path / "mlflow.db").exists()


def created_store(folder: Path) -> Path:
    """An empty MLflow database."""
    place = folder / "store"
    place.mkdir()
    open_client(default_store(place)).search_experiments()
    return place / "mlflow.db"
