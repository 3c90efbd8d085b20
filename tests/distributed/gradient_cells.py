"""One rank of the gradient test: the same global batch in 1, 2 and 4 micro-batches a rank; rank 0 keeps the gradients.

python gradient_cells.py DATA_DIR WORK_DIR OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from tiny_run import run_values

from data_pipeline.packing import Packer
from training.assembly import assemble
from training.distributed import rank, world_size
from training.engine import init_process_group
from training.prepare import prepare
from training.run_file import validate
from training.trainer import Trainer

STEP = 3


def main() -> None:
    data_dir, work, output = (Path(argument) for argument in sys.argv[1:])
    init_process_group(timeout_minutes=3)
    for objective in ("sft", "shifcon"):
        config = validate(run_values(data_dir, work / objective, objective), "test")
        run = assemble(config, prepare(config, rank()))
        trainer = Trainer(run, tracker=None)
        run.objective.before_step(run.engine, STEP)
        for micro_batches in (1, 2, 4):
            run.loader.packer = _packer_for(run, micro_batches)
            batch = run.loader.load(STEP)
            totals, _ = trainer._agree(batch)
            assert totals.micro_batches == micro_batches, (totals.micro_batches, micro_batches)
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
