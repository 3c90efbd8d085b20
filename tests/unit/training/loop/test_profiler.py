"""profiler.py: when the trace is written, and what a training that ends early leaves. Real runs: test_training.py."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from training.launch.heartbeat import WAITING_FOR_DATA, heartbeat
from training.loop.profiler import profiled_steps


def train(steps: int, **error: type[Exception]) -> None:
    """The phases of a loop, in which measures of samples are summed while it waits for data."""
    for heartbeat.step in range(steps):
        heartbeat.phase(WAITING_FOR_DATA)
        heartbeat.phase("all-reduce")
        heartbeat.phase(WAITING_FOR_DATA)
        heartbeat.phase("forward 1")
        torch.ones(4, 4) @ torch.ones(4, 4)
        heartbeat.phase("update")
    if error:
        raise error["error"]
    heartbeat.phase("all steps done")


def traced_steps(run: Path) -> dict[str, list[str]]:
    """File: the steps in its trace, numbered by torch from 0 at the start."""
    found = {}
    for path in sorted((run / "profile").iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
        steps = [name for name in names if name.startswith("ProfilerStep#")]
        assert names.count("update") == len(steps)
        found[path.name] = steps
    return found


def test_the_chosen_steps_are_traced_from_the_third_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with profiled_steps(2, tmp_path, start=100):
        train(6)
    assert traced_steps(tmp_path) == {"from-step-103.json.gz": ["ProfilerStep#2", "ProfilerStep#3"]}
    assert [line for line in caplog.messages if "profile of rank 0 from step 103: " in line]
    assert heartbeat.listener is None


def test_a_training_that_ends_early_leaves_the_steps_that_were_traced(tmp_path: Path) -> None:
    with pytest.raises(KeyError), profiled_steps(50, tmp_path, start=0):
        train(4, error=KeyError)
    assert traced_steps(tmp_path) == {"from-step-3.json.gz": ["ProfilerStep#2", "ProfilerStep#3"]}


def test_a_training_that_ends_before_the_traced_steps_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with profiled_steps(2, tmp_path, start=0):
        train(2)
    assert caplog.messages == ["--profile: training ended before step 3, the first that is profiled"]
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_costs_only_the_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file, not a folder")
    with profiled_steps(1, tmp_path, start=0):
        train(5)
    assert [line for line in caplog.messages if "from-step-3.json.gz could not be written" in line]


def test_other_ranks_and_runs_without_the_option_record_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with profiled_steps(0, tmp_path, start=0):
        assert heartbeat.listener is None
    monkeypatch.setenv("RANK", "1")
    with profiled_steps(2, tmp_path, start=0):
        assert heartbeat.listener is None
        train(6)
    assert not (tmp_path / "profile").exists()
