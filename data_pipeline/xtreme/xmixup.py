"""The layout of the X-Mixup authors: labelled files of each dataset's authors, and translations beside them.

Based on their `data` folder (github.com/yhy1117/X-Mixup, `xmixup/data/datasets`; the translations were not published).

Translations of a file are matched by place, those of questions by id. A teacher's soft tags are in the order of
`labels.txt`. XQuAD's dev is MLQA's; TyDiQA's dev is also its test.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data_pipeline.xtreme.items import DOMINANT, Source, Split
from data_pipeline.xtreme.lines import (
    PAWS,
    TEXTS_LABEL,
    TEXTS_LABEL_HEADER,
    read_pairs,
    read_soft,
    read_tagged,
    read_words,
    read_xnli,
)
from data_pipeline.xtreme.squad import read_gold, read_translated
from data_pipeline.xtreme.tasks import TASKS, XtremeTask


def source(task: XtremeTask, split: Split, language: str, data_dir: Path) -> Source | None:
    """The original items: in training English only. None if the authors have none."""
    folder = data_dir / task.name
    if task.kind == "retrieval" or (split == "train" and language != DOMINANT):
        return None
    if task.kind == "qa":
        file = _gold_questions(task, split, language, data_dir)
        return None if file is None else Source((file,), partial(read_gold, file))
    if task.kind == "tagging":
        file = folder / language / f"{split}.tsv"
        return Source((file,), partial(read_tagged, file, task))
    if task.name == "pawsx":
        file = folder / language / f"{'train' if split == 'train' else f'{split}_2k'}.tsv"
        return Source((file,), partial(read_pairs, file, task, PAWS))
    if split == "train":
        return _xnli_train(task, language, folder)
    file = folder / "XNLI-1.0" / f"xnli.{split}.tsv"
    return Source((file,), partial(read_xnli, file, task, language))


def training_translation(task: XtremeTask, language: str, data_dir: Path) -> Source | None:
    """The English training items in another language."""
    folder = data_dir / task.name
    if task.kind == "qa":
        file = _training_file(task, data_dir, "translate-train", f"en-{language}")
        return Source((file,), partial(read_translated, file), by="id")
    if task.kind == "tagging":
        file = folder / "translate-train-logits" / f"{language}.txt"
        return Source((file,), partial(read_soft, file, task, folder / "labels.txt"))
    if task.name == "xnli":
        return _xnli_train(task, language, folder)
    if task.name == "pawsx":
        file = _first(folder / language / "train.tsv", folder / language / "translated_train.tsv")
        return Source((file,), partial(read_pairs, file, task, PAWS))
    return None


def back_translation(task: XtremeTask, split: Split, language: str, data_dir: Path) -> Source | None:
    """A split's items (in training: the translated ones) translated back into English."""
    folder = data_dir / task.name
    if task.kind == "qa":
        return _back_questions(task, split, language, data_dir)
    if task.kind == "tagging":
        file = folder / f"translate-{'train-en' if split == 'train' else split}-token" / f"{language}.txt"
        return Source((file,), partial(read_words, file))
    if split == "test":
        names = f"test.{language}.tsv", f"test-{language}-en-translated.tsv"  # two versions of the authors' reader
        file = _first(*(folder / "translate-test" / name for name in names))
        return Source((file,), partial(read_pairs, file, task, TEXTS_LABEL))
    if task.name == "pawsx":
        name = f"translate-train-en/translated_train.{language}-en.tsv"
        file = folder / (name if split == "train" else f"translate-dev/dev_2k.{language}.tsv")
        return Source((file,), partial(read_pairs, file, task, PAWS))
    if task.name != "xnli":
        return None
    if split == "dev":
        # its own language column may be "en" everywhere
        file, gold = folder / "translate-dev" / "xnli.dev.tsv", folder / "XNLI-1.0" / "xnli.dev.tsv"
        return Source((file,), partial(read_xnli, file, task, language, gold))
    file = folder / "translate-train-en" / f"multinli.train.{language}-en.tsv"
    return Source((file,), partial(read_pairs, file, task, TEXTS_LABEL_HEADER))


def _xnli_train(task: XtremeTask, language: str, folder: Path) -> Source:
    file = folder / "XNLI-MT-1.0" / "multinli" / f"multinli.train.{language}.tsv"
    return Source((file,), partial(read_pairs, file, task, TEXTS_LABEL_HEADER))


def _gold_questions(task: XtremeTask, split: Split, language: str, data_dir: Path) -> Path | None:
    if task.name == "tydiqa":
        # their reader takes the English questions from the translations folder
        if split == "train":
            return _training_file(task, data_dir, "translate-train", "en-en")
        return data_dir / "tydiqa" / "dev" / f"tydiqa.{language}.dev.json"
    if split == "train":
        return data_dir / "squad" / "train-v1.1.json"
    if split == "test" and task.name == "xquad":
        return data_dir / "xquad" / "test" / f"xquad.{language}.json"
    if language not in TASKS["mlqa"].languages:
        return None
    return data_dir / "mlqa" / split / f"{split}-context-{language}-question-{language}.json"


def _back_questions(task: XtremeTask, split: Split, language: str, data_dir: Path) -> Source | None:
    if split == "dev":
        return None
    if split == "train":
        file = _training_file(task, data_dir, "translate-train-en", f"en-{language}-en")
    else:
        file = data_dir / task.name / "translate-test" / f"{task.name}.translate.test.{language}-en.json"
    return Source((file,), partial(read_translated, file), by="id")


def _training_file(task: XtremeTask, data_dir: Path, folder: str, pair: str) -> Path:
    """A file of training questions: TyDiQA has its own, the others train on SQuAD."""
    dataset = "tydiqa" if task.name == "tydiqa" else "squad"
    return data_dir / dataset / folder / f"{dataset}.translate.train.{pair}.json"


def _first(*files: Path) -> Path:
    return next((file for file in files if file.is_file()), files[0])
