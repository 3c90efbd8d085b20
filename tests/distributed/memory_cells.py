"""One rank of the memory test: what the engine really holds, under every ZeRO stage, in fp32 and bf16.

python memory_cells.py DATA_DIR WORK_DIR OUTPUT
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_run import rank_values

from training.assembly import Run, assemble
from training.distributed import rank, world_size
from training.engine import init_process_group
from training.prepare import prepare
from training.run_file import validate
from training.trainer import Trainer

BUCKET = 3000  # elements
# Weights come and go as fast as they can: nothing is kept for later, nothing is fetched early.
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
    changes = {"precision": "fp32", "objective": {"name": "sft"}, "deepspeed": {"zero_optimization": ZERO}}
    return rank_values(data_dir, output_dir, **{**changes, **CELLS[cell]})


def main() -> None:
    data_dir, work, output = (Path(argument) for argument in sys.argv[1:])
    warnings.simplefilter("ignore")  # PyTorch's about what DeepSpeed calls fill a pipe that nobody empties
    init_process_group(timeout_minutes=3)
    measured = {}
    for cell in CELLS:
        config = validate(values(data_dir, work, cell), "test")
        before = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        run = assemble(config, prepare(config, rank()))
        measured[cell] = measure(run, {id(each) for each in before})
        run.engine.destroy()
        del run, before
        gc.collect()
    if rank() == 0:
        (output / f"{world_size()}.json").write_text(json.dumps(measured))


def measure(run: Run, before: set[int]) -> dict[str, int]:
    """Bytes between a second step's backward and its update, by what holds them; `all`: of all float tensors."""
    trainer = Trainer(run, tracker=None)
    trainer.train_step(0, run.loader.load(0))  # afterwards the moments are there, and the trace of modules
    batch = run.loader.load(1)
    totals, _ = trainer._agree(batch)
    gathered = watch_gathered(run)
    trainer.accumulate(1, batch, totals)
    optimizer: Any = run.engine._optimizer
    held = {
        "moments": size(
            each for state in optimizer.optimizer.state.values() for name, each in state.items() if name != "step"
        ),
        "gathered": gathered(),
        "all": size(new_floats(before)),
    }
    if run.config.zero_stage == 3:
        held["weights"] = size([optimizer.lp_param_buffer])
        held["master"] = size(optimizer.fp32_partitioned_groups_flat)
        held["gradients"] = size([optimizer.grad_partitions_flat_buffer])
        held["bucket"] = size(bucket.buffer for bucket in optimizer.ipg_buckets.values())
        held["small"] = size(each.data for each in run.engine.module.parameters() if each.data.numel() > 1)
    else:
        held["weights"] = size(run.engine.module.parameters())
        bf16_optimizer = hasattr(optimizer, "fp32_groups_flat_partition")
        held["master"] = size(
            optimizer.fp32_groups_flat_partition if bf16_optimizer else optimizer.single_partition_of_fp32_groups
        )
        held["gradients"] = size(
            optimizer.fp32_groups_gradients_flat
            if bf16_optimizer
            else (each for group in optimizer.averaged_gradients.values() for each in group)
        )
    return held


def watch_gathered(run: Run) -> Callable[[], int]:
    """Elements of weights that are whole at the most, looked at around every module; 0 without ZeRO-3."""
    if run.config.zero_stage < 3:
        return lambda: 0
    coordinator = run.engine._optimizer.parameter_offload.get_param_coordinator()
    seen = [0]

    def look(*_: Any) -> None:
        seen.append(coordinator._PartitionedParameterCoordinator__n_available_params)

    for module in run.engine.module.modules():
        module.register_forward_pre_hook(look)  # behind the engine's, which fetch
        module.register_full_backward_pre_hook(look)
    return lambda: max(seen)


def new_floats(before: set[int]) -> list[torch.Tensor]:
    gc.collect()
    return [
        each
        for each in gc.get_objects()
        if type(each) in (torch.Tensor, torch.nn.Parameter) and id(each) not in before and each.is_floating_point()
    ]


def size(tensors: Any) -> int:
    """Bytes of the storages behind the tensors, each once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


if __name__ == "__main__":
    main()
