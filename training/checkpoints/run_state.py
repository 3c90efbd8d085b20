"""What a run has to know to go on, beside DeepSpeed's files; and whether it is still the same run.

In: a run's step, config and data fingerprint. Out: `state.json` in a checkpoint, and the differences between what it
says and what a run file says now. Next: `resume.py` refuses them, for `train` and `check` alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.settings import difference, flat
from training.engine.saved_files import FIXED_KEYS as ENGINE_KEYS
from training.errors import ConfigError

STATE_FILE = "state.json"
FORMAT = 2

# Keys that change neither the order of samples nor a gradient (by more than the order in which numbers are summed, as
# another number of ranks does): free to differ on a resume.
FREE_KEYS = (
    "output_dir", "data_dir", "checkpoint", "evaluation", "tracking", "watchdog", "guard", "data.workers",
    "data.max_bad_rows", "data.patience_seconds", "data.micro_batch_tokens", "gradient_checkpointing",
)  # fmt: skip
# Keys that the saved weights and moments were made by: with others there is nothing to load them into.
FIXED_KEYS = (
    "model.init", "model.lora.rank", "model.lora.targets", "model.lora.use_dora", "tokenizer.train", "data.task.kind",
    "data.task.labels", "objective.name", *ENGINE_KEYS,
)  # fmt: skip
# The same of what an objective saves beside them.
FIXED_KEYS_OF = {"shifcon": ("objective.layers", "data.languages", "data.dominant")}

DATE = "data.template.date"  # of the run, where its prompts name one (`run_folder/date.py`)


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
    metrics: dict[str, float | None] = field(default_factory=dict)  # of the last of these steps; None: not finite
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


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was when a checkpoint was saved."""

    text: str
    fixed: bool = False  # the checkpoint cannot be loaded with it

    def __str__(self) -> str:
        return self.text


def differences(saved: RunState, fingerprint: Mapping[str, str], config: Mapping[str, Any]) -> list[Difference]:
    """What decides a run's result and is not as it was when the checkpoint was saved: in the config, then in the data.

    `max_steps` may grow.
    """
    old, new = flat(saved.config), flat(config)
    if "data.overlong" in new:  # what versions did that had no such key
        old.setdefault("data.overlong", "truncate" if "data.task.kind" in old else "drop")
    if "model.lora.rank" in old:
        old = {"model.lora.use_dora": False, "model.lora.use_rslora": False} | old
    fixed = FIXED_KEYS + FIXED_KEYS_OF.get(old.get("objective.name", ""), ())
    if None in (old.get(DATE), new.get(DATE)):  # saved before it was fixed, or taken from the checkpoint
        old, new = ({key: value for key, value in values.items() if key != DATE} for values in (old, new))
    lines = [
        Difference(f"config {key}: was {was!r}, now {is_now!r}", _is_below(key, fixed))
        for key, (was, is_now) in difference(old, new).items()
        if not _is_below(key, FREE_KEYS) and not (key == "max_steps" and was is not None and (is_now or 0) > was)
    ]
    # Checkpoints of before the tokenizer was looked at say nothing of it.
    unknown = {"tokenizer"} - saved.fingerprint.keys()
    lines += [
        Difference(
            f"data {name}: {_change(saved.fingerprint.get(name), fingerprint.get(name))}",
            # of a tokenizer that the run trained itself, no model but its own knows the tokens
            name == "tokenizer" and bool((saved.config.get("tokenizer") or {}).get("train")),
        )
        for name in sorted((saved.fingerprint.keys() | fingerprint.keys()) - unknown)
        if saved.fingerprint.get(name) != fingerprint.get(name)
    ]
    return lines


def _is_below(key: str, keys: Sequence[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _change(old: str | None, new: str | None) -> str:
    if old is None:
        return "is new"
    return "is gone" if new is None else "has changed"
