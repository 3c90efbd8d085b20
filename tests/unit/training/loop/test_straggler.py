"""Which rank counts as a straggler; `test_preflight.py` measures real ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.loop import straggler
from training.loop.straggler import StragglerMonitor, compare


def test_the_slowest_rank_is_compared_with_the_median() -> None:
    metrics, warnings = compare([(1.0, 0.1, "a"), (1.1, 0.4, "a"), (1.8, 0.2, "b"), (0.9, 0.0, "b")])
    assert metrics == {
        "ranks/slowest": 2.0, "ranks/slowdown": pytest.approx(1.8), "ranks/data_wait_seconds_max": 0.4,
        "ranks/data_wait_seconds_median": 0.1,
    }  # fmt: skip
    assert warnings == ["rank 2 on b computes 1.8 times as slowly as the median rank; all wait for it"]


def test_of_two_ranks_the_slow_one_is_compared_with_the_other() -> None:
    metrics, warnings = compare([(2.0, 0.0, "a"), (1.0, 0.0, "b")])
    assert metrics["ranks/slowdown"] == 2.0
    assert len(warnings) == 1


def test_usual_differences_give_no_warning() -> None:
    metrics, warnings = compare([(1.0, 0.0, "a"), (1.49, 0.0, "b")])
    assert metrics["ranks/slowest"] == 1.0
    assert warnings == []


class Gpu:
    """A device that is `behind` steps behind the host; the n-th product that it times takes n milliseconds."""

    def __init__(self, behind: int) -> None:
        self.behind, self.begun, self.waits = behind, 0, 0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        self.begun += 1
        number = (self.begun + 1) // 2  # begin and end of a step

        def synchronize() -> None:
            self.waits += 1
            self.behind = 0

        return SimpleNamespace(
            record=lambda: None,
            query=lambda: number <= self.begun // 2 - self.behind,
            synchronize=synchronize,
            elapsed_time=lambda end: float(number),
        )


def monitor_of(gpu: Gpu, every: int, monkeypatch: pytest.MonkeyPatch) -> tuple[StragglerMonitor, list[list[float]]]:
    """The monitor of one of two ranks, and its probes at each comparison."""
    compared: list[list[float]] = []

    def gather(own: Any) -> list[Any]:
        compared.append(list(made._probes))
        return [own, own]

    monkeypatch.setattr(straggler, "world_size", lambda: 2)
    monkeypatch.setattr(straggler, "gather_objects", gather)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the device was waited for"))
    made = StragglerMonitor(every, torch.device("cpu"))
    made._device = torch.device("cuda")
    return made, compared


def test_on_a_gpu_a_product_is_read_once_the_device_has_passed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(behind=2)
    made, compared = monitor_of(gpu, 4, monkeypatch)
    metrics = [made.after_step(done, 0.0) for done in range(1, 9)]
    assert [bool(each) for each in metrics] == [False, False, False, True] * 2
    assert compared == [pytest.approx([0.001, 0.002]), pytest.approx([n / 1000 for n in range(1, 7)])]
    assert gpu.waits == 0


def test_only_a_first_comparison_without_any_product_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks gather, so one without a measurement cannot stay out."""
    gpu = Gpu(behind=1)
    made, compared = monitor_of(gpu, 1, monkeypatch)
    assert all(made.after_step(done, 0.0) for done in range(1, 5))
    assert compared[0] == pytest.approx([0.001])
    assert gpu.waits == 1
