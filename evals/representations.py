"""Similarity of a model's states across languages, layer by layer, before and after training.

A `RepresentationReport` holds linear CKA and the distance between centroids of each language and the dominant one, on
states of translated sentences (docs/methods.md, section 6); as JSON, as a table, and drawn by
`representation_plots.py`.

Models run without their method: an X-Mixup model unmixed, a ShifCon model unshifted. What is compared is the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.console import Progress, table
from evals.errors import EvalError
from evals.parallel_texts import ParallelTexts
from training.provenance import description

if TYPE_CHECKING:
    import torch

    from modeling.tasks.sentence_states import EncodedText, Pooling, SentenceStates

BATCH_SIZE = 32  # pairs
LEAST_SENTENCES = 4  # below this number the debiased CKA is undefined
Curve = tuple[float | None, ...]  # h[0] (the embeddings) to h[number of layers]; None where it is undefined

MEASURES = {
    "cka": "linear CKA of the states of translations (Kornblith et al. 2019); biased upwards with few sentences",
    "cka_debiased": "the same with the unbiased estimator of HSIC; comparable for different numbers of sentences",
    "centroid_distance": "|mean(x) - mean(y)| / mean(|x_i| + |y_i|) * 2, of the states x_i, y_i of translations",
    "centroid_cosine": "1 - cosine(mean(x), mean(y))",
}


@dataclass(frozen=True, slots=True)
class ModelRepresentations:
    """One model: `curves[measure][language]`, layer by layer. `truncated`: sentences cut to `max_length`."""

    path: str
    hash: str
    dtype: str
    layers: int
    width: int
    max_length: int
    truncated: int
    curves: dict[str, dict[str, Curve]]

    def mean(self, measure: str) -> Curve:
        """The mean over languages at each layer; undefined where one language's value is."""
        return tuple(_mean(values, partial=False) for values in zip(*self.curves[measure].values(), strict=True))


@dataclass(frozen=True, slots=True)
class RepresentationReport:
    """Models by label, in order. `sentences`: the number of pairs with the dominant language, by language.

    `limit`: the maximum number of pairs of a language; a language that reaches it may have more.
    """

    dominant: str
    pooling: str
    sentences: dict[str, int]
    models: dict[str, ModelRepresentations]
    limit: int | None = None

    @property
    def partial(self) -> list[str]:
        """Languages whose pairs the limit may have cut."""
        return [language for language, number in self.sentences.items() if number == self.limit]

    @property
    def few(self) -> list[str]:
        """Languages with fewer sentences than the width of a model's states, where plain CKA is much too high."""
        widest = max(model.width for model in self.models.values())
        return [language for language, number in self.sentences.items() if number < widest]

    def to_json(self) -> dict[str, Any]:
        """Plain data: what `representations.json` holds."""
        models = {
            label: {
                "path": model.path, "hash": model.hash, "dtype": model.dtype, "forward": "unmixed, unshifted",
                "layers": model.layers, "width": model.width, "max_length": model.max_length,
                "truncated": model.truncated,
                "mean": {measure: list(model.mean(measure)) for measure in MEASURES},
                "languages": {
                    language: {measure: list(model.curves[measure][language]) for measure in MEASURES}
                    for language in self.sentences
                },
            }
            for label, model in self.models.items()
        }  # fmt: skip
        return {
            "dominant": self.dominant,
            "pooling": self.pooling,
            "sentences": self.sentences,
            "limit": self.limit,
            "partial": self.partial,
            "measures": MEASURES,
            "models": models,
            "versions": description(),
        }


def analyse(
    models: Mapping[str, str],
    texts: Mapping[str, ParallelTexts | tuple[Sequence[str], Sequence[str]]],
    *,
    dominant: str,
    pooling: Pooling = "mean",
    max_length: int = 128,
    dtype: Literal["fp32", "bf16"] = "fp32",
    limit: int | None = None,
) -> RepresentationReport:
    """Compare each language with the dominant one in every model, with one forward pass a sentence.

    Args:
        models: label, such as before and after, -> Hugging Face directory or hub name of an encoder or decoder.
        texts: language -> (sentences in the dominant language, their translations), line by line.
        pooling: "mean" over a sentence's own tokens, or "first", for encoders only.
        max_length: tokens of a sentence; longer ones are cut and counted.
        limit: the limit given to `parallel_texts`, for the report.

    Sums take 24 * (layers + 1) * width^2 bytes on the model's device: 0.6 GB for XLM-R large, 13 GB for a decoder of 8B
    parameters. Raises EvalError for texts that are not parallel, ModelError for a model that cannot be opened.
    """
    if not models:
        raise EvalError("no model to analyse; give one or more, such as before=DIR and after=DIR")
    _check(texts, dominant)
    sentences = {language: len(pair[0]) for language, pair in texts.items()}
    with Progress("analyse", len(models) * sum(sentences.values()), "pairs") as progress:
        found = {label: _model(path, texts, pooling, max_length, dtype, progress) for label, path in models.items()}
    return RepresentationReport(dominant=dominant, pooling=pooling, sentences=sentences, models=found, limit=limit)


def representation_table(report: RepresentationReport) -> str:
    """Two tables, by layer (mean over languages) and by language (mean over layers), then notes."""
    heads = {"cka": "CKA", "cka_debiased": "debiased", "centroid_distance": "distance"}
    columns = [f"{label} {head}" for label in report.models for head in heads.values()]
    curves = [model.mean(measure) for model in report.models.values() for measure in heads]
    depth = max(map(len, curves))
    padded = [[*curve, *[None] * (depth - len(curve))] for curve in curves]
    by_layer = [[str(layer), *map(_cell, values)] for layer, values in enumerate(zip(*padded, strict=True))]
    by_language = []
    for language, number in report.sentences.items():
        found = [model.curves[measure][language] for model in report.models.values() for measure in heads]
        cell = f"{number}{'*' * (language in report.partial)}"
        by_language.append([language, cell, *(_cell(_mean(curve, partial=True)) for curve in found)])
    lines = [f"States of sentences against their translations in {report.dominant!r}, pooling {report.pooling!r}", ""]
    lines += ["Mean over languages", table(["layer", *columns], by_layer, text=()), "", "Mean over layers"]
    lines += [table(["language", "sentences", *columns], by_language)]
    if report.partial:
        lines.append(f"* the first {report.limit} sentences; the files may hold more")
    if report.few:
        lines.append(
            f"Fewer sentences than the states are wide, so that CKA is too high and only the debiased one compares: "
            f"{', '.join(report.few)}"
        )
    return "\n".join(lines)


def _check(texts: Mapping[str, Any], dominant: str) -> None:
    if not texts:
        raise EvalError(f"no language to compare with {dominant!r}")
    for language, (own, translated) in texts.items():
        if language == dominant:
            raise EvalError(f"texts of {language!r}: that is the dominant language; give the others")
        if len(own) != len(translated):
            raise EvalError(
                f"texts of {language!r}: {len(translated)} sentences, but {len(own)} in {dominant!r}; line i of "
                "one must translate line i of the other"
            )
        if len(own) < LEAST_SENTENCES:
            raise EvalError(f"texts of {language!r}: {len(own)} sentences; at least {LEAST_SENTENCES} are needed")
        for side, name in ((own, dominant), (translated, language)):
            if (empty := next((number for number, text in enumerate(side, 1) if not text.strip()), None)) is not None:
                raise EvalError(f"texts of {language!r}: sentence {empty} in {name!r} is empty; leave the pair out")


def _model(
    path: str,
    texts: Mapping[str, ParallelTexts | tuple[Sequence[str], Sequence[str]]],
    pooling: Pooling,
    max_length: int,
    dtype: str,
    progress: Progress,
) -> ModelRepresentations:
    import torch

    from modeling.loading import resolve_directory
    from modeling.tasks.sentence_states import SentenceStates
    from modeling.weights.weight_files import directory_hash

    directory = resolve_directory(path)
    states = SentenceStates.open(
        directory,
        pooling=pooling,
        max_length=max_length,
        dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    curves: dict[str, dict[str, Curve]] = {measure: {} for measure in MEASURES}
    for language, (own, translated) in texts.items():
        pairs = list(zip(states.encode(own), states.encode(translated), strict=True))
        for measure, curve in _measured(states, pairs, progress).items():
            curves[measure][language] = curve
    return ModelRepresentations(
        path=str(path),
        hash=directory_hash(directory),
        dtype=str(states.model.dtype).removeprefix("torch."),
        layers=states.layers,
        width=states.width,
        max_length=states.max_length,
        truncated=states.truncated,
        curves=curves,
    )


def _measured(
    states: SentenceStates, pairs: list[tuple[EncodedText, EncodedText]], progress: Progress
) -> dict[str, Curve]:
    """Every measure between the two sides of `pairs`, at every layer."""
    from modeling.cka import CrossCovariance

    sums = [CrossCovariance(states.width, states.width, states.model.device) for _ in range(states.layers + 1)]
    for batch in _batches(pairs, BATCH_SIZE):
        own, translated = (states.pooled(side) for side in zip(*batch, strict=True))
        for layer, covariance in enumerate(sums):
            covariance.add(translated[layer], own[layer])
        progress.advance(len(batch))
    distances = [covariance.centroid_distance() for covariance in sums]
    return {
        "cka": _curve(covariance.linear_cka() for covariance in sums),
        "cka_debiased": _curve(covariance.linear_cka(debiased=True) for covariance in sums),
        "centroid_distance": _curve(distance.relative for distance in distances),
        "centroid_cosine": _curve(distance.cosine for distance in distances),
    }


def _batches(
    pairs: list[tuple[EncodedText, EncodedText]], size: int
) -> Iterator[list[tuple[EncodedText, EncodedText]]]:
    """Pairs grouped by length to reduce padding; their order does not affect the sums."""
    ordered = sorted(pairs, key=lambda pair: -sum(len(side.ids) for side in pair))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _curve(values: Iterable[torch.Tensor]) -> Curve:
    return tuple(number if math.isfinite(number := float(value)) else None for value in values)


def _mean(values: Iterable[float | None], partial: bool) -> float | None:
    """The mean; `partial`: over the defined values, otherwise undefined if one value is."""
    given = list(values)
    defined = [value for value in given if value is not None]
    return sum(defined) / len(defined) if defined and (partial or len(defined) == len(given)) else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
