"""Memory estimates of `training.engine.memory` and `training.checks.activations` against measurements on the CPU.

    python -m benchmarks.memory_estimate --json FILE

1. Weights, gradients, optimiser: ranks train two steps of a Llama of 6M parameters under every ZeRO stage, in fp32 and
   bf16; between the second step's backward and its update each rank's tensors are measured.
2. Activations: models of Llama's, Qwen3's and XLM-R's shapes run forward and backward; measured are the tensors that
   autograd saves and the peak allocation (PyTorch's MemTracker), with and without gradient checkpointing.

`tests/distributed/test_memory.py` and `tests/unit/training/checks/test_activations.py` use the same measurements. Not
measured: GPUs, so neither flash-attention's kernels nor the CUDA allocator.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ranks import machine, run_ranks
from data_pipeline.batching.batch import Batch, BatchShape
from training.checks import activations
from training.checks.activations import SavedBytes

if TYPE_CHECKING:
    from training.assembly import Run
    from training.config import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE = BatchShape(rows=4, row_tokens=256, labels=400, segments=8, pairs=4)
VOCABULARY = 8000
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
    "xlm-roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 300},
}
# By their names in the estimate, in any stage.
NAMES = {
    "weights": ("weights, sharded", "weights, whole"),
    "master": ("master weights, fp32",),
    "moments": ("Adam's two moments, fp32",),
    "gradients": ("gradients, fp32",),
}


class LargestTensor(TorchDispatchMode):
    """Inside, `bytes` is the size of the largest storage that an operation allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return made


def held_bytes(run: Run, before: set[int]) -> dict[str, int]:
    """Bytes of tensors between a second step's backward and its update, by kind.

    `all` covers all float tensors except those with an id in `before`; `gathered` counts elements of gathered weights;
    `update` is the largest tensor that the update then makes.
    """
    from training.loop.trainer import Trainer

    trainer = Trainer(run, tracker=None)
    first, batch = run.loader.steps(0, 2)
    trainer.train_step(0, first)  # afterwards the moments and the trace of modules exist
    gathered = watch_gathered(run)
    trainer.accumulate(1, batch)
    optimizer: Any = run.engine._optimizer
    states = [(name, each) for state in optimizer.optimizer.state.values() for name, each in state.items()]
    held = {
        "moments": size(each for name, each in states if name != "step"),
        "gathered": gathered(),
        "all": size(each for each in floats() if id(each) not in before),
    }
    if run.config.zero_stage == 3:
        held["weights"] = size([optimizer.lp_param_buffer])
        held["master"] = size(optimizer.fp32_partitioned_groups_flat)
        held["gradients"] = size([optimizer.grad_partitions_flat_buffer])
        held["bucket"] = size(bucket.buffer for bucket in optimizer.ipg_buckets.values())
        held["small"] = size(each.data for each in run.engine.module.parameters() if each.data.numel() > 1)
    else:
        held["weights"] = size(run.engine.module.parameters())
        held["master"] = size(optimizer.single_partition_of_fp32_groups)
        held["gradients"] = size(each for group in optimizer.averaged_gradients.values() for each in group)
    with LargestTensor() as largest:
        run.engine.step(1e-5)
    return {**held, "update": largest.bytes}


def watch_gathered(run: Run) -> Callable[[], int]:
    """Largest number of gathered weight elements, sampled around every module; 0 without ZeRO-3."""
    if run.config.zero_stage < 3:
        return lambda: 0
    coordinator: Any = run.engine._optimizer.parameter_offload.get_param_coordinator()
    seen = [0]

    def record(*_: Any) -> None:
        seen.append(coordinator._PartitionedParameterCoordinator__n_available_params)

    for module in run.engine.module.modules():
        module.register_forward_pre_hook(record)  # after the engine's hooks, which gather
        module.register_full_backward_pre_hook(record)
    return lambda: max(seen)


def floats() -> list[Tensor]:
    """Every plain float tensor of the process."""
    gc.collect()
    kinds = (Tensor, torch.nn.Parameter)
    return [each for each in gc.get_objects() if type(each) in kinds and each.is_floating_point()]


def size(tensors: Any) -> int:
    """Bytes of the storages behind the tensors, each once; tensors on the meta device have none."""
    real = (each.untyped_storage() for each in tensors if not each.is_meta)
    storages = {storage.data_ptr(): storage.nbytes() for storage in real}
    return sum(storages.values())


@contextmanager
def real_inputs(shape: BatchShape, vocabulary: int) -> Iterator[None]:
    """Inside, `training.checks.activations` runs a forward pass on token ids instead of zeros.

    Decoders get positions that restart in the middle of a row, and encoders a padded row, so that transformers makes
    the masks of a real batch.
    """
    ids_BT = torch.randint(3, vocabulary, (shape.rows, shape.row_tokens))
    positions_BT = (torch.arange(shape.row_tokens) % (shape.row_tokens // 2)).expand_as(ids_BT)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, -5:] = 0

    def forward(self: Any, **inputs: Any) -> Any:
        real = {"position_ids": positions_BT} if "position_ids" in inputs else {"attention_mask": mask_BT}
        return self.module(**{**inputs, "input_ids": ids_BT, **real})

    with mock.patch.object(activations._PlainEngine, "forward", forward):
        yield


def blank_of(config: RunConfig) -> Callable[[BatchShape], Batch[Any]]:
    """The function that makes a run's micro-batches without content."""
    from data_pipeline.batching.chat import ChatCollator
    from data_pipeline.batching.tasks import TaskCollator

    if config.data.task is None:
        return ChatCollator(pad_id=0).blank
    with_partner = config.objective.pairing().with_partner
    return TaskCollator(0, config.data.task, with_partner, has_token_types=False).blank


def on_cpu(
    config: RunConfig, model_config: Any, architecture: Any, attention: str, shape: BatchShape
) -> tuple[Any, Callable[[], Tensor]]:
    """The real model with real attention, and its forward pass, both inside `real_inputs`."""
    from modeling.adapters import add_adapters
    from modeling.architectures import auto_class

    dtype = DTYPES[config.precision]
    model = auto_class(architecture).from_config(model_config, dtype=dtype, attn_implementation=attention)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if (lora := config.model.lora) is not None:
        add_adapters(model, lora, config.seed)
    objective = activations.build_without_engine(config.data, config.objective, model)
    return model.train(), activations.forward_without_engine(objective, model, blank_of(config)(shape))


def step_peak(model: Any, forward: Callable[[], Tensor], backward: bool = True) -> int:
    """Most bytes of activations and temporary tensors at any moment of a forward and, with it, a backward pass."""
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        loss = forward()
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
    peak: Any = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return int(peak[_MemRefType.ACT] + peak[_MemRefType.TEMP])


def measure_activations() -> list[dict[str, Any]]:
    """Bytes counted without data, saved by autograd, and allocated: one row a model, precision and checkpointing."""
    from transformers import AutoConfig

    from benchmarks.step_time import run_values
    from modeling.layers import decoder_layers
    from training.checks.activations import count_activations
    from training.run_file import validate

    rows = []
    for kind, sizes in SIZES.items():
        model_config = AutoConfig.for_model(
            kind, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
            vocab_size=VOCABULARY, pad_token_id=1, **sizes,
        )  # fmt: skip
        values = run_values(Path("never-read"), "5M", 8, on_gpu=False)
        values["objective"], architecture = {"name": "sft"}, "causal-lm"
        if kind == "xlm-roberta":
            values["objective"], architecture = {"name": "mlm"}, "masked-lm"
            values["data"] |= {"task": {"kind": "text"}, "mixture": {"strategy": "uniform"}}
            values["data"]["sources"] = [
                {"name": "texts", "files": "*.jsonl", "columns": {"language": "language", "text": "text"}}
            ]
        for precision in DTYPES:
            for checkpointing in (False, True):
                values |= {"precision": precision, "gradient_checkpointing": checkpointing}
                config = validate(values, "benchmark")
                counted = count_activations(config, model_config, "sdpa", DTYPES[precision], SHAPE, blank_of(config))
                with real_inputs(SHAPE, VOCABULARY):
                    model, forward = on_cpu(config, model_config, architecture, "sdpa", SHAPE)
                    with SavedBytes(model, list(decoder_layers(model))) as saved:
                        loss = forward()
                    del loss
                    allocated = step_peak(model, forward)
                inside = sum(counted.layers) if not checkpointing else len(counted.layers) * counted.layer_input
                rows.append({
                    "model": kind, "precision": precision, "checkpointing": checkpointing,
                    "counted_bytes": inside + counted.outside, "saved_bytes": sum(saved.inside) + saved.outside,
                    "estimated_peak_bytes": counted.peak(checkpointing), "allocated_peak_bytes": allocated,
                })  # fmt: skip
    return rows


def run_config(folder: Path, stage: int, precision: str) -> RunConfig:
    from benchmarks.step_time import run_values
    from training.run_file import validate

    values = run_values(folder, "5M", 16, on_gpu=False)
    zero = {"reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 0}
    values |= {"zero_stage": stage, "precision": precision, "objective": {"name": "sft"},
               "deepspeed": {"zero_optimization": zero}}  # fmt: skip
    return validate(values, "benchmark")


def rank_main(folder: Path) -> None:
    """One rank: every stage and precision; rank 0 writes its figures beside the estimate."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.assembly import assemble
    from training.distributed import rank, world_size
    from training.engine.engine import process_group
    from training.engine.memory import Activations, Ranks, memory_estimate
    from training.run_folder.prepare import prepare

    warnings.simplefilter("ignore")  # warnings of PyTorch about DeepSpeed's calls
    with process_group(timeout_minutes=10):
        rows = []
        for stage in (1, 2, 3):
            for precision in DTYPES:
                config = run_config(folder, stage, precision)
                kept = floats()
                before = {id(each) for each in kept}
                prepared = prepare(config, rank())
                run = assemble(config, prepared)
                held = held_bytes(run, before)
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(prepared.model_dir))
                nothing = Activations((), 0, 0, 0, 0, counted=True)
                parts = memory_estimate(config, model, nothing, Ranks(world_size(), world_size())).parts
                estimated = {
                    what: sum(part.gpu for part in parts if part.name in names) for what, names in NAMES.items()
                }
                rows.append({"stage": stage, "precision": precision, "held": held, "estimated": estimated})
                run.engine.destroy()
                del run, kept
        if rank() == 0:
            (folder / "measured.json").write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_estimate", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_folder is not None:
        rank_main(options.rank_folder)
        return
    from benchmarks.parallel_data import write_data

    engine = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "data")
        for ranks in (1, 2):
            run_ranks("benchmarks.memory_estimate", ["--rank-folder", temporary], ranks)
            engine[ranks] = json.loads((folder / "measured.json").read_text())
    print("| ranks | stage | | weights | master | moments | gradients |\n|---|---|---|---|---|---|---|")
    for ranks, rows in engine.items():
        for row in rows:
            cells = " | ".join(f"{row['held'][what] / 1e6:.2f} / {row['estimated'][what] / 1e6:.2f}" for what in NAMES)
            print(f"| {ranks} | {row['stage']} | {row['precision']} | {cells} |")
    kept = measure_activations()
    print("\n| model | | checkpointing | saved / counted | allocated / estimated peak |\n|---|---|---|---|---|")
    for row in kept:
        pairs = (("saved_bytes", "counted_bytes"), ("allocated_peak_bytes", "estimated_peak_bytes"))
        cells = " | ".join(f"{row[real] / 1e6:.2f} / {row[estimated] / 1e6:.2f}" for real, estimated in pairs)
        print(f"| {row['model']} | {row['precision']} | {'on' if row['checkpointing'] else 'off'} | {cells} |")
    if options.json is not None:
        result = {"machine": machine(2), "engine_bytes": engine, "activations": kept}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
