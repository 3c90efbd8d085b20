"""One rank of the gradient test: the same global batch in 1, 2 and 4 micro-batches a rank; rank 0 keeps the gradients.

Two ranks also run it under every ZeRO stage, and keep the parameters after two updates, with and without a
checkpoint in between.

python gradient_cells.py DATA_DIR WORK_DIR OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from tiny_run import rank_values

from data_pipeline.packing import Packer
from training.assembly import assemble
from training.distributed import barrier, rank, world_size
from training.engine import gathered, init_process_group
from training.prepare import prepare
from training.run_file import validate
from training.trainer import Trainer

STEP = 3
LEARNING_RATE = 1e-2


def main() -> None:
    data_dir, work, output = (Path(argument) for argument in sys.argv[1:])
    init_process_group(timeout_minutes=3)
    for objective in ("sft", "shifcon"):
        run = _run(data_dir, work / objective, **({"objective": {"name": "sft"}} if objective == "sft" else {}))
        trainer = Trainer(run, tracker=None)
        for micro_batches in (1, 2, 4):
            batch, totals = _batch(trainer, micro_batches)
            trainer.accumulate(STEP, batch, totals)
            gradients = run.engine.full_gradients()
            norm = run.engine.step(learning_rate=0.0)  # clears the gradients, moves nothing
            if rank() == 0:
                name = f"{objective}-{micro_batches}"
                save_file(gradients, output / f"{name}.safetensors")
                sets = sum(bool(unit.pairs) for unit in run.data.planner.step(STEP).units)
                facts = {**totals.counts, "norm": norm, "sets": sets}
                (output / f"{name}.json").write_text(json.dumps(facts))
        run.engine.destroy()
    if world_size() == 2:
        for stage in (1, 2, 3):
            _two_updates(data_dir, work / "shifcon", output, stage)


def _two_updates(data_dir: Path, work: Path, output: Path, stage: int) -> None:
    run = _run(data_dir, work, zero_stage=stage)
    trainer = Trainer(run, tracker=None)
    batch, totals = _batch(trainer, micro_batches=2)
    saved = output / f"stage-{stage}"
    for number, name in enumerate(("first", "second", "second-after-load")):
        if name == "second-after-load":
            run.engine.load_state(saved)
        trainer.accumulate(STEP, batch, totals)
        gradients = run.engine.full_gradients()
        run.engine.step(LEARNING_RATE)
        with gathered(run.engine.module.parameters()):
            parameters = {key: each.detach().clone() for key, each in run.engine.module.named_parameters()}
        if rank() == 0:
            save_file(gradients, output / f"stage-{stage}-{name}-gradients.safetensors")
            save_file(parameters, output / f"stage-{stage}-{name}-parameters.safetensors")
        if number == 0:
            run.engine.save_state(saved)
            barrier()
    run.engine.destroy()


def _run(data_dir: Path, work: Path, **changes):
    config = validate(rank_values(data_dir, work, **changes), "test")
    return assemble(config, prepare(config, rank()))


def _batch(trainer: Trainer, micro_batches: int):
    """The global batch of the step, packed so that the busiest rank has that many micro-batches."""
    run = trainer.run
    run.objective.before_step(run.engine, STEP)
    run.loader.packer = _packer_for(run, micro_batches)
    batch = run.loader.load(STEP)
    totals, _ = trainer._agree(batch)
    assert totals.micro_batches == micro_batches, (totals.micro_batches, micro_batches)
    return batch, totals


def _packer_for(run, micro_batches: int) -> Packer:
    """The budget under which the busiest rank has exactly that many micro-batches at this step."""
    shares = []
    for other in range(world_size()):
        batch = run.data.loader(run.config, other, world_size()).load(STEP)
        shares.append([unit for micro_batch in batch.micro_batches for unit in micro_batch.units])
    for row in (128, 112, 96, 80):
        for rows in range(200, 0, -1):
            packer = Packer("packed", rows * row, row, run.loader.packer.pad_id)
            if max(len(packer.pack(share)) for share in shares) == micro_batches:
                return packer
    raise AssertionError(f"no budget gives {micro_batches} micro-batches")


if __name__ == "__main__":
    main()
