"""XTREME's metrics, 0 to 100: F1 over chunks of tags, accuracy, F1 over mined pairs, exact match and F1 of answers.

XTREME scored both taggers with seqeval 0.0.12, which cuts a tag sequence into chunks as conlleval does: a tag is a
letter (B, I, O; also E for end and S for single) and a kind. Parts of speech have no prefix, so the letter is the tag's
first one and the kind is the whole tag: NOUN NOUN is one chunk, SCONJ SCONJ two. From 1.0 on, seqeval takes the tag
without its first letter as the kind, so CCONJ counts as SCONJ, and X has no separate kind. Published numbers follow
0.0.12.

Question answering: SQuAD's rule for XQuAD and TyDiQA, MLQA's for MLQA. Both compare texts after lowercasing and
removing punctuation and articles. SQuAD's (version 1.1) uses ASCII punctuation and English articles in all languages.
MLQA's (Lewis et al. 2020, arXiv 1910.07475) uses Unicode punctuation and each language's articles, and counts every
Chinese character as a word.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from functools import cache
from itertools import chain

Chunk = tuple[str, int, int]  # kind, first and last position
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


def accuracy(gold: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Share of equal labels, 0 to 100. ValueError if there are none, or if the numbers differ."""
    correct = sum(one == other for one, other in zip(gold, predicted, strict=True))
    if not gold:
        raise ValueError("no labels to score")
    return correct / len(gold) * 100


def set_f1(gold: Set[Hashable], predicted: Set[Hashable]) -> dict[str, float]:
    """`f1`, `precision`, `recall`, 0 to 100; undefined values (nothing gold, nothing predicted) are 0."""
    correct = len(gold & predicted)
    precision = correct / len(predicted) if predicted else 0.0
    recall = correct / len(gold) if gold else 0.0
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return {"f1": f1 * 100, "precision": precision * 100, "recall": recall * 100}


def tagging_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """One language's tags, by sentence, 0 to 100.

    `f1`, `precision` and `recall` are XTREME's, over the chunks of seqeval 0.0.12. In addition, outside the official
    averages: `token_accuracy`, and `f1_seqeval_1_2`, the F1 of seqeval 1.2.2 in its default mode. ValueError if there
    are no tags, or if the sentences differ in number or length.
    """
    if list(map(len, gold)) != list(map(len, predicted)):
        raise ValueError("gold and predicted tags are in sentences of other lengths")
    newer = set_f1(tag_chunks(gold, kind=_newer_kind), tag_chunks(predicted, kind=_newer_kind))
    return {
        **set_f1(tag_chunks(gold), tag_chunks(predicted)),
        "token_accuracy": accuracy(list(chain.from_iterable(gold)), list(chain.from_iterable(predicted))),
        "f1_seqeval_1_2": newer["f1"],
    }


def _kind(tag: str) -> str:
    return tag.rpartition("-")[2]


def _newer_kind(tag: str) -> str:
    rest, dash, kind = tag[1:].partition("-")
    return (kind if dash else rest) or "_"


def tag_chunks(sentences: Sequence[Sequence[str]], kind: Callable[[str], str] = _kind) -> set[Chunk]:
    """The chunks of all sentences, concatenated with an "O" after each.

    A chunk may lack a beginning (in seqeval 1.2.2, X after O): it then starts where the last one did. This, and the
    letter ".", which counts as "O", only serve equality with seqeval's numbers.
    """
    found = set()
    first, letter, name = 0, "O", ""
    for position, tag in enumerate(tag for sentence in sentences for tag in (*sentence, "O")):
        next_letter, next_name = tag[0], kind(tag)
        changes = next_name != name
        ends = letter in "ES" or (letter in "BI" and next_letter in "BSO") or (letter not in "O." and changes)
        begins = next_letter in "BS" or (letter in "ESO" and next_letter in "EI")
        if ends:
            found.add((name, first, position - 1))
        if begins or (next_letter not in "O." and changes):
            first = position
        letter, name = next_letter, next_name
    return found


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
