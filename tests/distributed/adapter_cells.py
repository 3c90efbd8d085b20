"""Program of a rank of the adapter tests: adapters to whole and to quantised weights, under ZeRO-1 and -3.

python adapter_cells.py DATA_DIR WORK_DIR

A cell is a ShifCon run of two steps. Rank 0 writes its losses to `WORK_DIR/<cell>.json`. The model of the cells
`rounded*` has the weights that quantised cells compute with. One cell also repeats its last step from the checkpoint
before it (`resumed`) and is exported to `WORK_DIR/model`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rounded_weights import RoundedWeights
from safetensors.torch import load_file, save_file
from tiny_run import copy_preparation, run_values

from modeling.loading import load_pretrained
from modeling.quantisation.linear import FORMATS, packed_layers, round_weights
from training.assembly import assemble
from training.checkpoints.checkpoint import checkpoint_path
from training.checkpoints.export import export_checkpoint
from training.distributed import all_sum, barrier, rank
from training.engine.engine import process_group
from training.loop.resume import resume_from
from training.loop.trainer import Trainer
from training.run_file import validate
from training.run_folder.prepare import prepare

LORA: dict[str, Any] = {"rank": 3, "alpha": 12, "targets": "all-linear"}
DORA: dict[str, Any] = {**LORA, "use_dora": True, "use_rslora": True}
# Weights are freed after each use, as those of a large model are.
FREED = {
    "deepspeed": {
        "zero_optimization": {
            "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    }
}  # fmt: skip
CELLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # keys of `model`, and other changes
    "rounded": ({"lora": LORA}, {}),
    "rounded-dora": ({"lora": DORA}, {}),
    "quantised-1": ({"lora": LORA, "quantise": "nf4"}, {"zero_stage": 1}),
    "quantised-3": ({"lora": LORA, "quantise": "nf4"}, {"gradient_checkpointing": True, **FREED}),
    "quantised-dora": ({"lora": DORA, "quantise": "nf4"}, FREED),
}
EXPORTED = "quantised-3"
STEPS = 2
COMMON = {"max_steps": STEPS, "checkpoint": {"every": 1, "keep": 9}, "optimizer.learning_rate": 1e-2}


@process_group(timeout_minutes=3)
def main() -> None:
    data_dir, work = Path(sys.argv[1]), Path(sys.argv[2])
    FORMATS["nf4"] = RoundedWeights()
    base = validate(run_values(data_dir, work / "base", **{"model.init.initializer_range": 0.2}), "test")
    prepared = prepare(base, rank())
    model, rounded = Path(prepared.model_dir), work / "rounded-base"
    if rank() == 0:
        write_rounded(model, rounded)
    for name, (of_model, changes) in CELLS.items():
        if rank() == 0:
            copy_preparation(base.output_dir, work / name)
        barrier()
        start = rounded if name.startswith("rounded") else model
        values = run_values(data_dir, work / name, **COMMON, **changes)
        values |= {"model": {"path": str(start), **of_model}, "tokenizer": {"path": prepared.tokenizer_dir}}
        run_cell(work, name, values)


def write_rounded(model: Path, output: Path) -> None:
    shutil.copytree(model, output)
    rounded = load_pretrained(model, torch.float32, "eager", "cpu")
    round_weights(rounded, "nf4")
    stored = load_file(output / "model.safetensors")
    save_file({name: rounded.state_dict()[name].contiguous() for name in stored}, output / "model.safetensors")


def run_cell(work: Path, name: str, values: dict[str, Any]) -> None:
    config = validate(values, "test")
    report: dict[str, Any] = {"losses": [], "resumed": []}
    for kind in ("losses", "resumed") if name == EXPORTED else ("losses",):
        trainer = Trainer(assemble(config, prepare(config, rank())), tracker=None)
        module = trainer.run.engine.module
        frozen = frozen_sums(module)
        report_losses(trainer, report[kind])
        resumed = checkpoint_path(config.output_dir, STEPS - 1)
        trainer.train(resume_from(trainer, resumed) if kind == "resumed" else 0)
        report["frozen_unchanged"] = frozen_sums(module) == frozen
        report["quantised"] = len(packed_layers(module))
        trainer.run.engine.destroy()
    if rank() == 0:
        if name == EXPORTED:
            export_checkpoint(checkpoint_path(config.output_dir, STEPS), work / "model")
        (work / f"{name}.json").write_text(json.dumps(report))
    barrier()


def frozen_sums(model: torch.nn.Module) -> dict[str, float]:
    """The sum of magnitudes of each frozen weight: of all ranks' shards, or of their whole weights."""
    return {
        name: float(all_sum([getattr(each, "ds_tensor", each).detach().double().abs().sum()], each.device))
        for name, each in model.named_parameters()
        if not each.requires_grad
    }


def report_losses(trainer: Trainer, kept: list[float]) -> None:
    train_step = trainer.train_step

    def kept_step(step: int, batch: Any) -> dict[str, float]:
        values = train_step(step, batch)
        kept.append(values["train/loss"])
        return values

    trainer.train_step = kept_step  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
