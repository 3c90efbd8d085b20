"""`crosslift xtreme` end to end with a small tagger: zero-shot, soft labels from it, X-Mixup, nested MLflow runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_encoders import unigram
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from ranks import checked, run_command
from tiny_run import ITEMS, write_task_data

from data_pipeline.xtreme.tasks import TASKS
from evals.xtreme.label_files import read_tags
from training.tracking.mlflow_store import default_store, open_client

pytestmark = pytest.mark.timeout(1800)  # one fixture makes both runs and the teacher's labels
TRANSLATED = ("de", "zh")
SMALL = ("precision=fp32", "epochs=3", "checkpoints=2", "data.slots_per_step=16", "optimizer.learning_rate=2.0e-3")


def succeeded(*arguments: object) -> str:
    """The output of a command. `crosslift train`, which it starts, is a new process as usual."""
    done = run_command(*arguments, timeout=560)
    checked([done])
    return done.stdout


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_encoder(folder: Path) -> None:
    """An untrained encoder in place of a pretrained one, with its tokenizer."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(unigram()), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=130, pad_token_id=unigram().pad_token_id,
    )  # fmt: skip
    XLMRobertaForMaskedLM(config).save_pretrained(folder)
    unigram().save_pretrained(folder)


def write_udpos(tiny: Path, folder: Path) -> None:
    """Numbers are NUM, the rest NOUN. Train: 24 items, German and Chinese without tags; dev and test: 8 each."""
    parts = {"train": range(24), "dev": range(24, 32), "test": range(32, ITEMS)}
    for language in ("en", *TRANSLATED):
        rows = [json.loads(line) for line in (tiny / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row |= {"group": row["id"], "tags": ["NUM" if tag == "NUMBER" else "NOUN" for tag in row["tags"]]}
        for split, items in parts.items():
            chosen = [rows[item] for item in items]
            if split == "train" and language != "en":
                chosen = [{key: value for key, value in row.items() if key != "tags"} for row in chosen]
            write_rows(folder / split / f"{language}.jsonl", chosen)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder/`, `zero-shot/`, `soft/` and `x-mixup/`; the output of the last is in `x-mixup.txt`."""
    folder = tmp_path_factory.mktemp("xtreme")
    tiny = write_task_data(folder / "tiny")
    write_udpos(tiny, folder / "udpos")
    write_encoder(folder / "encoder")
    common = ("--task", "udpos", "--model", "own", "--data-dir", folder / "udpos", "--nproc", 1)
    small = (*SMALL, f"model.path={folder / 'encoder'}")
    run = ("xtreme", "run", "configs/xtreme.yaml", *common)
    succeeded(*run, "--method", "zero-shot", "--output", folder / "zero-shot", *small, "checkpoints=1")
    succeeded(
        "xtreme", "soft-labels", folder / "zero-shot" / "model", "--task", "udpos", "--translations",
        folder / "udpos" / "train" / "de.jsonl", "--translations", folder / "udpos" / "train" / "zh.jsonl",
        "--output", folder / "soft",
    )  # fmt: skip
    out = succeeded(
        *run, "--method", "x-mixup", "--output", folder / "x-mixup", "--soft-labels", folder / "soft",
        "--baseline", folder / "zero-shot", *small, "objective.layer=1",
    )  # fmt: skip
    (folder / "x-mixup.txt").write_text(out, encoding="utf-8")
    return folder


def scores(run: Path) -> dict[str, Any]:
    return json.loads((run / "scores.json").read_bytes())


def test_both_runs_select_predict_and_score(runs: Path) -> None:
    for name, languages, n_checkpoints in (("zero-shot", ["en"], 1), ("x-mixup", ["de", "en", "zh"], 2)):
        found = scores(runs / name)
        assert found["selection"]["languages"] == languages
        assert len(found["selection"]["scores"]) == n_checkpoints
        assert list(found["summary"]["languages"]) == ["de", "en", "zh"]
        for language in ("en", *TRANSLATED):
            predicted, gold = (
                read_tags(runs / name / side / "udpos" / f"test-{language}.tsv", TASKS["udpos"].labels)
                for side in ("predictions", "labels")
            )
            assert [len(sentence.tags) for sentence in predicted] == [len(sentence.tags) for sentence in gold]
    mixed = scores(runs / "x-mixup")["predicted"]
    assert {language: each["mixed"] for language, each in mixed.items()} == {"de": 8, "en": 8, "zh": 8}


def test_the_table_equals_the_scorers_and_shows_the_gap(runs: Path) -> None:
    out = (runs / "x-mixup.txt").read_text(encoding="utf-8")
    summary = scores(runs / "x-mixup")["summary"]
    scored = succeeded(
        "score", "xtreme", "--predictions", runs / "x-mixup" / "predictions", "--labels", runs / "x-mixup" / "labels",
        "--json",
    )  # fmt: skip
    languages = json.loads(scored)["tasks"]["udpos"]["languages"]
    assert {language: found["f1"] for language, found in languages.items()} == pytest.approx(
        {language: found["f1"] for language, found in summary["languages"].items()}
    )
    gap = summary["gap"]["f1"]
    assert gap == pytest.approx(languages["en"]["f1"] - (languages["de"]["f1"] + languages["zh"]["f1"]) / 2)
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    # three of the task's languages: marked as partial
    assert rows["gap*"][1] == f"{gap:+.2f}"
    assert rows["baseline's gap*"][2] == f"{scores(runs / 'zero-shot')['summary']['gap']['f1']:+.2f}"


def test_the_training_is_nested_in_the_run(runs: Path) -> None:
    client = open_client(default_store(runs / "x-mixup"))
    (experiment,) = [each for each in client.search_experiments() if each.name == "crosslift"]
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"x-mixup", "x-mixup-training"}
    inner, outer = found["x-mixup-training"], found["x-mixup"]
    assert inner.data.tags["mlflow.parentRunId"] == outer.info.run_id
    assert (outer.info.status, inner.info.status) == ("FINISHED", "FINISHED")
    assert outer.data.params["method"] == "x-mixup"
    assert outer.data.metrics["test/f1/de"] == pytest.approx(
        scores(runs / "x-mixup")["summary"]["languages"]["de"]["f1"]
    )
    assert "train/mixup_ratio" in inner.data.metrics
