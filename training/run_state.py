"""What a run has to know to go on, beside DeepSpeed's files; and whether it is still the same run.

In: a run's step, config and data fingerprint. Out: `state.json` in a checkpoint, and the differences between what it
says and what a run file says now. Next: `checkpoint.py`, `fit.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.errors import ConfigError

STATE_FILE = "state.json"
FORMAT = 2

# Keys that change neither the order of samples nor a gradient: free to differ on a resume.
FREE_KEYS = (
    "output_dir", "data_dir", "checkpoint", "evaluation", "tracking", "watchdog", "guard", "data.workers",
    "data.max_bad_rows", "data.patience_seconds",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunState:
    """What a resume has to know beside DeepSpeed's files; `step` is the number of finished steps."""

    step: int
    world_size: int
    fingerprint: dict[str, str]
    config: dict[str, Any]
    versions: dict[str, str]
    zero_stage: int = 3
    base: dict[str, str] | None = None  # LoRA: directory and hash of the model whose frozen weights are not saved
    data_offset: int = 0  # step t reads the data of step t + data_offset
    metrics: dict[str, float] = field(default_factory=dict)  # of the last of these steps
    guard: dict[str, Any] = field(default_factory=dict)  # `guard.Guard.state()`
    totals: dict[str, Any] = field(default_factory=dict)  # `run_totals.RunTotals.state()`
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        text = json.dumps({name: getattr(self, name) for name in self.__slots__}, indent=1, sort_keys=True)
        (directory / STATE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> RunState:
        values = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise ConfigError(f"{directory / STATE_FILE}: format {values.get('format')}, this version reads {FORMAT}")
        values.pop("bad_slots", None)  # older versions counted visits of unusable rows, which says nothing of the rows
        return cls(**values)


def differences(saved: RunState, fingerprint: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """What in data and config is not as it was when the checkpoint was saved, one line each."""
    old, new = _flat(saved.config), _flat(config)
    if "data.overlong" in new:  # what versions did that had no such key
        old.setdefault("data.overlong", "truncate" if "data.task.kind" in old else "drop")
    lines = [
        f"config {key}: was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
    ]
    # Checkpoints of before the tokenizer was looked at say nothing of it.
    unknown = {"tokenizer"} - saved.fingerprint.keys()
    lines += [
        f"data {name}: {_change(saved.fingerprint.get(name), fingerprint.get(name))}"
        for name in sorted((saved.fingerprint.keys() | fingerprint.keys()) - unknown)
        if saved.fingerprint.get(name) != fingerprint.get(name)
    ]
    return lines


def _change(old: str | None, new: str | None) -> str:
    if old is None:
        return "is new"
    return "is gone" if new is None else "has changed"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping) and values:
        return {
            inner: leaf
            for key, value in values.items()
            for inner, leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: values}
