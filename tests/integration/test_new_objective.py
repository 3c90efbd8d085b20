"""A new objective is one file and one line: cosine alignment, added to a copy of the source, trained by the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import run_values, write_config, write_data

from training.tracking.run_record import read_events

SOURCE = Path(__file__).resolve().parents[2]
ROOMS = ("training", "modeling", "data_pipeline", "evals", "slurm")
STEPS, FIRST = 8, 4


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source with the objective's file and its line in the registry."""
    tree = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        shutil.copytree(SOURCE / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SOURCE / "crosslift.py", tree)
    shutil.copy(SOURCE / "tests" / "new_objective" / "cosine.py", tree / "training" / "objectives")
    registry = tree / "training" / "objectives" / "registry.py"
    lines = registry.read_text(encoding="utf-8").splitlines(keepends=True)
    lines.insert(lines.index('    "xmixup",\n') + 1, '    "cosine",\n')
    registry.write_text("".join(lines), encoding="utf-8")
    return tree


def crosslift(tree: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "crosslift.py", *map(str, arguments)]
    return subprocess.run(command, env=variables, cwd=tree, capture_output=True, text=True, timeout=240)


def test_the_new_objective_trains_resumes_and_exports(tree: Path, tmp_path: Path) -> None:
    """In two starts: the pairs' distance falls, no step runs twice, and the export opens in plain transformers."""
    from transformers import AutoModelForCausalLM

    output = tmp_path / "run"
    values = run_values(
        write_data(tmp_path / "data"), output,
        **{
            "objective": {"name": "cosine", "layer": 1, "weight": 3.0}, "max_steps": FIRST, "checkpoint.every": FIRST,
            "schedule": {"name": "constant"}, "evaluation.every": FIRST, "data.heldout_items": 8,
            "evaluation.items": 2, "checkpoint.best": "train/distance",
        },
    )  # fmt: skip
    run_file = write_config(tmp_path / "run.yaml", values)
    for steps in (FIRST, STEPS):
        done = crosslift(tree, "train", run_file, f"max_steps={steps}", "--nproc", 1)
        assert done.returncode == 0, done.stderr[-3000:]
    events = [event for _, event in read_events(output / "record.jsonl") if event["kind"] == "metrics"]
    assert [event["step"] for event in events] == list(range(1, STEPS + 1))
    distances = [event["values"]["train/distance"] for event in events]
    assert all(0 < distance < 2 for distance in distances)
    assert distances[-1] < 0.8 * distances[0], distances
    AutoModelForCausalLM.from_pretrained(output / "model")
    described = json.loads((output / "model" / "crosslift.json").read_text(encoding="utf-8"))
    assert described["objective"] == "cosine"
    assert described["step"] == STEPS


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.layer=2", "objective.layer: 2, but the model has layers 0 to 1"),
        ("objective.wieght=1", "objective.wieght: unknown key; did you mean 'weight'?"),
        ("checkpoint.best=train/distanec", "did you mean 'train/distance'?"),
    ],
)
def test_mistakes_in_its_section_are_refused_by_check(tree: Path, tmp_path: Path, override: str, message: str) -> None:
    values = run_values(
        write_data(tmp_path / "data"), tmp_path / "run", objective={"name": "cosine", "layer": 1, "weight": 3.0}
    )
    done = crosslift(tree, "check", write_config(tmp_path / "run.yaml", values), override)
    assert done.returncode == 2
    assert message in done.stderr
