"""guard.py: which updates are skipped, the limit of events, and equal decisions after a resume."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from training.loop.guard import LEAST_HISTORY, Guard, GuardConfig


def guard(**settings: Any) -> Guard:
    return Guard(GuardConfig(**settings))


def feed(watch: Guard, losses: list[float]) -> list[str | None]:
    return [verdict.policy if (verdict := watch.judge(loss)) else None for loss in losses]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_non_finite_loss_gets_the_policy(loss: float, policy: str) -> None:
    verdict = guard(non_finite=policy).judge(loss)
    assert verdict is not None
    assert (verdict.policy, verdict.what) == (policy, "loss is not finite")


def test_by_default_only_a_non_finite_loss_stops_a_run() -> None:
    assert feed(guard(), [1.0] * 60 + [1e9, math.nan]) == [None] * 61 + ["stop"]


def test_a_spike_is_measured_against_the_median_of_the_window() -> None:
    """The median of the last 10 losses; one outlier among them does not change it."""
    watch = guard(spike="skip", spike_factor=2.0, spike_window=10)
    assert feed(watch, [9.0] * 20 + [1.0] * 9 + [1.9]) == [None] * 30
    assert sorted([1.0] * 9 + [1.9])[4] == 1.0
    assert feed(watch, [2.0, 2.01]) == [None, "skip"]
    assert "2.01 is 2.0 times the median of the last 10 steps" in guard_text(watch, 2.01)


def guard_text(watch: Guard, loss: float) -> str:
    verdict = watch.judge(loss)
    assert verdict is not None
    return verdict.what


def test_no_spike_is_detected_before_there_is_a_history() -> None:
    watch = guard(spike="stop")
    assert feed(watch, [0.1] * (LEAST_HISTORY - 1) + [100.0]) == [None] * LEAST_HISTORY


def test_spikes_do_not_raise_the_median() -> None:
    watch = guard(spike="skip", spike_window=8, max_events=100)
    assert feed(watch, [1.0] * 8 + [50.0] * 20) == [None] * 8 + ["skip"] * 20


def test_both_kinds_of_events_share_one_limit_after_which_the_run_stops() -> None:
    watch = guard(spike="rollback", non_finite="skip", spike_window=8, max_events=2)
    assert feed(watch, [1.0] * 8 + [math.nan, 50.0, 1.0, math.nan]) == [None] * 8 + ["skip", "rollback", None, "stop"]
    assert "guard.max_events=2 were used up" in guard_text(watch, math.inf)


def test_a_guard_restored_from_json_makes_the_same_decisions() -> None:
    settings = {"spike": "skip", "spike_window": 8, "max_events": 3}
    one, losses = guard(**settings), [3.0, 2.0, 2.5, 1.5, 1.2, 1.1, 1.0, 0.9, 30.0]
    feed(one, losses)
    other = guard(**settings)
    other.restore(json.loads(json.dumps(one.state())))
    rest = [3.9, 4.2, math.nan, 0.8, 50.0, 0.7]
    assert feed(one, rest) == feed(other, rest)
    assert one.events == other.events == 3


def test_an_empty_state_restores_a_new_guard() -> None:
    watch = guard()
    watch.restore({})
    assert watch.state() == {"events": 0, "losses": []}
