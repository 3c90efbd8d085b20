"""Sentence retrieval: Tatoeba's pairs, and the two sides of BUCC.

Reads XTREME's files (`tatoeba/de-en.de`, `bucc2018/de-en.dev.de`), LASER's (`tatoeba.deu-eng.deu`) or the hub's.

XTREME sorts Tatoeba's English sentences by code points; the task is to predict, for each, the number (from 0) of its
source sentence. So gold is the order that sorts LASER's English side. XTREME's own files are sorted already and contain
no gold.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

from data_pipeline.records import DataError
from data_pipeline.xtreme.items import DOMINANT, Line, Source, Split
from data_pipeline.xtreme.lines import read_texts, text_lines
from data_pipeline.xtreme.tasks import TATOEBA_CODES, XtremeTask


class TatoebaPairs(NamedTuple):
    """`gold[i]`: the number of the source line that translates `english[i]`; None if the files do not contain it."""

    source: list[str]
    english: list[str]
    gold: list[int] | None

    def line(self, number: int, english: bool) -> int:
        """The line, from 1, of a sentence of a side in its file."""
        return (number if self.gold is None or not english else self.gold[number]) + 1


def tatoeba_files(data_dir: Path, language: str) -> tuple[Path, Path]:
    """(source, English): LASER's files if they exist, because only they give the gold; otherwise XTREME's."""
    folder = data_dir / "tatoeba" if (data_dir / "tatoeba").is_dir() else data_dir
    code = TATOEBA_CODES.get(language, language)
    laser = folder / f"tatoeba.{code}-eng.{code}", folder / f"tatoeba.{code}-eng.eng"
    if laser[0].is_file():
        return laser
    return folder / f"{language}-en.{language}", folder / f"{language}-en.en"


def tatoeba_pairs(data_dir: Path, language: str) -> TatoebaPairs:
    """Source sentences in their order, English sentences sorted, and gold; a line may be empty.

    Raises DataError: unequal lengths.
    """
    files = tatoeba_files(Path(data_dir), language)
    source, english = _parallel(files, empty=True)
    if not _keeps_order(files):
        return TatoebaPairs(source, english, None)
    return sorted_pairs(source, english)


def sorted_pairs(source: list[str], english: list[str]) -> TatoebaPairs:
    """The task made from parallel sides. Equal English sentences keep their order."""
    gold = sorted(range(len(english)), key=lambda line: english[line])
    return TatoebaPairs(source, [english[line] for line in gold], gold)


def tatoeba_source(task: XtremeTask, split: Split, language: str, data_dir: Path) -> Source | None:
    if split != "test":
        return None
    files = tatoeba_files(data_dir, language)

    def read() -> Iterator[Line]:
        source, english = _parallel(files)
        for index, (text, partner) in enumerate(zip(source, english, strict=True)):
            translation = partner if _keeps_order(files) else None
            yield Line(
                f"{files[0]}:{index + 1}", index, f"{task.name}-{split}-{language}-{index}", language, text, translation
            )

    return Source(files, read)


def bucc_source(task: XtremeTask, split: Split, language: str, data_dir: Path) -> Source | None:
    """Both sides, the language's first; ids as in the gold pairs."""
    if split == "train":
        return None
    folder = data_dir / "bucc2018" if (data_dir / "bucc2018").is_dir() else data_dir
    files = {side: folder / f"{language}-en.{split}.{side}" for side in (language, DOMINANT)}

    def read() -> Iterator[Line]:
        index = count()
        for side, file in files.items():
            for number, text in text_lines(file):
                columns = [column.strip() for column in text.split("\t")]
                if len(columns) != 2 or not all(columns):
                    raise DataError(f"{file}:{number}: not two columns; a line is ID<tab>SENTENCE")
                yield Line(f"{file}:{number}", next(index), columns[0], side, columns[1])

    return Source(tuple(files.values()), read)


def _parallel(files: tuple[Path, Path], empty: bool = False) -> tuple[list[str], list[str]]:
    source, english = (read_texts(file, empty) for file in files)
    if empty:
        longest = max(len(source), len(english))
        source, english = (read_texts(file, empty, longest) for file in files)
    if len(source) != len(english):
        raise DataError(
            f"{files[1]}: {len(english)} sentences, but {files[0]} has {len(source)}; they must have the same number"
        )
    return source, english


def _keeps_order(files: tuple[Path, Path]) -> bool:
    return files[0].name.startswith("tatoeba.")
