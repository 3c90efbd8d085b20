"""progress.py: the line of a step in a log, with the time that is left."""

from __future__ import annotations

import logging

import pytest

from training.loop import progress
from training.loop.progress import TrainingProgress


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_in_a_log_show_the_time_left(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """By the mean step of this start without its first, which is slow; steps that a rollback repeats count."""
    caplog.set_level(logging.INFO)
    shown = TrainingProgress(100, 400, shown=True)
    for done, seconds in [(101, 500.0), (102, 30.0), (119, 17 * 30.0), (120, 30.0), (100, 0.0), (120, 20 * 60.0)]:
        clock.now += seconds
        for _ in range(1 if done != 119 else 17):
            shown.step_done(done, {"train/loss": 2.0})
    first, last = (line for line in caplog.messages if line.startswith("step 120/400"))
    assert first == "step 120/400  loss 2.000  left 2 h 20 min"  # 280 steps of 30 s
    # 1 + 17 + 1 steps of 30 s, the rollback, and one report of 1,200 s
    mean = (19 * 30.0 + 20 * 60.0) / 21
    minutes = round(mean * 280 / 60)
    assert last == f"step 120/400  loss 2.000  left {minutes // 60} h {minutes % 60} min"
    clock.now += 30
    shown.step_done(400, {"train/loss": 1.0})
    assert caplog.messages[-1] == "step 400/400  loss 1.000"
    TrainingProgress(0, 10, shown=True).step_done(1, {"train/loss": 3.0})
    assert caplog.messages[-1] == "step 1/10  loss 3.000"  # nothing to tell it by


def test_a_line_is_written_by_the_first_step_that_logs_of_each_twentieth(caplog: pytest.LogCaptureFixture) -> None:
    """Of 60 steps, every third begins a new twentieth; every fourth logs, and the last."""
    caplog.set_level(logging.INFO)
    shown = TrainingProgress(0, 60, shown=True)
    for done in range(1, 61):
        shown.step_done(done, {"train/loss": 2.0} if done % 4 == 0 or done == 60 else {"shift/norm/sw": 1.0})
    lines = [int(line.split("/")[0].removeprefix("step ")) for line in caplog.messages]
    assert lines == list(range(4, 61, 4))
    caplog.clear()
    shown = TrainingProgress(0, 400, shown=True)
    for done in range(1, 101):
        shown.step_done(done, {"train/loss": 2.0} if done % 8 == 0 else {})
    assert [line.split("/")[0] for line in caplog.messages] == ["step 24", "step 40", "step 64", "step 80"]
