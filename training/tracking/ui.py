"""`crosslift ui`: MLflow's server for the runs below a folder, on a store built from their records."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from training.errors import ConfigError
from training.tracking.mlflow_feed import RecordFeeder, sync_record
from training.tracking.mlflow_store import (
    QUIET,
    combined_runs_page,
    default_store,
    open_client,
    remove_misread,
    runs_page,
    server_answers,
)
from training.tracking.run_record import RECORD_NAME, latest_start, run_folders


def serve_ui(runs_dir: Path, port: int = 5000, host: str = "127.0.0.1", open_browser: bool = False) -> int:
    """Show all runs below a folder: build `mlflow.db` there from the records and run MLflow's server on it.

    A run with a server of its own that responds is synced to that one instead, and its page there is printed; if this
    holds for every run, no server is started. The page that opens lists the runs of all experiments.

    Returns:
        The server's exit status, when it ends.

    Raises:
        ConfigError: the folder has no records, or the port is in use.
    """
    folders = sorted(run_folders(runs_dir))
    if not folders:
        raise ConfigError(f"{runs_dir}: no {RECORD_NAME} below it; give the folder that holds the run folders")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror} on {host}; choose another port") from None
    store, results = default_store(runs_dir), []
    for folder in sorted(folders, key=lambda folder: (folder / RECORD_NAME).stat().st_mtime, reverse=True):
        results.append(result := _synced(folder, store))
        print(_line(folder, result, store), flush=True)
    shown = [result for result in results if result is not None and result.run_id]
    elsewhere = _pages([result for result in shown if result.uri != store and not result.error], None)
    for address, content in elsewhere:
        print(f"{address}  ({content})", flush=True)
    here = _pages([result for result in shown if result.uri == store], f"http://{host}:{port}")
    if elsewhere and not here:  # a server started here would have no runs
        if open_browser:
            webbrowser.open(elsewhere[0][0])
        return 0
    return _serve(store, runs_dir, port, host, here, open_browser)


def has_display() -> bool:
    """Whether stdout is a terminal with a graphical display; over ssh a text browser would occupy the terminal."""
    graphical = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.stdout.isatty() and bool(graphical)


def _synced(folder: Path, store: str) -> RecordFeeder | None:
    """Sync one run with its own server if that responds, else with the folder's store; None for an empty record."""
    start = latest_start(folder / RECORD_NAME)
    if start is None:
        return None
    own = start.get("uri")
    return sync_record(folder, own if own and server_answers(own) else store)


def _line(folder: Path, result: RecordFeeder | None, store: str) -> str:
    if result is None:
        return f"{folder}: empty record, skipped"
    where = "" if result.uri == store else f" at {result.uri}"
    line = f"{folder}: {result.fed} new lines{where}"
    if result.refused:
        line += f", {sum(result.refused.values())} refused, such as {min(result.refused)}"
    return f"{line}, {result.left} left ({result.error})" if result.error else line


def _pages(results: Sequence[RecordFeeder], server: str | None) -> list[tuple[str, str]]:
    """The lists that contain these runs, in their order, at `server` or (None) at each run's own one.

    Each is its address and what it shows: an experiment, or the number of experiments, and the number of runs.
    """
    found: Counter[tuple[str, str, str]] = Counter()
    for result in results:
        client = open_client(result.uri)
        experiment = client.get_experiment(client.get_run(result.run_id).info.experiment_id)
        found[server or result.uri, str(experiment.experiment_id), experiment.name] += 1
    pages = [
        (runs_page(at, number), f"{name}: {runs} run{'s' * (runs != 1)}") for (at, number, name), runs in found.items()
    ]
    if server is None or len(pages) < 2:
        return pages
    together = combined_runs_page(server, [number for _, number, _ in found])
    return [(together, f"{len(pages)} experiments: {found.total()} runs"), *pages]


def _serve(
    store: str, runs_dir: Path, port: int, host: str, pages: Sequence[tuple[str, str]], open_browser: bool
) -> int:
    """Run MLflow's server until it ends or this process is asked to end."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--artifacts-destination", str(runs_dir.resolve() / "mlartifacts")]
    command += ["--host", host, "--port", str(port)]
    # Without MLflow's job runners, five processes that the page does not need.
    environment = {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    server = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    address = f"http://{host}:{port}"
    try:
        while server.poll() is None and not server_answers(address, timeout=1.0):
            threading.Event().wait(0.2)
        remove_misread(store)
        if server.poll() is None:
            for page, content in pages:
                print(f"{page}  ({content})", flush=True)
            print(f"Ctrl-C ends {address}", flush=True)
            if open_browser and pages:
                webbrowser.open(pages[0][0])
        return server.wait()
    except KeyboardInterrupt:  # the server received it too
        return server.wait()
