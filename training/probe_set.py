"""The probe set of a run: a few samples of each language, on which objectives measure states without training.

It holds training samples, and texts of the parallel corpus where the objective learns from its pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.reader import Reader
from data_pipeline.records import ChatSample, Sample, Split
from training.config import DataConfig
from training.errors import ConfigError
from training.objectives.base import ObjectiveConfig
from training.run_folder.prepare import sample_rows

PROBE_ROWS = 8  # rows that are looked at for each sample of the probe set, if the first ones are not usable


def uses_corpus(data: DataConfig, objective: ObjectiveConfig) -> bool:
    """Whether a step has pairs of the parallel corpus: there is one, and the objective learns from pairs."""
    return data.pairs is not None and objective.pairing().needed


def probe_samples(reader: Reader, n_items: int, *, parallel: bool = False) -> tuple[tuple[Sample, ...], ...]:
    """The probe set: `n_items` usable samples of each language, as far as its first rows have so many.

    Args:
        parallel: followed by as many texts of each language in the parallel corpus.
    """

    def of_language(language: int, split: Split) -> tuple[Sample, ...]:
        rows = sample_rows(reader.index, language, PROBE_ROWS * n_items, reader.seed, split)
        found: list[Sample] = []
        while rows and len(found) < n_items:  # more rows only where some are unusable or too long
            wanted = n_items - len(found)
            found += reader.readable(rows[:wanted]).samples
            rows = rows[wanted:]
        return tuple(found)

    splits = (Split.TRAIN, Split.PARALLEL) if parallel else (Split.TRAIN,)
    languages = range(len(reader.index.languages))
    return tuple(of_language(language, split) for split in splits for language in languages) if n_items else ()


def too_few_samples(data: DataConfig, objective: ObjectiveConfig, probe: Sequence[Sequence[Sample]]) -> frozenset[int]:
    """Places in the probe set with fewer samples than the objective's contrast sets need.

    Raises:
        ConfigError: the dominant language is one.
    """
    needed = objective.pairing().min_probe_samples
    found = [sum(map(_has_content, samples)) for samples in probe] if needed else []
    for first, where in ((0, ""), (len(data.languages), " of data.pairs")):
        dominant = first + data.languages.index(data.dominant)
        if dominant < len(found) and found[dominant] < needed:
            raise ConfigError(
                f"data.dominant: {data.dominant!r} has {found[dominant]} usable samples{where} for the probe set, but "
                f"objective.contrastive.normalise needs {needed}; add rows, or set it to none"
            )
    return frozenset(place for place, number in enumerate(found) if number < needed)


def _has_content(sample: Sample) -> bool:
    return isinstance(sample, ChatSample) and bool(sample.content.any())
