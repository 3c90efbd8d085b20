"""How long a run will take, from a measured speed: that of its own record, of another run, or a given one.

A record holds the time and the tokens of its steps, the settings, and on how many ranks of which device they ran. The
speed of another model, number of ranks or kind of device is refused; other settings that differ are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.console import duration
from data_pipeline.order.plan import Planner
from training.assembly import estimated_lengths
from training.config import RunConfig
from training.distributed import CPU
from training.engine.memory import Ranks
from training.errors import ConfigError
from training.run_file import resolved
from training.tracking.run_record import RECORD_NAME, flatten, read_events

LEAST_STEPS = 5  # over which a speed is measured
COUNTED_STEPS = 64  # steps of the plan whose tokens are estimated
# Settings that change the speed: they are named if they differ. Those of the model must be the same.
NAMED = (
    "precision", "zero_stage", "gradient_checkpointing", "optimizer.name", "objective.name",
    "deepspeed.", "data.slots_per_step", "data.sequence_length", "data.micro_batch_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GivenSpeed:
    """The speed to use: that of a run's folder, or tokens/s of all ranks together; neither: of the run's own record."""

    run: Path | None = None
    tokens_per_second: float | None = None


OWN_SPEED = GivenSpeed()


@dataclass
class _Measured:
    """What a record says of the latest start that did enough steps."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    steps: tuple[int, int] = (0, 0)  # first and last
    seconds_per_step: float = 0.0  # with evaluations and checkpoints
    tokens_per_step: float = 0.0

    @property
    def where(self) -> str:
        return f"{_count(int(self.tags['ranks']))}, {self.tags['device']}"


def time_lines(
    config: RunConfig, planner: Planner, ranks: Ranks, steps: int, given: GivenSpeed = OWN_SPEED
) -> Iterator[str]:
    """A line: how long the `steps` that are left take, and by what measurement; or why that is not known.

    Raises:
        ConfigError: a given speed is no number above 0, or the given run measured something else.
    """
    if (speed := given.tokens_per_second) is not None:
        if given.run is not None:
            raise ConfigError("--measured and --tokens-per-second: give one of them")
        if not 0 < speed < math.inf:
            raise ConfigError(f"--tokens-per-second {speed:g}: must be a number above 0")
        tokens = tokens_per_step(config, planner)
        yield _line(steps, steps * tokens / speed, f"{tokens:,.0f} tokens a step at {speed:,.0f} tokens/s, as given")
        return
    run = given.run or config.output_dir
    if not (run / RECORD_NAME).is_file():
        if given.run is not None:
            raise ConfigError(f"--measured {run}: holds no {RECORD_NAME}; give the folder of a run")
        yield (
            "time: not known before a measurement; give one by --measured RUN, which may be a run of this file with "
            "max_steps=20 and another output_dir, or by --tokens-per-second"
        )
        return
    measured = _read(run / RECORD_NAME)
    here = flatten(resolved(config))
    if reason := _other(measured, here, ranks):
        if given.run is not None:
            raise ConfigError(f"--measured {run}: {reason}")
        yield f"time: not known: {run}: {reason}"
        return
    same = all(measured.params.get(key, value) == value for key, value in here.items() if _is_data(key))
    tokens = measured.tokens_per_step if same else tokens_per_step(config, planner)
    speed = measured.tokens_per_step / measured.seconds_per_step
    first, last = measured.steps
    source = (
        f"{tokens:,.0f} tokens a step at {speed:,.0f} tokens/s, measured in {run} ({measured.where}) in steps "
        f"{first + 1} to {last}, with evaluations and checkpoints"
    )
    differing = [
        f"{key} {measured.params[key]} (here {value})"
        for key, value in here.items()
        if key.startswith(NAMED) and measured.params.get(key, value) != value
    ]
    other = f"; measured with {', '.join(differing)}" if differing else ""
    yield _line(steps, steps * tokens / speed, source + other)


def tokens_per_step(config: RunConfig, planner: Planner) -> float:
    """Estimated tokens of a step on all ranks, without padding, from the first steps of the plan."""
    counted = range(min(config.max_steps, COUNTED_STEPS))
    tokens = sum(float(estimated_lengths(planner.step(step), config.data).sum()) for step in counted)
    sides = 2 if config.objective.pairing().with_partner else 1
    return sides * tokens / len(counted)


def _line(steps: int, seconds: float, source: str) -> str:
    return f"time: about {duration(seconds)} for {steps:,} steps of {source}"


def _read(record: Path) -> _Measured:
    """The latest start in the record that did enough steps; if there is none, its `steps` are (0, 0)."""
    found, now = _Measured(), _Measured()
    began = 0
    tokens = 0.0
    for _, event in read_events(record):
        if event["kind"] == "start":  # after a rollback, without params and tags
            now = _Measured(dict(now.params), dict(now.tags))
            tokens = 0.0
        elif event["kind"] == "params":
            now.params = event["values"]
        elif event["kind"] == "tags":
            now.tags = now.tags | event["values"]
        elif event["kind"] == "metrics" and "train/tokens_per_second" in (values := event["values"]):
            step = event["step"]
            if not now.steps[1]:
                now.steps, began = (step, step), event["time"]
            # means of the steps since the last event
            mean = float(values["train/tokens_per_second"]) * float(values["train/step_seconds"])
            tokens += mean * (step - now.steps[1])
            now.steps = (now.steps[0], step)
            if (done := step - now.steps[0]) >= LEAST_STEPS:
                now.seconds_per_step, now.tokens_per_step = (event["time"] - began) / 1000 / done, tokens / done
                found = now
    return found


def _other(measured: _Measured, here: Mapping[str, str], ranks: Ranks) -> str | None:
    """Why the measured speed is not that of a run with the settings `here`; None if it is."""
    if not measured.seconds_per_step:
        return f"no start of it has recorded more than {LEAST_STEPS} steps"
    there = measured.params
    for key in sorted({*here, *there}):
        if key.startswith("model.") and there.get(key) != here.get(key):
            return f"measured another model: {key} was {there.get(key)}, and is {here.get(key)} here"
    if not {"ranks", "device"} <= measured.tags.keys():
        return "its record is of an older version, which does not name ranks and device"
    on_gpus = measured.tags["device"] != CPU
    if (int(measured.tags["ranks"]), on_gpus) != (ranks.total, ranks.on_gpus):
        kind = "GPUs" if ranks.on_gpus else "CPUs"
        return (
            f"measured on {measured.where}, and this is for {_count(ranks.total)} on {kind} (--nodes, "
            "--gpus-per-node, --nproc-per-node)"
        )
    return None


def _count(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"


def _is_data(key: str) -> bool:
    """Whether a setting changes the tokens of a step."""
    return key == "seed" or key.startswith(("data.", "objective."))
