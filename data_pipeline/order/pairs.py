"""Which items the languages share, and why they share none; signs that rows of the same item are no translations.

In: a DataIndex. Out: counts, and sentences for people. Next: `training/checks/pairs.py`, which refuses,
warns and shows pairs.

Rows pair by `Record.group`, compared in Unicode's form NFC. Everything here reads a bounded number of rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.records import Record
from data_pipeline.sources.index import DataIndex
from data_pipeline.text.templates import language_name

LOOKED_AT = 2_000  # rows a language whose ids are compared
COMPARED = 200  # pairs a language whose texts are compared
FEWEST = 20  # pairs that say something
RANDOM_Z = 2.33  # standard errors that the correlation of unrelated texts exceeds once in a hundred times
EXAMPLES = 2


@dataclass(frozen=True, slots=True)
class Shared:
    """Items of a language's training rows, and how many of them have a row in the dominant language too."""

    items: int
    shared: int


def shared_items(index: DataIndex, dominant: int) -> dict[int, Shared]:
    """By language, but for the dominant one. Bad and held-out rows count for nothing."""
    groups = [np.unique(index.group[_usable(index, language)]) for language in range(len(index.languages))]
    return {
        language: Shared(len(found), len(np.intersect1d(found, groups[dominant], assume_unique=True)))
        for language, found in enumerate(groups)
        if language != dominant
    }


def why_unpaired(index: DataIndex, language: int, dominant: int) -> str:
    """Ids of two languages that share no item, and the likely cause."""
    codes = [index.languages[each] for each in (dominant, language)]
    records = [_records(index, each) for each in (dominant, language)]
    ids = [{record.group: record for record in found} for found in records]
    for row in (int(_usable(index, each)[0]) for each in (dominant, language)):
        source = index.source(row)
        if source.columns.id is None and source.columns.group is None and source.languages is None:
            return (
                f"source {source.name!r} maps no id and no group column, so each of its rows is an item of its own; set"
                " columns.id to the column that is the same in translations"
            )
    shown = " and ".join(
        f"{', '.join(map(_quoted, list(found)[:EXAMPLES]))} ({code})" for code, found in zip(codes, ids, strict=True)
    )
    return f"ids look like {shown}; {_cause(ids, codes)}"


def _cause(ids: Sequence[dict[str, Record]], codes: Sequence[str]) -> str:
    without_code = [{_without_code(name, code) for name in found} for found, code in zip(ids, codes, strict=True)]
    if without_code[0] & without_code[1]:
        return (
            "they hold the language, and would be equal without it: map columns.group to a column that is the same in"
            " translations"
        )
    folded = [{_folded(name): name for name in found} for found in ids]
    if (alike := next((key for key in folded[0] if key in folded[1]), None)) is not None:
        one, other = (found[alike] for found in folded)
        return (
            f"{_quoted(one)} ({ids[0][one].origin}) and {_quoted(other)} ({ids[1][other].origin}) look alike but"
            f" differ in {_difference(one, other)}: make them equal"
        )
    return "no two of them are alike: map columns.id or columns.group to a column that is the same in translations"


def repeated_ids(index: DataIndex) -> Iterator[str]:
    """By language, an id that stands at several texts where ids are what rows pair by: a sentence for people."""
    for language, code in enumerate(index.languages):
        rows = _usable(index, language)
        rows = rows[np.lexsort((rows, index.group[rows]))]
        again = index.group[rows[1:]] == index.group[rows[:-1]]
        again &= index.content[rows[1:]] != index.content[rows[:-1]]
        places = [place for place in np.flatnonzero(again).tolist() if _pairs_by_id(index, int(rows[place]))]
        if not places:
            continue
        first, second = (index.record(int(rows[places[0] + step])) for step in (0, 1))
        more = f", and {len(places) - 1:,} more such rows" if len(places) > 1 else ""
        yield (
            f"id {_quoted(first.group)} stands at different texts in {code!r}: {first.origin} and {second.origin}{more}"
            "; ids that begin anew in every file make unrelated rows translations: make them unique, or map"
            " columns.group"
        )


def unlike_texts(index: DataIndex, language: int, dominant: int) -> str | None:
    """Why the paired texts of two languages look unrelated; None where they do not, or where too few tell.

    Two signs, each held against chance: whether numbers of one text stand in the other, more often than in the text of
    another pair; and whether long texts go with long ones (rank correlation). Both have to be missing, as far as the
    texts have any: numbers at all, and lengths that vary.
    """
    usable = _usable(index, language)
    paired = usable[np.isin(index.group[usable], index.group[_usable(index, dominant)])]
    rows = paired[:: max(len(paired) // COMPARED, 1)][:COMPARED].tolist()
    texts = [index.record(row).user_text for row in rows]
    others = [index.record(index.translation(row, dominant)).user_text for row in rows]
    numbers, lengths = _numbers_agree(texts, others), _lengths_agree(texts, others)
    signs = [sign for sign in (numbers, lengths) if sign is not None]
    if not signs or any(agrees for agrees, _ in signs):
        return None
    return " and ".join(said for _, said in signs)


def _numbers_agree(texts: Sequence[str], others: Sequence[str]) -> tuple[bool, str] | None:
    found = [(_numbers(one), _numbers(other)) for one, other in zip(texts, others, strict=True)]
    found = [(one, other) for one, other in found if one and other]
    if len(found) < FEWEST:
        return None
    agree = float(np.mean([bool(one & other) for one, other in found]))
    strangers = [
        bool(one & found[(place + turn) % len(found)][1])
        for turn in range(1, FEWEST // 2)
        for place, (one, _) in enumerate(found)
    ]
    chance = float(np.mean(strangers))
    if chance > 0.5:  # the same few numbers stand everywhere
        return None
    spread = np.sqrt(max(chance, 1 / len(found)) / len(found))
    return bool(agree > chance + 3 * spread), (
        f"numbers agree in {agree:.0%} of {len(found)} pairs ({chance:.0%} in texts of different items)"
    )


def _lengths_agree(texts: Sequence[str], others: Sequence[str]) -> tuple[bool, str] | None:
    ranks = [_ranks(np.array([len(text) for text in each])) for each in (texts, others)]
    if len(texts) < FEWEST or any(np.ptp(each) == 0 for each in ranks):
        return None
    correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    return bool(correlation * np.sqrt(len(texts) - 1) > RANDOM_Z), (
        f"long texts do not go with long ones (rank correlation {correlation:.2f} over {len(texts)} pairs)"
    )


def _numbers(text: str) -> set[int]:
    return {int(digits) for digits in re.findall(r"\d{1,18}", text)}  # of any script


def _ranks(values: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mean ranks, equal ones for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    stops = np.cumsum(counts)
    return (stops - (counts - 1) / 2)[inverse]


def _usable(index: DataIndex, language: int) -> npt.NDArray[np.int64]:
    rows = index.rows(language)
    return rows[~index.bad[rows]]


def _records(index: DataIndex, language: int) -> list[Record]:
    return [index.record(int(row)) for row in _usable(index, language)[:LOOKED_AT]]


def _pairs_by_id(index: DataIndex, row: int) -> bool:
    columns = index.source(row).columns
    return columns.id is not None and columns.group in (None, columns.id)


def _without_code(name: str, code: str) -> str:
    words = "|".join(re.escape(word) for word in (language_name(code), code))
    return re.sub(rf"(?<![^\W_])(?:{words})(?![^\W_])", "", name, flags=re.IGNORECASE)


def _invisible(name: str) -> str:
    return "".join(character for character in name if unicodedata.category(character) in ("Cf", "Cc"))


# Ways in which ids that look alike differ, and what makes them equal; tried in this order, each on top of the last.
_FOLDS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("invisible characters", lambda name: name.translate(dict.fromkeys(map(ord, _invisible(name))))),
    ("white space", lambda name: "".join(name.split())),
    ("upper and lower case", str.casefold),
    ("compatibility forms of characters", lambda name: unicodedata.normalize("NFKC", name)),
    ("leading zeros", lambda name: re.sub(r"(?<!\d)0+(?=\d)", "", name)),
    ("punctuation", lambda name: re.sub(r"[\W_]+", "-", name).strip("-")),
)


def _folded(name: str) -> str:
    for _, fold in _FOLDS:
        name = fold(name)
    return name


def _difference(one: str, other: str) -> str:
    for what, fold in _FOLDS:
        hidden = sorted({f"U+{ord(character):04X}" for character in _invisible(one) + _invisible(other)})
        one, other = fold(one), fold(other)
        if one == other:
            return f"{what} ({', '.join(hidden)})" if hidden and what == _FOLDS[0][0] else what
    return "more than one way"


def _quoted(name: str) -> str:
    """In quotes, with what is invisible spelled as escapes."""
    shown = repr(name if len(name) <= 40 else f"{name[:40]}...")
    return "".join(f"\\u{ord(each):04x}" if unicodedata.category(each) == "Cf" else each for each in shown)
