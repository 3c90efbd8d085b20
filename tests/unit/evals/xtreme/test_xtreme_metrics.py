"""Chunk F1 equals a second implementation of its definition and values of seqeval; F1 of sets."""

from __future__ import annotations

import random

import pytest

from data_pipeline.xtreme.tasks import TASKS
from evals.xtreme.metrics import accuracy, set_f1, tag_chunks, tagging_scores

# gold, predicted ("|" between sentences): f1, precision, recall of seqeval 0.0.12; f1 of seqeval 1.2.2.
MEASURED = [
    ("CCONJ VERB", "SCONJ VERB", 50.0, 50.0, 50.0, 100.0),
    ("CCONJ CCONJ SCONJ", "CCONJ SCONJ SCONJ", 40.0, 33.33333333333333, 50.0, 66.66666666666666),
    (
        "NOUN NOUN VERB|SCONJ SCONJ PUNCT",
        "NOUN VERB VERB|SCONJ ADP PUNCT",
        40.00000000000001,
        40.0,
        40.0,
        40.00000000000001,
    ),
    (
        "NOUN X X NOUN|X VERB X",
        "NOUN X NOUN NOUN|X VERB VERB",
        36.36363636363636,
        40.0,
        33.33333333333333,
        20.000000000000004,
    ),
    ("SYM INTJ INTJ NUM NUM|INTJ SCONJ INTJ", "SYM INTJ NUM NUM NUM|INTJ SCONJ SCONJ", 50.0, 50.0, 50.0, 50.0),
    ("B-PER I-PER O B-LOC|B-ORG I-ORG", "B-PER I-PER O B-LOC|B-ORG O", *[66.66666666666666] * 4),
    (
        "O I-LOC I-LOC O|B-LOC I-ORG B-ORG I-ORG",
        "O B-LOC I-LOC O|B-LOC I-ORG I-ORG I-ORG",
        57.14285714285715,
        66.66666666666666,
        50.0,
        57.14285714285715,
    ),
    ("B-PER B-PER I-PER O|I-PER|O O", "B-PER I-PER I-PER O|B-PER|O B-LOC", *[33.33333333333333] * 4),
    ("O O|O", "O O|O", 0.0, 0.0, 0.0, 0.0),
]


def sentences(text: str) -> list[list[str]]:
    return [sentence.split() for sentence in text.split("|")]


@pytest.mark.parametrize(("gold", "predicted", "f1", "precision", "recall", "newer"), MEASURED)
def test_tagging_scores_equal_those_of_both_seqeval_versions(
    gold: str, predicted: str, f1: float, precision: float, recall: float, newer: float
) -> None:
    scores = tagging_scores(sentences(gold), sentences(predicted))
    assert scores.pop("token_accuracy") == pytest.approx(shared_tokens(sentences(gold), sentences(predicted)))
    assert scores == {"f1": f1, "precision": precision, "recall": recall, "f1_seqeval_1_2": newer}


def shared_tokens(gold: list[list[str]], predicted: list[list[str]]) -> float:
    same = total = 0
    for i in range(len(gold)):
        for j in range(len(gold[i])):
            total += 1
            same += gold[i][j] == predicted[i][j]
    return 100 * same / total


def parts_of_speech_by_definition(tags: list[list[str]]) -> set[tuple[int, int, int, str]]:
    """Longest runs of one tag within a sentence; a tag that begins with S is always on its own."""
    found = set()
    for i, sentence in enumerate(tags):
        j = 0
        while j < len(sentence):
            k = j + 1
            while k < len(sentence) and sentence[k] == sentence[j] and sentence[j][0] != "S":
                k += 1
            found.add((i, j, k, sentence[j]))
            j = k
    return found


def entities_by_definition(tags: list[list[str]]) -> set[tuple[int, int, int, str]]:
    """conlleval: an entity begins at B, or at I after O or after another type, and lasts while I of its type follow."""
    found = set()
    for i, sentence in enumerate(tags):
        for j, tag in enumerate(sentence):
            continues = tag[0] == "I" and j > 0 and sentence[j - 1][2:] == tag[2:]
            if tag == "O" or continues:
                continue
            k = j + 1
            while k < len(sentence) and sentence[k] == "I-" + tag[2:]:
                k += 1
            found.add((i, j, k, tag[2:]))
    return found


@pytest.mark.parametrize(
    ("labels", "define"),
    [(TASKS["udpos"].labels, parts_of_speech_by_definition), (TASKS["panx"].labels, entities_by_definition)],
    ids=["udpos", "panx"],
)
def test_chunk_f1_equals_its_definition(labels: tuple[str, ...], define) -> None:
    rng = random.Random(5)
    for _ in range(300):
        few = rng.sample(labels, 4)  # so that equal tags are often adjacent
        gold = [[rng.choice(few) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 5))]
        predicted = [[tag if rng.random() < 0.7 else rng.choice(few) for tag in sentence] for sentence in gold]
        ours, theirs = define(predicted), define(gold)
        right = len([chunk for chunk in ours if chunk in theirs])
        scores = tagging_scores(gold, predicted)
        assert scores["precision"] == pytest.approx(100 * right / len(ours) if ours else 0)
        assert scores["recall"] == pytest.approx(100 * right / len(theirs) if theirs else 0)
        assert scores["f1"] == pytest.approx(200 * right / (len(ours) + len(theirs)) if right else 0)
        assert scores["token_accuracy"] == pytest.approx(shared_tokens(gold, predicted))


def test_chunks_do_not_cross_sentences() -> None:
    assert tag_chunks([["NOUN", "NOUN"], ["NOUN"], [], ["B-LOC", "I-LOC"], ["I-LOC"]]) == {
        ("NOUN", 0, 1), ("NOUN", 3, 3), ("LOC", 6, 7), ("LOC", 9, 9)
    }  # fmt: skip


def test_tags_of_other_schemes_are_read() -> None:
    tags = [["S-A", "B-A", "E-A", "E-A", "I-A", ".", "S", "E"]]
    assert tag_chunks(tags) == {("A", 0, 0), ("A", 1, 2), ("A", 3, 3), ("A", 4, 4), ("S", 6, 6), ("E", 7, 7)}


def test_set_f1_precision_and_recall() -> None:
    assert set_f1({1, 2, 3, 4}, {3, 4, 5}) == pytest.approx({"f1": 400 / 7, "precision": 200 / 3, "recall": 50})
    for gold, predicted in (({1}, set()), (set(), {1}), ({1}, {2}), (set(), set())):
        assert set_f1(gold, predicted) == {"f1": 0, "precision": 0, "recall": 0}


def test_accuracy_is_the_share_of_equal_labels() -> None:
    assert accuracy("aabb", "abbb") == 75
    with pytest.raises(ValueError, match="no labels"):
        accuracy([], [])
    with pytest.raises(ValueError, match="shorter"):
        accuracy("ab", "a")


@pytest.mark.parametrize("predicted", [[["X"]], [["X"], ["X"]], [["X", "X", "X"], ["X"]]])
def test_sentences_of_different_lengths_are_refused(predicted: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="other lengths"):
        tagging_scores([["X", "X"], ["X"]], predicted)
