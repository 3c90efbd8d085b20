"""XTREME's nine tasks: kind, languages, labels, metrics.

Source: Hu et al. 2020 (arXiv 2003.11080), table 1, and the benchmark's own scorer. Languages are ISO 639-1 codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.records import DataError

Kind = Literal["classification", "tagging", "qa", "retrieval"]


@dataclass(frozen=True, slots=True)
class XtremeTask:
    """One task. `metrics` make up its score, in the scorer's order; a QA score is their mean."""

    name: str
    kind: Kind  # also the group to which its score belongs
    languages: tuple[str, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()


def _task(name: str, kind: Kind, languages: str, metrics: str, labels: str = "") -> XtremeTask:
    return XtremeTask(name, kind, tuple(languages.split()), tuple(metrics.split()), tuple(labels.split()))


_PANX = (
    "af ar bg bn de el en es et eu fa fi fr he hi hu id it ja jv ka kk ko ml mr ms my nl pt ru sw ta te th tl tr ur"
    " vi yo zh"
)
_UDPOS = "af ar bg de el en es et eu fa fi fr he hi hu id it ja kk ko mr nl pt ru ta te th tl tr ur vi yo zh"
_TATOEBA = "af ar bg bn de el es et eu fa fi fr he hi hu id it ja jv ka kk ko ml mr nl pt ru sw ta te th tl tr ur vi zh"
_UPOS = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"

TASKS: dict[str, XtremeTask] = {
    task.name: task
    for task in (
        _task(
            "xnli", "classification", "ar bg de el en es fr hi ru sw th tr ur vi zh", "accuracy",
            "contradiction entailment neutral",
        ),
        _task("pawsx", "classification", "de en es fr ja ko zh", "accuracy", "0 1"),
        _task("panx", "tagging", _PANX, "f1", "B-LOC B-ORG B-PER I-LOC I-ORG I-PER O"),
        _task("udpos", "tagging", _UDPOS, "f1", _UPOS),
        _task("xquad", "qa", "ar de el en es hi ru th tr vi zh", "exact_match f1"),
        _task("mlqa", "qa", "ar de en es hi vi zh", "exact_match f1"),
        _task("tydiqa", "qa", "ar bn en fi id ko ru sw te", "exact_match f1"),
        _task("bucc2018", "retrieval", "de fr ru zh", "f1"),
        _task("tatoeba", "retrieval", _TATOEBA, "accuracy"),
    )
}  # fmt: skip

# Tatoeba's file names have ISO 639-3 codes.
TATOEBA_CODES = {
    "af": "afr", "ar": "ara", "bg": "bul", "bn": "ben", "de": "deu", "el": "ell", "es": "spa", "et": "est",
    "eu": "eus", "fa": "pes", "fi": "fin", "fr": "fra", "he": "heb", "hi": "hin", "hu": "hun", "id": "ind",
    "it": "ita", "ja": "jpn", "jv": "jav", "ka": "kat", "kk": "kaz", "ko": "kor", "ml": "mal", "mr": "mar",
    "nl": "nld", "pt": "por", "ru": "rus", "sw": "swh", "ta": "tam", "te": "tel", "th": "tha", "tl": "tgl",
    "tr": "tur", "ur": "urd", "vi": "vie", "zh": "cmn",
}  # fmt: skip


def xtreme_task(name: str) -> XtremeTask:
    """The task of that name; DataError naming all nine if there is no such task."""
    if name not in TASKS:
        raise DataError(f"task {name!r} is not one of XTREME's: {', '.join(TASKS)}")
    return TASKS[name]
