"""`layers: auto` in a run: the area is chosen once, recorded, and kept by a resume; `check` does not need it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from ranks import checked, run_command, run_ranks
from tiny_run import run_values, write_config, write_data

from modeling.shifcon.language_vectors import LanguageVectors
from training.checkpoints.run_state import RunState


def train(ranks: int, *arguments: object) -> str:
    """Train on so many ranks to the end; what rank 0 printed to stderr."""
    results = run_ranks(["-m", "training", *map(str, arguments)], ranks)
    checked(results)
    return results[0].stderr


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
    checked([run_command("check", file)])
    assert not (run / "layer_area.json").exists()
    printed = train(2, file)
    found = json.loads((run / "layer_area.json").read_text())
    toward, back = found["area"]
    assert back - toward == 2  # 30 % of six layers
    assert f"objective.layers: auto chose [{toward}, {back}) by retrieval" in printed
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"]["layers"] == [toward, back]
    checkpoint = run / "checkpoints" / "step-00000002"
    assert RunState.read(checkpoint).config["objective"]["layers"] == [toward, back]
    assert LanguageVectors.load(run / "model" / "language_vectors.safetensors").area == (toward, back)
    # Another area in the file would be refused; a resume takes that of its checkpoint.
    (run / "layer_area.json").unlink()
    assert "auto chose" not in train(1, file, "max_steps=4")
    assert LanguageVectors.load(run / "model" / "language_vectors.safetensors").area == (toward, back)


def test_a_given_area_is_not_probed_and_the_run_is_baked_for_a_language(values: dict[str, Any], tmp_path: Path) -> None:
    """`export --bake`, of the run and of its export: one answer of the plain model is that of the shifted one."""
    changed = {**values, "output_dir": str(tmp_path / "run"), "objective": {**values["objective"], "layers": [2, 4]}}
    train(1, write_config(tmp_path / "run.yaml", changed))
    assert not (tmp_path / "run" / "layer_area.json").exists()
    outputs = []
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / "model")):
        checked([run_command("export", source, "--bake", "de", "--output", tmp_path / f"baked-{number}")])
    for model in (tmp_path / "run", tmp_path / "baked-0", tmp_path / "baked-1"):
        prompt = ("--prompt", "Wie viele?", "--max-new-tokens", 8)
        done = run_command("generate", model, "--language", "de", *prompt, "--json")
        checked([done])
        outputs.append(json.loads(done.stdout)["output"])
    assert outputs[1:] == outputs[:1] * 2
    other = run_command("generate", tmp_path / "baked-0", "--language", "sw", "--prompt", "Ngapi?")
    assert other.returncode == 2
    assert "language 'sw': the model has de" in other.stderr
    refused = run_command("export", tmp_path / "run", "--bake", "en", "--output", tmp_path / "baked-en")
    assert refused.returncode == 2
    assert "'en' is the dominant language" in refused.stderr
    assert not (tmp_path / "baked-en").exists()
