"""forecast.py: how long a run takes, by the speed of its own record, of another run's, or a given one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import PreparedRun

from training.assembly import DataParts, assemble_data
from training.check import check_run
from training.checks.forecast import GivenSpeed, time_lines, tokens_per_step
from training.config import RunConfig
from training.engine.memory import Ranks
from training.errors import ConfigError
from training.run_file import resolved, validate
from training.tracking.run_record import flatten

ON_2_CPUS = Ranks(2, 2, on_gpus=False)


@pytest.fixture(scope="module")
def parts(prepared_run: PreparedRun) -> DataParts:
    return assemble_data(prepared_run.config, prepared_run.prepared)


@pytest.fixture
def config(tmp_path: Path, tiny_run: Any) -> RunConfig:
    return validate(tiny_run(tmp_path / "run", max_steps=3000), "tiny run")


def event(seconds: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": round(seconds * 1000), "kind": kind, **fields}


def start(config: RunConfig, at: float = 0.0, ranks: int = 2, device: str = "cpu") -> list[dict[str, Any]]:
    return [
        event(at, "start", id="i", experiment="e", run_name="r"),
        event(at, "params", values=flatten(resolved(config))),
        event(at, "tags", values={"ranks": str(ranks), "device": device}),
    ]


def steps(ends: dict[int, float], tokens: float = 400.0) -> list[dict[str, Any]]:
    """Steps and when they ended; each computed for half a second."""
    values = {"train/tokens_per_second": 2 * tokens, "train/step_seconds": 0.5}
    return [event(at, "metrics", step=step, values=values) for step, at in ends.items()]


def record(config: RunConfig, *events: dict[str, Any]) -> Path:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(each) + "\n" for each in events)
    (config.output_dir / "record.jsonl").write_text(lines, encoding="utf-8")
    return config.output_dir


def line(config: RunConfig, parts: DataParts, ranks: Ranks = ON_2_CPUS, left: int = 3000, **given: Any) -> str:
    (found,) = time_lines(config, parts.planner, ranks, left, GivenSpeed(**given))
    return found


def test_the_runs_own_record_gives_the_time_of_the_steps_that_are_left(config: RunConfig, parts: DataParts) -> None:
    """Steps 2 to 11 took 90 s, an evaluation included, though each computed for half a second: 9 s a step."""
    ends = {step: 100.0 + 5 * step for step in range(1, 11)} | {11: 100.0 + 5 + 90}
    record(config, *start(config), *steps(ends))
    assert line(config, parts, left=2800) == (
        "time: about 7 h 0 min for 2,800 steps of 400 tokens a step at 44 tokens/s, measured in "
        f"{config.output_dir} (2 ranks, cpu) in steps 2 to 11, with evaluations and checkpoints"
    )
    assert "about 7 h 0 min for 2,800 steps" in line(config, parts, left=2800, run=config.output_dir)


def test_metrics_that_are_not_logged_at_every_step_give_the_same_time(config: RunConfig, parts: DataParts) -> None:
    """A line's tokens are the mean of the steps since the line before."""
    lines = [*steps({1: 10.0}, 9999.0), *steps({10: 91.0}, 380.0), *steps({11: 100.0}, 580.0)]
    record(config, *start(config), *lines)
    assert "about 7 h 0 min for 2,800 steps of 400 tokens" in line(config, parts, left=2800)


def test_the_latest_start_that_did_enough_steps_is_measured(config: RunConfig, parts: DataParts) -> None:
    slow = [*start(config), *steps({step: 60.0 * step for step in range(1, 8)})]
    fast = [*start(config, at=5000.0), *steps({step: 5000.0 + 9 * step for step in range(8, 18)})]
    rolled_back = [event(5990.0, "start", id="i", experiment="e", run_name="r"), *steps({16: 6000.0, 17: 9000.0})]
    record(config, *slow, *fast, *rolled_back)
    assert "about 7 h 0 min for 2,800 steps of 400" in line(config, parts, left=2800)
    record(config, *slow)
    assert "about 46 h 40 min for 2,800 steps of 400" in line(config, parts, left=2800)


def test_other_data_take_the_time_of_their_own_tokens(config: RunConfig, parts: DataParts, tiny_run: Any) -> None:
    other = validate(
        tiny_run(config.output_dir.with_name("other"), **{"data.slots_per_step": 16, "precision": "bf16"}), "other"
    )
    run = record(other, *start(other), *steps({step: 9.0 * step for step in range(1, 12)}))
    tokens = tokens_per_step(config, parts.planner)
    found = line(config, parts, run=run)
    hours, minutes = divmod(round(3000 * tokens / (400 / 9) / 60), 60)
    assert f"about {hours} h {minutes} min for 3,000 steps of {tokens:,.0f} tokens a step at 44 tokens/s" in found
    assert found.endswith("; measured with data.slots_per_step 16 (here 8), precision bf16 (here fp32)")


def test_the_estimated_tokens_of_a_step_are_close_to_those_that_are_read(config: RunConfig, parts: DataParts) -> None:
    loader = parts.loader()
    read = sum(int(step.tokens.sum()) for step in loader.steps(0, 64)) / 64
    assert tokens_per_step(config, parts.planner) == pytest.approx(read, rel=0.05)


def test_a_given_speed_needs_no_record(config: RunConfig, parts: DataParts) -> None:
    tokens = tokens_per_step(config, parts.planner)
    speed = 3000 * tokens / (7 * 3600)
    found = line(config, parts, tokens_per_second=speed)
    assert found.startswith(f"time: about 7 h 0 min for 3,000 steps of {tokens:,.0f} tokens a step at")
    assert found.endswith("as given")


@pytest.mark.parametrize(
    ("written", "ranks", "reason"),
    [
        ({}, Ranks(4, 4, on_gpus=False), "measured on 2 ranks, cpu, and this is for 4 ranks on CPUs"),
        ({}, Ranks(2, 2), "measured on 2 ranks, cpu, and this is for 2 ranks on GPUs"),
        ({"device": "NVIDIA H200"}, ON_2_CPUS, "measured on 2 ranks, NVIDIA H200, and this is for 2 ranks on CPUs"),
        ({"width": 64}, ON_2_CPUS, "measured another model: model.init.hidden_size was 64, and is 32 here"),
        ({"steps": 5}, ON_2_CPUS, "no start of it has recorded more than 5 steps"),
        ({"tags": {}}, ON_2_CPUS, "its record is of an older version, which does not name ranks and device"),
    ],
)
def test_the_speed_of_something_else_is_refused(
    written: dict[str, Any], ranks: Ranks, reason: str, config: RunConfig, parts: DataParts, tiny_run: Any
) -> None:
    """A run that was named is an error; of the own record, the reason is printed."""
    changes = {"model.init.hidden_size": written["width"]} if "width" in written else {}
    there = validate(tiny_run(config.output_dir, **changes), "there")
    events = start(there, device=written.get("device", "cpu"))
    if "tags" in written:
        events[2]["values"] = written["tags"]
    run = record(there, *events, *steps({step: 9.0 * step for step in range(1, written.get("steps", 12) + 1)}))
    found = line(config, parts, ranks)
    assert found.startswith(f"time: not known: {run}: {reason}")
    with pytest.raises(ConfigError, match=f"^--measured {run}: {reason}"):
        line(config, parts, ranks, run=run)


def test_without_a_measurement_check_says_how_to_make_one(config: RunConfig, parts: DataParts) -> None:
    assert line(config, parts).startswith("time: not known before a measurement; give one by --measured RUN")
    with pytest.raises(ConfigError, match=r"^--measured .*run: holds no record.jsonl; give the folder of a run$"):
        line(config, parts, run=config.output_dir)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf")])
def test_a_speed_must_be_a_number_above_0(config: RunConfig, parts: DataParts, speed: float) -> None:
    with pytest.raises(ConfigError, match=r"^--tokens-per-second .*: must be a number above 0"):
        line(config, parts, tokens_per_second=speed)


def test_check_prints_the_time_before_it_is_ready(prepared_run: PreparedRun) -> None:
    lines = list(check_run(prepared_run.config, gpus_per_node=0, speed=GivenSpeed(tokens_per_second=1e-3)))
    assert lines[-2].startswith("time: about ")
    assert lines[-2].endswith("as given")
    assert lines[-1] == "ready to train"
