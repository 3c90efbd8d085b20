"""Scores of question answering: SQuAD's rule for XQuAD and TyDiQA, MLQA's for MLQA; exact match and F1 over words.

Both rules compare texts after lowercasing and removing punctuation and articles. SQuAD's (version 1.1) uses ASCII
punctuation and English articles in all languages. MLQA's (Lewis et al. 2020, arXiv 1910.07475) uses Unicode punctuation
and each language's articles, and counts every Chinese character as a word.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache

Normalise = Callable[[str], list[str]]  # text -> the words to compare

_NO_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ENGLISH_ARTICLES = "a|an|the"
_ARTICLES = {
    "de": "ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des",
    "en": _ENGLISH_ARTICLES,
    "es": "un|una|unos|unas|el|la|los|las",
    "vi": "của|là|cái|chiếc|những",
}
_ARABIC_ARTICLE = "ال"
_HAN = re.compile("[\u4e00-\u9fa5]")  # the range in MLQA's script: no rarer characters, no Japanese kana


def squad_words(text: str) -> list[str]:
    """SQuAD 1.1: the answer's words in lower case, without ASCII punctuation and English articles."""
    text = text.lower().translate(_NO_ASCII_PUNCTUATION)
    return re.sub(rf"\b({_ENGLISH_ARTICLES})\b", " ", text).split()


def mlqa_words(language: str) -> Normalise:
    """MLQA's rule for answers in one of its seven languages.

    Its Arabic rule is meant to delete the article at the start of words, but deletes its two letters anywhere.
    """

    def words(text: str) -> list[str]:
        text = "".join(char for char in text.lower() if not _is_punctuation(char))
        if language == "ar":
            text = text.replace(_ARABIC_ARTICLE, " ")
        elif language == "zh":
            text = _HAN.sub(r" \g<0> ", text)
        elif language in _ARTICLES:
            text = re.sub(rf"\b({_ARTICLES[language]})\b", " ", text)
        return text.split()

    return words


def answer_scores(
    gold: Sequence[tuple[str, Sequence[str]]], predicted: Mapping[str, str], normalise: Normalise
) -> dict[str, float]:
    """`exact_match` and `f1`, 0 to 100, means over questions; the best of several gold answers counts.

    `gold` is (question's id, its answers), at least one of each. If both sides are empty after normalising, exact match
    is 1 and F1 is 0, as in the official scripts. KeyError for a question without prediction.
    """
    exact, f1 = 0, 0.0
    for question, answers in gold:
        words = normalise(predicted[question])
        accepted = [normalise(answer) for answer in answers]
        exact += words in accepted
        f1 += max(_f1(words, other) for other in accepted)  # not sum(), which some Python versions round differently
    return {"exact_match": 100.0 * exact / len(gold), "f1": 100.0 * f1 / len(gold)}


def _f1(words: list[str], gold: list[str]) -> float:
    same = (Counter(words) & Counter(gold)).total()
    if not same:
        return 0.0
    precision, recall = same / len(words), same / len(gold)
    return 2 * precision * recall / (precision + recall)


@cache
def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")
