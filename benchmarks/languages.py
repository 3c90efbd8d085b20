"""What 1,000 languages cost over 10 in a whole run: record, MLflow, per-language metrics and plots included.

    python -m benchmarks.languages --json FILE

Both runs train the same model on the same rows, in batches of the same size; only the names of the rows' languages
differ. Each round is one run of each, and ratios are computed within a round. A run is measured from its first step
until MLflow (a SQLite store in the run folder, or --uri) has everything and the plots are drawn; preparing it (index,
tokenizer, weights) is left out. So is what grows with the languages because there is more to compute: probe and
held-out samples, of which each language has its own. CPU time is that of the process with all of its threads, the
MLflow feeder's included; other programs affect it less than the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ranks import machine

COUNTS = (10, 1000)
ROWS = 8000
LEXICON = 300
MLFLOW_SECONDS = 600.0  # to send the rest at the end
MODEL = {
    "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip


def write_rows(file: Path, n_languages: int) -> None:
    """The same texts whatever the number of languages; row n is in language n modulo their number."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u")]
    lexicon = ["".join(rng.choice(words) for _ in range(rng.randint(1, 3))) for _ in range(LEXICON)]
    with file.open("w", encoding="utf-8") as lines:
        for number in range(ROWS):
            question, answer = (" ".join(rng.choices(lexicon, k=rng.randint(*span))) for span in ((20, 60), (10, 30)))
            row = {"id": f"i{number}", "language": name(number % n_languages), "question": question, "answer": answer}
            lines.write(json.dumps(row) + "\n")


def name(number: int) -> str:
    return f"l{number:04d}"


def run_values(folder: Path, data: Path, n_languages: int, steps: int, uri: str | None) -> dict[str, Any]:
    columns = {"id": "id", "language": "language", "prompt": "question", "completion": "answer"}
    return {
        "data_dir": str(data),
        "output_dir": str(folder),
        "max_steps": steps,
        "model": {"init": MODEL},
        "tokenizer": {"train": {"vocab_size": 1200}},
        "data": {
            "languages": [name(number) for number in range(n_languages)],
            "dominant": name(0),
            "sources": [{"name": "rows", "files": f"{n_languages}.jsonl", "columns": columns}],
            "template": {"name": "plain"},
            "mixture": {"strategy": "uniform"},
            "slots_per_step": 32,
            "sequence_length": 256,
            "micro_batch_tokens": 4096,
        },
        "objective": {"name": "sft"},
        "optimizer": {"learning_rate": 1e-3},
        "precision": "fp32",
        "checkpoint": {"every": steps, "keep": 1},
        "tracking": {"uri": uri},
    }


def measure(values: dict[str, Any]) -> dict[str, float]:
    """One run: seconds and CPU seconds from the first step to the end, bytes of the record, requests to MLflow."""
    from mlflow.tracking import MlflowClient

    from training.assembly import assemble
    from training.fit import _track_files, _write_resolved
    from training.loop.trainer import Trainer
    from training.run_file import resolved, validate
    from training.run_folder.prepare import prepare
    from training.tracking.tracker import Tracker

    config = validate(values, "benchmark")
    run = assemble(config, prepare(config, 0))
    tracker = Tracker(config.output_dir, config.tracking)
    trainer = Trainer(run, tracker)
    _write_resolved(config)
    tracker.start(resolved(config), {}, None)
    requests, log_batch = [0], MlflowClient.log_batch

    def counted(client: Any, *arguments: Any, **options: Any) -> Any:
        requests[0] += any(options.values())
        return log_batch(client, *arguments, **options)

    MlflowClient.log_batch = counted
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train(0)
    trained = time.perf_counter() - wall
    _track_files(tracker, config.output_dir)
    drawn = time.perf_counter() - wall
    tracker.finish("FINISHED", timeout=MLFLOW_SECONDS)
    found = {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "training_seconds": trained,
        "plot_seconds": drawn - trained,
        "record_bytes": float((config.output_dir / "record.jsonl").stat().st_size),
        "mlflow_requests": float(requests[0]),
    }
    MlflowClient.log_batch = log_batch
    feeder = tracker._feeder
    if feeder is None or feeder.left or feeder.refused:
        raise RuntimeError("MLflow does not have everything, so the run is not measured to its end")
    run.engine.destroy()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--uri", help="MLflow's address, such as http://127.0.0.1:5000")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = parser.parse_args(arguments)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29640"}
    os.environ.update(place)
    from training.engine.engine import process_group
    from training.tracking import plots
    from training.tracking.mlflow_store import default_store, open_client

    rounds: list[dict[int, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder, process_group(timeout_minutes=30):
        work = Path(folder)
        open_client(default_store(work))  # imports mlflow and matplotlib, which takes seconds
        plots._draw({"": {0: 0.0}}, "", "", work / "first.png")
        for count in COUNTS:
            write_rows(work / f"{count}.jsonl", count)
        for number in range(options.rounds):
            order = COUNTS if number % 2 else COUNTS[::-1]
            rounds.append({
                count: measure(run_values(work / f"{number}-{count}", work, count, options.steps, options.uri))
                for count in order
            })  # fmt: skip
    few, many = COUNTS
    ratios = {
        clock: [each[many][clock] / each[few][clock] for each in rounds] for clock in ("wall_seconds", "cpu_seconds")
    }
    print(f"| {options.steps} steps, median of {options.rounds} rounds | {few} languages | {many} languages |")
    print("|---|---|---|")
    for what in rounds[0][few]:
        values = [statistics.median(each[count][what] for each in rounds) for count in COUNTS]
        print(f"| {what.replace('_', ' ')} | {values[0]:,.1f} | {values[1]:,.1f} |")
    for clock, each in ratios.items():
        print(f"{many} / {few}, {clock.replace('_', ' ')}: {statistics.median(each):.3f} "
              f"({min(each):.3f} to {max(each):.3f})")  # fmt: skip
    if options.json is not None:
        figures = {"machine": machine(1), "rounds": rounds, "ratios": ratios}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
