"""Encoder training end to end: masked words from scratch, then X-Mixup on a tagger, exported and reopened."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from ranks import checked, run_command, run_ranks
from tiny_run import XMIXUP, run_values, write_config, write_task_data

from modeling.export_info import ExportInfo
from modeling.tasks.encoders import load_task_model
from modeling.weights.weight_files import directory_hash
from modeling.xmixup.mixup import CrossLingualMixup

STEPS = 4
LORA = {"rank": 2, "alpha": 4, "targets": ["query", "value"]}
ADAPTERS = {"lora": LORA, "dora": {**LORA, "use_dora": True, "use_rslora": True}}
TEXT = {
    **XMIXUP,
    "max_steps": STEPS,
    "data.task": {"kind": "text"},
    "data.sources": [{"name": "text", "files": "*.jsonl", "columns": {"language": "language", "text": "text"}}],
    "objective": {"name": "mlm"},
    "checkpoint.every": STEPS,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mlm/` and, from its export, `mixed/`, and `lora/` and `dora/`, which train adapters only, on two ranks.

    The first by `crosslift train`, the others as the ranks that it would start.
    """
    folder = tmp_path_factory.mktemp("encoder")
    data = write_task_data(folder / "data")
    tagging = {key: value for key, value in XMIXUP.items() if key not in ("model.init", "tokenizer.train")}
    tagging |= {"model": {"path": str(folder / "mlm" / "model")}, "tokenizer": {}}
    tagging |= {"max_steps": STEPS, "checkpoint.every": 2}
    lora, dora = ({**tagging, "model": {**tagging["model"], "lora": options}} for options in ADAPTERS.values())
    adapted = (("lora", lora, 2), ("dora", {**dora, "gradient_checkpointing": True}, 2))
    for name, changes, ranks in (("mlm", TEXT, None), ("mixed", tagging, 1), *adapted):
        config = write_config(folder / f"{name}.yaml", run_values(data, folder / name, **changes))
        if ranks is None:
            checked([run_command("train", str(config), "--nproc", "1")])
        else:
            checked(run_ranks(["-m", "training", str(config)], ranks))
    return folder


RUNS = ("mixed", "lora")


def metrics(run: Path) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (run / "record.jsonl").read_text().splitlines()]
    return [event["values"] for event in events if event["kind"] == "metrics"]


def test_a_checkpoint_of_adapters_has_no_frozen_weights_and_needs_its_base_model(runs: Path, tmp_path: Path) -> None:
    whole, adapted = (sum(f.stat().st_size for f in runs.glob(f"{name}/checkpoints/step-*/zero/*.pt")) for name in RUNS)
    assert adapted < whole / 2
    start = runs / "lora" / "task_model" / "model.safetensors"
    content = bytearray(start.read_bytes())
    content[-1] ^= 1
    start.write_bytes(content)
    try:
        refused = run_command("export", str(runs / "lora"), "--output", str(tmp_path / "model"))
    finally:
        content[-1] ^= 1
        start.write_bytes(content)
    assert refused.returncode == 2
    assert "which is gone or has changed" in refused.stderr
    assert not (tmp_path / "model").exists()


def test_masked_words_are_learned_and_the_tied_head_is_stored_once(runs: Path) -> None:
    losses = [step["train/loss"] for step in metrics(runs / "mlm") if "train/loss" in step]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    names = set(load_file(runs / "mlm" / "model" / "model.safetensors"))
    assert "roberta.embeddings.word_embeddings.weight" in names
    assert "lm_head.decoder.weight" not in names


def test_the_tagger_keeps_the_pretrained_encoder_and_gets_a_fresh_head(runs: Path) -> None:
    before = load_file(runs / "mlm" / "model" / "model.safetensors")
    start = load_file(runs / "mixed" / "task_model" / "model.safetensors")
    encoder = [name for name in start if name.startswith("roberta.")]
    assert len(encoder) > 20
    assert all(torch.equal(start[name], before[name]) for name in encoder)
    assert {name for name in start if not name.startswith("roberta.")} == {"classifier.weight", "classifier.bias"}


def test_every_step_reports_both_sides_consistency_and_ratio(runs: Path) -> None:
    steps = [step for step in metrics(runs / "mixed") if "train/loss" in step]
    assert len(steps) == STEPS
    for step in steps:
        assert step["train/loss"] == pytest.approx(step["train/target"])
        assert step["train/consistency"] >= 0
        assert 0.25 < step["train/mixup_ratio"] < 0.5  # lambda_0 * sigmoid of an entropy, which is above 0
        assert {f"train/loss/{language}" for language in ("en", "de", "sw", "zh")} <= set(step)


@pytest.mark.parametrize("name", ["mlm", "mixed"])
def test_the_card_s_example_runs_in_plain_transformers(
    runs: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (runs / name / "model" / "README.md").read_text()
    example = card.partition("```python\n")[2].partition("```")[0]
    exec(example.replace("MODEL", str(runs / name / "model")), {})
    assert "tensor(" in capsys.readouterr().out


def test_the_card_names_the_run_that_the_weights_started_from(runs: Path) -> None:
    card = (runs / "lora" / "model" / "README.md").read_text()
    start = directory_hash(runs / "lora" / "task_model")
    assert f"| base model | mlm; hash of the weights at the start: `{start}` |" in card
    assert [path.name for path in (runs / "lora" / "model" / "adapter").glob("*.md")] == []


def test_the_export_describes_itself_and_applies_x_mixup(runs: Path) -> None:
    model_dir = runs / "mixed" / "model"
    info = ExportInfo.read(model_dir)
    assert (info.objective, info.sequence_length, info.step) == ("xmixup", 96, STEPS)
    assert info.task is not None
    assert info.task["labels"] == ["WORD", "NUMBER"]
    assert info.check is not None
    assert info.check["passed"]
    assert not (model_dir / "generation_config.json").exists()
    assert not any("mixup" in name for name in load_file(model_dir / "model.safetensors"))
    model = load_task_model(model_dir, "tagging", info.task["labels"], torch.float32, "sdpa", "cpu")
    mixup = CrossLingualMixup.attach(model, model_dir)
    assert mixup.state().layer == 1
    assert [float(value.detach()) for value in mixup.parameters()] != [1.0, 0.0]  # trained
    ids = torch.randint(5, 100, (2, 12))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        with mixup.batch(mask, 1):
            mixed = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(mixed[1], plain[1])  # the source is not mixed
    assert (mixed[0] - plain[0]).abs().max() > 1e-6


def test_check_shows_both_sides_with_their_tags(runs: Path) -> None:
    done = run_command("check", str(runs / "mixed.yaml"))
    assert done.returncode == 0, done.stderr
    assert "source (gold):" in done.stdout or "source (back-translation):" in done.stdout
    assert "NUMBER" in done.stdout


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_alone_are_trained_and_merged(runs: Path, name: str) -> None:
    start = load_file(runs / name / "task_model" / "model.safetensors")
    found = load_file(runs / name / "model" / "model.safetensors")
    assert set(found) == set(start)  # a plain model's names
    changed = {name for name in found if not torch.equal(found[name], start[name])}
    blocks = [f"roberta.encoder.layer.{block}.attention.self" for block in range(3)]
    learned = {f"{block}.{target}.weight" for block in blocks for target in LORA["targets"]}
    assert changed == learned | {"classifier.weight", "classifier.bias"}
    check = ExportInfo.read(runs / name / "model").check
    assert check is not None
    assert check["passed"], check  # the run's logits, of sharded weights, are the export's
    assert CrossLingualMixup.attach(
        load_task_model(runs / name / "model", "tagging", ["WORD", "NUMBER"], torch.float32, "sdpa", "cpu"),
        runs / name / "model",
    ).parameters()


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_export_has_an_adapter_directory_that_peft_opens(runs: Path, name: str) -> None:
    labels, base = ["WORD", "NUMBER"], runs / name / "task_model"
    merged = load_task_model(runs / name / "model", "tagging", labels, torch.float32, "sdpa", "cpu")
    opened = load_task_model(base, "tagging", labels, torch.float32, "sdpa", "cpu")
    adapter = runs / name / "model" / "adapter"
    adapted = PeftModel.from_pretrained(opened, str(adapter)).eval()
    ids = torch.randint(5, 100, (2, 12))
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits for model in (adapted, merged))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    described = json.loads((adapter / "base_model.json").read_text())
    assert described == {"name": str(runs / "mlm" / "model"), "hash": directory_hash(base)}


def test_dora_under_zero_3_starts_from_the_norms_of_whole_weights(runs: Path) -> None:
    """Its first step has the outputs of the model itself, as LoRA's has; later steps differ."""
    lora, dora = ([step["train/loss"] for step in metrics(runs / name) if "train/loss" in step] for name in ADAPTERS)
    assert dora[0] == pytest.approx(lora[0], rel=1e-6)
    assert dora[-1] != lora[-1]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_resumed_run_of_adapters_repeats_the_steps_of_an_uninterrupted_one(runs: Path, name: str) -> None:
    before = [step["train/loss"] for step in metrics(runs / name) if "train/loss" in step]
    checkpoint = runs / name / "checkpoints" / "step-00000002"
    checked(run_ranks(["-m", "training", str(runs / f"{name}.yaml"), "--resume", str(checkpoint)], 2))
    again = [step["train/loss"] for step in metrics(runs / name) if "train/loss" in step]
    assert again == [*before, *before[2:]]
