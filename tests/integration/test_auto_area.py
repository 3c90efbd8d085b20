"""`layers: auto` in a run: the area is chosen once, recorded, and kept by a resume; `check` does not need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import run_values, write_config, write_data

from modeling.shifcon.language_vectors import LanguageVectors
from training.checkpoints.run_state import RunState

SOURCE = Path(__file__).resolve().parents[2]


def crosslift(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SOURCE / "crosslift.py"), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("area")
    return run_values(
        write_data(folder / "data"), folder / "run",
        **{
            "objective.layers": "auto", "max_steps": 2, "model.init.num_hidden_layers": 6, "checkpoint.every": 2,
        },
    )  # fmt: skip


def test_a_run_chooses_its_area_once_and_resumes_with_it(values: dict[str, Any], tmp_path: Path) -> None:
    file, run = write_config(tmp_path / "run.yaml", values), Path(values["output_dir"])
    checked = crosslift("check", file)
    assert checked.returncode == 0, checked.stderr
    assert not (run / "layer_area.json").exists()
    started = crosslift("train", file, "--nproc", 2)
    assert started.returncode == 0, started.stderr[-3000:]
    found = json.loads((run / "layer_area.json").read_text())
    toward, back = found["area"]
    assert back - toward == 2  # 30 % of six layers
    assert f"objective.layers: auto chose [{toward}, {back}) by retrieval" in started.stderr
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"]["layers"] == [toward, back]
    checkpoint = run / "checkpoints" / "step-00000002"
    assert RunState.read(checkpoint).config["objective"]["layers"] == [toward, back]
    assert LanguageVectors.load(run / "model" / "language_vectors.safetensors").area == (toward, back)
    # Another area in the file would be refused; a resume takes that of its checkpoint.
    (run / "layer_area.json").unlink()
    resumed = crosslift("train", file, "max_steps=4", "--nproc", 1)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "auto chose" not in resumed.stderr
    assert LanguageVectors.load(run / "model" / "language_vectors.safetensors").area == (toward, back)


def test_a_given_area_is_not_probed_and_the_run_is_baked_for_a_language(values: dict[str, Any], tmp_path: Path) -> None:
    """`export --bake`, of the run and of its export: one answer of the plain model is that of the shifted one."""
    changed = {**values, "output_dir": str(tmp_path / "run"), "objective": {**values["objective"], "layers": [2, 4]}}
    done = crosslift("train", write_config(tmp_path / "run.yaml", changed), "--nproc", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "run" / "layer_area.json").exists()
    outputs = []
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / "model")):
        baked = crosslift("export", source, "--bake", "de", "--output", tmp_path / f"baked-{number}")
        assert baked.returncode == 0, baked.stderr[-3000:]
    for model in (tmp_path / "run", tmp_path / "baked-0", tmp_path / "baked-1"):
        done = crosslift(
            "generate", model, "--language", "de", "--prompt", "Wie viele?", "--max-new-tokens", 8, "--json"
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(json.loads(done.stdout)["output"])
    assert outputs[1:] == outputs[:1] * 2
    other = crosslift("generate", tmp_path / "baked-0", "--language", "sw", "--prompt", "Ngapi?")
    assert other.returncode == 2
    assert "language 'sw': the model has de" in other.stderr
    refused = crosslift("export", tmp_path / "run", "--bake", "en", "--output", tmp_path / "baked-en")
    assert refused.returncode == 2
    assert "'en' is the dominant language" in refused.stderr
    assert not (tmp_path / "baked-en").exists()
