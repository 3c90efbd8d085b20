"""Sentences and their translations into the dominant language, from the user's files.

Reads one file a language: canonical rows (JSON lines; translations share their `group`, or have a `translation`), or
one side of LASER's Tatoeba pairs. Gives two lists of sentences a language, translations of each other line by line.
Each language is parallel to the dominant one on the items that the two share, which may differ between languages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.records import BadRow, item_key
from data_pipeline.sources.formats import JsonLines
from data_pipeline.xtreme.items import DOMINANT as ENGLISH
from data_pipeline.xtreme.lines import read_texts
from data_pipeline.xtreme.tasks import TATOEBA_CODES
from evals.errors import EvalError

TEXT_FIELDS = ("text_a", "question", "text", "words")  # a row's sentence is the first of these that it has
TATOEBA = "tatoeba."


class ParallelTexts(NamedTuple):
    """Line i of one side translates line i of the other. Pairs are distinct."""

    dominant: list[str]
    language: list[str]


class _Row(NamedTuple):
    place: str  # "file:line"
    group: str
    text: str
    translation: str | None  # into English


def text_files(folder: Path, languages: Sequence[str] | None = None) -> dict[str, Path]:
    """The files of a folder that `parallel_texts` reads, by language: `XX.jsonl`, else LASER's `tatoeba.XXX-eng.XXX`.

    `languages`: only these, each of which must exist. Raises EvalError if there is nothing to read.
    """
    found = {file.stem: file for file in sorted(folder.glob("*.jsonl"))}
    if not found:
        names = {code: language for language, code in TATOEBA_CODES.items()}
        for file in sorted(folder.glob(f"{TATOEBA}*-eng.*")):
            if (code := file.suffix[1:]) != "eng":
                found[names.get(code, code)] = file
    if not found and any(folder.glob("*-en.en")):
        raise EvalError(
            f"{folder}: XTREME's Tatoeba files have their English side sorted, so lines do not match; use LASER's, "
            "such as tatoeba.deu-eng.deu"
        )
    if not found:
        raise EvalError(
            f"{folder}: no parallel texts there; files are XX.jsonl for each language, or tatoeba.XXX-eng.XXX"
        )
    if missing := [language for language in languages or () if language not in found]:
        raise EvalError(f"{folder}: no file for {missing[0]!r}; there are {', '.join(found)}")
    return {language: found[language] for language in languages or found}


def parallel_texts(files: Mapping[str, Path], dominant: str, limit: int | None = None) -> dict[str, ParallelTexts]:
    """The sentences that each language shares with the dominant one, in the latter's order; the first `limit`.

    The dominant language's own file is among `files`, unless every row of the others has its translation. Of a row with
    two texts, the first is used. A repeated pair, such as a premise with its next hypothesis, is left out. Raises
    EvalError or DataError with file and line.
    """
    others = {language: file for language, file in files.items() if language != dominant}
    if not others:
        raise EvalError(f"only texts in {dominant!r}, the dominant language; there must be others to compare with it")
    own: dict[str, _Row] | None = None
    texts = {}
    for language, file in others.items():
        if file.suffix == ".jsonl":
            rows = list(_rows(file, language))
            if not rows or rows[0].translation is None:
                own = _by_group(_rows(_own_file(files, dominant, file), dominant)) if own is None else own
            pairs = _joined(rows, own, dominant, file)
        else:
            pairs = _tatoeba(file, dominant)
        chosen = list(dict.fromkeys(pairs))[:limit]
        texts[language] = ParallelTexts([pair[0] for pair in chosen], [pair[1] for pair in chosen])
    return texts


def _own_file(files: Mapping[str, Path], dominant: str, file: Path) -> Path:
    if dominant not in files:
        raise EvalError(f"{file.with_name(f'{dominant}.jsonl')}: missing; {file.name} is joined with it by `group`")
    return files[dominant]


def _joined(rows: list[_Row], own: dict[str, _Row] | None, dominant: str, file: Path) -> list[tuple[str, str]]:
    pairs = []
    if rows and rows[0].translation is not None:
        for row in rows:
            if dominant != ENGLISH or row.translation is None:
                wrong = "has no translation, but others do" if row.translation is None else "is translated into English"
                raise EvalError(f"{row.place}: {wrong}; every row needs its translation into {dominant!r}, or none")
            pairs.append((row.translation, row.text))
    else:
        found = _by_group(iter(rows))
        pairs = [(row.text, found[group].text) for group, row in (own or {}).items() if group in found]
    if not pairs:
        raise EvalError(f"{file}: shares no `group` with the rows in {dominant!r}, so nothing in it is parallel")
    return pairs


def _tatoeba(file: Path, dominant: str) -> list[tuple[str, str]]:
    if dominant != ENGLISH or not file.name.startswith(TATOEBA):
        raise EvalError(f"{file}: neither JSON lines nor Tatoeba's pairs with English, so not parallel to {dominant!r}")
    partner = file.with_suffix(".eng")
    english, texts = read_texts(partner), read_texts(file)
    if len(english) != len(texts):
        raise EvalError(
            f"{partner}: {len(english)} sentences, but {file} has {len(texts)}; they must have the same number"
        )
    return list(zip(english, texts, strict=True))


def _by_group(rows: Iterator[_Row]) -> dict[str, _Row]:
    found: dict[str, _Row] = {}
    for row in rows:
        if row.group in found:
            raise EvalError(
                f"{row.place}: group {row.group!r} is at {found[row.group].place} too; each item has one row"
            )
        found[row.group] = row
    return found


def _rows(file: Path, language: str) -> Iterator[_Row]:
    shard = JsonLines(str(file), file.name, "")
    try:
        with file.open("rb") as stream:
            for place, row in shard.rows(stream):
                if isinstance(row, BadRow):
                    raise row
                yield _row(row, shard.origin(place), language)
    except OSError as error:
        raise EvalError(f"{file}: cannot be read ({error.strerror})") from error


def _row(row: dict[str, Any], place: str, language: str) -> _Row:
    if row.get("group") is None:
        raise EvalError(f"{place}: no `group`, which identifies the item it translates")
    if row.get("language", language) != language:
        raise EvalError(f"{place}: language {row['language']!r} in a file of {language!r}; a file has one language")
    field = next((name for name in TEXT_FIELDS if row.get(name)), None)
    if field is None:
        raise EvalError(f"{place}: no text; a row has one of {', '.join(TEXT_FIELDS)}")
    text = " ".join(map(str, row[field])) if isinstance(row[field], list) else row[field]
    translation = row.get("translation")
    if not isinstance(text, str) or not text.strip() or not (translation is None or isinstance(translation, str)):
        raise EvalError(f"{place}: `{field}` or `translation` is not text, but {str(row[field])[:40]!r}")
    return _Row(place, item_key(str(row["group"])), text.strip(), translation)
