"""Runs on the test cluster: a tiny run (`tiny_run.py`) submitted as by a user, its record, and waiting for its state.

`SlurmRun.repeated()` gives every recorded step, for each time that it ran.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cluster import TwoNodeCluster
from tiny_run import RANK_ITEMS, rank_values, write_config, write_data

import crosslift as command_line

STEPS = 36
TRAINS_WITHIN = 240.0  # seconds, on two busy cores
# Metrics that must not depend on interruptions.
SAME = ("train/loss", "train/contrastive", "train/grad_norm", "train/learning_rate", "data/step_fingerprint", "shift/")
# Variables of another allocation in the submitting shell; none of them may reach a job's ranks.
FOREIGN = {"CROSSLIFT_DEADLINE": "1", "PMI_RANK": "7", "OMPI_COMM_WORLD_SIZE": "9", "SALLOC_PARTITION": "elsewhere",
           "SRUN_DEBUG": "3", "RANK": "7", "MASTER_PORT": "1"}  # fmt: skip
QUESTIONS = ("3 plus 4?\t7", "5 plus 6?\t11")


def reference_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Values of the run file that the tests share, its data in `folder`."""
    write_data(folder / "data", RANK_ITEMS)
    chosen = {"max_steps": STEPS, "model.init.attention_dropout": 0.1, "checkpoint": {"every": 2, "keep": 2}, **changes}
    return rank_values(folder / "data", folder / "run", **chosen)


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a command."""

    returncode: int
    stdout: str
    stderr: str


def crosslift(*arguments: object, folder: Path, check: bool = True) -> Result:
    """Run `crosslift ARGUMENTS` in a folder, in this process, so that imports are shared by all tests."""
    before, sys.argv = sys.argv, ["crosslift", *map(str, arguments)]
    status: object = 0
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, chdir(folder):
        try:
            command_line.main()
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.argv = before
    assert isinstance(status, int)
    assert not check or status == 0, f"{arguments}: {status}\n{out.getvalue()}\n{err.getvalue()}"
    return Result(status, out.getvalue(), err.getvalue())


class SlurmRun:
    """One run folder and its newest job."""

    def __init__(self, cluster: TwoNodeCluster, folder: Path, values: dict[str, Any]) -> None:
        self.cluster = cluster
        self.folder = folder
        self.output = Path(values["output_dir"])
        self.config = write_config(folder / "run.yaml", values)
        self.jobs: list[dict[str, Any]] = []

    def submit(self, *options: object, nodes: int = 2) -> str:
        """Submit the run; returns the job's number."""
        with patch.dict(os.environ, FOREIGN):
            done = crosslift("submit", self.config, "--nodes", nodes, "--gpus-per-node", 0, "--cpus-per-task", 1,
                             "--json", *options, folder=self.folder)  # fmt: skip
        self.jobs = json.loads(done.stdout)
        return self.job

    def submit_with_evaluation(self) -> None:
        questions = self.folder / "questions"
        questions.mkdir()
        (questions / "mgsm_en.tsv").write_text("\n".join(QUESTIONS) + "\n")
        self.submit(
            "--time",
            "10",
            "--then",
            f"eval {{run}}/model --data-dir {questions} --output {{run}}/mgsm --max-new-tokens 4 --template model",
        )
        for job in self.jobs:
            self.cluster.wait_for_state(job["job"], "COMPLETED", "FAILED", "CANCELLED", seconds=2 * TRAINS_WITHIN)

    @property
    def job(self) -> str:
        return str(self.jobs[0]["job"])

    def log(self) -> str:
        """The output of the newest job."""
        file = Path(self.jobs[0]["output"])
        return file.read_text(errors="replace") if file.is_file() else ""

    # --- the record

    def events(self, kind: str) -> list[dict[str, Any]]:
        record = self.output / "record.jsonl"
        lines = record.read_text().splitlines() if record.is_file() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def repeated(self) -> dict[int, list[dict[str, float]]]:
        """The metrics of each step, for each time that it ran."""
        found: dict[int, list[dict[str, float]]] = defaultdict(list)
        for event in self.events("metrics"):
            values = {name: value for name, value in event["values"].items() if name.startswith(SAME)}
            if values:
                found[event["step"]].append(values)
        return found

    def last_step(self) -> int:
        return max(self.repeated(), default=0)

    def starts(self) -> list[int | None]:
        """The step from which each start resumed."""
        return [event["resumed_step"] for event in self.events("start")]

    # --- waiting

    def train_until(self, step: int) -> None:
        """Wait until the running job has recorded a step."""
        self.cluster.wait_until(
            lambda: self.last_step() >= step or self._ended(), f"step {step}", TRAINS_WITHIN, self.diagnostics
        )
        assert self.last_step() >= step, self.diagnostics()

    def train_more(self, steps: int = 2) -> None:
        """Wait until the run has some more steps."""
        self.train_until(self.last_step() + steps)

    def resume(self) -> None:
        """Start the requeued job at once, and wait until it trains."""
        starts = len(self.starts())
        self.cluster.skip_requeue_delay(self.job)
        self.cluster.wait_until(lambda: len(self.starts()) > starts or self._ended(), "the next start", TRAINS_WITHIN,
                                self.diagnostics)  # fmt: skip
        self.train_more()

    def wait_for_state(self, *states: str) -> None:
        self.cluster.wait_for_state(self.job, *states, seconds=TRAINS_WITHIN)

    def wait_for_requeue(self, restarts: int) -> None:
        """Wait until the job is pending again, after `restarts` restarts."""

        def requeued() -> bool:
            job = self.cluster.job(self.job)
            return job["JobState"] == "PENDING" and int(job["Restarts"]) == restarts

        self.cluster.wait_until(lambda: requeued() or self._ended(), "the requeue", 90, self.diagnostics)
        assert requeued(), self.diagnostics()

    def _ended(self) -> bool:
        return self.cluster.state(self.job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def diagnostics(self) -> str:
        """State and log of the job, for the message of a failed test."""
        return f"{self.cluster.slurm('scontrol', 'show', 'job', self.job)}\n{self.log()[-6000:]}"
