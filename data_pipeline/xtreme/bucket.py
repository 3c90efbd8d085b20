"""XTREME's machine translations, in the layout of its public bucket `xtreme_translations`.

The bucket has XNLI, PAWSX, SQuAD, XQuAD, MLQA and TyDiQA-GoldP: translated training sets, and test sets translated
into English. No training set is translated back.

Pairs have five columns since google-research/xtreme#37: the two texts of the original, the two of the translation, and
the label. The lines have their own order, so a line is matched by its original. Columns and names follow TensorFlow
Datasets (`xtreme_xnli`, `xtreme_pawsx`, `xquad`, `tydi_qa`) and the Model Garden (`XtremeXnliProcessor`); those of MLQA
and of TyDiQA's test set are assumed by analogy.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data_pipeline.xtreme.items import Source, Split
from data_pipeline.xtreme.lines import TRANSLATED, read_pairs
from data_pipeline.xtreme.squad import read_translated
from data_pipeline.xtreme.tasks import XtremeTask

FOLDERS = {"xnli": "XNLI", "pawsx": "PAWSX", "xquad": "XQuAD", "mlqa": "MLQA", "tydiqa": "TyDiQA-GoldP"}


def training_translation(task: XtremeTask, language: str, folder: Path) -> Source | None:
    """The source of the English training items in another language."""
    if task.kind == "classification":
        file = folder / FOLDERS[task.name] / "translate-train" / f"en-{language}-translated.tsv"
        return Source((file,), partial(read_pairs, file, task, TRANSLATED), by="text")
    if task.kind == "qa":
        name, home = ("tydiqa", FOLDERS["tydiqa"]) if task.name == "tydiqa" else ("squad", "SQuAD")
        file = folder / home / "translate-train" / f"{name}.translate.train.en-{language}.json"
        return Source((file,), partial(read_translated, file), by="id")
    return None


def back_translation(task: XtremeTask, split: Split, language: str, folder: Path) -> Source | None:
    """The source of the test items in English."""
    if split != "test" or task.name not in FOLDERS:
        return None
    home = folder / FOLDERS[task.name] / "translate-test"
    if task.kind == "classification":
        file = home / f"test-{language}-en-translated.tsv"
        return Source((file,), partial(read_pairs, file, task, TRANSLATED))
    file = home / f"{task.name}.translate.test.{language}-en.json"
    return Source((file,), partial(read_translated, file), by="id")
