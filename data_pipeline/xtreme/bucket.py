"""XTREME's own machine translations, as they lie in its public bucket `xtreme_translations`.

In: that folder (XNLI, PAWSX, SQuAD, XQuAD, MLQA, TyDiQA-GoldP). Out: the source of each training translation and of
each test set translated into English. Next: `translations.py`.

Pairs have five columns since google-research/xtreme#37: the original's two texts, the translation's two and the label;
the lines are in an order of their own, so a line is matched by its original. Columns and names as read by TensorFlow
Datasets (`xtreme_xnli`, `xtreme_pawsx`, `xquad`, `tydi_qa`) and the Model Garden (`XtremeXnliProcessor`); those of MLQA
and of TyDiQA's test set are by analogy. The bucket translates no training set back.
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
    """The English training items in another language."""
    if task.kind == "classification":
        file = folder / FOLDERS[task.name] / "translate-train" / f"en-{language}-translated.tsv"
        return Source((file,), partial(read_pairs, file, task, TRANSLATED), by="text")
    if task.kind == "qa":
        name, home = ("tydiqa", FOLDERS["tydiqa"]) if task.name == "tydiqa" else ("squad", "SQuAD")
        file = folder / home / "translate-train" / f"{name}.translate.train.en-{language}.json"
        return Source((file,), partial(read_translated, file), by="id")
    return None


def back_translation(task: XtremeTask, split: Split, language: str, folder: Path) -> Source | None:
    """The test items in English."""
    if split != "test" or task.name not in FOLDERS:
        return None
    home = folder / FOLDERS[task.name] / "translate-test"
    if task.kind == "classification":
        file = home / f"test-{language}-en-translated.tsv"
        return Source((file,), partial(read_pairs, file, task, TRANSLATED))
    file = home / f"{task.name}.translate.test.{language}-en.json"
    return Source((file,), partial(read_translated, file), by="id")
