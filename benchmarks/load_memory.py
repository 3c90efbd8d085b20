"""Peak host memory of a rank while a 1B-parameter model is loaded under ZeRO-3, on the path of a training run.

    python -m benchmarks.load_memory --json FILE

The launcher writes a random Llama (bf16, safetensors in shards of about 500 MB) to a temporary folder, one shard at a
time; then the ranks create the sharded architecture and stream the weights in, as `training.assembly` does. The limit
is a rank's shard of the weights plus twice the largest file. There is no optimiser.

The limit applies to anonymous (and shared) memory above the level after the imports, which the kernel cannot reclaim.
Safetensors files are mapped, so the reading rank also has file pages (RssFile), which the kernel drops when memory is
short; they are reported separately. Memory is sampled every few milliseconds; the high-water mark (VmHWM) is the
kernel's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.ranks import machine, run_ranks

SIZES: dict[str, dict[str, Any]] = {
    "10M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 12000},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
}
SHARDS = {"10M": 6 * 2**20, "1B": 500 * 10**6}  # bytes of a file
SAMPLE_SECONDS = 0.002
STATUS_KEYS = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")


def write_model(folder: Path, size: str) -> None:
    """Write config.json and random weights, with at most one shard in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = {"num_attention_heads": SIZES[size]["hidden_size"] // 64, "num_key_value_heads": 4}
    config = LlamaConfig(**SIZES[size], **heads, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        if shards[-1] and filled + 2 * tensor.numel() > SHARDS[size]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * tensor.numel()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.empty(state[name].shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * tensor.numel() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def memory() -> dict[str, int]:
    """This process's memory by kind, in bytes."""
    values = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in STATUS_KEYS:
            values[key] = int(rest.split()[0]) * 1024
    return {**values, "unreclaimable": values["RssAnon"] + values["RssShmem"]}


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Record the highest value of each kind inside the block, sampled by a thread every few milliseconds."""
    peak = dict.fromkeys((*STATUS_KEYS, "unreclaimable"), 0)
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for key, value in memory().items():
                peak[key] = max(peak[key], value)
            peak["samples"] = peak.get("samples", 0) + 1
            done.wait(SAMPLE_SECONDS)

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak["VmHWM"] = memory()["VmHWM"]


def run_config(folder: Path) -> Any:
    """A run that starts from the model in `folder`; its data are never read."""
    from training.run_file import validate

    values = {
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "model": {"path": str(folder)},
        "data": {
            "languages": ["en"],
            "sources": [
                {"name": "none", "files": "none.jsonl", "language": "en",
                 "columns": {"prompt": "prompt", "completion": "completion"}}
            ],
            "slots_per_step": 2, "sequence_length": 16, "micro_batch_tokens": 16,
        },
        "objective": {"name": "sft"},
        "optimizer": {"learning_rate": 1e-5},
        "precision": "bf16",
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }  # fmt: skip
    return validate(values, "benchmark")


def rank_main(folder: Path) -> None:
    """One rank: load as `training.assembly.assemble` does; rank 0 writes every rank's figures."""
    from transformers import LlamaForCausalLM  # noqa: F401  an import, so part of the baseline

    from training.assembly import starting_model
    from training.distributed import barrier, gather_objects, rank, world_size
    from training.engine.engine import deepspeed_settings, process_group

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    with process_group(timeout_minutes=10):
        config = run_config(folder)
        barrier()
        before = memory()
        started = time.perf_counter()
        with peak_memory() as peak:
            model = starting_model(config, folder, deepspeed_settings(config, world_size()))
            barrier()
        seconds = time.perf_counter() - started
        after = memory()
        parameters: list[Any] = list(model.parameters())  # with ZeRO-3's own attributes
        shard = sum(each.ds_tensor.numel() * each.ds_tensor.element_size() for each in parameters)
        check_weights(model, folder)
        over = {key: peak[key] - before[key] for key in (*STATUS_KEYS, "unreclaimable")}
        # The high-water mark counts from what was resident when it was reset.
        over["VmHWM"] = peak["VmHWM"] - before["VmRSS"]
        kept = {key: after[key] - before[key] for key in over if key != "VmHWM"}
        mine = {
            "shard_bytes": shard, "baseline": before, "peak_over_baseline": over, "kept_over_baseline": kept,
            "samples": peak["samples"], "seconds": seconds,
        }  # fmt: skip
        ranks = gather_objects(mine)
        if rank() == 0:
            total = sum(each.ds_numel for each in parameters)
            (folder / "measured.json").write_text(json.dumps({"parameters": total, "ranks": ranks}))


def check_weights(model: Any, folder: Path) -> None:
    """Check that the first, the last and a middle parameter equal the files' values."""
    import torch
    from safetensors import safe_open

    from training.engine.engine import gathered

    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    parameters = list(model.named_parameters())
    for name, parameter in (parameters[0], parameters[len(parameters) // 2], parameters[-1]):
        with safe_open(folder / weight_map[name], framework="pt") as file, gathered([parameter]):
            if not torch.equal(parameter.data.cpu(), file.get_tensor(name)):
                raise RuntimeError(f"{name}: not what was stored")


def verdict(measured: dict[str, Any], largest_file: int) -> list[str]:
    """Adds the limit and pass or fail to each rank's figures. Returns a Markdown table of them."""
    lines = [
        "| rank | shard | limit | peak anonymous | peak file-mapped | peak resident (VmHWM) | kept anonymous | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, figures in enumerate(measured["ranks"]):
        over = figures["peak_over_baseline"]
        figures["limit_bytes"] = figures["shard_bytes"] + 2 * largest_file
        figures["passed"] = over["unreclaimable"] <= figures["limit_bytes"]
        shown = (
            figures["shard_bytes"], figures["limit_bytes"], over["unreclaimable"], over["RssFile"], over["VmHWM"],
            figures["kept_over_baseline"]["unreclaimable"],
        )  # fmt: skip
        cells = " | ".join(f"{value / 1e6:.0f}" for value in shown)
        lines.append(f"| {number} | {cells} | {'pass' if figures['passed'] else 'FAIL'} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1B", choices=list(SIZES))
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--folder", type=Path, help="where the temporary model goes (2.2 GB)")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_folder is not None:
        rank_main(options.rank_folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        write_model(folder, options.size)
        files = sorted(file.stat().st_size for file in folder.glob("*.safetensors"))
        run_ranks("benchmarks.load_memory", ["--rank-folder", temporary], options.nproc)
        measured = json.loads((folder / "measured.json").read_text())
    print(
        f"{measured['parameters'] / 1e9:.2f}B parameters in {len(files)} files, the largest {files[-1] / 1e6:.0f} MB, "
        f"{options.nproc} ranks; MB over the baseline after imports; load average {os.getloadavg()[0]:.1f}\n"
    )
    print("\n".join(verdict(measured, files[-1])))
    passed = all(figures["passed"] for figures in measured["ranks"])
    if options.json is not None:
        settings = {"load_average": os.getloadavg()[0], "malloc": os.environ.get("MALLOC_MMAP_THRESHOLD_", "default")}
        result = {"machine": machine(options.nproc), **settings, "files": files, **measured, "passed": passed}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
