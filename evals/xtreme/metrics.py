"""XTREME's metrics over labels: F1 over chunks of tags, accuracy, F1 over mined pairs; 0 to 100.

XTREME scored both taggers with seqeval 0.0.12, which cuts a tag sequence into chunks as conlleval does: a tag is a
letter (B, I, O; also E for end and S for single) and a kind. Parts of speech have no prefix, so the letter is the tag's
first one and the kind is the whole tag: NOUN NOUN is one chunk, SCONJ SCONJ two. From 1.0 on, seqeval takes the tag
without its first letter as the kind, so CCONJ counts as SCONJ, and X has no kind of its own. Published numbers follow
0.0.12.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence, Set
from itertools import chain

Chunk = tuple[str, int, int]  # kind, first and last position


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
