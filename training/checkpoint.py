"""Checkpoints that exist only when complete: save, mark, find, compare.

In: the engine's sharded state and a few small files. Out: `<output_dir>/checkpoints/step-00000100/`, written
under a temporary name, synced, marked COMPLETE, renamed (design, decision 9). Next: `export.py`.

    step-00000100/
        zero/                            DeepSpeed's shards of weights and optimiser state, one set a rank
        model_config/                    the model's config and the tokenizer, as an export needs them
        state.json                       step, world size, data fingerprint, config, versions
        language_vectors.safetensors     ShifCon only
        xmixup.safetensors               X-Mixup only
        reference.safetensors            a few tokens and their logits: every export is checked against them
        COMPLETE                         names and sizes of all files; written last

No random state is saved: random streams derive from (seed, step, rank).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import ConfigError

log = logging.getLogger(__name__)
MARKER = "COMPLETE"
STATE_FILE = "state.json"
REFERENCE_FILE = "reference.safetensors"
FORMAT = 1

# Keys that change neither the order of samples nor a gradient: free to differ on a resume.
FREE_KEYS = (
    "output_dir", "data_dir", "checkpoint", "evaluation", "tracking", "data.workers", "data.max_bad_rows",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunState:
    """What a resume has to know beside DeepSpeed's files; `step` is the number of finished steps."""

    step: int
    world_size: int
    bad_slots: int
    fingerprint: dict[str, str]
    config: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        text = json.dumps({name: getattr(self, name) for name in self.__slots__}, indent=1, sort_keys=True)
        (directory / STATE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> RunState:
        values = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise ConfigError(f"{directory / STATE_FILE}: format {values.get('format')}, this version reads {FORMAT}")
        return cls(**values)


def checkpoint_root(output_dir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return output_dir / "checkpoints"


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return checkpoint_root(output_dir) / f"step-{step:08d}"


def incomplete_path(output_dir: Path, step: int) -> Path:
    """Temporary name that a checkpoint has while it is written."""
    return checkpoint_root(output_dir) / f".incomplete-step-{step:08d}"


def begin(output_dir: Path, step: int) -> Path:
    """Rank 0: an empty temporary folder for the checkpoint of `step`."""
    path = incomplete_path(output_dir, step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def commit(output_dir: Path, step: int, keep: int) -> Path:
    """Rank 0, after every rank has written: sync, mark COMPLETE, rename, drop older ones so that `keep` are left."""
    temporary, final = incomplete_path(output_dir, step), checkpoint_path(output_dir, step)
    sizes = {}
    for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
        _sync(file)
        sizes[file.relative_to(temporary).as_posix()] = file.stat().st_size
    marker = temporary / MARKER
    marker.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    for path in (marker, *(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(final.parent)
    # A run that was resumed from an earlier step saves below what lies there already, which is not its to drop.
    complete = [path for path in _step_folders(output_dir) if path <= final and problem(path) is None]
    for old in complete[:-keep]:
        shutil.rmtree(old)
    return final


def problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None where it is complete."""
    marker = path / MARKER
    if not marker.is_file():
        return f"no {MARKER} marker"
    try:
        sizes = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        sizes = None
    if not isinstance(sizes, dict):
        return f"its {MARKER} marker is torn"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def latest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; says why newer ones were passed over."""
    for path in reversed(_step_folders(output_dir)):
        reason = problem(path)
        if reason is None:
            return path
        log.warning("%s is passed over: %s", path, reason)
    return None


def find(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that `--resume` asks for; None starts from the beginning.

    Args:
        resume: "auto" (the run's newest complete one, if any), "never", or a path to a checkpoint or a run.

    Raises:
        ConfigError: "never" where checkpoints exist, or a path that holds no complete checkpoint.
    """
    if resume == "auto":
        return latest(output_dir)
    if resume == "never":
        if (existing := latest(output_dir)) is not None:
            raise ConfigError(
                f"{existing}: --resume never, but this run folder holds a checkpoint; "
                "take another output_dir, remove the folder, or use --resume auto"
            )
        return None
    return at(Path(resume))


def at(path: Path) -> Path:
    """A checkpoint's own folder, or a run's newest complete one. Raises ConfigError where there is none."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give a checkpoint's or a run's")
    if checkpoint_root(path).is_dir():
        if (found := latest(path)) is None:
            raise ConfigError(f"{path}: this run has no complete checkpoint")
        return found
    if (reason := problem(path)) is not None:
        raise ConfigError(f"{path}: not a complete checkpoint: {reason}")
    return path


def set_aside_newer(output_dir: Path, step: int) -> None:
    """Rank 0, on resuming from an older checkpoint: the newer ones are another branch, which `auto` must not take."""
    for path in _step_folders(output_dir):
        if path > checkpoint_path(output_dir, step):
            aside = path.with_name(f"set-aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s is newer than the checkpoint resumed from; kept as %s", path, aside.name)


def differences(saved: RunState, fingerprint: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """What in data and config is not as it was when the checkpoint was saved, one line each."""
    old, new = _flat(saved.config), _flat(config)
    lines = [
        f"config {key}: was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
    ]
    lines += [
        f"data {name}: {_change(saved.fingerprint.get(name), fingerprint.get(name))}"
        for name in sorted(saved.fingerprint.keys() | fingerprint.keys())
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


def _step_folders(output_dir: Path) -> list[Path]:
    return sorted(checkpoint_root(output_dir).glob("step-*"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
