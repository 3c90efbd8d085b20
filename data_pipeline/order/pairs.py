"""Diagnostics of pairing: items that languages share, likely causes of missing pairs, and pairs that look unrelated.

`training/checks/pairs.py` turns the results into errors and warnings. Rows are paired by `Record.group`, compared in
Unicode form NFC. Every function reads a bounded number of rows.
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

MAX_IDS = 2_000  # rows per language whose ids are compared
MAX_PAIRS = 200  # pairs per language whose texts are compared
MIN_PAIRS = 20  # with fewer pairs, the texts are not compared
RANDOM_Z = 2.33  # standard errors that the correlation of unrelated texts exceeds with probability 0.01
EXAMPLES = 2


@dataclass(frozen=True, slots=True)
class Shared:
    """Number of items in a language's training rows, and how many of them also have a dominant-language row."""

    items: int
    shared: int


def shared_items(index: DataIndex, dominant: int) -> dict[int, Shared]:
    """Shared items of each language except the dominant one. Bad and held-out rows are not counted."""
    groups = [np.unique(index.group[_usable(index, language)]) for language in range(len(index.languages))]
    return {
        language: Shared(len(found), len(np.intersect1d(found, groups[dominant], assume_unique=True)))
        for language, found in enumerate(groups)
        if language != dominant
    }


def why_unpaired(index: DataIndex, language: int, dominant: int) -> str:
    """Explains why two languages share no item: examples of their ids, and the likely cause."""
    codes = [index.languages[each] for each in (dominant, language)]
    records = [_records(index, each) for each in (dominant, language)]
    ids = [{record.group: record for record in found} for found in records]
    for row in (int(_usable(index, each)[0]) for each in (dominant, language)):
        source = index.source(row)
        if source.columns.id is None and source.columns.group is None and source.languages is None:
            return (
                f"source {source.name!r} maps no id and no group column, so each of its rows is a separate item; set"
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
            "they contain the language and would be equal without it: map columns.group to a column that is the same in"
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
    """One message per language in which rows with different texts share an id that rows are paired by."""
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
            f"id {_quoted(first.group)} is shared by different texts in {code!r}: {first.origin} and {second.origin}"
            f"{more}; ids that restart in every file pair unrelated rows: make them unique, or map columns.group"
        )


def unlike_texts(index: DataIndex, language: int, dominant: int) -> str | None:
    """Explains why the paired texts of two languages look unrelated; None if they do not, or if there are too few.

    Two tests are compared with chance: whether numbers of one text occur in its translation more often than in the
    texts of other pairs, and whether text lengths correlate (rank correlation). The texts look unrelated if every
    applicable test fails; a test applies if the texts contain numbers, or if their lengths vary.
    """
    usable = _usable(index, language)
    paired = usable[np.isin(index.group[usable], index.group[_usable(index, dominant)])]
    rows = paired[:: max(len(paired) // MAX_PAIRS, 1)][:MAX_PAIRS].tolist()
    texts = [index.record(row).user_text for row in rows]
    others = [index.record(index.translation(row, dominant)).user_text for row in rows]
    numbers, lengths = _numbers_agree(texts, others), _lengths_agree(texts, others)
    results = [result for result in (numbers, lengths) if result is not None]
    if not results or any(agrees for agrees, _ in results):
        return None
    return " and ".join(finding for _, finding in results)


def _numbers_agree(texts: Sequence[str], others: Sequence[str]) -> tuple[bool, str] | None:
    found = [(_numbers(one), _numbers(other)) for one, other in zip(texts, others, strict=True)]
    found = [(one, other) for one, other in found if one and other]
    if len(found) < MIN_PAIRS:
        return None
    agree = float(np.mean([bool(one & other) for one, other in found]))
    unrelated = [
        bool(one & found[(place + offset) % len(found)][1])
        for offset in range(1, MIN_PAIRS // 2)
        for place, (one, _) in enumerate(found)
    ]
    chance = float(np.mean(unrelated))
    if chance > 0.5:  # the same few numbers occur in most texts
        return None
    spread = np.sqrt(max(chance, 1 / len(found)) / len(found))
    return bool(agree > chance + 3 * spread), (
        f"numbers agree in {agree:.0%} of {len(found)} pairs ({chance:.0%} in texts of different items)"
    )


def _lengths_agree(texts: Sequence[str], others: Sequence[str]) -> tuple[bool, str] | None:
    ranks = [_ranks(np.array([len(text) for text in each])) for each in (texts, others)]
    if len(texts) < MIN_PAIRS or any(np.ptp(each) == 0 for each in ranks):
        return None
    correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    return bool(correlation * np.sqrt(len(texts) - 1) > RANDOM_Z), (
        f"text lengths do not correlate (rank correlation {correlation:.2f} over {len(texts)} pairs)"
    )


def _numbers(text: str) -> set[int]:
    return {int(digits) for digits in re.findall(r"\d{1,18}", text)}  # digits of any script


def _ranks(values: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Ranks; equal values get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    stops = np.cumsum(counts)
    return (stops - (counts - 1) / 2)[inverse]


def _usable(index: DataIndex, language: int) -> npt.NDArray[np.int64]:
    rows = index.rows(language)
    return rows[~index.bad[rows]]


def _records(index: DataIndex, language: int) -> list[Record]:
    return [index.record(int(row)) for row in _usable(index, language)[:MAX_IDS]]


def _pairs_by_id(index: DataIndex, row: int) -> bool:
    columns = index.source(row).columns
    return columns.id is not None and columns.group in (None, columns.id)


def _without_code(name: str, code: str) -> str:
    words = "|".join(re.escape(word) for word in (language_name(code), code))
    return re.sub(rf"(?<![^\W_])(?:{words})(?![^\W_])", "", name, flags=re.IGNORECASE)


def _invisible(name: str) -> str:
    return "".join(character for character in name if unicodedata.category(character) in ("Cf", "Cc"))


# Differences between ids that look alike, and the function that removes each; applied cumulatively in this order.
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
    """The name in quotes, shortened, with invisible characters escaped."""
    shown = repr(name if len(name) <= 40 else f"{name[:40]}...")
    return "".join(f"\\u{ord(each):04x}" if unicodedata.category(each) == "Cf" else each for each in shown)
