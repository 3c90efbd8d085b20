"""Program of a rank of the ZeRO tests: every stage in both precisions trains, skips, rolls back, saves and resumes.

python zero_cells.py DATA_DIR WORK_DIR train|resume|short

A cell is a ZeRO stage with a precision. `train` runs every cell past its last checkpoint, and then all ranks are
killed with SIGKILL; `resume` finishes these runs. `short`, on one rank, saves after three steps and stops after five.
Rank 0 writes `WORK_DIR/<cell>-<mode>.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optimizer_cells
import torch
from tiny_run import copy_preparation, rank_values

from training.assembly import assemble
from training.checkpoints.search import find_checkpoint
from training.distributed import barrier, gather_objects, rank
from training.engine.engine import gathered, process_group
from training.launch.stop import StoppedOnRequest
from training.loop.resume import resume_from
from training.loop.trainer import Trainer
from training.run_file import validate
from training.run_folder.prepare import prepare

CELLS: dict[str, dict[str, Any]] = {
    f"{stage}-{precision}": {"zero_stage": stage, "precision": precision}
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
}
STEPS, EVERY = 14, 3
SAVED, SHORT, STOPPED = 12, 3, 5  # the last checkpoint of `train`, that of `short`, and where `short` stops
# Steps of the data, from 0: a loss that is NaN, a gradient that is infinite, and a loss spike after 8 usual losses.
NAN_LOSS, INFINITE_GRADIENT, SPIKE = 1, 2, 9
FAULTY_RANK = 1
FROM_ONE_RANK = "1-bf16"  # what `short` saved of this cell is resumed on two ranks
CHANGES: dict[str, Any] = {
    "objective": {"name": "sft"},
    "data.slots_per_step": 16,
    "model.init.num_hidden_layers": 2,
    "data.micro_batch_tokens": 384,
    "max_steps": STEPS,
    "optimizer.learning_rate": 1e-2,
    "checkpoint": {"every": EVERY, "keep": 9},
    "guard": {"non_finite": "skip", "spike": "rollback", "spike_window": 8},
}


def main() -> None:
    data_dir, work, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    for name in CELLS:
        trainer = made(data_dir, work, name if mode != "short" else f"{name}-short", CELLS[name])
        report = watch(trainer)
        if mode == "resume":
            start = resumed(trainer)
        else:
            start = 0
            save_until(trainer, SAVED if mode == "train" else SHORT)
            if mode == "train":
                inject_faults(trainer)
            else:
                stop_after(trainer, STOPPED)
        with suppress(StoppedOnRequest):
            trainer.train(start)
        write(report, trainer, work / f"{name}-{mode}.json")
    if mode == "resume":
        trainer = made(data_dir, work, f"{FROM_ONE_RANK}-short", CELLS[FROM_ONE_RANK])
        report, start = watch(trainer), resumed(trainer)
        save_until(trainer, 0)
        stop_after(trainer, STOPPED)
        with suppress(StoppedOnRequest):
            trainer.train(start)
        write(report, trainer, work / f"{FROM_ONE_RANK}-from-one-rank.json")
    run_optimizers(data_dir, work, mode)
    barrier()
    if mode == "train":
        os.kill(os.getpid(), signal.SIGKILL)


def run_optimizers(data_dir: Path, work: Path, mode: str) -> None:
    """`optimizer_cells`: `short` and `train` do all steps on one and two ranks; `resume` the last ones, on two."""
    for name, ranks, implementation in optimizer_cells.starts(mode):
        folder, changes = optimizer_cells.folder(name, ranks), optimizer_cells.CELLS[implementation]
        trainer = made(data_dir, work, folder, {**optimizer_cells.CHANGES, **changes})
        save_until(trainer, optimizer_cells.SAVED if mode != "resume" else 0)
        start = resumed(trainer) if mode == "resume" else 0
        with optimizer_cells.compared(trainer) as report:
            trainer.train(start)
        if rank() == 0:
            optimizer_cells.report_file(work, name, f"{mode}-{ranks}-{implementation}").write_text(json.dumps(report))
        trainer.run.engine.destroy()


def made(data_dir: Path, work: Path, folder: str, changes: dict[str, Any]) -> Trainer:
    config = validate(rank_values(data_dir, work / folder, **{**CHANGES, **changes}), "test")
    first = work / f"{next(iter(CELLS))}-short"  # all stages and precisions start from the same weights
    if rank() == 0 and first.exists() and not config.output_dir.exists():  # the others wait for rank 0 to prepare
        copy_preparation(first, config.output_dir)
    return Trainer(assemble(config, prepare(config, rank())), tracker=None)


def resumed(trainer: Trainer) -> int:
    found = find_checkpoint("auto", trainer.disks)
    assert found is not None
    return resume_from(trainer, found)


def save_until(trainer: Trainer, last: int) -> None:
    """Write no checkpoints of later steps."""
    save, complete = trainer.save, trainer._complete_checkpoint
    trainer.save = lambda step, metrics: save(step, metrics) if step <= last else None  # type: ignore[method-assign]
    trainer._complete_checkpoint = lambda required=False: complete()  # type: ignore[method-assign]


def stop_after(trainer: Trainer, step: int) -> None:
    accumulate = trainer.accumulate

    def stopping(at: int, batch: Any) -> Any:
        if at + 1 == step:
            trainer.stop._reason = "the test"
        return accumulate(at, batch)

    trainer.accumulate = stopping  # type: ignore[method-assign]


def watch(trainer: Trainer) -> dict[str, Any]:
    """A report, filled during the run: metrics by step; for each skipped update, whether the state is unchanged.

    `fine` is the share of the first step's gradients that bf16 cannot hold.
    """
    report: dict[str, Any] = {"metrics": {}, "dropped": []}
    train_step, skip_update, accumulate, before = trainer.train_step, trainer._skip_update, trainer.accumulate, [""]

    def kept(step: int, batch: Any) -> dict[str, float]:
        values = train_step(step, batch)
        report["metrics"][step + 1] = {name: str(values.get(name)) for name in ("train/loss", "train/grad_norm")}
        return values

    def hashed(step: int, batch: Any) -> Any:
        before[0] = state_hash(trainer)
        found = accumulate(step, batch)
        if "fine" not in report:
            gradients = torch.cat([each.flatten() for each in trainer.run.engine.full_gradients().values()])
            report["fine"] = float((gradients != gradients.bfloat16()).float().mean())
        return found

    def compared(step: int, *arguments: Any) -> None:
        try:
            skip_update(step, *arguments)
        finally:
            report["dropped"].append([step, state_hash(trainer) == before[0]])

    trainer.train_step, trainer.accumulate, trainer._skip_update = kept, hashed, compared  # type: ignore[method-assign]
    return report


def write(report: dict[str, Any], trainer: Trainer, file: Path) -> None:
    report["optimizer"] = type(trainer.run.engine._optimizer).__name__
    report["dropped"] = gather_objects(report["dropped"])
    report["moments"] = gather_objects(destroyed(trainer))
    if rank() == 0:
        file.write_text(json.dumps(report))


def destroyed(trainer: Trainer) -> list[int]:
    """Destroys the engine: how many of this rank's moments were held before and are held after that."""
    states = trainer.run.engine._optimizer.optimizer.state.values()
    moments = [weakref.ref(each) for state in states for each in state.values() if torch.is_tensor(each)]
    del states
    trainer.run.engine.destroy()
    return [len(moments), sum(each() is not None for each in moments)]


def state_hash(trainer: Trainer) -> str:
    """Of the weights, and of this rank's part of the optimizer's state."""
    engine, digest = trainer.run.engine, hashlib.sha256()
    with gathered(engine.module.parameters()):
        tensors = [parameter.detach() for parameter in engine.module.parameters()]
        tensors += [value for state in engine._optimizer.optimizer.state.values() for value in state.values()]
        for each in tensors:
            digest.update(torch.as_tensor(each).detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def inject_faults(trainer: Trainer) -> None:
    """Faults at three steps of the data: a NaN loss, an infinite gradient, a loss spike."""
    accumulate, loss_terms, current = trainer.accumulate, trainer.run.objective.loss_terms, [-1]

    def noted(step: int, batch: Any) -> Any:
        current[0] = batch.step
        return accumulate(step, batch)

    def corrupted(engine: Any, batch: Any) -> Any:
        terms = loss_terms(engine, batch)
        if not torch.is_grad_enabled():
            return terms
        sft, faulty = terms.terms["sft"], rank() == FAULTY_RANK
        if current[0] == INFINITE_GRADIENT and faulty:
            sft.sum.register_hook(lambda gradient: gradient * float("inf"))
        factor = 50.0 if current[0] == SPIKE else float("nan") if current[0] == NAN_LOSS and faulty else 1.0
        changed = {**terms.terms, "sft": replace(sft, sum=sft.sum * factor)}
        return replace(terms, terms=changed, label_losses=terms.label_losses * factor)

    trainer.accumulate, trainer.run.objective.loss_terms = noted, corrupted  # type: ignore[method-assign]


if __name__ == "__main__":
    with process_group(timeout_minutes=3):
        main()
