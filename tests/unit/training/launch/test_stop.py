"""Stop requests by signals and by the deadline; outside of training a signal ends the process at once."""

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
from training.launch.stop import DEADLINE, DEFAULT_SAVE_S, EXIT_S, SIGNALS, STOPPED, StopRequest


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    before = [signal.getsignal(each) for each in SIGNALS]
    yield
    for each, handler in zip(SIGNALS, before, strict=True):
        signal.signal(each, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_training_is_a_request_and_further_ones_change_nothing(number: signal.Signals) -> None:
    stop = StopRequest()
    stop.install()
    stop.training = True
    assert stop.reason is None
    os.kill(os.getpid(), number)
    assert stop.reason == number.name
    os.kill(os.getpid(), number)
    assert stop.reason == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_training_a_signal_ends_the_process_with_the_status_of_a_stop(number: signal.Signals) -> None:
    program = (
        "import time; from training.launch.stop import StopRequest; stop = StopRequest(); stop.install(); "
        "stop.training = True; stop.training = False; print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == STOPPED
    assert printed == f"crosslift: stopped by {number.name} outside of training; the same command resumes the run\n"


def with_deadline(monkeypatch: pytest.MonkeyPatch, seconds: float) -> StopRequest:
    monkeypatch.setenv(DEADLINE, str(time.time() + seconds))
    return StopRequest()


def test_the_deadline_leaves_time_for_a_checkpoint_of_unknown_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = DEFAULT_SAVE_S + EXIT_S
    assert with_deadline(monkeypatch, needed + 5).reason is None
    assert with_deadline(monkeypatch, needed - 1).reason == "the end of the allocation"


def test_a_reason_is_never_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick checkpoint does not withdraw a request on which the other ranks already act."""
    stop = with_deadline(monkeypatch, DEFAULT_SAVE_S)
    assert stop.reason == "the end of the allocation"
    stop.record_save(0.1)
    assert stop.reason == "the end of the allocation"


def test_the_deadline_leaves_time_for_the_longest_step_and_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the longest step, as one may just have begun, and one and a half times the longest checkpoint."""
    for spare, reason in ((5, None), (-1, "the end of the allocation")):
        stop = with_deadline(monkeypatch, 2 * 100 + 1.5 * 200 + EXIT_S + spare)
        for step_seconds in (30, 100, 20):
            stop.record_step(step_seconds)
        for save_seconds in (200, 10):
            stop.record_save(save_seconds)
        assert stop.reason == reason


@pytest.mark.parametrize("text", [None, ""])
def test_without_a_deadline_there_is_no_request(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    monkeypatch.delenv(DEADLINE, raising=False)
    if text is not None:
        monkeypatch.setenv(DEADLINE, text)
    stop = StopRequest()
    stop.record_step(1e9)
    assert stop.reason is None


@pytest.mark.parametrize("text", ["tomorrow", "nan", "-1", "0", "12:00"])
def test_a_deadline_that_is_not_a_time_is_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(DEADLINE, text)
    with pytest.raises(ConfigError, match=rf"^{DEADLINE}={text}: must be the unix time \(in seconds\) at which"):
        StopRequest()


def test_a_past_deadline_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(DEADLINE, str(int(time.time()) - 3600))
    with pytest.raises(ConfigError, match=rf"^{DEADLINE}=\d+: is 360\d s in the past, .*; unset it, or"):
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
