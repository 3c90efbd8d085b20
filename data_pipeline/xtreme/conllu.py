"""Universal Dependencies files (`en_ewt-ud-dev.conllu`) as sentences of the task udpos.

The folder is flat or has one folder a treebank. Each sentence has its syntactic words and universal tags.

Lines of multiword tokens ("4-5 im") and empty nodes ("8.1") are left out, as in the hub's version. XTREME's download
script instead writes "im" in place of its parts, so it has fewer words. The treebanks of a language are read in the
order of their names, as there. Format: universaldependencies.org/format.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

from data_pipeline.records import DataError
from data_pipeline.xtreme.items import NO_WORD, Sentence, Source, Split, check_label
from data_pipeline.xtreme.lines import text_lines
from data_pipeline.xtreme.tasks import XtremeTask

N_COLUMNS = 10
WITHHELD = "_"  # the form of a word whose treebank must not be distributed


def source(task: XtremeTask, split: Split, language: str, data_dir: Path) -> Source | None:
    """The treebanks of a language; None for another task. Language codes are XTREME's."""
    if task.name != "udpos":
        return None
    folder = data_dir / task.name if (data_dir / task.name).is_dir() else data_dir
    files = tuple(sorted(folder.rglob(f"{language}_*-ud-{split}*.conllu"), key=lambda file: file.name))
    return Source(files, partial(read_conllu, files, task))


def read_conllu(files: tuple[Path, ...], task: XtremeTask) -> Iterator[Sentence]:
    """Every sentence. A sentence whose words are all withheld, except at most one, is empty.

    Raises DataError with file and line: not ten columns, ids out of order, or a tag that the task does not have.
    """
    index = count()
    for file in files:
        for start, comments, lines in _blocks(file):
            words: list[str] = []
            tags: list[str] = []
            for number, line in lines:
                columns = line.split("\t")
                if len(columns) != N_COLUMNS:
                    raise DataError(f"{file}:{number}: {len(columns)} columns; CoNLL-U has ten, separated by tabs")
                id, form, tag = columns[0], columns[1], columns[3]
                if "-" in id or "." in id:
                    continue
                if id != str(len(words) + 1):
                    raise DataError(f"{file}:{number}: word {id!r}, but the next one is {len(words) + 1}")
                check_label(tag, task, f"{file}:{number}", "tag")
                words.append(form if form.strip() else NO_WORD)
                tags.append(tag)
            withheld = bool(words.count(WITHHELD)) and words.count(WITHHELD) >= len(words) - 1
            if withheld:
                words, tags = [], []
            yield Sentence(
                f"{file}:{start}", next(index), tuple(words), tuple(tags), text=comments.get("text"), withheld=withheld
            )


def _blocks(file: Path) -> Iterator[tuple[int, dict[str, str], list[tuple[int, str]]]]:
    """(first line's number, {comment: value}, [(number, line)]) of each sentence."""
    comments: dict[str, str] = {}
    lines: list[tuple[int, str]] = []
    for number, text in text_lines(file):
        if text.startswith("#") and not lines:
            name, _, value = text[1:].partition("=")
            comments[name.strip()] = value.strip()
        elif text:
            lines.append((number, text))
        elif lines:
            yield lines[0][0], comments, lines
            comments, lines = {}, []
    if lines:
        yield lines[0][0], comments, lines
