"""A training run into which `faults.py` injects faults, and the evaluation of its record.

`DisturbedRun` starts, kills, stops and restarts `crosslift train` on a run folder. `compare` checks the record of
every start against the record of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.ranks import SOURCE
from data_pipeline.toy_problems.corpus import LANGUAGES

RANKS = 2
TIMEOUT_S = 240.0  # for any event


def run_values(data: Path, output: Path) -> dict[str, Any]:
    """A small ShifCon run of many short steps, with a checkpoint at every second step."""
    return {
        "data_dir": str(data), "output_dir": str(output), "seed": 5, "max_steps": 400,
        "model": {"init": {
            "model_type": "llama", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
        }},
        "tokenizer": {"train": {"vocab_size": 1200}},
        "data": {
            "languages": list(LANGUAGES), "dominant": "en",
            "sources": [{
                "name": "problems", "files": "finetune/*.jsonl",
                "columns": {"id": "id", "language": "language", "prompt": "question", "completion": "answer"},
            }],
            "mixture": {"strategy": "uniform", "pairing": "reuse"},
            "slots_per_step": 12, "sequence_length": 160, "micro_batch_tokens": 1200,
        },
        "objective": {
            "name": "shifcon", "layers": [1, 2], "probe_items": 4, "refresh_every": 50,
            "contrastive": {"weight": 0.1, "scale": 10.0, "set_size": 2},
        },
        "optimizer": {"learning_rate": 1e-3},
        "precision": "fp32",
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        "checkpoint": {"every": 2, "keep": 2},
        "watchdog": {"stall_minutes": 0.15},
        "tracking": {"enabled": False, "log_every": 1},
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Start:
    """What one process of a run recorded."""

    resumed: int  # steps done before this start
    metrics: dict[int, dict[str, Any]]  # by step, 1-based

    @property
    def last(self) -> int:
        return max(self.metrics, default=self.resumed)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One start compared with the undisturbed run."""

    samples: bool  # no sample lost or repeated: every step read its own samples, and no step is missing
    losses: bool  # equal to the last digit

    @property
    def passed(self) -> bool:
        return self.samples and self.losses


def starts(output: Path) -> list[Start]:
    """The starts in the record, one entry per process."""
    found: list[Start] = []
    record = output / "record.jsonl"
    for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line is being written, or was cut off by a kill and will be repaired
        if event["kind"] == "start":
            found.append(Start(event["resumed_step"] or 0, {}))
        elif event["kind"] == "metrics":
            found[-1].metrics[event["step"]] = event["values"]
    return found


def compare(start: Start, reference: dict[int, dict[str, Any]], before: int) -> Comparison:
    """`before`: the last step that was recorded when this process began."""
    steps = sorted(start.metrics)
    contiguous = steps == list(range(start.resumed + 1, start.last + 1)) and start.resumed <= before

    def equal(*names: str) -> bool:
        return all(start.metrics[each][name] == reference[each][name] for each in steps for name in names)

    samples = contiguous and bool(steps) and equal("data/step_fingerprint")
    return Comparison(samples, equal("train/loss", "train/grad_norm"))


class DisturbedRun:
    """`crosslift train` on a run folder; one process at a time."""

    def __init__(self, folder: Path, data: Path, **changes: Any) -> None:
        self.output = folder / "run"
        folder.mkdir(parents=True)
        values = run_values(data, self.output)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                values[section][name] = value
            else:
                values[section] = value
        self.max_steps: int = values["max_steps"]
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(values), encoding="utf-8")
        self._log = folder / "stderr"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self) -> None:
        """Start or resume the run."""
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        command = [sys.executable, "crosslift.py", "train", str(self.config), "--nproc", str(RANKS)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=SOURCE, env=environment, stdout=log, stderr=log)

    @property
    def log_text(self) -> str:
        """The output of this start so far."""
        return self._log.read_bytes()[self._log_start :].decode(errors="replace")

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def last_step(self) -> int:
        """The last recorded step, of any process."""
        return max((each.last for each in starts(self.output)), default=0)

    def ranks(self) -> list[psutil.Process]:
        """The ranks' processes, in order."""
        assert self._process is not None
        below = psutil.Process(self._process.pid).children(recursive=True)
        found = [each for each in below if each.environ().get("RANK", "") and "training" in each.cmdline()]
        return sorted(found, key=lambda each: int(each.environ()["RANK"]))

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.02) -> bool:
        """Whether the condition became true while the process ran. Raises TimeoutError."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if not self.running:
                return condition()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self.output}: timeout after {TIMEOUT_S:.0f} s; its output: {self.log_text[-2000:]}"
                )
            time.sleep(pause)
        return True

    def wait_for_steps(self, n: int) -> bool:
        """Wait until this process has done `n` steps; False if it ended before."""
        begun = len(starts(self.output)) if self.running else 0

        def moved() -> bool:
            found = starts(self.output)
            return "from step" in self.log_text and len(found) >= max(begun, 1) and len(found[-1].metrics) >= n

        return self.wait_until(moved)

    def kill(self, rng: random.Random) -> None:
        """SIGKILL to one rank, or to all processes at once, as when a node dies."""
        assert self._process is not None
        ranks = self.ranks()
        if rng.random() < 0.5 or not ranks:
            for each in [*ranks, psutil.Process(self._process.pid)]:
                each.kill()
        else:
            rng.choice(ranks).kill()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the launcher."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        assert self._process is not None
        return self._process.wait(TIMEOUT_S)

    def finish(self) -> int:
        """Resume the run to its end; the exit status."""
        if not self.running:
            self.start()
        return self.wait()
