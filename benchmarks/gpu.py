"""Speed, memory and loss of a Llama from a random start on GPUs: bf16, ZeRO-3, plain SFT and ShifCon, by attention.

    python -m benchmarks.gpu --json FILE --markdown FILE

Each case is its own set of ranks, which trains some steps of generated parallel data through crosslift's own loop, the
loader included. Measured: tokens/s without padding (median of windows of steps, at whose ends the loop logs and the
device is synchronised), MFU, peak memory against the estimate of `crosslift check`, and the losses. The cases
`curve bf16` and `curve fp32 on CPU` train the same smaller model on the same samples, which shows what bf16 and the
GPU's kernels change.

`--budget` seconds bound the whole: a case that does not fit into what is left is "not measured", one that runs is ended
at the end of the budget, and what was measured is written after every case. Without a GPU everything is "not measured",
unless `--cpu` asks for a trial of the script on CPUs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.flops import ModelShape, model_shape
from benchmarks.gpu_report import CURVES, summary, table
from benchmarks.parallel_data import LANGUAGES, WEIGHTS, sources, write_data
from benchmarks.ranks import SOURCE, machine

LEAST_CASE_S = 45.0  # what a case needs on a GPU, with the start of its ranks
SIZES: dict[str, dict[str, Any]] = {  # Llama 3.2 1B's shape; a smaller one for the curve; one for a trial
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "100M": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
CASES = {
    "SFT, sdpa": ("sft", "sdpa"),
    "ShifCon, sdpa": ("shifcon", "sdpa"),
    "SFT, flash-attn varlen": ("sft", "flash_attention_2"),
    "ShifCon, flash-attn varlen": ("shifcon", "flash_attention_2"),
}


def run_values(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The run file of a case."""
    method, attention = CASES.get(name, ("sft", "sdpa"))
    curve = name in CURVES
    size = options.curve_size if curve else options.size
    layers = SIZES[size]["num_hidden_layers"]
    shifcon = {
        "name": "shifcon", "layers": [layers // 3, max(layers // 2, layers // 3 + 1)],
        "contrastive": {"weight": 0.1, "scale": 10.0, "set_size": 8},
    }  # fmt: skip
    return {
        "data_dir": str(folder / "data"),
        "output_dir": str(folder / (f"curve-{CURVES[name]}" if curve else f"{method}-{attention}")),
        "max_steps": 1000,
        "model": {"path": str(folder / size / "initial_model"), "attention": attention},
        "tokenizer": {"path": str(folder / size / "tokenizer")},
        "data": {
            "languages": LANGUAGES,
            "sources": sources(LANGUAGES),
            "mixture": {"strategy": "explicit", "weights": WEIGHTS, "pairing": "reuse"},
            "slots_per_step": options.curve_slots if curve else options.slots,
            "sequence_length": 512,
            "micro_batch_tokens": options.micro_batch_tokens,
            "workers": 2,
        },
        "objective": shifcon if method == "shifcon" else {"name": "sft"},
        "optimizer": {"learning_rate": 3e-4},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
        "precision": CURVES.get(name, "bf16"),
        "gradient_checkpointing": False,
        "tracking": {"enabled": False, "log_every": 1 if curve else options.window},
    }


def prepare_model(folder: Path, size: str, options: argparse.Namespace) -> None:
    """Tokenizer and random weights of a size, for all of its cases."""
    from training.run_file import validate
    from training.run_folder.prepare import prepare

    values = run_values(folder, next(iter(CASES)), options)
    values["output_dir"] = str(folder / size)
    values["model"] = {"init": {"model_type": "llama", "max_position_embeddings": 2048, **SIZES[size]}}
    values["tokenizer"] = {"train": {"vocab_size": 2000}}
    prepare(validate(values, "benchmark"))


def measure(name: str, folder: Path, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """A case on this rank, until its steps are done or the deadline (`time.time()`) is near; on all ranks alike."""
    import torch

    from training.assembly import assemble
    from training.distributed import all_sum, rank, world_size
    from training.loop.trainer import Trainer
    from training.run_file import validate
    from training.run_folder.prepare import prepare

    config = validate(run_values(folder, name, options), "benchmark")
    run = assemble(config, prepare(config, rank()))
    device = run.engine.device
    shape, estimate = shape_and_estimate(config, run)
    trainer = Trainer(run, tracker=None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wanted = options.curve_steps if name in CURVES else options.window + options.steps
    window = config.tracking.log_every
    windows: list[dict[str, float]] = []
    flops = tokens = labels = waited = 0.0
    began = since = time.perf_counter()
    for number, batch in enumerate(run.loader.steps(0, wanted)):
        waited += time.perf_counter() - since
        run.objective.before_step(run.engine, number)
        trainer.agree(batch)
        metrics = trainer.train_step(number, batch)
        lengths = [len(sample) for micro_batch in batch.micro_batches for sample in micro_batch.samples]
        of_rank = sum(int(micro_batch.label_weights.sum()) for micro_batch in batch.micro_batches)
        flops, tokens, labels = flops + shape.step_flops(lengths, of_rank), tokens + sum(lengths), labels + of_rank
        since = time.perf_counter()
        if (number + 1) % window:
            continue
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        out_of_time = time.time() + 2 * seconds > deadline  # a rank's clock; the sum makes it one decision
        sums = all_sum([flops, tokens, labels, out_of_time], device).tolist()
        windows.append({
            "steps": window, "seconds": seconds, "waited": waited, "flops": sums[0], "tokens": sums[1],
            "label_tokens": sums[2], "loss": metrics["train/loss"],
        })  # fmt: skip
        if sums[3]:
            break
        flops = tokens = labels = waited = 0.0
        began = since = time.perf_counter()
    found = {
        "parameters": sum(parameter.ds_numel for parameter in run.engine.module.parameters()),
        "attention": str(run.engine.module.config._attn_implementation), "precision": config.precision,
        "layout": run.data.packer.layout, "ranks": world_size(), "wanted_steps": wanted, "windows": windows,
        "memory": {"estimate": estimate, **used_memory(device)},
    }  # fmt: skip
    run.engine.destroy()
    return found


def shape_and_estimate(config: Any, run: Any) -> tuple[ModelShape, int]:
    """The model's shape, and the peak that `crosslift check` estimates for a rank's device, in bytes."""
    import torch

    from modeling.architectures import ARCHITECTURE_OF, auto_class
    from training.check import largest_batch
    from training.checks.activations import count_activations
    from training.distributed import world_size
    from training.engine.engine import DTYPES
    from training.engine.memory import Ranks, memory_estimate

    model_config = copy.deepcopy(run.engine.module.config)  # counting changes its attention
    kernel = model_config._attn_implementation
    with torch.device("meta"):
        model = auto_class(ARCHITECTURE_OF[config.data.kind]).from_config(model_config)
        model.tie_weights()
    batch = largest_batch(config.data, config.objective, run.data, world_size())
    blank = run.data.packer.collator.blank
    kept = count_activations(config, model_config, kernel, DTYPES[config.precision], batch, blank)
    ranks = Ranks(world_size(), world_size(), on_gpus=run.engine.device.type == "cuda")
    return model_shape(model), memory_estimate(config, model, kept, ranks).gpu_bytes


def used_memory(device: Any) -> dict[str, int]:
    """Peak bytes of this rank: of tensors, of the allocator, of the whole device now; on CPUs, of the process."""
    import resource

    import torch

    if device.type != "cuda":
        return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"tensors": allocated, "allocator": reserved, "device": total - free}


def obstacle(name: str, options: argparse.Namespace) -> str | None:
    """Why a case cannot be measured here; None if it can."""
    from training.distributed import visible_gpus

    if not options.cpu and not visible_gpus():
        return "no GPU"
    if CASES.get(name, ("", ""))[1] == "flash_attention_2":
        if options.cpu:
            return "needs a GPU"
        if find_spec("flash_attn") is None:
            return "flash-attn is not installed"
    return None


def rank_program(name: str, folder: Path, options: argparse.Namespace, deadline: float) -> list[str]:
    """Arguments of Python for a rank of a case."""
    given = ["--case", name, "--rank-folder", str(folder), "--deadline", str(deadline)]
    return ["-m", "benchmarks.gpu", *options.own, *given]


def start_ranks(name: str, folder: Path, options: argparse.Namespace, deadline: float) -> str | None:
    """Runs a case's ranks to their end or the deadline, and kills them then; returns why it failed."""
    on_cpu = options.cpu or name == "curve fp32 on CPU"
    nproc = 1 if name in CURVES else options.nproc
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // nproc, 1))}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if on_cpu else {}
    source = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command = [*launcher, *rank_program(name, folder, options, deadline)]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**threads, **os.environ, **hidden, "PYTHONPATH": source}, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(max(deadline - time.time(), 1))
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == 0:
        return None
    text = log.read_text(errors="replace")
    print(text[-3000:], file=sys.stderr)
    errors = [
        line for line in text.splitlines() if re.match(r"(\[rank\d+\]: *)?[\w.]*(Error|Exception|Failed)\b", line)
    ]
    return f"failed: {errors[0][:200] if errors else f'status {status}'}"


def run_cases(folder: Path, options: argparse.Namespace, deadline: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case and what was found."""
    prepared: set[str] = set()
    for name in options.cases:
        if (reason := obstacle(name, options)) is None and time.time() + (
            0 if options.cpu else LEAST_CASE_S
        ) > deadline:
            reason = "out of time"
        if reason is None:
            size = options.curve_size if name in CURVES else options.size
            if size not in prepared:
                prepare_model(folder, size, options)
                prepared.add(size)
            (result := folder / "measured.json").unlink(missing_ok=True)
            reason = start_ranks(name, folder, options, deadline)
        if reason is not None:
            yield name, {"reason": reason}
            continue
        found = json.loads(result.read_text())
        yield name, {**found, "summary": summary(found, options.peak_tflops)}


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    names = [*CASES, *CURVES]
    parser.add_argument("--cases", nargs="+", default=names, choices=names)
    parser.add_argument("--size", default="1B", choices=list(SIZES))
    parser.add_argument("--curve-size", default="100M", choices=list(SIZES))
    parser.add_argument("--slots", type=int, default=128, help="samples in a step's global batch")
    parser.add_argument("--curve-slots", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=20, help="after a first window of steps")
    parser.add_argument("--window", type=int, default=5, help="steps between two synchronisations of the device")
    parser.add_argument("--curve-steps", type=int, default=20)
    parser.add_argument("--budget", type=float, default=440.0, help="seconds for everything")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="of one device, for MFU")
    parser.add_argument("--nproc", type=int, default=1, help="ranks, one per GPU")
    parser.add_argument("--cpu", action="store_true", help="a trial on CPUs")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    for hidden in ("--case", "--rank-folder", "--deadline"):  # of ranks
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser


def rank_main(options: argparse.Namespace) -> None:
    """One rank of a case; rank 0 writes the figures."""
    from training.distributed import rank
    from training.engine.engine import process_group

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    folder = Path(options.rank_folder)
    with process_group(timeout_minutes=10):
        found = measure(options.case, folder, options, float(options.deadline))
        if rank() == 0:
            (folder / "measured.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # see training/__main__.py


def main(arguments: list[str] | None = None) -> None:
    began = time.time()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser_of().parse_args(arguments)
    if options.rank_folder is not None:
        rank_main(options)
        return
    options.own = arguments
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.gpu", *arguments]), "peak_tflops": options.peak_tflops,
        "machine": machine(options.nproc), "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "data")
        for name, found in run_cases(folder, options, began + options.budget):
            results["cases"][name] = found
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
            if options.markdown is not None:
                options.markdown.write_text(table(results))
            print(f"{time.time() - began:.0f} s: {name}: {found.get('reason') or found['summary']}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
