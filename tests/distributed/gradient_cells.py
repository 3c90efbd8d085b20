"""Program of a rank of the gradient tests: the same global batch in 1, 2 and 4 micro-batches per rank.

A cell is an objective at a step; rank 0 saves its gradients. X-Mixup has two cells: a step with gold sources and one
with back-translations. Two ranks also run under every ZeRO stage and save the parameters after two updates, with and
without a checkpoint in between.

python gradient_cells.py DATA_DIR WORK_DIR OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_run import XMIXUP, rank_values

from data_pipeline.batching.packer import Packer
from data_pipeline.loader import Step
from training.assembly import Run, assemble
from training.distributed import all_sum, barrier, rank, world_size
from training.engine.engine import gathered, process_group
from training.loop.trainer import Trainer
from training.objectives.scaling import StepTotals
from training.run_file import validate
from training.run_folder.prepare import prepare

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"name": "sft"}},
    "shifcon": {},
    # Larger weights than usual: otherwise attention is uniform and the learned ratio has almost no gradient.
    "xmixup": {**XMIXUP, "model.init.initializer_range": 0.3, "data.slots_per_step": 48},
}
STEP = 3
STEPS = {"xmixup": {"xmixup": STEP, "xmixup-back": 5}}  # cell: step; others have one, of the objective's name
LEARNING_RATE = 1e-2


@process_group(timeout_minutes=3)
def main() -> None:
    data_dir, work, output = (Path(argument) for argument in sys.argv[1:])
    for objective in OBJECTIVES:
        run = _run(data_dir, work, objective)
        for cell, step in STEPS.get(objective, {objective: STEP}).items():
            for micro_batches in (1, 2, 4):
                _cell(run, step, micro_batches, output / f"{cell}-{micro_batches}")
        run.engine.destroy()
    if world_size() == 2:
        for objective in ("shifcon", "xmixup"):
            for stage in (1, 2, 3):
                _two_updates(data_dir, work, output, objective, stage)


def _cell(run: Run, step: int, micro_batches: int, output: Path) -> None:
    """The step's gradients as `output`.safetensors, and what it was made of as `output`.json."""
    trainer = Trainer(run, tracker=None)
    batch, totals = _batch(trainer, step, micro_batches)
    idle = all_sum([micro_batches - len(batch.micro_batches)], run.engine.device)
    trainer.accumulate(step, batch, totals)
    gradients = run.engine.full_gradients()
    assert gradients.keys() == dict(run.engine.module.named_parameters()).keys()
    norm = run.engine.step(learning_rate=0.0)  # clears the gradients, changes no weight
    if rank() == 0:
        save_file(gradients, output.with_suffix(".safetensors"))
        sets = sum(bool(unit.pairs) for unit in run.data.planner.step(step).units)
        facts = {**totals.counts, "norm": norm, "sets": sets, "idle": float(idle)}
        output.with_suffix(".json").write_text(json.dumps(facts))


def _two_updates(data_dir: Path, work: Path, output: Path, objective: str, stage: int) -> None:
    run = _run(data_dir, work, objective, zero_stage=stage)
    assert run.engine._engine.zero_optimization_stage() == stage
    trainer = Trainer(run, tracker=None)
    batch, totals = _batch(trainer, STEP, micro_batches=2)
    saved = output / f"{objective}-stage-{stage}"
    for number, name in enumerate(("first", "second", "second-after-load")):
        if name == "second-after-load":
            run.engine.load_state(saved)
            # Dropped gradients must have no effect. Not STEP + 1: ShifCon's vectors are estimated before it.
            trainer.accumulate(STEP + 2, *_batch(trainer, STEP + 2, micro_batches=2))
            run.engine.drop_update()
        trainer.accumulate(STEP, batch, totals)
        gradients = run.engine.full_gradients()
        run.engine.step(LEARNING_RATE)
        with gathered(run.engine.module.parameters()):
            parameters = {key: each.detach().clone() for key, each in run.engine.module.named_parameters()}
        assert gradients.keys() == parameters.keys()
        if rank() == 0:
            save_file(gradients, output / f"{saved.name}-{name}-gradients.safetensors")
            save_file(parameters, output / f"{saved.name}-{name}-parameters.safetensors")
        if number == 0:
            for path, state in run.engine.take_state(saved):
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(state, path)
            barrier()
    run.engine.destroy()


def _run(data_dir: Path, work: Path, objective: str, **changes: int) -> Run:
    data = data_dir / "tasks" if objective == "xmixup" else data_dir
    config = validate(rank_values(data, work / objective, **OBJECTIVES[objective], **changes), "test")
    return assemble(config, prepare(config, rank()))


def _batch(trainer: Trainer, step: int, micro_batches: int) -> tuple[Step, StepTotals]:
    """The global batch of the step, packed so that the busiest rank has that many micro-batches."""
    run = trainer.run
    run.objective.before_step(run.engine, step)
    run.loader.packer = _packer_for(run, step, micro_batches)
    batch = run.loader.load(step)
    totals = trainer.agree(batch).totals
    assert totals.micro_batches == micro_batches, (totals.micro_batches, micro_batches)
    return batch, totals


def _packer_for(run: Run, step: int, micro_batches: int) -> Packer:
    """A budget under which the busiest rank has exactly that many micro-batches at this step.

    Packed: the largest one; padded: the smallest, so that some rank may have fewer.
    """
    own = run.loader.packer
    shares = []
    for other in range(world_size()):
        batch = run.data.loader(other, world_size()).load(step)
        shares.append([unit for micro_batch in batch.micro_batches for unit in micro_batch.units])
    samples = max(sum(len(unit.samples) for unit in share) for share in shares)
    budgets = [(rows * row, row) for row in (128, 112, 96, 80) for rows in range(samples, 0, -1)]
    if own.layout == "padded":
        budgets = [(budget, own.row_tokens) for budget in range(256, 2**14, 64)]
    for budget, row in budgets:
        packer = Packer(own.layout, budget, row, own.collator)
        if max(len(packer.pack(share)) for share in shares) == micro_batches:
            return packer
    raise AssertionError(f"no budget gives {micro_batches} micro-batches")


if __name__ == "__main__":
    main()
