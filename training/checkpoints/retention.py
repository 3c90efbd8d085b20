"""Which complete checkpoints are kept: the newest, every k-th, and the best by a metric; the others are deleted."""

from __future__ import annotations

import difflib
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from training.checkpoints import checkpoint
from training.checkpoints.run_state import RunState
from training.config import CheckpointConfig

log = logging.getLogger(__name__)


def retain(output_dir: Path, step: int, config: CheckpointConfig) -> None:
    """Delete the checkpoints that need not be kept. Called by each disk's leader once that of `step` is complete.

    Checkpoints that cannot be read or deleted are reported and left alone.
    """
    checkpoint.resolve_replaced(output_dir)
    # After a resume from an earlier step, newer checkpoints belong to another branch and are left alone.
    newest = checkpoint.checkpoint_path(output_dir, step)
    try:
        complete = [path for path in checkpoint.complete(output_dir) if path <= newest]
    except OSError as error:
        log.warning("old checkpoints stay: %s", error)
        return
    values = {checkpoint.step_of(path): _metric(path, config.best) if config.best else None for path in complete}
    keep = kept(values, config.keep, config.keep_every, config.best_mode)
    for path in complete:
        if checkpoint.step_of(path) not in keep:
            try:
                shutil.rmtree(path)
            except OSError as error:
                log.warning("%s: an old checkpoint that cannot be deleted: %s", path, error)


def _metric(path: Path, name: str) -> float | None:
    """A metric of a checkpoint; None if it was not measured or another version of crosslift wrote the state."""
    try:
        return RunState.read(path).metrics.get(name)
    except Exception as error:  # a file of another version may have any form
        log.warning("%s: its %s is not known: %s", path, name, error)
        return None


def kept(values: Mapping[int, float | None], newest: int, every: int, mode: str) -> set[int]:
    """Steps of the checkpoints to keep: the `newest`, every `every`-th step (0: none), and the best one by a metric.

    Args:
        values: the metric of each checkpoint by its step; None if it was not measured.
        mode: "min" or "max": which value is best; of equal ones the newest.
    """
    steps = sorted(values)
    keep = set(steps[-newest:]) | {step for step in steps if every and step % every == 0}
    sign = 1 if mode == "max" else -1
    measured = {step: sign * value for step, value in values.items() if value is not None and math.isfinite(value)}
    if measured:
        keep.add(max(measured, key=lambda step: (measured[step], step)))
    return keep


def no_such_metric(best: str, step: int, metrics: Iterable[str]) -> str:
    """The warning about a checkpoint without the metric of `checkpoint.best`, with similar names."""
    near = difflib.get_close_matches(best, list(metrics), cutoff=0.3)
    return (
        f"checkpoint.best: {best}: no such metric at step {step}, so its checkpoint cannot be the best; "
        f"nearest: {', '.join(near) or 'none'}"
    )
