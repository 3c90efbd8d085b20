"""Crosslift beside TRL: plain SFT, ShifCon and TRL's SFTTrainer on the same rows, in interleaved rounds.

    python -m benchmarks.peers --json FILE [--data DIR]

TRL is no dependency of crosslift: `pip install -c constraints.txt trl` (without it: `--systems SFT ShifCon`). DIR holds
`<language>.jsonl` with the keys id, question and answer; by default parallel data are generated.

- SFT, ShifCon: `crosslift train`'s own parts (`assemble`, `Trainer`), each with its own plan of the same rows
- TRL padded: its default collator, with as many rows on a rank as the budget holds of the longest length
- TRL packed: `packing=True` with its default strategy (bfd); it mixes the rows of all steps

All have the same weights, tokens, labels, tokens in a forward pass at most, DeepSpeed settings (ZeRO-3), optimizer,
fp32 and sdpa, no gradient checkpointing. TRL's rows are tokenised before, crosslift's while it trains. A round is one
step of each; ratios are taken within a round. Tokens are those of samples, without padding. Each system has its own
processes (`benchmarks/turns.py`): the peak is the resident memory of its largest rank over the measured steps.
CPU: gloo. The refresh of ShifCon's language vectors is timed by `benchmarks/step_time.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.parallel_data import sources, write_data
from benchmarks.ranks import add_rank_options, machine, run_ranks
from benchmarks.turns import Turns, take_turns

SYSTEMS = ("SFT", "ShifCon", "TRL padded", "TRL packed")
NO_TRL = "TRL is not installed: pip install -c constraints.txt trl, or leave it out with --systems SFT ShifCon"
SIZES: dict[str, dict[str, Any]] = {
    "0.4M": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
    "23M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6},
    "110M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
VOCABULARY = {"0.4M": 2400, "23M": 2400, "110M": 16000}
AREAS = {"0.4M": [1, 2], "23M": [4, 7], "110M": [4, 7]}
LONGEST, BUDGET = 512, 2048  # tokens of a sample, and of a rank's forward pass
SET_SIZE = 2  # a set fits into the budget with rows of the longest length
PROBE_ITEMS = 16  # samples a language, whose refresh, before the first step, is not measured
NOT_FIRST = 1  # a rank that reads what the first, here the parent, has prepared
DOMINANT_SHARE = 0.3  # of English; the others share the rest


def run_values(folder: Path, data: Path, size: str, slots: int, system: str) -> dict[str, Any]:
    """The run file of a system; TRL's settings are taken from that of SFT."""
    languages = sorted((file.stem for file in data.glob("*.jsonl")), key=lambda name: (name != "en", name))
    share = (1 - DOMINANT_SHARE) / (len(languages) - 1)
    shifcon = {
        "name": "shifcon", "layers": AREAS[size], "contrastive": {"weight": 0.1, "scale": 10.0, "set_size": SET_SIZE},
        "probe_items": PROBE_ITEMS,
    }  # fmt: skip
    model = {**SIZES[size], "num_key_value_heads": SIZES[size]["num_attention_heads"]}
    return {
        "data_dir": str(data),
        "output_dir": str(folder / size),
        "max_steps": 1000,
        "model": {"init": {"model_type": "llama", "max_position_embeddings": 1024, **model}},
        "tokenizer": {"train": {"vocab_size": VOCABULARY[size]}},
        "data": {
            "languages": languages,
            "sources": sources(languages),
            "mixture": {
                "strategy": "explicit",
                "weights": {each: DOMINANT_SHARE if each == "en" else share for each in languages},
                "pairing": "reuse",
            },
            "slots_per_step": slots,
            "sequence_length": LONGEST,
            "overlong": "truncate",
            "micro_batch_tokens": BUDGET,
        },
        "objective": shifcon if system == "ShifCon" else {"name": "sft"},
        "optimizer": {"learning_rate": 1e-4},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
        "precision": "fp32",
        "tracking": {"enabled": False, "log_every": 1},
    }  # fmt: skip


def write_rows(config: Any, prepared: Any, file: Path, steps: int) -> None:
    """Tokens and labels of the rows of every step, in the order of SFT's plan, for TRL."""
    from training.assembly import assemble_data

    data = assemble_data(config, prepared)
    with file.open("w") as out:
        for step in range(steps):
            plan = data.planner.step(step)
            for sample in data.reader.read_many([plan.slot(position) for position in range(len(plan))]):
                labels = [
                    token if chosen else -100 for token, chosen in zip(sample.input_ids, sample.labels, strict=True)
                ]
                row = {"input_ids": sample.input_ids.tolist(), "labels": list(map(int, labels)), "step": step}
                out.write(json.dumps(row) + "\n")


def run_crosslift(config: Any, turns: Turns, rounds: int) -> None:
    """One rank of SFT or ShifCon: a step a turn."""
    from training.assembly import assemble
    from training.engine.engine import process_group
    from training.loop.trainer import Trainer
    from training.run_folder.prepare import prepare

    with process_group(timeout_minutes=60):
        run = assemble(config, prepare(config, NOT_FIRST))
        trainer = Trainer(run, None)
        steps = run.loader.steps(0, rounds + 1)
        for number in range(rounds + 1):
            turns.begin()
            step = next(steps)
            trainer.agree(step)
            run.objective.before_step(run.engine, number)
            metrics = trainer.train_step(number, step)
            nproc = int(os.environ["WORLD_SIZE"])
            tokens, labels = int(step.tokens.sum()) / nproc, step.counts["label_tokens"] / nproc
            computed = sum(batch.input_ids.numel() for batch in step.micro_batches)
            turns.end(tokens=tokens, label_tokens=labels, computed_tokens=computed, loss=metrics["train/loss"])


def run_trl(config: Any, turns: Turns, rounds: int, rows: Path, packed: bool) -> None:
    """One rank of TRL's SFTTrainer: a step a turn."""
    import deepspeed
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from training.engine.engine import deepspeed_settings
    from training.run_folder.prepare import prepare

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)  # before SFTConfig: else it counts one rank
    prepared, nproc = prepare(config, NOT_FIRST), int(os.environ["WORLD_SIZE"])
    settings = deepspeed_settings(config, nproc)
    per_rank = BUDGET // LONGEST
    n_rows = config.data.slots_per_step // (per_rank * nproc)  # micro-batches of a padded step
    if packed:  # rows are full: as many tokens as the samples of a padded step have, to the next micro-batch
        mean = statistics.fmean(len(json.loads(line)["input_ids"]) for line in rows.open())
        n_rows = max(round(config.data.slots_per_step * mean / (BUDGET * nproc)), 1)
    settings |= {
        "train_micro_batch_size_per_gpu": per_rank, "gradient_accumulation_steps": n_rows,
        "train_batch_size": per_rank * n_rows * nproc,
    }  # fmt: skip
    options = SFTConfig(
        output_dir=str(rows.parent / f"trl-{packed}"), deepspeed=settings, max_length=LONGEST, packing=packed,
        per_device_train_batch_size=per_rank, gradient_accumulation_steps=n_rows, max_steps=rounds + 1,
        train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False, use_cpu=True,
        learning_rate=config.optimizer.learning_rate, lr_scheduler_type="constant", logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, dataset_num_proc=None,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )  # fmt: skip
    counted = dict.fromkeys(("tokens", "label_tokens", "computed_tokens"), 0.0)

    class Counting(SFTTrainer):  # type: ignore[misc]
        """Counts what its forward passes are given."""

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            counted["tokens"] += float(ids.numel() if mask is None else mask.sum())
            counted["label_tokens"] += float((inputs["labels"] != -100).sum())
            counted["computed_tokens"] += ids.numel()
            return super().training_step(model, inputs, *rest)

    class Turned(TrainerCallback):  # type: ignore[misc]
        """A step a turn; the log of a step follows its end."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:  # the summary at the end
                return
            turns.end(**counted, loss=logs["loss"])
            counted.update(dict.fromkeys(counted, 0.0))
            if state.global_step <= rounds:
                turns.begin()

    columns = [json.loads(line) for line in rows.open()]
    trainer = Counting(
        model=prepared.model_dir, args=options, processing_class=AutoTokenizer.from_pretrained(prepared.tokenizer_dir),
        train_dataset=Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in columns]),
        callbacks=[Turned()],
    )  # fmt: skip
    trainer.train()


def rank_main(folder: Path, options: argparse.Namespace) -> None:
    """One rank of one system."""
    from training.run_file import validate

    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's calls of torch
    (size,), (system,) = options.sizes, options.systems
    config = validate(run_values(folder, options.data, size, options.slots, system), "benchmark")
    if system.startswith("TRL"):
        run_trl(config, Turns(system), options.rounds, folder / f"{size}.rows", packed=system == "TRL packed")
    else:
        run_crosslift(config, Turns(system), options.rounds)


def measure(folder: Path, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the systems on one size: for each, its figures in each round, over all ranks."""
    from training.run_file import validate
    from training.run_folder.prepare import prepare

    for system in {"SFT", *options.systems} - {"TRL padded", "TRL packed"}:
        config = validate(run_values(folder, options.data, size, options.slots, system), "benchmark")
        prepared = prepare(config)
        if system == "SFT":
            write_rows(config, prepared, folder / f"{size}.rows", options.rounds + 1)
    shared = ["--sizes", size, "--rounds", str(options.rounds), "--slots", str(options.slots)]
    shared += ["--nproc", str(options.nproc), "--data", str(options.data), "--launch-folder", str(folder)]
    commands = {
        system: [sys.executable, "-m", "benchmarks.peers", *shared, "--systems", system] for system in options.systems
    }
    turns = take_turns(commands, options.nproc, options.rounds)
    found = {system: [_over_ranks(each) for each in turns[system]] for system in options.systems}
    same = [found[system] for system in options.systems if system != "TRL packed"]
    for others in zip(*same, strict=True):  # the same rows in the same steps
        for key in ("tokens", "label_tokens"):
            if len(counts := {each[key] for each in others}) > 1:
                raise RuntimeError(f"{size}: systems were given different {key} in a step: {sorted(counts)}")
    return found


def _over_ranks(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        **{
            key: sum(each[key] for each in ranks)
            for key in ("tokens", "label_tokens", "computed_tokens", "cpu_seconds")
        },
        "wall_seconds": max(each["wall_seconds"] for each in ranks),
        "peak_bytes": max(each["peak_bytes"] for each in ranks),
        "loss": statistics.fmean(each["loss"] for each in ranks),
    }


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """By system: medians of rates, and SFT's rate over that of the system, paired by round (least, median, most)."""
    rows = {}
    for system, rounds in found.items():
        row: dict[str, Any] = {
            "tokens_a_second": statistics.median(each["tokens"] / each["wall_seconds"] for each in rounds),
            "label_tokens_a_second": statistics.median(each["label_tokens"] / each["wall_seconds"] for each in rounds),
            "padding_share": 1
            - sum(each["tokens"] for each in rounds) / sum(each["computed_tokens"] for each in rounds),
            "peak_gib": max(each["peak_bytes"] for each in rounds) / 2**30,
        }
        for clock in ("wall_seconds", "cpu_seconds"):
            ratios = [
                (sft["tokens"] / sft[clock]) / (each["tokens"] / each[clock])
                for sft, each in zip(found.get("SFT", rounds), rounds, strict=True)
            ]
            row[f"sft_to_it_by_{clock}"] = [min(ratios), statistics.median(ratios), max(ratios)]
        rows[system] = row
    return rows


def table(size: str, rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"\n| {size} | tokens/s | label tokens/s | padding | peak of a rank | SFT's rate over it: wall | CPU time |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, row in rows.items():
        ratios = (row[f"sft_to_it_by_{clock}"] for clock in ("wall_seconds", "cpu_seconds"))
        shown = " | ".join("{1:.2f} ({0:.2f} to {2:.2f})".format(*each) for each in ratios)
        lines.append(
            f"| {system} | {row['tokens_a_second']:.0f} | {row['label_tokens_a_second']:.0f} | "
            f"{row['padding_share']:.0%} | {row['peak_gib']:.2f} GiB | {shown} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["23M", "110M"], choices=list(SIZES))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each system")
    parser.add_argument("--slots", type=int, default=48, help="samples in a step's global batch")
    parser.add_argument("--data", type=Path, help="folder of <language>.jsonl; default: generated")
    parser.add_argument("--launch-folder", type=Path, help=argparse.SUPPRESS)
    add_rank_options(parser)
    options = parser.parse_args()
    if options.rank_folder is not None:
        rank_main(options.rank_folder, options)
        return
    if options.launch_folder is not None:  # the ranks of one system
        arguments = [*sys.argv[1:], "--rank-folder", str(options.launch_folder)]
        run_ranks("benchmarks.peers", arguments, options.nproc)
        return
    if any(system.startswith("TRL") for system in options.systems) and importlib.util.find_spec("trl") is None:
        parser.error(NO_TRL)
    per_step = BUDGET // LONGEST * options.nproc
    if options.slots % per_step:
        parser.error(f"--slots must be a multiple of {per_step}, the rows of a padded micro-batch on all ranks")
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.data is None:
            options.data = folder / "data"
            write_data(options.data)
        for size in options.sizes:
            found = measure(folder, size, options)
            results[size] = {"summary": summary(found), "rounds": found}
            print(table(size, results[size]["summary"]), flush=True)
    if options.json is not None:
        described = {**machine(options.nproc), "trl": _trl_version(), "slots": options.slots}
        options.json.write_text(json.dumps({"machine": described, "sizes": results}, indent=1) + "\n")


def _trl_version() -> str | None:
    return importlib.metadata.version("trl") if importlib.util.find_spec("trl") is not None else None


if __name__ == "__main__":
    main()
