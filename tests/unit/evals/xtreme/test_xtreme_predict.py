"""Predictions in batches and windows equal those of the same tiny model run on single texts."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_encoders import WORDS, unigram, wordpiece
from tiny_task_model import export
from tokenizers import normalizers
from transformers import BertTokenizer, XLMRobertaTokenizer

from data_pipeline.records import Example, Record
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.tokenize import TaskTokenizer
from data_pipeline.xtreme.tasks import TASKS
from evals.errors import EvalError
from evals.xtreme.label_files import read_answers, read_labels, read_tags
from evals.xtreme.predict import EncoderPredictor, write_predictions
from evals.xtreme.score import score_file
from evals.xtreme.spans import ScoredWindow, best_span

CLASSES = ("contradiction", "entailment", "neutral")
TAGS = TASKS["panx"].labels
ALL_WORDS = [word for words in WORDS.values() for word in words]


def words(rng: np.random.Generator, n: int) -> tuple[str, ...]:
    return tuple(ALL_WORDS[number] for number in rng.integers(len(ALL_WORDS), size=n))


def record(
    number: int, language: str, texts: tuple[str, ...], back: tuple[str, ...] | None = None, **labels: Any
) -> Record:
    example = Example(texts, **labels)
    return Record(f"r{number}", f"g{number}", language, f"rows.jsonl:{number + 1}", example, back and Example(back))


def pairs(n: int, seed: int = 0, language: str = "de", back: bool = False) -> list[Record]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(n):
        texts = tuple(" ".join(words(rng, int(rng.integers(1, 12)))) for _ in range(4))
        made.append(record(number, language, texts[:2], texts[2:] if back else None))
    return made


def plain(model: Any, hf: Any, *texts: str, length: int = 24) -> Any:
    inputs = hf(*texts, truncation="longest_first", max_length=length, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs)


# --- classification


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_batched_labels_equal_those_of_single_texts_in_row_order(
    tmp_path: Path, family: Any, batch_tokens: int
) -> None:
    predictor = EncoderPredictor.open(export(tmp_path, "classification", CLASSES, family=family), "fp32", batch_tokens)
    rows = pairs(23)
    hf = predictor.tokenizer.tokenizer
    expected = np.stack([plain(predictor.model, hf, *row.example.texts).logits[0].numpy() for row in rows])
    assert len({tuple(row) for row in expected.round(3)}) == 23  # so the order matters
    np.testing.assert_allclose(predictor.class_logits(rows), expected, atol=1e-5)
    found = predictor.predict(rows)
    assert found.values == [CLASSES[number] for number in expected.argmax(axis=1)]
    assert found.mixed == 0


def mixed_logits(predictor: EncoderPredictor, target: tuple[str, ...], source: tuple[str, ...]) -> torch.Tensor:
    """(2, C): one pair by itself, its rows in the tokenizer's own padding."""
    hf, mixup = predictor.tokenizer.tokenizer, predictor.mixup
    cut = [hf(*side, truncation="longest_first", max_length=24) for side in (target, source)]
    inputs = hf.pad({key: [each[key] for each in cut] for key in cut[0]}, return_tensors="pt")
    assert mixup is not None
    with torch.no_grad(), mixup.batch(inputs["attention_mask"], 1):
        return predictor.model(**inputs).logits


def test_logits_of_both_sides_are_averaged_for_rows_with_a_translation(tmp_path: Path) -> None:
    folder = export(tmp_path, "classification", CLASSES, mixup_layer=1)
    predictor = EncoderPredictor.open(folder, "fp32", batch_tokens=200)
    translated, bare = pairs(17, back=True), pairs(5, seed=1)
    rows = [row for two in zip(translated, [*bare, *[None] * 12], strict=True) for row in two if row is not None]
    hf = predictor.tokenizer.tokenizer
    alone = np.stack([plain(predictor.model, hf, *row.example.texts).logits[0].numpy() for row in rows])
    expected = alone.copy()
    for number, row in enumerate(rows):
        if row.back is not None:
            both = mixed_logits(predictor, row.example.texts, row.back.texts).numpy()
            expected[number] = both.mean(axis=0)
            assert np.abs(both[0] - alone[number]).max() > 1e-3  # the target is mixed
            assert np.abs(both[0] - both[1]).max() > 1e-3  # and the source has other logits
    np.testing.assert_allclose(predictor.class_logits(rows), expected, atol=1e-5)
    np.testing.assert_allclose(predictor.class_logits(rows, "off"), alone, atol=1e-5)
    found = predictor.predict(rows)
    assert found.values == [CLASSES[number] for number in expected.argmax(axis=1)]
    assert found.mixed == 17
    assert predictor.predict(rows, "off").mixed == 0


def test_a_row_of_the_dominant_language_is_its_own_source(tmp_path: Path) -> None:
    predictor = EncoderPredictor.open(export(tmp_path, "classification", CLASSES, mixup_layer=0), "fp32")
    rows = pairs(12, language="en")
    sides = [mixed_logits(predictor, row.example.texts, row.example.texts).mean(dim=0).numpy() for row in rows]
    np.testing.assert_allclose(predictor.class_logits(rows, "on"), np.stack(sides), atol=1e-5)
    assert predictor.predict(rows).mixed == 12


def test_impossible_mixing_is_refused_with_the_language(tmp_path: Path) -> None:
    mixing = EncoderPredictor.open(export(tmp_path / "a", "classification", CLASSES, mixup_layer=0), "fp32")
    rows = [*pairs(2, back=True), *pairs(1, language="sw")]
    with pytest.raises(EvalError, match=r"rows.jsonl:1: mixup is 'on', but this row of language 'sw' has no transl"):
        mixing.predict(rows, "on")
    never = EncoderPredictor.open(export(tmp_path / "b", "classification", CLASSES), "fp32")
    with pytest.raises(EvalError, match="the model has no X-Mixup"):
        never.predict(rows, "on")
    assert never.predict(rows).mixed == 0


def test_a_model_without_a_task_is_refused(tmp_path: Path) -> None:
    folder = export(tmp_path, "classification", CLASSES)
    (folder / "crosslift.json").unlink()
    with pytest.raises(EvalError, match=r"crosslift\.json: missing, or without a task"):
        EncoderPredictor.open(folder)


# --- tagging


def tag_logits(predictor: EncoderPredictor, sentence: tuple[str, ...], first: int, stop: int, pooling: str) -> Any:
    """(stop - first, C): words first..stop-1 alone; a word's tokens are those of the tokenizer's `word_ids`."""
    hf = predictor.tokenizer.tokenizer
    encoded = hf(list(sentence[first:stop]), is_split_into_words=True, return_tensors="pt")
    assert encoded["input_ids"].shape[1] <= predictor.tokenizer.sequence_length
    with torch.no_grad():
        logits = predictor.model(**encoded).logits[0].numpy()
    of_word = encoded.word_ids()
    rows = []
    for word in range(stop - first):
        tokens = [logits[place] for place, each in enumerate(of_word) if each == word]
        rows.append(np.mean(tokens, axis=0) if pooling == "mean" else tokens[0])
    return np.stack(rows)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_every_word_of_a_long_sentence_is_tagged_in_the_window_with_most_context(
    tmp_path: Path, family: Any, pooling: str
) -> None:
    folder = export(tmp_path, "tagging", TAGS, family=family, length=40, word_pooling=pooling, doc_stride=12)
    predictor = EncoderPredictor.open(folder, "fp32", batch_tokens=90)
    rng = np.random.default_rng(3)
    rows = [record(number, "de", words(rng, n)) for number, n in enumerate([1, 30, 2, 45, 5])]
    expected, n_windows = [], []
    for row in rows:
        sentence = row.example.texts
        ranges = [window.words for window in predictor.tokenizer.windows(row.example)]
        n_windows.append(len(ranges))
        logits = [tag_logits(predictor, sentence, *each, pooling) for each in ranges]
        words_logits = []
        for word in range(len(sentence)):
            contexts = [
                min(word - first, stop - 1 - word) + 0.01 * (stop - first) if first <= word < stop else -1
                for first, stop in ranges
            ]
            best = contexts.index(max(contexts))
            words_logits.append(logits[best][word - ranges[best][0]])
        expected.append(np.stack(words_logits))
    for found, logits in zip(predictor.tag_probabilities(rows), expected, strict=True):
        np.testing.assert_allclose(found, torch.tensor(logits).softmax(dim=1).numpy(), atol=1e-5)
    assert predictor.predict(rows).values == [tuple(TAGS[tag] for tag in each.argmax(axis=1)) for each in expected]
    assert max(n_windows) > 3
    assert n_windows[0] == 1


def test_tag_probabilities_are_the_softmax_of_the_pooled_logits(tmp_path: Path) -> None:
    predictor = EncoderPredictor.open(export(tmp_path, "tagging", TAGS, length=60), "fp32")
    sentence = ("The", "old", "bridge", "in", "Budapest")
    logits = tag_logits(predictor, sentence, 0, 5, "mean")
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    (found,) = predictor.tag_probabilities([record(0, "en", sentence)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_mixed_tagger_takes_the_tags_of_the_target_side(tmp_path: Path) -> None:
    predictor = EncoderPredictor.open(export(tmp_path, "tagging", TAGS, length=60, mixup_layer=1), "fp32")
    rng = np.random.default_rng(5)
    rows = [record(number, "de", words(rng, 4), words(rng, 6)) for number in range(6)]
    expected = []
    hf, mixup = predictor.tokenizer.tokenizer, predictor.mixup
    assert mixup is not None
    for row in rows:
        assert row.back is not None
        sides = [hf(list(each), is_split_into_words=True) for each in (row.example.texts, row.back.texts)]
        inputs = hf.pad({"input_ids": [each["input_ids"] for each in sides]}, return_tensors="pt")
        with torch.no_grad(), mixup.batch(inputs["attention_mask"], 1):
            logits = predictor.model(**inputs).logits[0].numpy()
        of_word = sides[0].word_ids()
        means = [
            logits[[place for place, each in enumerate(of_word) if each == word]].mean(axis=0) for word in range(4)
        ]
        expected.append(tuple(TAGS[int(mean.argmax())] for mean in means))
    found = predictor.predict(rows)
    assert (found.values, found.mixed) == (expected, 6)
    assert found.values != predictor.predict(rows, "off").values


# --- question answering


def questions(n: int, seed: int = 0, back: bool = False) -> list[Record]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(n):
        context = " ".join(words(rng, int(rng.integers(4, 40))))
        other = (" ".join(words(rng, 3)), " ".join(words(rng, 20))) if back else None
        made.append(record(number, "de", (" ".join(words(rng, 3)), context), other))
    return made


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_answers_are_substrings_of_the_context(tmp_path: Path, family: Any) -> None:
    folder = export(tmp_path, "qa", family=family, length=60, doc_stride=16, max_question_length=20)
    predictor = EncoderPredictor.open(folder, "fp32", batch_tokens=200)
    rows = questions(12)
    answers = predictor.predict(rows).values
    for row, answer in zip(rows, answers, strict=True):
        assert answer
        assert answer in row.example.texts[1]
        assert answer == answer.strip()
    assert max(len(predictor.tokenizer.windows(row.example)) for row in rows) > 3
    assert predictor.predict(list(reversed(rows))).values == answers[::-1]


def strips_accents() -> Any:
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789.?"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, do_lower_case=True, strip_accents=True)


def composes() -> Any:
    """Like XLM-R's, whose normaliser composes decomposed characters."""
    pieces = {"<s>": 0.0, "<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0}
    pieces |= dict.fromkeys([*"abcdefghijklmnopqrstuvwxyzéÂ0123456789.?"], -6.0)
    tokenizer = XLMRobertaTokenizer(vocab=[*pieces.items(), ("<mask>", 0.0)])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


@pytest.mark.parametrize("make", [wordpiece, unigram, strips_accents, composes])
def test_an_answer_keeps_its_decomposed_accents(make: Any) -> None:
    """Whether the tokenizer keeps, separates, strips or composes them."""
    context = unicodedata.normalize("NFD", "cafe café 12 Âncora é fim é")
    tokenizer = TaskTokenizer(make(), TaskConfig(kind="qa", max_question_length=8, doc_stride=8), 64)
    words = [(found.start(), found.group()) for found in re.finditer(r"\S+", context)]
    for start, answer in words:
        window = tokenizer.windows(Example(("1?", context), answers=((answer, start),)))[0]
        assert window.span is not None
        first, last = window.span
        scores = [np.full(len(window), -9.0, np.float32) for _ in range(2)]
        scores[0][first] = scores[1][last] = 9.0
        assert best_span(context, [ScoredWindow(window, *scores)]).text == answer
    # an accent that is a token by itself belongs to that token only
    offsets = tokenizer.windows(Example(("1?", context)))[0].context_offsets
    assert offsets is not None
    covered = [place for a, b in offsets.tolist() if a >= 0 for place in range(a, b)]
    assert {place for place, char in enumerate(context) if not char.isspace()} <= set(covered)


def test_gold_answers_do_not_change_predictions(tmp_path: Path) -> None:
    folder = export(tmp_path, "qa", length=60, doc_stride=16, max_question_length=20, mixup_layer=1)
    predictor = EncoderPredictor.open(folder, "fp32")
    rows = questions(8, back=True)
    labelled = [
        Record(
            row.id, row.group, row.language, row.origin,
            Example(row.example.texts, answers=((row.example.texts[1][:3], 0),)),
            row.back and Example(row.back.texts, answers=((row.back.texts[1][-3:], len(row.back.texts[1]) - 3),)),
        )
        for row in rows
    ]  # fmt: skip
    found = predictor.predict(rows)
    assert found.mixed == 8
    assert predictor.predict(labelled).values == found.values
    assert found.values != predictor.predict(rows, "off").values


# --- files


def test_the_scorer_reads_written_predictions(tmp_path: Path) -> None:
    labels = ["neutral", "entailment", "neutral"]
    write_predictions(tmp_path / "c.tsv", "classification", pairs(3), labels)
    assert read_labels(tmp_path / "c.tsv", CLASSES) == labels
    write_predictions(tmp_path / "cg.tsv", "classification", pairs(3), ["neutral", "entailment", "contradiction"])
    assert score_file("xnli", "de", tmp_path / "c.tsv", tmp_path / "cg.tsv")["accuracy"] == pytest.approx(200 / 3)
    tags = [("O", "B-PER"), ("O",), ("B-LOC", "I-LOC", "O")]
    write_predictions(tmp_path / "t.tsv", "tagging", pairs(3), tags)
    assert [sentence.tags for sentence in read_tags(tmp_path / "t.tsv", TAGS)] == tags
    assert (tmp_path / "t.tsv").read_text().endswith("O\n")
    rows = questions(2)
    write_predictions(tmp_path / "q.json", "qa", rows, ["Brücke ", ""])
    assert read_answers(tmp_path / "q.json") == {"r0": "Brücke ", "r1": ""}
    assert list(json.loads((tmp_path / "q.json").read_bytes())) == ["r0", "r1"]
    assert not list(tmp_path.glob(".*"))


def test_questions_that_share_an_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"q\.json: 2 questions share 1 ids"):
        write_predictions(tmp_path / "q.json", "qa", [*questions(1), *questions(1)], ["a", "b"])
    assert not (tmp_path / "q.json").exists()
