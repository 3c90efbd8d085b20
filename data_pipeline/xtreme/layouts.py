"""The layouts of XTREME's files: detection, and one reader for all of them.

`find_source` gives the source of a split, and `read_items` its items.

Layouts: `download` (XTREME's script; also one task's files in a flat folder), `xmixup` (the X-Mixup authors'), `conllu`
(Universal Dependencies' files), `hub` (google/xtreme, or a folder of its Parquet files).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from data_pipeline.records import DataError
from data_pipeline.xtreme import conllu, download, hub, retrieval, xmixup
from data_pipeline.xtreme.items import Item, Line, Question, Source, Split, checked_test, is_empty, is_left_out
from data_pipeline.xtreme.squad import repeated_id
from data_pipeline.xtreme.tasks import XtremeTask, xtreme_task

Layout = Literal["download", "xmixup", "conllu", "hub"]
SOURCES: dict[str, Callable[[XtremeTask, Split, str, Path], Source | None]] = {
    "download": download.source,
    "xmixup": xmixup.source,
    "conllu": conllu.source,
    "hub": hub.source,
}


def find_source(task: XtremeTask, split: Split, language: str, data_dir: Path | str, layout: str) -> Source | None:
    """The source of a split of a language, whether or not its files exist; None: the layout has no such split."""
    return SOURCES[layout](task, split, language, Path(data_dir))


def read_items(task: XtremeTask, split: Split, source: Source, allow_unlabelled_test: bool) -> Iterator[Item]:
    """The items of original files (no translations). Raises DataError if required labels are missing."""
    items: Iterable[Item] = source.read()
    if split == "test":
        items = checked_test(task, items, source.name, allow_unlabelled_test)
    for item in items:
        unlabelled = item.answer is None and not is_empty(item) and not is_left_out(item)
        if split != "test" and unlabelled and task.kind != "retrieval":
            raise DataError(f"{item.place}: no label; only test rows may lack one")
        if split != "train" and isinstance(item, Question) and repeated_id([item]) is not None:
            raise DataError(f"{item.place}: the id is repeated; predictions need unique ids")
        yield item


def detect_layout(task: XtremeTask, data_dir: Path | str, layout: str = "auto") -> str:
    """The given layout, checked, or for "auto" the one whose files exist.

    Raises:
        DataError: no such layout or folder; no files of the task, or files of several layouts.
    """
    if layout != "auto":
        if layout not in SOURCES:
            raise DataError(f"layout {layout!r} is not one of auto, {', '.join(get_args(Layout))}")
        if layout != "hub" and not Path(data_dir).is_dir():
            raise DataError(f"{data_dir}: no such folder")
        return layout
    if not Path(data_dir).is_dir():
        raise DataError(f"{data_dir}: no such folder; for the dataset google/xtreme give layout hub")
    found = [name for name in SOURCES if _has_files(task, name, data_dir)]
    if len(found) > 1:
        raise DataError(
            f"{data_dir}: has files of {task.name} in the layouts {' and '.join(found)}; give one of them as the layout"
        )
    if not found:
        raise DataError(f"{data_dir}: no files of {task.name}; expected one of {'; '.join(_examples(task, data_dir))}")
    return found[0]


def _has_files(task: XtremeTask, layout: str, data_dir: Path | str) -> bool:
    """Whether a layout has test or dev files of the task; training files are the same in several layouts."""
    for split in ("test", "dev", "train") if layout == "conllu" else ("test", "dev"):
        for language in task.languages:
            source = find_source(task, split, language, data_dir, layout)
            if source is not None and source.exists():
                return True
    return False


def _examples(task: XtremeTask, data_dir: Path | str) -> Iterator[str]:
    for layout in SOURCES:
        source = find_source(task, "test", task.languages[0], data_dir, layout)
        if source is not None and source.files:
            yield f"{source.files[0]} ({layout})"
    if task.name == "udpos":
        yield f"{Path(data_dir, 'af_TREEBANK-ud-test.conllu')} (conllu)"


def tatoeba_pairs(data_dir: Path | str, language: str, layout: str = "auto") -> retrieval.TatoebaPairs:
    """Source sentences, sorted English sentences, and for each of these the number of its source sentence.

    Gold is None for XTREME's own files, which are sorted. Raises DataError.
    """
    task = xtreme_task("tatoeba")
    if detect_layout(task, data_dir, layout) != "hub":
        return retrieval.tatoeba_pairs(Path(data_dir), language)
    source = hub.source(task, "test", language, data_dir)
    assert source is not None  # the hub has a test split of every language
    lines = [item for item in read_items(task, "test", source, False) if isinstance(item, Line) and not is_empty(item)]
    return retrieval.sorted_pairs([line.text for line in lines], [line.translation or "" for line in lines])
