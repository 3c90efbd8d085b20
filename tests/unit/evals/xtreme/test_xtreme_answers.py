"""Scores of QA answers equal those of XTREME's two scripts and of a slow count of shared words."""

from __future__ import annotations

import random
import string

import pytest

from evals.xtreme.metrics import answer_scores, mlqa_words, squad_words

# MLQA's language (None: SQuAD's rule), prediction, gold answer: exact match and F1 as XTREME's scripts print them.
MEASURED = [
    (None, "The Cat's, house", "a cats house", 100.0, 100.0),
    (None, "THE", "an", 100.0, 0.0),  # both are empty after normalisation
    (None, "“Paris”", "Paris", 0.0, 0.0),  # only ASCII punctuation is dropped
    (None, "das Haus der Katze", "Haus Katze", 0.0, 66.66666666666666),
    (None, "北京市", "北京", 0.0, 0.0),
    (None, "a.b. the-cat 1,998", "ab thecat 1998 dog", 0.0, 85.71428571428571),
    ("en", "“The Cat” – a dog", "cat dog", 100.0, 100.0),
    ("de", "Der Hund des Nachbarn", "hund Nachbarn", 100.0, 100.0),
    ("de", "einer Straße", "Straße eine", 100.0, 100.0),
    ("es", "¿Los años, una Casa?", "años casa el", 100.0, 100.0),
    ("es", "unas del las", "del", 100.0, 100.0),
    ("vi", "Những người của Việt", "người Việt", 100.0, 100.0),
    ("vi", "cái nhà là chiếc", "cái", 0.0, 0.0),
    ("ar", "الكتاب والمدرسة", "كتاب", 0.0, 50.0),
    ("ar", "العالم", "عالم ال", 100.0, 100.0),  # an article's letters at the end
    ("ar", "بالقلم", "ب قلم", 100.0, 100.0),  # and within a word
    ("zh", "中国北京，NBA赛", "北京 NBA", 0.0, 66.66666666666666),
    ("zh", "the 2008年《三国》", "2008 年三国", 0.0, 88.8888888888889),
    ("zh", "ゝ東京タワー", "東京", 0.0, 66.66666666666666),
    ("zh", "龥龦x 龦", "龦 龥x", 0.0, 66.66666666666666),  # the last character that stands alone, and the next
    ("en", "US$ <5>", "us 5", 100.0, 100.0),  # ASCII's symbols are punctuation too
    ("hi", "भारत की राजधानी।", "राजधानी", 0.0, 50.0),
    ("hi", "the दिल्ली", "दिल्ली", 0.0, 66.66666666666666),
]


@pytest.mark.parametrize(("language", "predicted", "gold", "exact_match", "f1"), MEASURED)
def test_answer_scores_equal_those_of_xtremes_scripts(
    language: str | None, predicted: str, gold: str, exact_match: float, f1: float
) -> None:
    normalise = mlqa_words(language) if language else squad_words
    scores = answer_scores([("q", [gold])], {"q": predicted}, normalise)
    assert scores == {"exact_match": exact_match, "f1": f1}


def squad_words_slowly(text: str) -> list[str]:
    kept = ""
    for char in text.lower():
        if char not in string.punctuation:
            kept += char
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def f1_slowly(predicted: str, gold: str) -> float:
    ours, theirs = squad_words_slowly(predicted), squad_words_slowly(gold)
    left, same = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            same += 1
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def test_scores_of_many_questions_equal_a_slow_count() -> None:
    rng = random.Random(11)
    words = ["the", "A", "an,", "cat", "Cat.", "dog", "dog-house", "1,000", "(b)", "ab", "of"]

    def text() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(0, 5)))

    gold = [(str(i), [text() for _ in range(rng.randint(1, 3))]) for i in range(400)]
    predicted = {question: text() for question, _ in gold}
    exact, f1 = 0, 0.0
    for question, answers in gold:
        exact += any(squad_words_slowly(predicted[question]) == squad_words_slowly(answer) for answer in answers)
        f1 += max([f1_slowly(predicted[question], answer) for answer in answers])
    scores = answer_scores(gold, predicted, squad_words)
    assert scores["exact_match"] == pytest.approx(exact / 4)
    assert scores["f1"] == pytest.approx(f1 / 4)
    assert 0 < exact < 400


def test_each_metric_takes_the_best_gold_answer() -> None:
    gold = [("q", ["red cat", "cat red dog", "fish"])]
    assert answer_scores(gold, {"q": "cat red"}, squad_words) == {"exact_match": 0, "f1": 100}
    assert answer_scores(gold, {"q": "Fish!"}, squad_words) == {"exact_match": 100, "f1": 100}
