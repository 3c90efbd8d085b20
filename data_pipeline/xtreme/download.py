"""The layout of XTREME's download script: a folder a task, English training labels only, test labels erased.

Also reads the files of one task in a flat folder (`xquad.de.json`, `tatoeba.deu-eng.deu`).

Based on google-research/xtreme, `scripts/download_data.sh` and `utils_preprocess.py`. XQuAD and MLQA train on SQuAD
v1.1; XQuAD's dev is SQuAD's (its English test questions are among them). TyDiQA's dev is the test; it has no other.
Test labels are missing (pairs, tags) or blank (answers); to have them, put the dataset authors' files under the same
names.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data_pipeline.xtreme import retrieval
from data_pipeline.xtreme.items import DOMINANT, Source, Split
from data_pipeline.xtreme.lines import TEXTS_LABEL, read_pairs, read_tagged
from data_pipeline.xtreme.squad import read_gold
from data_pipeline.xtreme.tasks import XtremeTask


def source(task: XtremeTask, split: Split, language: str, data_dir: Path) -> Source | None:
    """The source of a split of a language; None if XTREME has no such split. The files need not exist."""
    if task.name == "tatoeba":
        return retrieval.tatoeba_source(task, split, language, data_dir)
    if task.name == "bucc2018":
        return retrieval.bucc_source(task, split, language, data_dir)
    file = _file(task, split, language, data_dir)
    if file is None:
        return None
    if task.kind == "classification":
        return Source((file,), partial(read_pairs, file, task, TEXTS_LABEL))
    if task.kind == "tagging":
        return Source((file,), partial(read_tagged, file, task))
    return Source((file,), partial(read_gold, file))


def _file(task: XtremeTask, split: Split, language: str, data_dir: Path) -> Path | None:
    folder = data_dir / task.name if (data_dir / task.name).is_dir() else data_dir
    english = language == DOMINANT
    if task.kind == "tagging":
        return folder / f"{split}-{language}.tsv"
    if task.kind == "classification":
        return folder / f"{split}-{language}.tsv" if split != "train" or english else None
    if task.name == "tydiqa":
        if split == "dev":
            return None
        part = "train" if split == "train" else "dev"
        return folder / f"tydiqa-goldp-v1.1-{part}" / f"tydiqa.goldp.{language}.{part}.json"
    if split == "train":
        return data_dir / "squad" / "train-v1.1.json" if english else None
    if task.name == "mlqa":
        return folder / "MLQA_V1" / split / f"{split}-context-{language}-question-{language}.json"
    if split == "dev":
        return data_dir / "squad" / "dev-v1.1.json" if english else None
    return folder / f"xquad.{language}.json"
