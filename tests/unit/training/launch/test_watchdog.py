"""Heartbeats, stall detection, and which rank is the cause. `tests/distributed/test_stalls.py` has real ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from waiting import wait_for

from training.launch import watchdog
from training.launch.heartbeat import (
    ENDED,
    HEARTBEAT_DIR,
    STARTING,
    STEPPING,
    Heartbeat,
    heartbeat_file,
    read_heartbeat,
)
from training.launch.watchdog import RankSnapshot, Watchdog, furthest_behind, main_stack
from training.run_folder.lock import process_of

HANGS = """
    import os, signal, sys, threading, time
    from training.launch.heartbeat import heartbeat
    heartbeat.attach()
    def deep_in_the_reader():
        open(os.environ["CROSSLIFT_HEARTBEAT_DIR"] + "/ready", "w").close()
        time.sleep(60)
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    steps = heartbeat.steps(iter(range(9)), 4)
    next(steps)
    heartbeat.forward()
    deep_in_the_reader()
"""
STOPS_ITSELF = """
    import os, signal, threading, time
    from training.launch.heartbeat import heartbeat
    heartbeat.attach()
    def stopping():
        os.kill(os.getpid(), signal.SIGSTOP)
    def other():
        while True:
            time.sleep(0.001)
    for _ in range(8):
        threading.Thread(target=other, daemon=True).start()
    for batch in heartbeat.steps(range(1000), 0):
        stopping()
        time.sleep(0.2)
"""


@pytest.fixture
def heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Heartbeat:
    """This process as local rank 0 of a launcher's folder."""
    monkeypatch.setenv(HEARTBEAT_DIR, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("training.launch.heartbeat._die_with_launcher", lambda: None)
    heartbeat = Heartbeat()
    heartbeat.attach()
    return heartbeat


def test_the_launcher_reads_step_and_phase_of_a_rank(heartbeat: Heartbeat, tmp_path: Path) -> None:
    def now() -> tuple[int, int, int, str]:
        beat = read_heartbeat(tmp_path, 0)
        assert beat is not None
        assert beat.pid == os.getpid()
        return beat.step, beat.phases, beat.state, beat.phase

    assert now() == (-1, 1, STARTING, "starting")
    seen = []
    for batch in heartbeat.steps("ab", 7):
        seen += [batch, now()]
        heartbeat.forward()
        heartbeat.phase("backward")
        heartbeat.forward()
        seen.append(now())
    assert seen[:2] == ["a", (7, 2, STEPPING, "agreeing on the step")]
    assert seen[2] == (7, 5, STEPPING, "forward 2")
    assert seen[3:5] == ["b", (8, 2, STEPPING, "agreeing on the step")]
    assert heartbeat.step == 8  # there is no step 9
    heartbeat.end()
    assert now()[2:] == (ENDED, "ended")


def test_without_a_launcher_heartbeats_are_only_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEARTBEAT_DIR, raising=False)
    heartbeat = Heartbeat()
    heartbeat.attach()
    assert list(heartbeat.steps("ab", 0)) == ["a", "b"]
    assert heartbeat.step == 1


def test_a_rank_without_a_heartbeat_has_no_state(tmp_path: Path) -> None:
    assert read_heartbeat(tmp_path, 0) is None
    heartbeat_file(tmp_path, 0).write_bytes(b"")
    assert read_heartbeat(tmp_path, 0) is None


class Clock:
    """A clock that the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)


def test_a_rank_is_watched_from_its_first_step_until_its_end(
    heartbeat: Heartbeat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    monitor = Watchdog(tmp_path, {0: os.getpid()}, "host", stall_seconds=60, first_rank=0)

    def stalled_after(seconds: float) -> bool:
        assert not monitor.stalled()
        clock.now += seconds
        return monitor.stalled()

    assert not stalled_after(1000)  # loading a model may take long
    steps = heartbeat.steps("abc", 0)
    next(steps)
    assert not stalled_after(59)
    heartbeat.forward()
    assert not stalled_after(59)
    assert stalled_after(2)
    heartbeat.end()
    assert not stalled_after(1000)


def test_zero_stall_seconds_disable_the_watchdog(
    heartbeat: Heartbeat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    monitor = Watchdog(tmp_path, {0: os.getpid()}, "host", stall_seconds=0, first_rank=0)
    next(heartbeat.steps("abc", 0))
    assert not monitor.stalled()
    clock.now += 1e9
    assert not monitor.stalled()


WAITS = ['File ".../torch/distributed/distributed_c10d.py", line 1 in all_reduce', 'File "trainer.py", line 2 in agree']
WORKS = ['File "reader.py", line 3 in parse', 'File "trainer.py", line 1 in train']


def rank(number: int, **changes: object) -> RankSnapshot:
    usual = RankSnapshot(number, "host", 1, 5, 9, "all-reduce", 100.0, "S", WAITS)
    return replace(usual, **changes)


@pytest.mark.parametrize(
    "cause",
    [
        rank(2, step=4, phases=30),  # a step behind
        rank(2, phases=8, silent_seconds=50),  # a phase behind
        rank(2, state="T"),  # at the same point, but stopped
        rank(2, state="D", stack=[]),
        rank(2, stack=WORKS),  # at the same point, but not in a collective call
        rank(2, silent_seconds=101),
    ],
)
def test_the_rank_that_the_others_wait_for_is_found(cause: RankSnapshot) -> None:
    others = [rank(0), rank(1, silent_seconds=99), rank(3, step=5, phases=9)]
    assert furthest_behind([*others, cause]) == cause
    from_other_nodes = json.loads(json.dumps([asdict(each) for each in (cause, *others)]))
    assert furthest_behind(RankSnapshot(**each) for each in from_other_nodes) == cause


def test_the_report_has_rank_host_step_phase_state_and_stack() -> None:
    text = str(rank(2, host="n7", silent_seconds=930, state="D", stack=WORKS, phase="waiting for data"))
    assert text.splitlines() == [
        "rank 2 on n7 is stalled: no heartbeat for 15.5 minutes; step 6, phase 'waiting for data', process 1 is "
        "waiting for a disk",
        '    File "reader.py", line 3 in parse',
        '    File "trainer.py", line 1 in train',
    ]


def test_the_main_threads_stack_is_extracted_from_the_dump() -> None:
    shown = textwrap.dedent("""\
        Thread 0x00007f00000000aa (most recent call first):
          File "feeder.py", line 1 in feed

        Current thread 0x00007f00000000bb (most recent call first):
          File "other.py", line 2 in f

        Thread 0x00007f00000000cc (most recent call first):
          File "main.py", line 3 in g
          File "main.py", line 4 in main
        """)
    assert main_stack(shown, 0x7F00000000CC) == ['File "main.py", line 3 in g', 'File "main.py", line 4 in main']
    assert main_stack(shown, 0x1) == []


@contextmanager
def rank_process(program: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with heartbeats in `folder` as local rank 0, killed at the end."""
    environment = {
        **os.environ,
        HEARTBEAT_DIR: str(folder),
        "LOCAL_RANK": "0",
        "CROSSLIFT_LAUNCHER_PID": str(os.getpid()),
    }
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("stopped", [False, True])
def test_the_snapshot_of_a_hung_or_stopped_process_has_step_phase_state_and_stack(
    tmp_path: Path, stopped: bool
) -> None:
    with rank_process(HANGS, tmp_path) as process:
        wait_for((tmp_path / "ready").exists)
        if stopped:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
        (seen,) = Watchdog(tmp_path, {0: process.pid}, "host", 1, first_rank=8).snapshots()
    assert (seen.rank, seen.step, seen.phase) == (8, 4, "forward 1")
    assert seen.state == ("T" if stopped else "S")
    assert "in deep_in_the_reader" in seen.stack[0]
    assert "in <module>" in seen.stack[1]
    assert not seen.in_collective


def test_the_stack_of_a_stopped_process_is_from_where_it_stopped(tmp_path: Path) -> None:
    """Another thread could take the signal, and the main one would have moved on by then."""
    with rank_process(STOPS_ITSELF, tmp_path) as process:
        for _ in range(10):
            wait_for(lambda: (process_of(process.pid) or "?")[0] == "T")
            (seen,) = Watchdog(tmp_path, {0: process.pid}, "host", 1, first_rank=0).snapshots()
            assert "in stopping" in seen.stack[0]


def test_a_rank_dies_with_its_launcher(tmp_path: Path) -> None:
    """Even one that is blocked in a call."""
    program = (
        "import time; from training.launch.heartbeat import heartbeat; heartbeat.attach(); open('{}', 'w').close(); "
        "time.sleep(60)"
    )
    launcher = f"""
        import os, subprocess, sys, time
        os.environ |= {{"CROSSLIFT_HEARTBEAT_DIR": {str(tmp_path)!r}, "LOCAL_RANK": "0"}}
        os.environ["CROSSLIFT_LAUNCHER_PID"] = str(os.getpid())
        child = subprocess.Popen([sys.executable, "-c", {program.format(tmp_path / "ready")!r}], start_new_session=True)
        while not os.path.exists({str(tmp_path / "ready")!r}):
            time.sleep(0.02)
        print(child.pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(launcher)], capture_output=True, text=True, timeout=30)
    pid = int(done.stdout)
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until, "the rank outlived its launcher"
        time.sleep(0.05)
