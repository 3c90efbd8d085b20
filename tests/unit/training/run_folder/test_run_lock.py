"""The lock on a run folder, with real processes: one run at a time; the lock of a dead process is taken over."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from waiting import wait_for

from training.errors import ConfigError
from training.run_folder import lock as run_lock
from training.run_folder.lock import HELD, LOCK_FILE, Holder, held, holder_of, refuse_other, running_in

ROOT = Path(__file__).resolve().parents[4]
HOLD = """
import sys, time
from pathlib import Path
from training.run_folder import lock as run_lock
from training.errors import ConfigError
from training.run_folder.lock import held

def slowly(file, read=run_lock._read):  # gives others time between reading and writing
    holder = read(file)
    time.sleep(0.2)
    return holder

run_lock._read = slowly
until = float(sys.argv[2])
time.sleep(max(until - time.time(), 0))
try:
    with held(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
except ConfigError as error:
    print(error, flush=True)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", HELD):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that hold `tmp_path / "run"`, at a given time; they end with the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(at: float = 0.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), str(at)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def written(output: Path, holder: Holder) -> Path:
    """Write the lock file of another holder."""
    output.mkdir(exist_ok=True)
    (output / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return output / LOCK_FILE


def elsewhere(**changes: object) -> Holder:
    """A holder on another machine."""
    return replace(Holder.here(0), host="node-7", machine="another boot", **changes)  # type: ignore[arg-type]


def test_a_second_run_is_refused_with_host_pid_and_time_and_changes_nothing(start: Start, tmp_path: Path) -> None:
    first = start()
    assert first_line(first) == "held"
    before = (tmp_path / "run" / LOCK_FILE).read_bytes()
    with pytest.raises(ConfigError) as refusal, held(tmp_path / "run"):
        pass
    assert re.fullmatch(
        rf"output_dir: {re.escape(str(tmp_path / 'run'))}: in use by a run on {re.escape(socket.gethostname())} "
        rf"\(pid {first.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\); wait for it or end it, or give another "
        "output_dir",
        str(refusal.value),
    )
    assert (tmp_path / "run" / LOCK_FILE).read_bytes() == before
    assert os.listdir(tmp_path / "run") == [LOCK_FILE]


def test_the_lock_of_a_killed_run_is_taken_over(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start()
    assert first_line(first) == "held"
    first.kill()  # and not waited for: a zombie process does not count as a run
    wait_for(lambda: running_in(tmp_path / "run") is None)
    with held(tmp_path / "run"):
        holder = holder_of(tmp_path / "run")
        assert holder is not None
        assert holder.pid == os.getpid()
    assert f"left by a run on {socket.gethostname()} (pid {first.pid}, since " in capsys.readouterr().err
    assert holder_of(tmp_path / "run") is None


def test_a_pid_reused_by_another_process_does_not_count_as_the_run(start: Start, tmp_path: Path) -> None:
    other = start()
    assert first_line(other) == "held"
    holder = holder_of(tmp_path / "run")
    assert holder is not None
    written(tmp_path / "reused", replace(holder, started=holder.started - 1))
    with held(tmp_path / "reused"):
        pass


@pytest.mark.parametrize("stale", [False, True])
def test_of_simultaneous_starts_exactly_one_gets_the_lock(start: Start, tmp_path: Path, stale: bool) -> None:
    if stale:
        written(tmp_path / "run", replace(Holder.here(0), started=1))
    at = time.time() + 1.5
    lines = [first_line(process) for process in [start(at) for _ in range(4)]]
    assert lines.count("held") == 1
    assert sum(": in use by a run on " in line for line in lines) == 3


def test_a_run_that_ends_releases_its_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with held(tmp_path / "run"):
            assert running_in(tmp_path / "run") is not None
    assert HELD not in os.environ
    with pytest.raises(KeyboardInterrupt), held(tmp_path / "run"):
        raise KeyboardInterrupt
    assert running_in(tmp_path / "run") is None


def test_processes_that_a_run_starts_share_its_lock(tmp_path: Path) -> None:
    """Ranks run under the launcher's lock; a training that `xtreme run` starts in another folder locks that one."""
    with held(tmp_path / "run"):
        token = os.environ[HELD]
        with held(tmp_path / "run"):
            refuse_other(tmp_path / "run", 29500)
        assert running_in(tmp_path / "run") is not None
        with held(tmp_path / "run" / "training"):
            assert os.environ[HELD] != token
        assert os.environ[HELD] == token


def test_a_rank_is_refused_if_another_run_holds_the_lock(start: Start, tmp_path: Path) -> None:
    first = start()
    assert first_line(first) == "held"
    refuse_other(tmp_path / "run", 0)  # the rendezvous port of that run's ranks
    with pytest.raises(ConfigError, match="in use by a run on "):
        refuse_other(tmp_path / "run", 29501)


def test_a_requeued_job_takes_over_from_its_killed_predecessor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the other node are not visible, but Slurm ends a job before it starts it again."""
    monkeypatch.setattr(run_lock, "_renews_lock", lambda *_: pytest.fail("nothing to wait for"))
    written(tmp_path / "run", elsewhere(job="42", restart=1))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with held(tmp_path / "run"):
        pass


@pytest.mark.parametrize("job", ["", "41"])
def test_a_lock_from_another_machine_that_is_not_renewed_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    written(tmp_path / "run", elsewhere(job=job))
    with held(tmp_path / "run"):
        pass
    printed = capsys.readouterr().err
    assert "held by a run on node-7" in printed
    assert "for its lock to be renewed" in printed
    assert "taken over" in printed


def test_a_lock_from_another_machine_that_is_renewed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = written(tmp_path / "run", elsewhere())
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 20)
    monkeypatch.setattr(
        run_lock, "print_message", lambda text: os.utime(lock, ns=(1, 1))
    )  # it renews its lock meanwhile
    with pytest.raises(ConfigError, match=r"in use by a run on node-7 \(pid "), held(tmp_path / "run"):
        pass


def test_a_holder_renews_its_lock_and_ends_if_it_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.05)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a script started pytest with &
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    lock = tmp_path / "run" / LOCK_FILE

    def run() -> None:
        os.utime(lock, ns=(1, 1))
        wait_for(lambda: lock.stat().st_mtime_ns > 1)
        lock.unlink()  # by hand: it is still this run's folder
        wait_for(lambda: running_in(tmp_path / "run") is not None)
        written(tmp_path / "run", elsewhere())
        time.sleep(20)

    with pytest.raises(KeyboardInterrupt), held(tmp_path / "run"):
        run()
    assert holder_of(tmp_path / "run") is not None, "the lock of the other holder is kept"


def test_a_holder_that_ignores_interrupts_ends_too(tmp_path: Path) -> None:
    """Processes that a script starts with `&` have SIGINT ignored by the shell."""
    folder = tmp_path / "run"
    code = f"""
        import signal, time
        from pathlib import Path
        from training.run_folder import lock
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        lock.RENEW_SECONDS = 0.05
        with lock.held(Path({str(folder)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            written(folder, elsewhere())
            assert process.wait(30) == 128 + signal.SIGINT
        finally:
            process.kill()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_damaged_lock_file_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with held(tmp_path):
        assert running_in(tmp_path) is not None
