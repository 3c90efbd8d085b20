"""stop.py: signals and the deadline become a request; outside of training a signal ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_run import run_values, write_data

from training.errors import ConfigError
from training.launch.stop import DEADLINE, SIGNALS, SPARE_SECONDS, STOPPED, UNMEASURED_SAVE_SECONDS, StopRequest


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    before = [signal.getsignal(each) for each in SIGNALS]
    yield
    for each, handler in zip(SIGNALS, before, strict=True):
        signal.signal(each, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_training_is_a_request_and_a_second_one_changes_nothing(number: signal.Signals) -> None:
    stop = StopRequest()
    stop.install()
    stop.begin_training()
    assert stop.reason is None
    os.kill(os.getpid(), number)
    assert stop.reason == number.name
    os.kill(os.getpid(), number)
    assert stop.reason == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_training_the_process_ends_with_the_status_that_goes_on(number: signal.Signals) -> None:
    program = (
        "import time; from training.launch.stop import StopRequest; stop = StopRequest(); stop.install(); "
        "stop.begin_training(); stop.end_training(); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == STOPPED
    assert said == f"crosslift: stopped by {number.name} outside of training; the same command goes on\n"


def with_deadline(monkeypatch: pytest.MonkeyPatch, seconds: float) -> StopRequest:
    monkeypatch.setenv(DEADLINE, str(time.time() + seconds))
    return StopRequest()


def test_the_deadline_leaves_time_for_a_checkpoint_that_was_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = UNMEASURED_SAVE_SECONDS + SPARE_SECONDS
    assert with_deadline(monkeypatch, needed + 5).reason is None
    assert with_deadline(monkeypatch, needed - 1).reason == "the end of the allocation"


def test_a_reason_that_was_told_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that turns out to be quick does not take back what the other ranks already act upon."""
    stop = with_deadline(monkeypatch, UNMEASURED_SAVE_SECONDS)
    assert stop.reason == "the end of the allocation"
    stop.saved(0.1)
    assert stop.reason == "the end of the allocation"


def test_the_deadline_counts_the_longest_step_and_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the longest steps, since one is under way when the next begins, and half as much again for the disk."""
    for spare, reason in ((5, None), (-1, "the end of the allocation")):
        stop = with_deadline(monkeypatch, 2 * 100 + 1.5 * 200 + SPARE_SECONDS + spare)
        for step_seconds in (30, 100, 20):
            stop.took(step_seconds)
        for save_seconds in (200, 10):
            stop.saved(save_seconds)
        assert stop.reason == reason


@pytest.mark.parametrize("text", [None, ""])
def test_without_a_deadline_there_is_none(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    monkeypatch.delenv(DEADLINE, raising=False)
    if text is not None:
        monkeypatch.setenv(DEADLINE, text)
    stop = StopRequest()
    stop.took(1e9)
    assert stop.reason is None


@pytest.mark.parametrize("text", ["tomorrow", "nan", "-1", "0", "12:00"])
def test_a_deadline_that_is_no_time_is_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(DEADLINE, text)
    with pytest.raises(ConfigError, match=rf"^{DEADLINE}={text}: must be the unix time \(in seconds\) at which"):
        StopRequest()


def test_a_deadline_that_has_passed_is_refused_instead_of_a_stop_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(DEADLINE, str(int(time.time()) - 3600))
    with pytest.raises(ConfigError, match=rf"^{DEADLINE}=\d+: lies 360\d s in the past, .*; unset it, or"):
        StopRequest()


@pytest.mark.parametrize("module", ["training", "training.launch"])
def test_a_wrong_deadline_ends_ranks_and_launcher_with_status_2(tmp_path: Path, module: str) -> None:
    config = tmp_path / "run.yaml"
    values = run_values(write_data(tmp_path / "data"), tmp_path / "run")
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    options = ["--nproc", "1"] if module == "training.launch" else []
    found = subprocess.run(
        [sys.executable, "-m", module, str(config), *options], env={**os.environ, DEADLINE: "soon"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    assert (
        found.stderr == f"crosslift: {DEADLINE}=soon: must be the unix time (in seconds) at which the allocation ends\n"
    )
    assert not (tmp_path / "run").exists()
