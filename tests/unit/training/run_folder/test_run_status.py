"""`crosslift status` and `logs` of a run outside Slurm, from the files in its folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import crosslift
from training.checkpoints.checkpoint import MARKER, checkpoint_path
from training.launch import logs
from training.run_folder import status as run_status
from training.run_folder.lock import LOCK_FILE, Holder, held
from training.run_folder.status import local_runs
from training.run_folder.status import run_status as status_of
from training.tracking.run_record import RunRecord


def record(run: Path, steps: int, end: str | None, resumed: int | None = None, total: int = 10) -> None:
    """Write the record of a start that did `steps` steps."""
    written = RunRecord(run)
    written.append("start", id="i", parent=None, experiment="e", run_name="r", uri=None, resumed_step=resumed)
    written.append("params", values={"max_steps": str(total)})
    for step in range((resumed or 0) + 1, (resumed or 0) + steps + 1):
        written.append("metrics", step=step, values={"train/loss": 1.0})
        time.sleep(0.002)
    if end is not None:
        written.append("finish", status=end)
    written.close()


def log_event(run: Path, level: str, message: str) -> None:
    logs.make_logs_folder(run)
    with (logs.logs_folder(run) / "events.jsonl").open("a", encoding="utf-8") as file:
        line = json.loads(logs.event_line(0, level, 3, message))
        file.write(json.dumps({**line, "time": line["time"] + 1}) + "\n")


def holder(run: Path, **changes: Any) -> None:
    (run / LOCK_FILE).write_text(json.dumps(asdict(replace(Holder.here(0), **changes))))


def command(*arguments: str) -> Any:
    return CliRunner().invoke(crosslift.app, list(arguments))


@pytest.mark.parametrize(
    ("end", "state", "words"),
    [
        ("FINISHED", "finished", "finished"),
        ("SCHEDULED", "stopped", "the same command resumes it"),
        ("KILLED", "interrupted", "interrupted"),
        ("FAILED", "failed", "failed"),
        (None, "killed", "killed, or its machine went down"),
    ],
)
def test_status_shows_how_a_run_ended(tmp_path: Path, end: str | None, state: str, words: str) -> None:
    record(tmp_path, 4, end)
    found = status_of(tmp_path)
    assert found is not None
    assert (found.state, found.step, found.max_steps, found.host) == (state, 4, 10, None)
    assert words in command("status", str(tmp_path)).output
    assert "step 4 of 10" in command("status", str(tmp_path)).output


def test_a_run_is_running_while_its_process_lives(tmp_path: Path) -> None:
    record(tmp_path, 4, None)
    with held(tmp_path):
        found = status_of(tmp_path)
        assert found is not None
        assert (found.state, found.host, found.pid) == ("running", socket.gethostname(), os.getpid())
        assert found.seconds_per_step is not None
        assert found.seconds_left == pytest.approx(6 * found.seconds_per_step)
        output = command("status", str(tmp_path)).output
        assert f"running on {socket.gethostname()} (pid {os.getpid()}) since" in output
        assert " left" in output
    after = status_of(tmp_path)
    assert after is not None
    assert after.state == "killed"  # it released its lock, but its record has no end
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder(tmp_path, pid=ended.pid, started=1)
    assert status_of(tmp_path) == replace(after, updated=status_of(tmp_path).updated)  # type: ignore[union-attr]


def test_a_run_on_another_machine_runs_while_it_renews_its_lock(tmp_path: Path) -> None:
    record(tmp_path, 4, None)
    holder(tmp_path, host="node-7", machine="another", pid=1)
    found = status_of(tmp_path)
    assert found is not None
    assert (found.state, found.host) == ("running", "node-7")
    long_ago = time.time() - 3600
    os.utime(tmp_path / LOCK_FILE, (long_ago, long_ago))
    found = status_of(tmp_path)
    assert found is not None
    assert found.state == "killed"


def test_before_its_first_step_a_run_is_starting(tmp_path: Path) -> None:
    log_event(tmp_path, "INFO", "preflight: 1 rank")
    with held(tmp_path):
        assert [each.state for each in local_runs(tmp_path)] == ["starting"]
    assert [each.state for each in local_runs(tmp_path)] == ["killed"]


def test_status_of_a_failed_run_shows_its_last_error(tmp_path: Path) -> None:
    record(tmp_path, 3, "FAILED")
    for line in ("Traceback (most recent call last):", '  File "x.py", line 1', "OSError: the disk is gone"):
        log_event(tmp_path, "STDERR", line)
    assert "\n  OSError: the disk is gone\n" in command("status", str(tmp_path)).output
    log_event(tmp_path, "CRITICAL", "crosslift: step 4: the loss is not finite")
    assert "\n  step 4: the loss is not finite\n" in command("status", str(tmp_path)).output


def test_a_message_after_a_successful_end_is_not_a_failure(tmp_path: Path) -> None:
    record(tmp_path, 10, "FINISHED")
    log_event(tmp_path, "CRITICAL", "crosslift: 3 lines have not reached MLflow")
    found = status_of(tmp_path)
    assert found is not None
    assert (found.state, found.error) == ("finished", None)


def test_a_start_that_failed_before_its_first_step_is_the_newest(tmp_path: Path) -> None:
    record(tmp_path, 4, "SCHEDULED")
    log_event(tmp_path, "INFO", "preflight: 1 rank on here")
    log_event(tmp_path, "CRITICAL", "crosslift: config optimizer.learning_rate: was 1, now 2")
    found = status_of(tmp_path)
    assert found is not None
    assert (found.state, found.error) == ("failed", "config optimizer.learning_rate: was 1, now 2")


def test_steps_are_those_of_the_newest_start_and_the_checkpoint_is_complete(tmp_path: Path) -> None:
    record(tmp_path, 9, None)
    record(tmp_path, 2, None, resumed=4)
    for step in (4, 8):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    (checkpoint_path(tmp_path, 4) / MARKER).write_text('{"files": {}}')
    found = status_of(tmp_path)
    assert found is not None
    assert found.step == 6
    assert found.checkpoint == str(checkpoint_path(tmp_path, 4))
    printed = json.loads(command("status", str(tmp_path), "--json").output)
    assert printed["runs"] == [asdict(found)]


def test_status_shows_all_runs_below_a_folder(tmp_path: Path) -> None:
    for name in ("base", "msft"):
        record(tmp_path / name, 1, "FINISHED")
    output = command("status", str(tmp_path)).output
    assert f"{tmp_path}/base: finished" in output
    assert f"{tmp_path}/msft: finished" in output
    result = command("logs", str(tmp_path))
    assert "give one run's folder" in str(result.exception)
    (tmp_path / "empty").mkdir()
    assert "no run there" in str(command("status", str(tmp_path / "empty")).exception)


def test_cancel_explains_how_to_end_a_local_run(tmp_path: Path) -> None:
    record(tmp_path, 1, None)
    assert "is not a Slurm job; `kill -TERM` the pid" in str(command("cancel", str(tmp_path)).exception)


def test_logs_of_a_local_run(tmp_path: Path) -> None:
    record(tmp_path, 1, "FINISHED")
    assert "has written no log" in str(command("logs", str(tmp_path)).exception)
    logs.make_logs_folder(tmp_path)
    (logs.logs_folder(tmp_path) / "run.log").write_text("of all\n")
    logs.rank_log(tmp_path, 1).write_text("of one\n")
    assert command("logs", str(tmp_path)).output == "of all\n"
    assert command("logs", str(tmp_path), "--follow").output == "of all\n"  # it has ended, so nothing more is written
    assert command("logs", str(tmp_path), "--rank", "1").output == "of one\n"
    assert "ranks with a log: 0 to 1" in str(command("logs", str(tmp_path), "--rank", "2").exception)


def test_logs_are_followed_to_the_runs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.jobs.FOLLOW_INTERVAL_S", 0.05)
    monkeypatch.setattr("slurm.commands.POLL_S", 0.1)
    record(tmp_path, 1, None)
    logs.make_logs_folder(tmp_path)
    file = logs.logs_folder(tmp_path) / "run.log"
    alive = True
    monkeypatch.setattr(run_status, "_live_holder", lambda run: Holder.here(0) if alive else None)
    shown: list[str] = []
    reader = threading.Thread(target=lambda: shown.append(command("logs", str(tmp_path), "--follow").output))
    reader.start()  # before there is a log
    time.sleep(0.3)
    file.write_text("one\n")
    time.sleep(0.3)
    with file.open("a") as more:
        more.write("two\n")
    alive = False
    reader.join(20)
    assert shown == ["one\ntwo\n"]


def test_steps_between_two_logged_ones_are_counted(tmp_path: Path) -> None:
    """Ten steps a line, 2 s a step; the last checkpoint is of a step that did not log."""
    record(tmp_path, 1, None, resumed=9, total=100)
    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    first = lines[-1]["time"]
    for step in (20, 30):
        lines.append({**lines[-1], "step": step, "time": first + 2000 * (step - 10)})
    (tmp_path / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with held(tmp_path):
        found = status_of(tmp_path)
        assert found is not None
        assert (found.step, found.seconds_per_step, found.seconds_left) == (30, 2.0, 140.0)
    complete = checkpoint_path(tmp_path, 33)
    complete.mkdir(parents=True)
    (complete / MARKER).write_text(json.dumps({"files": {}}))
    found = status_of(tmp_path)
    assert found is not None
    assert (found.step, found.checkpoint) == (33, str(complete))
