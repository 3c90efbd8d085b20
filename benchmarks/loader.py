"""How long another thread waits for the interpreter's lock beside the loader, and how many tokens a worker loads.

    python -m benchmarks.loader [RUN_FILE [KEY=VALUE ...]] [--json FILE]

A thread sleeps for TICK_S again and again. What a sleep takes longer is a wait: for the interpreter's lock, as a
training thread needs it after each operation that released it, and for a core. Rounds alternate between the thread
alone (idle) and beside a loader whose steps are taken as fast as it makes them; a loader beside a real run rests when
it is ahead. Without a run file: generated parallel texts, as conversations and as each kind of an encoder's task.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.parallel_data import LANGUAGES, write_data
from benchmarks.ranks import machine
from benchmarks.step_time import run_values
from training.run_file import load_config, validate

if TYPE_CHECKING:
    from data_pipeline.loader import Loader
    from training.assembly import DataParts
    from training.config import RunConfig

TICK_S = 2e-4
GOAL_MS = 10.0  # of the 99.9th percentile of the waits beside the loader
ROUND_STEPS = 1_000_000  # the steps of a round begin here times the round's number; more than a round loads
Waits = npt.NDArray[np.float64]

TASKS: dict[str, dict[str, Any]] = {  # kind of rows: columns and `data.task`
    "classification": {
        "columns": {"text_a": "text_a", "text_b": "text_b", "label": "label"},
        "task": {"labels": ["long", "short"]},
    },
    "tagging": {"columns": {"words": "words", "tags": "tags"}, "task": {"labels": ["LONG", "SHORT"]}},
    "qa": {"columns": {"question": "question", "context": "context", "answers": "answers"}, "task": {}},
    "text": {"columns": {"text": "context"}, "task": {}},
}
KINDS = ("chat", *TASKS)


def write_task_data(source: Path, folder: Path) -> None:
    """Write the columns of every kind of task, made from the conversations of `write_data`."""
    folder.mkdir()
    for file in sorted(source.glob("*.jsonl")):
        rows = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            texts = json.loads(line)
            words, asked = texts["question"].split(), texts["answer"].split()[:12]
            place = number % len(words)
            answer = {"text": words[place], "answer_start": len(" ".join([*words[:place], ""]))}
            row = {
                "id": texts["id"], "text_a": texts["question"], "text_b": texts["answer"],
                "label": "long" if len(words) > 70 else "short", "words": words,
                "tags": ["LONG" if len(word) > 4 else "SHORT" for word in words], "question": " ".join(asked),
                "context": texts["question"], "answers": [answer],
            }  # fmt: skip
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        (folder / file.name).write_text("".join(rows), encoding="utf-8")


def made_up_run(folder: Path, kind: str, workers: int) -> RunConfig:
    """A run on the generated data in `folder`."""
    values = run_values(folder, "0.1M", 128, on_gpu=False)
    values["data"] |= {"workers": workers, "micro_batch_tokens": 16384}
    if kind != "chat":
        task = TASKS[kind]
        values |= {
            "data_dir": str(folder / "tasks"), "output_dir": str(folder / kind),
            "model": {"init": {
                "model_type": "xlm-roberta", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "max_position_embeddings": 258,
            }},
            "tokenizer": {"train": {"vocab_size": 700, "style": "encoder"}},
            "objective": {"name": "mlm" if kind == "text" else "finetune"},
        }  # fmt: skip
        values["data"] |= {
            "sources": [
                {"name": language, "files": f"{language}.jsonl", "language": language,
                 "columns": {"id": "id", **task["columns"]}}
                for language in LANGUAGES
            ],
            "task": {"kind": kind, **task["task"]},
        }  # fmt: skip
        values["data"]["mixture"].pop("pairing")
    return validate(values, "benchmark")


def waits(seconds: float) -> Waits:
    """Seconds that each sleep of this thread took longer than TICK_S, for so long."""
    found = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        time.sleep(TICK_S)
        found.append(time.perf_counter() - started - TICK_S)
    return np.array(found)


def beside(loader: Loader, first: int, seconds: float) -> tuple[Waits, float]:
    """Waits of this thread while another one takes the loader's steps from `first` on; tokens loaded a second."""
    running, stop = threading.Event(), threading.Event()

    def take() -> float:
        steps = loader.steps(first, sys.maxsize)
        next(steps)
        running.set()
        started, tokens = time.perf_counter(), 0
        while not stop.is_set():
            tokens += int(next(steps).tokens.sum())
        elapsed = time.perf_counter() - started
        steps.close()  # type: ignore[attr-defined]  # a generator
        return tokens / elapsed

    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(take)
        taken.add_done_callback(lambda _: running.set())  # also when it fails
        running.wait()
        found = waits(seconds)
        stop.set()
        return found, taken.result()


def measure(data: DataParts, workers: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Waits alone and beside a loader with so many workers, in milliseconds, and tokens a second of a worker."""
    loader = data.loader(workers=workers)
    idle, loaded, speeds = [], [], []
    for number in range(rounds):
        idle.append(waits(seconds))
        found, speed = beside(loader, number * ROUND_STEPS, seconds)
        loaded.append(found)
        speeds.append(speed / workers)
    return {
        "idle": summary(np.concatenate(idle)), "beside": summary(np.concatenate(loaded)),
        "tokens_a_second_a_worker": speeds,
    }  # fmt: skip


def summary(found: Waits) -> dict[str, float]:
    """Percentiles, mean and maximum in milliseconds, and the number of waits."""
    low, high, highest = np.percentile(found, [50, 99, 99.9]) * 1e3
    return {
        "p50": low, "p99": high, "p99.9": highest, "max": found.max() * 1e3, "mean": found.mean() * 1e3,
        "n": len(found),
    }  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line per kind of rows and number of workers."""
    lines = [
        "| rows | workers | idle, ms: mean, 99.9 %, max | beside the loader, ms: the same | tokens/s a worker |",
        "|---|---|---|---|---|",
    ]
    for name, by_workers in results.items():
        for workers, each in by_workers.items():
            idle, loaded = (
                ", ".join(f"{each[part][key]:.2f}" for key in ("mean", "p99.9", "max")) for part in ("idle", "beside")
            )
            lines.append(
                f"| {name} | {workers} | {idle} | {loaded} | {np.median(each['tokens_a_second_a_worker']):,.0f} |"
            )
    return "\n".join(lines)


def data_parts(config: RunConfig) -> DataParts:
    from training.assembly import assemble_data
    from training.run_folder.prepare import prepare_read_only

    with prepare_read_only(config) as prepared:
        return assemble_data(config, prepared)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("run_file", type=Path, nargs="?", help="a run file; default: generated data")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the run file")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="kinds of generated rows")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of a half of a round")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in a rank
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.run_file is not None:
            runs = {options.run_file.stem: load_config(options.run_file, [*options.overrides, f"output_dir={folder}"])}
        else:
            write_data(folder / "data")
            write_task_data(folder / "data", folder / "tasks")
            runs = {kind: made_up_run(folder, kind, 1) for kind in options.kinds}
        for name, config in runs.items():
            data = data_parts(config)
            results[name] = {
                str(workers): measure(data, workers, options.rounds, options.seconds) for workers in options.workers
            }
    print(
        f"{options.rounds} rounds of {options.seconds:g} s, load average {os.getloadavg()[0]:.2f}; "
        f"goal: 99.9 % below {GOAL_MS:g} ms\n\n{table(results)}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(1), "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
