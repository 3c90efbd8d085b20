"""Write a task of XTREME as JSON lines for training and evaluation: one file a split and language.

Reads files of any layout and machine translations of them. Writes `<output>/{train,dev,test}/<language>.jsonl` and
`prepared.json`, which describes the inputs. The folder is written under another name and renamed, so it is complete or
absent.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.atomic import atomic_folder
from data_pipeline.records import DataError
from data_pipeline.xtreme import translations as mt
from data_pipeline.xtreme.items import (
    DOMINANT,
    SPLITS,
    Item,
    Question,
    Row,
    Sentence,
    Source,
    Split,
    is_empty,
    is_left_out,
    to_row,
)
from data_pipeline.xtreme.layouts import detect_layout, find_source, read_items
from data_pipeline.xtreme.tasks import XtremeTask, xtreme_task

STAMP = "prepared.json"
VERSION = 2  # raise it if the same files now give other rows
Counts = dict[str, Any]
KEPT_EMPTY = "empty sentence (row kept, so that lines match)"
UNANSWERABLE, MISPLACED = "unanswerable question", "answer not at its offset"


@dataclass(frozen=True)
class _Part:
    """One output file: original items, or (training) a translation of the English ones."""

    split: Split  # of the output
    read: Split  # of the layout
    language: str
    gold: Source
    translated: Source | None = None
    back: Source | None = None


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What `prepare_task` prepares, and how strictly."""

    languages: Sequence[str] | None = None  # languages of dev, test and translations; default: all that exist
    layout: str = "auto"  # the layout of the files; "auto" detects it
    # {split to write: split to read}, such as {"train": "dev", "test": "test"} for treebanks without train
    splits: Mapping[str, str] | None = None
    # the folder of machine translations, in the X-Mixup authors' or the bucket's layout
    translations: Path | str | None = None
    allow_unlabelled_test: bool = False  # accept test files whose labels are erased; the rows have no labels
    remake: bool = False  # replace an `output` that was made from other files or with other options
    # how many questions of a file may have answers that are not at the given offset. Such questions lose these
    # answers, or are left out if they have no others, and are counted.
    max_bad_rows: int = 0
    # end of the error message for an `output` with other inputs, in terms of the calling command
    remedy: str = "name a new --output, or add --remake"


def prepare_task(task: str, data_dir: Path | str, output: Path | str, options: PrepareOptions | None = None) -> Counts:
    """Write the canonical rows of a task to the folder `output`.

    Train holds the English labelled items, whatever `languages` is, and machine translations of them into the
    `languages`; with the layout xmixup these are in `data_dir` itself. Dev and test rows get their English version if
    the folder of translations has one. An `output` made from the same files with the same options is kept.

    Returns:
        {"train": {language: rows}, "dev": ..., "test": ..., "skipped": {split: {language: {reason: count}}},
        "missing": {split: [languages without files]}, "layout": its name}.

    Raises:
        DataError: no such task, language, layout or file, or one that violates its format; erased test labels;
            translations that do not match their originals; an `output` with other content.
    """
    options = options or PrepareOptions()
    translations = options.translations
    found = xtreme_task(task)
    layout = detect_layout(found, data_dir, options.layout)
    root = Path(translations) if translations is not None else Path(data_dir) if layout == "xmixup" else None
    parts, missing = _plan(found, data_dir, layout, root, options)
    if translations is not None and not any(part.translated or part.back for part in parts):
        raise DataError(
            f"{translations}: no translation of the requested files of {task}, in the X-Mixup authors' layout"
            " or in that of XTREME's bucket"
        )
    made_from = {
        "version": VERSION,
        "task": task,
        "layout": layout,
        "allow_unlabelled_test": options.allow_unlabelled_test,
        "max_bad_rows": options.max_bad_rows,
        "languages or splits": sorted(f"{part.split}/{part.language} from {part.read}" for part in parts),
        "files": _identities(parts),
    }
    output = Path(output)
    if (counts := _kept(output, made_from, options.remake, options.remedy)) is not None:
        return counts
    try:
        with atomic_folder(output, exists="replace") as temporary:
            counts = _write(found, parts, temporary, options) | {"missing": missing, "layout": layout}
            stamp = json.dumps({"made_from": made_from, "counts": counts}, ensure_ascii=False, indent=1)
            (temporary / STAMP).write_text(stamp + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror})") from error
    return counts


def _splits(splits: Mapping[str, str] | None) -> dict[Split, Split] | None:
    if splits is None:
        return None
    named = {name: name for name in SPLITS}
    wrong = [name for pair in splits.items() for name in pair if name not in named]
    if wrong or not splits:
        raise DataError(
            f"splits: {wrong[0]!r} is not one of {', '.join(SPLITS)}" if wrong else "splits: names no split"
        )
    return {named[write]: named[read] for write, read in splits.items()}  # type: ignore[index]  # checked above


def _plan(
    task: XtremeTask, data_dir: Path | str, layout: str, root: Path | None, options: PrepareOptions
) -> tuple[list[_Part], dict[str, list[str]]]:
    """The files to write, and for each split the languages without files.

    A split that was not requested by name may be missing completely, but not in some of the requested languages only.

    Args:
        root: the folder of translations.

    Raises:
        DataError: a language or a split that was requested by name has no file.
    """
    languages, splits = options.languages, _splits(options.splits)
    for language in languages or ():
        # a retrieval task has no English rows and no training
        if language not in task.languages and (language != DOMINANT or task.kind != "retrieval"):
            raise DataError(
                f"{task.name}: language {language!r} is not one of its languages: {', '.join(task.languages)}"
            )
    parts: list[_Part] = []
    missing: dict[str, list[str]] = {}
    for split, read in (splits or {name: name for name in SPLITS}).items():
        own = (DOMINANT,) if split == "train" else tuple(languages or task.languages)
        gold = {language: find_source(task, read, language, data_dir, layout) for language in own}
        there = [language for language, source in gold.items() if source is not None and source.exists()]
        for language, source in gold.items():
            if source is None:
                continue
            if language in there:
                back = None if root is None or split == "train" else mt.back_translation(task, read, language, root)
                parts.append(_Part(split, read, language, source, back=back))
                continue
            if languages is not None and split != "train" and (there or splits is not None):
                where = source.name or data_dir
                raise DataError(f"{where}: missing, and {task.name}'s {read} {language!r} is requested")
            missing.setdefault(split, []).append(language)
        if (split, read) == ("train", "train") and root is not None:
            english = gold[DOMINANT] if there else None
            parts += _translations(task, english, languages or task.languages, root, missing)
        if splits is not None and not any(part.split == split for part in parts):
            raise DataError(f"{data_dir}: no file of {task.name} for {split} (read from {read}) in the layout {layout}")
    if not parts:
        raise DataError(f"{data_dir}: no file of {task.name} in the layout {layout}")
    return parts, missing


def _translations(
    task: XtremeTask, english: Source | None, languages: Sequence[str], root: Path, missing: dict[str, list[str]]
) -> Iterator[_Part]:
    for language in languages:
        if language == DOMINANT:
            continue
        translated = mt.training_translation(task, language, root)
        if translated is None:
            missing.setdefault("train", []).append(language)
            continue
        if english is None:
            raise DataError(f"{translated.name}: translates {task.name}'s English training items, which are missing")
        back = mt.back_translation(task, "train", language, root)
        yield _Part("train", "train", language, english, translated, back)


def _write(task: XtremeTask, parts: Iterable[_Part], folder: Path, options: PrepareOptions) -> Counts:
    counts: Counts = {split: {} for split in SPLITS} | {"skipped": {}}
    for part in parts:
        lost: Counter[str] = Counter()
        file = folder / part.split / f"{part.language}.jsonl"
        counts[part.split][part.language] = _write_rows(file, _rows(task, part, lost, options))
        if lost:
            counts["skipped"].setdefault(part.split, {})[part.language] = dict(lost)
    return counts


def _rows(task: XtremeTask, part: _Part, lost: Counter[str], options: PrepareOptions) -> Iterator[Row]:
    if part.translated is not None:
        yield from mt.translated_rows(task, part.language, part.gold, part.translated, part.back, lost)
        return
    items = read_items(task, part.read, part.gold, options.allow_unlabelled_test)
    written = False
    for item, version in mt.with_versions(part.read, items, part.gold, part.back, lost):
        if _is_usable(item, part, lost, options.max_bad_rows):
            written = True
            yield to_row(task, part.read, part.language, item, back=version)
    if lost[UNANSWERABLE] and not written:
        raise DataError(f"{part.gold.name}: no question has an answer; only test rows may lack one")


def _is_usable(item: Item, part: _Part, lost: Counter[str], max_bad_rows: int) -> bool:
    """Whether an item becomes a row; `lost` counts items that do not, or that lose a part."""
    if is_empty(item):
        if part.split == "train" or (isinstance(item, Sentence) and item.withheld):
            lost[mt.EMPTY] += 1
            return False
        if isinstance(item, Sentence):  # an extra blank line: scorers count it, so predictions need it
            lost[KEPT_EMPTY] += 1
            return True
        raise DataError(f"{item.place}: {mt.EMPTY}; each {part.read} item must have some")
    if isinstance(item, Question):
        if item.unanswerable:  # XTREME's tests have no unanswerable questions, so training on them is not useful
            lost[UNANSWERABLE] += 1
            return False
        if item.misplaced is not None:
            if lost[MISPLACED] >= max_bad_rows:
                raise DataError(f"{item.misplaced}; --max-bad-rows N leaves out up to N of a file and counts them")
            lost[MISPLACED] += 1
    return not is_left_out(item)


def _write_rows(file: Path, rows: Iterable[Row]) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    n_rows = 0
    with open(file, "w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            try:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"row {row['id']!r} of {file.parent.name}/{file.name}: not text (half of a surrogate pair)"
                ) from error
            n_rows += 1
    return n_rows


def _identities(parts: Iterable[_Part]) -> dict[str, str]:
    """{role of a file: hash of its content}, independent of its place, or a hub dataset's fingerprint."""
    found: dict[str, str] = {}
    hashes: dict[Path, str] = {}
    for part in parts:
        for role, source in (("", part.gold), (" translated", part.translated), (" back", part.back)):
            if source is None:
                continue
            for file in source.files:
                if file not in hashes:
                    with file.open("rb") as stream:
                        hashes[file] = hashlib.file_digest(stream, "sha256").hexdigest()
                found[f"{part.split}/{part.language}{role}: {file.name}"] = hashes[file]
            if source.identity is not None:
                found[f"hub: {part.read}/{part.language}"] = source.identity()
    return found


def _kept(output: Path, made_from: dict[str, Any], remake: bool, remedy: str) -> Counts | None:
    """The counts of an existing output of the same inputs. Raises DataError if its content is something else."""
    if not output.exists():
        return None
    try:
        stamp = json.loads((output / STAMP).read_bytes())
        before, counts = stamp["made_from"], stamp["counts"]
    except (OSError, ValueError, KeyError, TypeError):
        if output.is_dir() and not any(output.iterdir()):
            return None
        raise DataError(f"{output}: exists and is not a prepared task; name a new folder") from None
    if before == made_from:
        return dict(counts)
    if remake:
        return None
    key = next(key for key in made_from if before.get(key) != made_from[key])
    if key == "files":
        files = {**made_from[key], **before[key]}
        key = next(f"content of {each}" for each in files if before[key].get(each) != made_from[key].get(each))
    raise DataError(f"{output}: was prepared from other files or options (different: {key}); {remedy}")
