"""Soft labels are the teacher's probabilities in the task's label order; other fields are unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_encoders import WORDS
from tiny_task_model import export

from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.rows import check_example, read_task_file
from data_pipeline.xtreme.tasks import TASKS
from evals.errors import EvalError
from evals.xtreme import teacher
from evals.xtreme.predict import EncoderPredictor
from evals.xtreme.teacher import soft_labels

TAGS = TASKS["panx"].labels


def write_rows(file: Path, n: int, **more: Any) -> list[dict[str, Any]]:
    rows = [
        {
            "id": f"r{at}",
            "group": f"panx-train-en-{at}",
            "language": "zh",
            "words": list(WORDS["zh"][: 1 + at % 7]),
            **more,
        }
        for at in range(n)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows


def test_rows_get_the_teachers_probabilities_and_keep_their_other_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evals.xtreme.teacher.CHUNK", 4)
    predictor = EncoderPredictor.open(export(tmp_path / "model", "tagging", TAGS[::-1]), "fp32")  # another order
    rows = write_rows(tmp_path / "mt" / "zh.jsonl", 10, tags=None, back_words=["old", "bridge"])
    advanced: list[int] = []
    monkeypatch.setattr(teacher.Progress, "advance", lambda self, n=1: advanced.append(n))
    counts = soft_labels(predictor, "panx", [tmp_path / "mt"], tmp_path / "out")
    assert counts == {"zh.jsonl": 10}
    assert advanced == [4, 4, 2]
    written = [json.loads(line) for line in (tmp_path / "out" / "zh.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in row if key != "soft_tags"} for row in written] == [
        {key: row[key] for key in row if key != "tags"} for row in rows
    ]
    expected = predictor.tag_probabilities(list(read_task_file(tmp_path / "mt" / "zh.jsonl", "tagging")))
    for row, words in zip(written, expected, strict=True):
        np.testing.assert_allclose(np.array(row["soft_tags"]), words[:, ::-1], atol=1e-5)
    config = TaskConfig(kind="tagging", labels=TAGS)
    for record in read_task_file(tmp_path / "out" / "zh.jsonl", "tagging"):  # as training reads them
        check_example(record.example, config, record.origin)
        assert record.back is not None


def test_a_model_that_is_not_a_tagger_of_the_task_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "zh.jsonl", 1)
    tagger = EncoderPredictor.open(export(tmp_path / "tagger", "tagging", TAGS), "fp32")
    classifier = EncoderPredictor.open(export(tmp_path / "classifier", "classification", TAGS), "fp32")
    with pytest.raises(EvalError, match=r"its labels are B-LOC, .*; those of udpos are ADJ"):
        soft_labels(tagger, "udpos", [tmp_path / "zh.jsonl"], tmp_path / "out")
    with pytest.raises(EvalError, match="its labels are"):
        soft_labels(classifier, "panx", [tmp_path / "zh.jsonl"], tmp_path / "out")
    with pytest.raises(EvalError, match="task 'xnli' is not a tagging task"):
        soft_labels(tagger, "xnli", [tmp_path / "zh.jsonl"], tmp_path / "out")
    with pytest.raises(EvalError, match=r"zh\.jsonl: is the input; name another --output"):
        soft_labels(tagger, "panx", [tmp_path / "zh.jsonl"], tmp_path)
    with pytest.raises(EvalError, match=r"de\.jsonl: no such file"):
        soft_labels(tagger, "panx", [tmp_path / "de.jsonl"], tmp_path / "out")
    with pytest.raises(EvalError, match="a second file of that name"):
        soft_labels(tagger, "panx", [tmp_path / "zh.jsonl"] * 2, tmp_path / "out")
    assert not (tmp_path / "out" / "de.jsonl").exists()
