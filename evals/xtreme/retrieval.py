"""Sentence retrieval on Tatoeba by nearest states across languages, without any training.

For an encoder (an export, or a pretrained one), writes `tatoeba/test-XX.tsv`: for each English sentence the number of
the nearest source sentence; and scores if gold is known.

As in XTREME: the mean over a sentence's tokens of the states that LEAVE one layer, and cosine similarity. Its layers,
counted from 0, are 7 for mBERT and 13 for XLM-R large (`--specific_layer` of its script), that is `h[8]` and `h[14]`.
XTREME averages over `<s>` and `</s>` too (`specials`); the default here leaves them out.

Shapes: N sentences, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.atomic import write_text
from data_pipeline.console import track
from data_pipeline.xtreme.layouts import detect_layout, find_source, tatoeba_pairs
from data_pipeline.xtreme.retrieval import tatoeba_files
from data_pipeline.xtreme.tasks import xtreme_task
from evals.errors import EvalError
from evals.xtreme.score import XtremeScores, score_directory
from training.provenance import description
from training.tracking.run_record import RESULTS_FILE

if TYPE_CHECKING:
    from modeling.tasks.sentence_states import SentenceStates

Floats = npt.NDArray[np.float32]
XTREME_LAYERS = {12: 7, 24: 13}  # number of layers -> the layer that XTREME's script uses
MAX_TOKENS = 512  # XTREME's; longer sentences are cut
BATCH_TOKENS = 8192  # rows x row length of one forward pass
CHUNK = 1024  # queries compared at a time
ROUNDING = 1e-6  # rounding of an inner product of unit vectors


class SentenceEncoder:
    """Sentences -> unit vectors: mean states that leave `layer` (0-based; None: XTREME's, or 7/12 of the depth)."""

    def __init__(self, states: SentenceStates, layer: int | None = None, specials: bool = False) -> None:
        """`specials`: average over special tokens too. Raises EvalError for a layer that does not exist."""
        depth = states.layers
        self.layer = XTREME_LAYERS.get(depth, depth * 7 // 12) if layer is None else layer
        if not 0 <= self.layer < depth:
            raise EvalError(f"layer {self.layer}: the model has layers 0 to {depth - 1}")
        self.states, self.specials = states, specials

    @classmethod
    def open(
        cls, path: str | Path, layer: int | None = None, specials: bool = False, dtype: str = "auto"
    ) -> SentenceEncoder:
        """Opens an encoder without its head. `dtype`: bf16, fp32, or auto: bf16 on a GPU. Raises ModelError."""
        from modeling.loading import resolve_device
        from modeling.tasks.sentence_states import SentenceStates

        device, number_format = resolve_device(dtype)
        states = SentenceStates.open(path, max_length=MAX_TOKENS, dtype=number_format, device=device)
        return cls(states, layer, specials)

    def encode(self, sentences: Sequence[str]) -> Floats:
        """(N, H) unit vectors, zeros for a sentence without other tokens than special ones."""
        encoded = self.states.encode_all(sentences)
        filled = [number for number, text in enumerate(encoded) if any(text.content)]
        if self.specials:
            encoded = [text._replace(content=[True] * len(text.ids)) for text in encoded]
        order = sorted(filled, key=lambda number: len(encoded[number].ids), reverse=True)
        found = np.zeros((len(encoded), self.states.width), np.float32)
        while order:
            size = max(BATCH_TOKENS // len(encoded[order[0]].ids), 1)
            batch, order = order[:size], order[size:]
            found[batch] = self.states.pooled([encoded[number] for number in batch])[self.layer + 1].cpu().numpy()
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.float32(1e-12))


def nearest(queries: Floats, candidates: Floats, chunk: int = CHUNK) -> list[int]:
    """For each query (N, H) the candidate (M, H) with the largest inner product; the first of equal ones.

    Values that differ by less than rounding are equal: the product of two given vectors depends on their place in the
    batch. A candidate of zeros (a sentence without tokens) is chosen only if all are.
    """
    found: list[int] = []
    nothing = ~candidates.any(axis=1)
    for start in range(0, len(queries), chunk):
        products = queries[start : start + chunk] @ candidates.T
        products[:, nothing] = -2.0  # below every cosine
        found += (products >= products.max(axis=1, keepdims=True) - ROUNDING).argmax(axis=1).tolist()
    return found


def retrieve_tatoeba(
    encoder: SentenceEncoder,
    data_dir: Path,
    output: Path,
    *,
    languages: Sequence[str] | None = None,
    layout: str = "auto",
) -> tuple[dict[str, Any], XtremeScores | None]:
    """Predictions of every language, and scores if gold is known (XTREME's own files do not contain it).

    Writes `output/{predictions,labels}/tatoeba/` and `output/results.json`; returns the latter's content, and the
    scores. `languages`: default: all in `data_dir`; the others are reported as missing. A sentence without tokens is
    left out and named (`without_tokens`): its own prediction is line 0.
    Raises EvalError or DataError before anything is computed.
    """
    task = xtreme_task("tatoeba")
    layout = detect_layout(task, data_dir, layout)
    absent = _absent(data_dir, layout)
    chosen = list(languages) if languages else [each for each in task.languages if each not in absent]
    missing = {each: absent.get(each, "not requested") for each in task.languages if each not in chosen}
    pairs_of = {language: tatoeba_pairs(data_dir, language, layout) for language in chosen}
    gold_of, without_tokens = [], {}
    for language, pairs in track(pairs_of.items(), len(pairs_of), "tatoeba", "languages"):
        english, source = encoder.encode(pairs.english), encoder.encode(pairs.source)
        without = [
            f"{_file(data_dir, layout, language, is_english)}:{pairs.line(number, is_english)}: {text[:40]!r}"
            for is_english, texts, vectors in ((False, pairs.source, source), (True, pairs.english, english))
            for number, text in enumerate(texts)
            if not vectors[number].any()
        ]
        if without:
            without_tokens[language] = without
        _write(output / "predictions" / "tatoeba" / f"test-{language}.tsv", nearest(english, source))
        if pairs.gold is not None:
            _write(output / "labels" / "tatoeba" / f"test-{language}.tsv", pairs.gold)
            gold_of.append(language)
        else:
            missing[language] = "no gold: the file's English side is sorted"
    scores = None
    if gold_of:
        scores = score_directory(output / "predictions", output / "labels", ["tatoeba"], gold_of)
        task_scores = replace(
            scores.tasks["tatoeba"], missing={each: missing[each] for each in task.languages if each in missing}
        )
        scores = replace(scores, tasks={"tatoeba": task_scores})
    results = {
        "task": "tatoeba",
        "model": str(encoder.states.model.name_or_path),
        "layer": encoder.layer,
        "specials": encoder.specials,
        "scores": scores and scores.to_json(),
        "missing": missing,
        "without_tokens": without_tokens,
        "versions": description(),
    }
    write_text(output / RESULTS_FILE, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    return results, scores


def _file(data_dir: Path, layout: str, language: str, english: bool) -> str:
    """The name of a side's file, for messages."""
    if layout == "hub":
        return f"{data_dir} ({'target' if english else 'source'}_sentence)"
    return str(tatoeba_files(data_dir, language)[int(english)])


def _absent(data_dir: Path, layout: str) -> dict[str, str]:
    """Languages without files, with the reason: which file, if only one of the two is missing."""
    absent = {}
    for language in xtreme_task("tatoeba").languages:
        source = find_source(xtreme_task("tatoeba"), "test", language, data_dir, layout)
        if source is None or not source.exists():
            lacking = [file.name for file in source.files if not file.is_file()] if source is not None else []
            some = source is not None and len(lacking) < len(source.files)
            absent[language] = f"no file {', '.join(lacking)}" if some else "no files"
    return absent


def _write(file: Path, numbers: Sequence[int]) -> None:
    write_text(file, "".join(f"{number}\n" for number in numbers))
