"""Program of a rank of the fault tolerance tests: bad losses, a full disk, unreadable data, requests to stop.

python unkillable_cells.py DATA_DIR WORK_DIR

A cell is one short run with one fault; one launch runs all cells. Rank 0 writes `WORK_DIR/<cell>.json`: the error that
each rank raised.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tiny_run import copy_preparation, rank_values

from data_pipeline.records import BadRow, DataError
from training.assembly import assemble
from training.checkpoints import saving
from training.checkpoints.disks import Disk, checkpoint_disks
from training.checkpoints.search import find_checkpoint
from training.distributed import barrier, gather_objects, rank
from training.engine.engine import process_group
from training.engine.saved_files import shard_of
from training.errors import ConfigError
from training.launch.stop import StopRequest
from training.loop.resume import resume_from
from training.loop.trainer import Trainer
from training.run_file import validate
from training.run_folder.prepare import prepare
from training.tracking.tracker import Tracker

STEPS, EVERY = 12, 2
FAULTY_RANK = 1
SMALL = {"objective": {"name": "sft"}, "data.slots_per_step": 16, "model.init.num_hidden_layers": 1}

Fault = Callable[[Trainer], None]


def scaled_losses(steps: set[int], factor: float, ranks: set[int]) -> Fault:
    """Multiply the losses of these steps of the data by a factor, on these ranks."""

    def inject(trainer: Trainer) -> None:
        accumulate, loss_terms = trainer.accumulate, trainer.run.objective.loss_terms
        current = [-1]

        def watched(step, batch):
            current[0] = batch.step
            found = accumulate(step, batch)
            current[0] = -1
            return found

        def corrupted(engine, batch):
            terms = loss_terms(engine, batch)
            if current[0] not in steps or rank() not in ranks:
                return terms
            sft = terms.terms["sft"]
            scaled = {**terms.terms, "sft": replace(sft, sum=sft.sum * factor)}
            return replace(terms, terms=scaled, label_losses=terms.label_losses * factor)

        trainer.accumulate, trainer.run.objective.loss_terms = watched, corrupted

    return inject


def full_disk(saves: set[int]) -> Fault:
    """The disk of one rank is full when these checkpoints (the first is 1) are written."""

    def inject(trainer: Trainer) -> None:
        begin, number = trainer.saver.begin, [0]

        def counted(step, state, disk):
            number[0] += 1
            full = rank() == FAULTY_RANK and number[0] in saves
            saving.HashingFile.__init__ = _opens_full if full else _OPENS
            begin(step, state, disk)

        trainer.saver.begin = counted

    return inject


_OPENS = saving.HashingFile.__init__


def _opens_full(self, path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")
    _OPENS(self, path)


def signalled(step: int, number: signal.Signals, again: bool = False) -> Fault:
    """One rank gets a signal while it works on a step; and once more while the checkpoint is saved."""

    def inject(trainer: Trainer) -> None:
        trainer.stop.install()
        trainer.stop.training = True
        accumulate, begin = trainer.accumulate, trainer.saver.begin

        def interrupted(at, batch):
            if at == step and rank() == FAULTY_RANK:
                os.kill(os.getpid(), number)
            return accumulate(at, batch)

        def interrupted_again(at, state, disk):
            begin(at, state, disk)
            if again and at == step + 1:
                os.kill(os.getpid(), number)

        trainer.accumulate, trainer.saver.begin = interrupted, interrupted_again

    return inject


def deadline(seconds: float) -> Fault:
    """On one rank, the allocation ends after this many seconds."""

    def inject(trainer: Trainer) -> None:
        if rank() == FAULTY_RANK:
            trainer.stop._deadline = time.time() + seconds

    return inject


def misread(step: int, error: Exception) -> Fault:
    """Reading its share of a step fails on one rank with this error; the others read theirs."""

    def inject(trainer: Trainer) -> None:
        loader = trainer.run.loader
        scan, reader = loader.scan, loader.reader

        def fail(slots):
            loader.reader = reader  # once
            if isinstance(error, BadRow):
                return [error, *reader.read_many(slots[1:])]
            raise error

        def failing(number):
            if number == step and rank() == FAULTY_RANK:
                loader.reader = SimpleNamespace(index=reader.index, read_many=fail)
            return scan(number)

        loader.scan = failing

    return inject


CELLS: dict[str, tuple[dict[str, Any], Fault]] = {
    "undisturbed": ({}, lambda trainer: None),
    "foreground": ({"checkpoint.background": False}, lambda trainer: None),
    "skip": ({"guard.non_finite": "skip"}, scaled_losses({4}, float("nan"), {FAULTY_RANK})),
    "roll back": ({"guard.non_finite": "rollback"}, scaled_losses({5}, float("nan"), {FAULTY_RANK})),
    "roll back twice": ({"guard.non_finite": "rollback"}, scaled_losses({5, 7}, float("inf"), {FAULTY_RANK})),
    "roll back from nowhere": ({"guard.non_finite": "rollback"}, scaled_losses({1}, float("nan"), {FAULTY_RANK})),
    "used up": ({"guard": {"non_finite": "skip", "max_events": 1}}, scaled_losses({3, 6}, float("nan"), {FAULTY_RANK})),
    "spike skipped": ({"guard": {"spike": "skip", "spike_window": 8}}, scaled_losses({9}, 50.0, {0, 1})),
    "spike stops": ({"guard": {"spike": "stop", "spike_window": 8}}, scaled_losses({9}, 50.0, {0, 1})),
    "disk full once": ({}, full_disk({2})),
    "disk full": ({}, full_disk(set(range(2, 99)))),
    "disk full at the end": ({"checkpoint.every": STEPS}, full_disk({1})),
    "TERM": ({"checkpoint.every": 100}, signalled(4, signal.SIGTERM)),
    "USR1 twice": ({"checkpoint.every": 100}, signalled(6, signal.SIGUSR1, again=True)),
    "unreadable": ({}, misread(5, DataError("sw.jsonl:7: the file has changed since the run began; start again"))),
    "unreadable at once": ({}, misread(0, DataError("sw.jsonl:7: cannot be read (I/O error)"))),
    "bad row": ({"checkpoint.every": 100}, misread(5, BadRow("sw.jsonl:7", "the tokenizer writes ' ' for '\u2581'"))),
    "not finite": ({}, scaled_losses({4}, float("nan"), {FAULTY_RANK})),
    "deadline near": ({"checkpoint.every": 100}, deadline(60.0)),
    "deadline far": ({"checkpoint.every": 100}, deadline(100_000.0)),
}
FIRST = next(iter(CELLS))


@process_group(timeout_minutes=3)
def main() -> None:
    data_dir, work = Path(sys.argv[1]), Path(sys.argv[2])
    for name, (changes, inject) in CELLS.items():
        defaults = {**SMALL, "max_steps": STEPS, "checkpoint.every": EVERY}
        values = rank_values(data_dir, work / name, **{**defaults, **changes})
        config = validate(values, name)
        if name != FIRST and rank() == 0:  # the others wait for rank 0 to prepare
            copy_preparation(work / FIRST, config.output_dir)
        trainer = Trainer(assemble(config, prepare(config, rank())), _tracker(config), StopRequest())
        inject(trainer)
        raised = None
        try:
            trainer.train(0)
        except Exception as error:
            raised = [type(error).__name__, str(error)]
        saving.HashingFile.__init__ = _OPENS
        errors = gather_objects(raised)
        if trainer.tracker is not None:
            trainer.tracker.finish("FINISHED" if raised is None else "FAILED")
            (work / f"{name}.json").write_text(json.dumps(errors))
        trainer.run.engine.destroy()
    local_disks(data_dir, work)


def local_disks(data_dir: Path, work: Path) -> None:
    """Each rank has a node-local disk: without shared checkpoints a run resumes from these disks or is refused."""
    disks = [work / f"disk-{number}" for number in range(2)]
    os.environ["OWN_DISK"] = str(disks[rank()])
    changes = {**SMALL, "max_steps": STEPS, "checkpoint.every": EVERY, "checkpoint.local_dir": "$OWN_DISK/run"}
    config = validate(rank_values(data_dir, work / "local disks", **changes), "local disks")
    prepared = prepare(config, rank())
    trainer = Trainer(assemble(config, prepared), _tracker(config), StopRequest())
    trainer.train(0)
    trainer.run.engine.destroy()
    report: dict[str, Any] = {"shared": str(find_checkpoint("auto", disks_of(config)))}
    if rank() == 0:
        shutil.rmtree(work / "local disks" / "checkpoints")
    barrier()
    report["own"] = gather_objects(str(find_checkpoint("auto", disks_of(config))))
    shard = disks[FAULTY_RANK] / "run" / "checkpoints" / f"step-{STEPS - EVERY:08d}" / shard_of(FAULTY_RANK)
    content = shard.read_bytes()
    if rank() == 0:
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    barrier()
    start = find_checkpoint("auto", disks_of(config))
    assert start is not None
    report["damaged"] = str(start)
    resumed = Trainer(assemble(config, prepared), None, StopRequest())
    losses = {}
    for step in range(resume_from(resumed, start), STEPS):
        (batch,) = resumed.run.loader.steps(step, step + 1)
        losses[step + 1] = resumed.train_step(step, batch)["train/loss"]
    report["losses"] = losses
    resumed.run.engine.destroy()
    os.environ["OWN_DISK"] = str(disks[1 - rank()])
    try:
        find_checkpoint("auto", disks_of(config))
    except ConfigError as error:
        report["swapped"] = str(error)
    if rank() == 0:
        (work / "local disks.json").write_text(json.dumps(report))


def disks_of(config: Any) -> tuple[Disk, ...]:
    return checkpoint_disks(config.output_dir, config.checkpoint.local_dir, config.zero_stage)


def _tracker(config: Any) -> Tracker | None:
    if rank() > 0:
        return None
    tracker = Tracker(config.output_dir, config.tracking)
    tracker.start({}, {}, resumed_step=None)
    return tracker


if __name__ == "__main__":
    main()
