"""The state of a run that a checkpoint holds besides the engine's files, and its differences from a later start.

`training/loop/resume.py` refuses differences, for both `train` and `check`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.settings import difference, flat
from training.engine.saved_files import FIXED_KEYS as ENGINE_KEYS
from training.errors import ConfigError
from training.objectives.registry import fixed_keys

STATE_FILE = "state.json"
FORMAT = 3  # raised when a checkpoint's files change such that older ones cannot be loaded

# Keys that may differ on a resume: they change neither the order of samples nor a gradient, except for rounding by
# another order of summation, as another number of ranks does.
FREE_KEYS = (
    "output_dir", "data_dir", "checkpoint", "evaluation", "tracking", "watchdog", "guard", "data.workers",
    "data.max_bad_rows", "data.patience_seconds", "data.micro_batch_tokens", "gradient_checkpointing",
)  # fmt: skip
# Keys that the saved weights and moments depend on: with other values they cannot be loaded.
FIXED_KEYS: tuple[str, ...] = (
    "model.init", "model.lora.rank", "model.lora.targets", "model.lora.use_dora", "tokenizer.train", "data.task.kind",
    "data.task.labels", "objective.name", *ENGINE_KEYS,
)  # fmt: skip

DATE = "data.template.date"  # of the run, if the chat template prints it (`run_folder/date.py`)


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a run after `step` steps, besides the engine's files."""

    step: int
    world_size: int
    fingerprint: dict[str, str]
    config: dict[str, Any]
    versions: dict[str, str]
    base: dict[str, str] | None = None  # directory and hash of the model that the run started from; None: from scratch
    data_offset: int = 0  # step t reads the data of step t + data_offset
    metrics: dict[str, float | None] = field(default_factory=dict)  # last logged; None: not finite
    guard: dict[str, Any] = field(default_factory=dict)  # `guard.Guard.state()`
    totals: dict[str, Any] = field(default_factory=dict)  # `run_totals.RunTotals.state()`
    unlogged: dict[str, Any] = field(default_factory=dict)  # `metric_window.MetricWindow.state()`
    rows: dict[str, int] = field(default_factory=dict)  # of the training data, by language
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        text = json.dumps(asdict(self), indent=1, sort_keys=True)
        (directory / STATE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> RunState:
        values = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        if (saved := values.get("format")) != FORMAT:
            raise ConfigError(
                f"{directory / STATE_FILE}: format {saved}, this version reads {FORMAT}: the checkpoint was saved by "
                "another version of crosslift; give another output_dir, or use that version"
            )
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between a run file or its data and a checkpoint."""

    text: str
    fixed: bool = False  # the checkpoint cannot be loaded with it

    def __str__(self) -> str:
        return self.text


def differences(saved: RunState, fingerprint: Mapping[str, str], config: Mapping[str, Any]) -> list[Difference]:
    """Differences from a checkpoint that affect a run's result: first of the config, then of the data.

    `max_steps` may be raised.
    """
    old, new = flat(saved.config), flat(config)
    fixed = FIXED_KEYS + fixed_keys(old.get("objective.name", ""))
    if None in (old.get(DATE), new.get(DATE)):  # it is then taken from the checkpoint
        old, new = ({key: value for key, value in values.items() if key != DATE} for values in (old, new))
    lines = [
        Difference(f"config {key}: was {was!r}, now {is_now!r}", _is_below(key, fixed))
        for key, (was, is_now) in difference(old, new).items()
        if not _is_below(key, FREE_KEYS) and not (key == "max_steps" and was is not None and (is_now or 0) > was)
    ]
    lines += [
        Difference(
            f"data {name}: {_change(saved.fingerprint.get(name), fingerprint.get(name))}",
            # a tokenizer that the run trained itself fits no model but its own
            name == "tokenizer" and bool((saved.config.get("tokenizer") or {}).get("train")),
        )
        for name in sorted(saved.fingerprint.keys() | fingerprint.keys())
        if saved.fingerprint.get(name) != fingerprint.get(name)
    ]
    return lines


def _is_below(key: str, keys: Sequence[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _change(old: str | None, new: str | None) -> str:
    if old is None:
        return "is new"
    return "is gone" if new is None else "has changed"
