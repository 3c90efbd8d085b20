"""Program of a rank of the world size tests: two ranks save a checkpoint, one and four ranks resume from it.

python world_size_cells.py DATA_DIR WORK_DIR

A cell is one run configuration. With two ranks, each cell trains to its last step and saves on the way. With another
number of ranks, the cells that list it in `OTHERS` resume from that checkpoint. Rank 0 writes every step's metrics,
including the fingerprint of its data, to `WORK_DIR/<cell>-<ranks>.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from device_reads import device_reads
from tiny_run import XMIXUP, copy_preparation, rank_values
from warm import Warm

from training.assembly import assemble
from training.checkpoints import checkpoint
from training.distributed import rank, world_size
from training.engine.engine import process_group
from training.loop import resume
from training.loop.metric_window import MetricWindow
from training.loop.resume import resume_from
from training.loop.trainer import Trainer
from training.run_file import validate
from training.run_folder.prepare import prepare

CELLS: dict[str, dict[str, Any]] = {
    "shifcon-1": {"zero_stage": 1},
    "shifcon-2": {"zero_stage": 2},
    "shifcon-3": {},
    **{f"shifcon-{stage}-bf16": {"zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)},
    "xmixup-3": XMIXUP,
}
FIRST = next(iter(CELLS))
DEVICE = torch.device("cpu")
SAVED, STEPS, SAVING_RANKS = 3, 6, 2  # ShifCon refreshes its vectors before step 4
# How a batch and a checkpoint are split does not depend on the precision: fp32, with its small tolerance, tests more
# and fewer ranks; for loading what bf16 saves, one other number of ranks is enough.
OTHERS = {name: (1,) if name.endswith("bf16") else (1, 4) for name in CELLS}
SMALL: dict[str, Any] = {"max_steps": STEPS, "optimizer.learning_rate": 1e-2, "data.slots_per_step": 48}


@contextmanager
def warm_conversions() -> Iterator[None]:
    """In this context, the process that converts a checkpoint is started normally once and later as a fork."""
    warm, run, cold = Warm("training.engine.state"), subprocess.run, [True]

    def started(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[1:3] != ["-m", "training.engine.state"]:
            return run(command, **options)
        if cold:
            cold.clear()
            return run(command, **options)
        return warm.run(command[1:], dict(os.environ))

    with patch.object(resume.subprocess, "run", started):
        yield


def reads_between_logged_steps(trainer: Trainer) -> list[str]:
    """What two steps that do not log read from the device (`device_reads`); the logged one after them has a loss."""
    trainer.window = MetricWindow(trainer.config.data.languages, len(trainer.config.objective.terms), 9, DEVICE)
    trainer._logs = lambda done, by_language=False: done == STEPS + 3  # type: ignore[method-assign]
    batches = list(trainer.run.loader.steps(STEPS, STEPS + 3))
    with device_reads() as reads:
        for number, batch in enumerate(batches[:2]):
            trainer.agree(batch)
            assert trainer.train_step(STEPS + number, batch) == {}
    logged = trainer.train_step(STEPS + 2, batches[2])
    assert 0 < logged["train/loss"] < 10
    return reads


@process_group(timeout_minutes=3)
def main() -> None:
    data_dir, work = Path(sys.argv[1]), Path(sys.argv[2])
    for name, changes in CELLS.items():
        if world_size() not in (SAVING_RANKS, *OTHERS[name]):
            continue
        data = data_dir / "tasks" if name.startswith("xmixup") else data_dir
        config = validate(rank_values(data, work / name, **{**SMALL, **changes}), "test")
        if rank() == 0 and world_size() == SAVING_RANKS and name.startswith("shifcon") and name != FIRST:
            copy_preparation(work / FIRST, config.output_dir)  # the others wait for rank 0 to prepare
        trainer = Trainer(assemble(config, prepare(config, rank())), tracker=None)
        start = 0
        if world_size() != SAVING_RANKS:
            start = resume_from(trainer, checkpoint.checkpoint_path(config.output_dir, SAVED))
            assert start == SAVED
        metrics = {}
        for step in range(start, STEPS):
            refreshed = trainer.run.objective.before_step(trainer.run.engine, step)
            (batch,) = trainer.run.loader.steps(step, step + 1)
            metrics[step] = {**refreshed, **trainer.train_step(step, batch)}
            if step + 1 == SAVED and world_size() == SAVING_RANKS:
                trainer.save(SAVED, metrics[step])
                trainer.saver.complete(required=True)
        if world_size() == SAVING_RANKS:
            reads = reads_between_logged_steps(trainer)
            if rank() == 0:
                (work / f"{name}-reads.json").write_text(json.dumps(reads))
        if rank() == 0:
            (work / f"{name}-{world_size()}.json").write_text(json.dumps(metrics))
        trainer.run.engine.destroy()


if __name__ == "__main__":
    if os.environ["RANK"] == "0" and int(os.environ["WORLD_SIZE"]) != SAVING_RANKS:
        with warm_conversions():
            main()
    else:
        main()
