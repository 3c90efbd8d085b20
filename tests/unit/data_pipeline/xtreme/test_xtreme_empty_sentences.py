"""Empty sentences in tagging files keep their places, from XTREME's files to the score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_encoders import WORDS
from tiny_task_model import export
from xtreme_files import jsonl, tagged, write

from data_pipeline.xtreme.prepare import KEPT_EMPTY, PrepareOptions, prepare_task
from data_pipeline.xtreme.tasks import TASKS
from evals.xtreme.metrics import tag_chunks
from evals.xtreme.predict import EncoderPredictor, write_predictions
from evals.xtreme.prepared import gold_file, read_records, write_gold
from evals.xtreme.score import score_file

GOLD = {"panx": ("B-LOC", "O"), "udpos": ("NOUN", "VERB")}
LAYOUTS = {
    "two in a row": "{a}\n\n\n{b}\n\n",
    "four in a row": "{a}\n\n\n\n\n{b}\n",
    "at the start": "\n\n{a}\n\n{b}\n",
    "at the end": "{a}\n\n{b}\n\n\n\n",
    "no last line end": "{a}\n\n\n{b}",
    "all of it": "\n{a}\n\n\n\n{b}\n\n\n",
    "spaces in it": "{a}\n \n\n{b}\n  \n",
}


def xtremes_sentences(file: Path) -> list[list[str]]:
    """How XTREME's scorer reads a file of tags: each blank line ends a sentence, whether or not it has tags."""
    labels: list[list[str]] = []
    example: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.strip():
            example.append(line.strip())
        else:
            labels.append(example)
            example = []
    return [*labels, example] if example else labels


def xtremes_f1(ours: Path, gold: Path) -> float:
    """The scorer's F1 over the chunks of all sentences."""
    found, wanted = tag_chunks(xtremes_sentences(ours)), tag_chunks(xtremes_sentences(gold))
    return 200 * len(found & wanted) / (len(found) + len(wanted))


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EncoderPredictor]:
    return {
        task: EncoderPredictor.open(export(tmp_path_factory.mktemp(task), "tagging", TASKS[task].labels), "fp32")
        for task in GOLD
    }


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", GOLD)
def test_predictions_with_empty_sentences_match_xtremes_own_file(
    tmp_path: Path, predictors: dict[str, Any], task: str, layout: str, line_end: str
) -> None:
    one, two = GOLD[task]
    words = WORDS["en"]
    parts = [[(words[0], one), (words[1], two)], [(words[2], two), (words[3], one), (words[4], one)]]
    blocks = ["\n".join("\t".join(word) for word in part) for part in parts]
    text = LAYOUTS[layout].replace("{a}", blocks[0]).replace("{b}", blocks[1])
    write(tmp_path / f"data/{task}/test-de.tsv", text.replace("\n", line_end))
    tags = "\n".join(line.split("\t")[-1] for line in text.split("\n"))
    gold = write(tmp_path / f"gold/{task}/test-de.tsv", tags.replace("\n", line_end))

    counts = prepare_task(task, tmp_path / "data", tmp_path / "rows")
    records = read_records(tmp_path / "rows/test/de.jsonl", TASKS[task])
    assert counts["test"]["de"] == len(records)
    assert sum(not record.texts for record in records) == counts["skipped"].get("test", {}).get("de", {}).get(
        KEPT_EMPTY, 0
    )
    found = predictors[task].predict(records)
    assert [len(tags) for tags in found.values] == [len(record.texts) for record in records]
    ours = gold_file(tmp_path / "predictions", TASKS[task], "de")
    write_predictions(ours, "tagging", records, found.values)
    assert score_file(task, "de", ours, gold)["f1"] == pytest.approx(xtremes_f1(ours, gold), abs=1e-12)
    rewritten = gold_file(tmp_path / "labels", TASKS[task], "de")
    assert write_gold(rewritten, TASKS[task], records)
    assert score_file(task, "de", rewritten, gold)["f1"] == xtremes_f1(rewritten, gold) == 100


def test_empty_sentences_are_left_out_of_training_rows(tmp_path: Path) -> None:
    write(tmp_path / "data/panx/train-en.tsv", "Ulm\tB-LOC\n\n\nlives\tO\n")
    tagged(tmp_path / "data/panx/test-de.tsv", [[("Ulm", "B-LOC")]])
    counts = prepare_task("panx", tmp_path / "data", tmp_path / "rows")
    assert (counts["train"], counts["skipped"]) == ({"en": 2}, {"train": {"en": {"empty text": 1}}})
    assert all(row["words"] for row in jsonl(tmp_path / "rows/train/en.jsonl"))


@pytest.mark.parametrize("header", ["-DOCSTART- -X- O O\n\n", "-DOCSTART-\tO\n\n", "-DOCSTART-\n"])
def test_a_document_header_is_not_a_sentence(tmp_path: Path, header: str) -> None:
    write(tmp_path / "data/panx/test-de.tsv", f"{header}Ulm\tB-LOC\n\n{header}lebt\tO\n")
    counts = prepare_task("panx", tmp_path / "data", tmp_path / "rows")
    assert [row["words"] for row in jsonl(tmp_path / "rows/test/de.jsonl")] == [["Ulm"], ["lebt"]]
    assert counts["skipped"] == {}


def test_erased_labels_are_detected_beside_empty_sentences(tmp_path: Path) -> None:
    write(tmp_path / "data/panx/test-de.tsv", "Ulm\n\n\nlebt\n")
    prepare_task("panx", tmp_path / "data", tmp_path / "rows", PrepareOptions(allow_unlabelled_test=True))
    records = read_records(tmp_path / "rows/test/de.jsonl", TASKS["panx"])
    assert [len(record.texts) for record in records] == [1, 0, 1]
    assert not write_gold(tmp_path / "gold.tsv", TASKS["panx"], records)
