"""Program of a rank of the memory tests: memory of the engine, measured under every ZeRO stage in fp32 and bf16.

A cell is one such configuration.

python memory_cells.py DATA_DIR WORK_DIR OUTPUT
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from tiny_run import rank_values

from benchmarks.memory_estimate import floats, held_bytes
from training.assembly import assemble
from training.distributed import rank, world_size
from training.engine.engine import process_group
from training.run_file import validate
from training.run_folder.prepare import prepare

BUCKET = 3000  # elements
# Gathered weights are released at once: none is kept for reuse, none is prefetched.
ZERO: dict[str, Any] = {
    "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}  # fmt: skip
CELLS: dict[str, dict[str, Any]] = {
    **{
        f"stage {stage} {precision}": {"zero_stage": stage, "precision": precision}
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
    },
    "stage 3 fp32 reuse": {"deepspeed.zero_optimization.stage3_max_reuse_distance": 20_000},
    "stage 3 fp32 prefetch": {
        "deepspeed.zero_optimization.stage3_prefetch_bucket_size": 4_000,
        "deepspeed.zero_optimization.stage3_max_live_parameters": 10_000,
    },
    "stage 3 bf16 offload": {
        "precision": "bf16",
        "deepspeed.zero_optimization.offload_optimizer": {"device": "cpu", "pin_memory": False},
    },
}


def values(data_dir: Path, output_dir: Path, cell: str) -> dict[str, Any]:
    """The run file of a cell."""
    changes = {
        "precision": "fp32",
        "objective": {"name": "sft"},
        "deepspeed": {"zero_optimization": ZERO},
        "watchdog.straggler_every": 0,  # its matrix has a fixed size, whatever the model
        **CELLS[cell],
    }
    return rank_values(data_dir, output_dir, **changes)


@process_group(timeout_minutes=3)
def main() -> None:
    data_dir, work, output = (Path(argument) for argument in sys.argv[1:])
    measured = {}
    for cell in CELLS:
        config = validate(values(data_dir, work, cell), "test")
        before = floats()  # kept, so that no later tensor gets the id of one of them
        run = assemble(config, prepare(config, rank()))
        measured[cell] = held_bytes(run, {id(each) for each in before})
        run.engine.destroy()
        del run, before
        gc.collect()
    assert not {"mlflow", "torch._inductor.compile_fx"} & sys.modules.keys(), "the engine imports unused modules"
    if rank() == 0:
        (output / f"{world_size()}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
