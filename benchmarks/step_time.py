"""Seconds per step: plain SFT, one-pass ShifCon, three-pass ShifCon, interleaved in one launch under ZeRO-3.

    python -m benchmarks.step_time --json FILE

All three train the same model from the same weights on the same batches of generated parallel data. Each round is one
step of each, in rotating order, so noise of the machine affects all three; ratios are computed within a round. Two
clocks: the wall clock of the slowest rank, and the CPU time of all ranks, which other programs affect less (on GPUs it
means little). The refresh of the language vectors is timed separately, at the default `refresh_every` and
`probe_items`, and its share is added to every one-pass step; three-pass gets its vectors at no cost.
CPU: gloo, fp32; GPU: NCCL, bf16, one rank a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.parallel_data import LANGUAGES, WEIGHTS, sources, write_data
from benchmarks.ranks import add_rank_options, all_max, machine, run_ranks, usable_ranks

CLOCKS = {"wall_seconds": "wall clock", "cpu_seconds": "CPU time, all ranks"}
OBJECTIVES = ("SFT", "one-pass", "three-pass")
SIZES: dict[str, dict[str, Any]] = {
    "0.1M": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
    "5M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4},
    "20M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6},
}
AREAS = {"0.1M": [1, 2], "5M": [2, 4], "20M": [4, 7]}


def run_values(folder: Path, size: str, slots: int, on_gpu: bool) -> dict[str, Any]:
    """The run file of the one-pass run; the other two differ only in the objective."""
    model = {**SIZES[size], "num_key_value_heads": SIZES[size]["num_attention_heads"]}
    return {
        "data_dir": str(folder / "data"),
        "output_dir": str(folder / size),
        "max_steps": 1000,
        "model": {"init": {"model_type": "llama", "max_position_embeddings": 512, **model}},
        "tokenizer": {"train": {"vocab_size": 2400}},
        "data": {
            "languages": LANGUAGES,
            "sources": sources(LANGUAGES),
            "mixture": {"strategy": "explicit", "weights": WEIGHTS, "pairing": "reuse"},
            "slots_per_step": slots,
            "sequence_length": 256,
            "micro_batch_tokens": 4096,
        },
        "objective": {
            "name": "shifcon", "layers": AREAS[size], "contrastive": {"weight": 0.1, "scale": 10.0, "set_size": 6},
        },
        "optimizer": {"learning_rate": 1e-4},
        "precision": "bf16" if on_gpu else "fp32",
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        "tracking": {"enabled": False},
    }  # fmt: skip


def build_trainers(config: Any) -> dict[str, Any]:
    """One Trainer per objective: three models and engines that share the data."""
    from benchmarks.three_pass import ThreePassShifCon
    from modeling.loading import build_model, load_weights, resolve_directory
    from training.assembly import Run, assemble_data, this_rank
    from training.distributed import rank
    from training.engine.engine import DTYPES, Construction, Engine, deepspeed_settings
    from training.loop.trainer import Trainer
    from training.objectives.base import ObjectiveParts
    from training.objectives.sft import SFTConfig, SupervisedFineTuning
    from training.objectives.shifcon import ShifCon
    from training.run_folder.prepare import prepare

    prepared = prepare(config, rank())
    data = assemble_data(config, prepared)
    nproc = int(os.environ["WORLD_SIZE"])
    settings = deepspeed_settings(config, nproc)
    probe = data.probe_batches(this_rank())
    parts = ObjectiveParts(config.data.kind, config.data.languages, config.data.dominant, probe=probe)
    makers: tuple[Callable[[Any], Any], ...] = (
        SupervisedFineTuning,
        lambda model: ShifCon(model, config.objective, config.objective.layers, parts),
        lambda model: ThreePassShifCon(model, config.objective, config.objective.layers, parts),
    )
    trainers = {}
    for name, make in zip(OBJECTIVES, makers, strict=True):
        construction = Construction(settings)
        directory = resolve_directory(prepared.model_dir)
        model = build_model(
            directory, attention=config.model.attention, dtype=DTYPES[config.precision],
            gradient_checkpointing=False, construction=construction.context(),
        )  # fmt: skip
        load_weights(model, directory, construction.write, is_reader=rank() == 0 or not construction.sharded)
        objective = make(model)  # its hooks are installed before the engine's, as in training.assembly
        engine = Engine(model, config, settings, nproc)
        own = config.model_copy(update={"objective": SFTConfig(name="sft")}) if name == "SFT" else config
        loader = data.loader(this_rank(), config.data.workers)
        trainers[name] = Trainer(Run(own, data, loader, objective, engine, None, directory), None)
    return trainers


def timed(work: Callable[[], Any], device: Any) -> tuple[float, float]:
    """Seconds until the slowest rank is done, with a common start; CPU seconds of all ranks."""
    import torch

    from training.distributed import all_sum, barrier

    barrier()
    started, used = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - started, time.process_time() - used
    return all_max(wall, device), float(all_sum([cpu], device))


def measure(config: Any, rounds: int) -> dict[str, Any]:
    """Times of every round and contents of the batches; the same on every rank."""
    from data_pipeline.loader import Loader
    from training.assembly import build_planner, tokens_per_byte
    from training.distributed import all_sum
    from training.objectives.sft import SFTConfig

    trainers = build_trainers(config)
    one_pass, three_pass = trainers["one-pass"].run, trainers["three-pass"].run
    device, loader = one_pass.engine.device, one_pass.loader
    # Plain SFT runs on its own plan: the same rows without contrast sets, as balanced over ranks as they can be.
    reader = one_pass.data.reader
    free = build_planner(config.data, SFTConfig(name="sft"), reader, tokens_per_byte(config.data, reader))
    loaders = {"contrast sets": loader, "single samples": Loader(reader, free, loader.packer, loader.this_rank)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in OBJECTIVES}
    counts, loads = [], []
    refresh = (0.0, 0.0)
    for number in range(rounds + 1):
        read_by = {name: next(each.steps(number, number + 1)) for name, each in loaders.items()}
        batch = read_by["contrast sets"]
        batches = dict.fromkeys(OBJECTIVES, batch) | {"SFT": read_by["single samples"]}
        extra = three_pass.objective.prepare(loader, batch, device)
        if number == 0:  # unmeasured: first passes, DeepSpeed's traces, the allocator
            for name, trainer in trainers.items():
                _step(trainer, number, batches[name])
            refresh = timed(partial(one_pass.objective.refresh, one_pass.engine), device)
            three_pass.objective.set_vectors(one_pass.objective.vectors)
            continue
        for place in range(len(OBJECTIVES)):
            name = OBJECTIVES[(place + number) % len(OBJECTIVES)]
            times[name].append(timed(partial(_step, trainers[name], number, batches[name]), device))
        extra_of_all = int(all_sum([extra], device))
        read = {"tokens": int(batch.tokens.sum()), **batch.counts, "three_pass_extra_tokens": extra_of_all}
        busiest = {name: int(all_max(_grid(each), device)) for name, each in read_by.items()}
        counts.append({**read, "grid_tokens_of_busiest_rank": busiest})
        loads.append(round(os.getloadavg()[0], 2))
    parameters = sum(parameter.ds_numel for parameter in one_pass.engine.module.parameters())
    for trainer in trainers.values():
        trainer.run.engine.destroy()
    return {
        "parameters": parameters, "layers": one_pass.engine.module.config.num_hidden_layers,
        "area": list(config.objective.layers), "precision": config.precision,
        "refresh_every": config.objective.refresh_every, "probe_items": config.objective.probe_items,
        "slots_per_step": config.data.slots_per_step, "rounds": counts, "load_average": loads,
        **{
            clock: {**{name: [each[i] for each in times[name]] for name in OBJECTIVES}, "refresh": refresh[i]}
            for i, clock in enumerate(CLOCKS)
        },
    }  # fmt: skip


def _step(trainer: Any, number: int, batch: Any) -> None:
    """A whole step of the loop, with its all-reduce."""
    trainer.agree(batch)
    trainer.train_step(number, batch)


def _grid(batch: Any) -> int:
    """Tokens of a rank's forward passes, padding included."""
    return sum(each.input_ids.numel() for each in batch.micro_batches)


def summary(measured: dict[str, Any], clock: str) -> dict[str, Any]:
    """Medians, and ratios paired by round, with the refresh included in the time of one-pass."""
    seconds, rounds = measured[clock], measured["rounds"]
    share = seconds["refresh"] / measured["refresh_every"]
    whole = {**seconds, "one-pass": [each + share for each in seconds["one-pass"]]}
    rows = {}
    for name in OBJECTIVES:
        extra = name == "three-pass"
        processed = [each["tokens"] + extra * each["three_pass_extra_tokens"] for each in rounds]
        labels = [each["label_tokens"] for each in rounds]
        rows[name] = {
            "seconds_a_step": statistics.median(whole[name]),
            "us_a_processed_token": 1e6 * statistics.median(_ratios(whole[name], processed)),
            "us_a_label_token": 1e6 * statistics.median(_ratios(whole[name], labels)),
            "ratio_to_sft": _spread(_ratios(whole[name], whole["SFT"])),
        }
    return {
        "objectives": rows,
        "one_pass_ratio_without_refresh": _spread(_ratios(seconds["one-pass"], seconds["SFT"])),
        "one_pass_to_three_pass": _spread(_ratios(whole["one-pass"], whole["three-pass"])),
        "refresh_share_of_one_pass": share / rows["one-pass"]["seconds_a_step"],
    }


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _spread(values: Sequence[float]) -> list[float]:
    return [min(values), statistics.median(values), max(values)]


def table(size: str, measured: dict[str, Any]) -> str:
    """Markdown, one table per clock."""
    grids = [each["grid_tokens_of_busiest_rank"] for each in measured["rounds"]]
    sets, single = (sum(each[key] for each in grids) for key in ("contrast sets", "single samples"))
    lines = [
        f"\n{size}: {measured['parameters'] / 1e6:.1f}M parameters, {measured['layers']} layers, area "
        f"{measured['area']}, {measured['precision']}, {measured['slots_per_step']} samples a step, "
        f"{len(measured['rounds'])} rounds, load average {min(measured['load_average'])} to "
        f"{max(measured['load_average'])}. Contrast sets load the busiest rank {sets / single:.3f} times as much "
        "as samples spread singly."
    ]
    for clock, found in measured["summary"].items():
        lines += [
            f"\n| {CLOCKS[clock]} | s/step | µs/processed token | µs/label token | ratio to SFT: min, median, max |",
            "|---|---|---|---|---|",
        ]
        for name, row in found["objectives"].items():
            each = f"{row['us_a_processed_token']:.1f} | {row['us_a_label_token']:.1f}"
            lines.append(f"| {name} | {row['seconds_a_step']:.3f} | {each} | {_shown(row['ratio_to_sft'])} |")
        lines.append(
            f"\nOne-pass without the refresh: {_shown(found['one_pass_ratio_without_refresh'])} of SFT; "
            f"with it: {_shown(found['one_pass_to_three_pass'])} of three-pass; "
            f"refresh: {found['refresh_share_of_one_pass']:.2%} of a one-pass step"
        )
    return "\n".join(lines)


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def rank_main(folder: Path, options: argparse.Namespace) -> None:
    """One rank: every size in turn; rank 0 writes the figures."""
    import torch

    from training.distributed import rank
    from training.engine.engine import process_group
    from training.run_file import validate

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    with process_group(timeout_minutes=10):
        results = {}
        for size in options.sizes:
            values = run_values(folder, size, options.slots, torch.cuda.is_available())
            results[size] = measure(validate(values, "benchmark"), options.rounds)
        if rank() == 0:
            (folder / "measured.json").write_text(json.dumps(results))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["5M", "20M"], choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--slots", type=int, default=48, help="samples in a step's global batch")
    add_rank_options(parser)
    options = parser.parse_args()
    if options.rank_folder is not None:
        rank_main(options.rank_folder, options)
        return
    nproc = usable_ranks(options.nproc)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "data")
        shared = ["--rounds", str(options.rounds), "--slots", str(options.slots), "--sizes", *options.sizes]
        run_ranks("benchmarks.step_time", [*shared, "--rank-folder", temporary], nproc)
        measured = json.loads((folder / "measured.json").read_text())
    for size, each in measured.items():
        each["summary"] = {clock: summary(each, clock) for clock in CLOCKS}
        print(table(size, each))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(nproc), "sizes": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
