"""model_card.py: the card of an export states what the run and its evaluations say, and nothing of the machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tiny_run import XMIXUP

from modeling.export_info import EXPORT_FILE
from modeling.weights.weight_files import directory_hash
from training.checkpoints.card_sections import add_scores, split
from training.checkpoints.checkpoint import checkpoint_path
from training.checkpoints.export import export_baked
from training.checkpoints.model_card import write_baked_card, write_card
from training.checkpoints.run_state import RunState
from training.run_file import resolved, validate

SHIFCON = {"objective.layers": [1, 2]}
SFT = {"objective": {"name": "sft"}}
LORA = {"model": {"path": "tiny/llama", "lora": {"rank": 2, "alpha": 4}}, "tokenizer": {}}
EVALUATION = {"task": "mgsm", "protocol": {"shots": 0, "template": {"name": "alpaca", "system": None}, "limit": None}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, tiny_run: Callable[..., dict[str, Any]]) -> Make:
    """`make(changes, base=...)`: the folder of an export with weights and the card of a run in `run/`."""

    def export(changes: dict[str, Any], base: dict[str, str] | None = None, **state: Any) -> Path:
        config = validate(tiny_run(tmp_path / "run", **changes), "tiny run")
        output = tmp_path / "run" / "model"
        output.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.arange(4.0)}, output / "model.safetensors")
        (output / EXPORT_FILE).write_text("{}")
        totals = {"filled": {"en": 30, "de": 10, "sw": 0}, "labels": {"en": 900, "de": 100, "sw": 0}}
        prints = {"/data/corpus/de.jsonl": "a" * 64, "version": "2", "tokenizer": "b" * 64}
        values = {"totals": totals, "rows": {"en": 4000, "de": 40}, "versions": {"torch": "2.9"}, **state}
        state_ = RunState(200, 2, prints, resolved(config), base=base, **values)
        write_card(checkpoint_path(tmp_path / "run", 200), config, state_, output)
        return output

    return export


def sections(export: Path) -> dict[str, str]:
    return split(ModelCard.load(export / "README.md").text, "## ")


def rows(text: str) -> dict[str, list[str]]:
    """The rows of a section's tables by their first cell."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first: others for first, *others in cells}


@pytest.mark.parametrize(
    ("changes", "metadata", "use"),
    [
        (SFT, {"pipeline_tag": "text-generation", "tags": ["crosslift", "sft"]}, "AutoModelForCausalLM"),
        (SHIFCON, {"pipeline_tag": "text-generation", "tags": ["crosslift", "shifcon"]}, "load_shifted("),
        (
            {**SFT, **LORA},
            {"base_model": "tiny/llama", "pipeline_tag": "text-generation", "tags": ["crosslift", "sft", "lora"]},
            "The adapters are merged",
        ),
        (
            XMIXUP,
            {"pipeline_tag": "token-classification", "tags": ["crosslift", "xmixup"]},
            "AutoModelForTokenClassification",
        ),
    ],
    ids=["sft", "shifcon", "lora", "encoder"],
)
def test_the_metadata_and_the_usage_are_those_of_the_method(
    make: Make, changes: dict[str, Any], metadata: dict[str, Any], use: str
) -> None:
    export = make(changes)
    data = ModelCard.load(export / "README.md").data.to_dict()
    assert data == {"language": ["en", "de", "sw", "zh"], "library_name": "transformers", **metadata}
    text = sections(export)["Use"]
    assert use in text
    assert ("load_shifted(" in text) == (changes is SHIFCON)


def test_the_training_section_has_the_settings_of_the_run(make: Make, tmp_path: Path) -> None:
    base = tmp_path / "somewhere" / "small-llama"
    base.mkdir(parents=True)
    changes = {"model": {"path": str(base)}, "tokenizer": {}, "optimizer.learning_rate": 2e-5, "precision": "bf16"}
    (tmp_path / "run").mkdir()
    events = [{"time": 1, "kind": "tags", "values": {"commit": COMMIT, "dirty": "true"}}]
    (tmp_path / "run" / "record.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    export = make(changes | SHIFCON, base={"directory": str(base), "hash": "c0ffee"})
    found = {key: value for key, (value,) in rows(sections(export)["Training"]).items()}
    assert found["base model"] == "small-llama; hash of the weights at the start: `c0ffee`"
    assert found["`layers`"] == "`[1, 2]`"
    assert (found["`strength`"], found["`contrastive.scale`"]) == ("`1.0`", "`10.0`")
    assert found["`contrastive.normalise`"] == '`"standardised"`'
    assert found["optimizer"].startswith("adamw, learning rate 2e-05 at the peak")
    assert (found["steps"], found["precision"], found["seed"], found["ranks"]) == ("200", "bf16", "3", "2")
    assert found["versions"] == "torch 2.9"
    assert found["commit of crosslift"] == f"{COMMIT}, with local changes"


def test_the_data_section_has_rows_and_realised_shares_by_language(make: Make) -> None:
    found = rows(sections(make(SFT))["Data"])
    assert found["en"] == ["4,000", "30", "75.0%", "900", "90.0%"]
    assert found["sw"] == ["not recorded", "0", "0.0%", "0", "0.0%"]
    assert found["problems"] == ["files"]
    assert found["de.jsonl"] == [f"`{'a' * 64}`"]


def test_the_card_has_no_path_host_or_secret(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    base = tmp_path / "somewhere" / "hf_verysecretvalue"
    source = {"hub": "$HOME/rows", "columns": {"language": "l", "prompt": "p", "completion": "c"}}
    changes = {"model": {"path": str(base)}, "tokenizer": {}, "data.sources": [{"name": "rows", **source}], **SFT}
    text = (make(changes, base={"directory": str(base), "hash": "0"}) / "README.md").read_text()
    for hidden in (str(tmp_path), "/data/", str(Path.home()), socket.gethostname(), "hf_verysecretvalue"):
        assert hidden not in text
    assert "base_model" not in text, "the folder's name is not one of the hub"


def test_a_base_from_the_hub_s_cache_is_named_with_its_revision_and_licence(make: Make, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--tiny--llama" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    licence = "license: other\nlicense_name: tiny-1\nlicense_link: LICENSE"
    (snapshot / "README.md").write_text(f"---\n{licence}\n---\n# Tiny\n")
    export = make({"model": {"path": "tiny/llama"}, "tokenizer": {}, **SFT}, {"directory": str(snapshot), "hash": "0"})
    data = ModelCard.load(export / "README.md").data
    assert (data.base_model, data.license, data.license_name) == ("tiny/llama", "other", "tiny-1")
    assert f"tiny/llama (revision {COMMIT})" in sections(export)["Training"]


def test_languages_with_a_script_or_region_have_the_hub_s_codes(make: Make) -> None:
    languages = ["en", "zh-Hant", "zh-Hans", "eng_Latn", "x", "dialect"]
    export = make({"data.languages": languages, "data.dominant": "en", **SFT})
    assert ModelCard.load(export / "README.md").data.language == ["en", "zh", "eng"]
    assert "eng_Latn" in sections(export)["Data"]


def evaluate(run: Path, name: str, weights: str, text: str) -> None:
    folder = run / "scores" / name
    folder.mkdir(parents=True, exist_ok=True)
    described = {**EVALUATION, "model": {"hash": weights}}
    (folder / "results.json").write_text(json.dumps({"run": described}))
    (folder / "table.txt").write_text(text)


def test_scores_of_these_very_weights_are_in_the_card(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sections(make(SHIFCON))["Scores"] == "Not evaluated."
    own = directory_hash(tmp_path / "run" / "model")
    evaluate(tmp_path / "run", "mgsm", own, "language  mgsm\nsw        12.0")
    evaluate(tmp_path / "run", "of-earlier-weights", "0", "sw 99")
    evaluate(tmp_path / "run", "cut-off", own, "sw 99")
    (tmp_path / "run" / "scores" / "cut-off" / "results.json").write_text("{")
    losses = {"eval/loss": 1.5, "eval/loss/sw": 2.0, "eval/loss/en": None, "eval/loss_swapped": 9.0, "train/loss": 9.0}
    scores = split(sections(make(SHIFCON, metrics=losses))["Scores"], "### ")
    assert scores.pop("") == ""
    assert scores["mgsm"] == "shots 0, template alpaca\n\n```\nlanguage  mgsm\nsw        12.0\n```"
    assert rows(scores["Held-out loss"]) == {"language": ["nats per label"], "---": ["---"], "mean": ["1.5000"],
                                             "sw": ["2.0000"]}  # fmt: skip
    assert scores.keys() == {"mgsm", "Held-out loss"}
    assert "cut-off/results.json: not in the model card, as it cannot be read" in caplog.text


def test_an_evaluation_replaces_its_earlier_scores_in_the_card(make: Make) -> None:
    export = make(SFT)
    before = sections(export)
    for name, text in (("mgsm", "sw 1"), ("other", "sw 2"), ("mgsm", "sw 3")):
        assert add_scores(export, name, EVALUATION, text) == f"scores: in the model card {export / 'README.md'}"
    after = sections(export)
    assert split(after["Scores"], "### ") == {
        "": "", "mgsm": "shots 0, template alpaca\n\n```\nsw 3\n```",
        "other": "shots 0, template alpaca\n\n```\nsw 2\n```",
    }  # fmt: skip
    assert {**after, "Scores": ""} == {**before, "Scores": ""}
    assert ModelCard.load(export / "README.md").data.tags == ["crosslift", "sft"]


def test_only_the_card_of_an_export_is_changed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Of another\n")
    assert add_scores(tmp_path, "mgsm", EVALUATION, "sw 1") is None
    assert (tmp_path / "README.md").read_text() == "---\nlicense: mit\n---\n# Of another\n"


@pytest.mark.parametrize("with_card", [True, False])
def test_the_card_of_a_baked_model_is_for_one_language_and_has_no_scores_of_another(
    make: Make, tmp_path: Path, with_card: bool
) -> None:
    export = make(SHIFCON)
    add_scores(export, "mgsm", EVALUATION, "sw 1")
    before = sections(export)
    if not with_card:
        (export / "README.md").unlink()
    write_baked_card(export, "sw", tmp_path)
    data, found = ModelCard.load(tmp_path / "README.md").data, sections(tmp_path)
    assert data.language == ["sw"]
    assert data.tags == (["crosslift", "shifcon", "baked"] if with_card else ["crosslift", "baked"])
    assert found[""].splitlines()[0].endswith(", for sw only")
    assert found["Scores"].startswith("Not evaluated.")
    assert "AutoModelForCausalLM.from_pretrained" in found["Use"]
    assert "load_shifted" not in found["Use"]
    if with_card:
        assert (found["Training"], found["Data"]) == (before["Training"], before["Data"])


def test_baking_writes_the_card_too(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_weights(directory: Path, language: str, output: Path) -> float:
        return 0.0

    monkeypatch.setattr("modeling.shifcon.bake.bake", no_weights)
    export = make(SHIFCON)
    (export / "config.json").touch()
    assert ModelCard.load(export_baked(export, "sw", tmp_path / "sw") / "README.md").data.language == ["sw"]
