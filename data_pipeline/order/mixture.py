"""The language of each slot: weights are turned into integer quotas, and the quotas into one fixed sequence.

`Quotas` gives the language of any slot and the number of earlier slots of the same language; `plan.py` turns slots
into rows. A slot is one labelled sample. The sequence repeats after P slots (the period), so seeking is a divmod.
See docs/methods.md, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from data_pipeline.order.order import mix64
from data_pipeline.records import DataError
from data_pipeline.settings import Section

LARGEST_WEIGHT = 1e12  # sums of a few thousand stay exact enough
Pairing = Literal["none", "reuse", "fill"]
Strategy = Literal["proportional", "temperature", "uniform", "explicit"]


class SharesConfig(Section):
    """How often each language is sampled."""

    strategy: Strategy = Field(
        "proportional",
        description="proportional to rows, or to rows ** (1 / temperature); uniform; explicit: `weights`",
    )
    temperature: float = Field(5.0, gt=0, description="strategy temperature only: 1 is proportional, large is uniform")
    weights: dict[str, float] | None = Field(
        None,
        description="strategy explicit only: one weight per language, any scale; a language with 0 or no weight is"
        " excluded",
    )
    period: int = Field(65536, ge=1, le=10**8, description="slots after which the sequence of languages repeats")

    @model_validator(mode="after")
    def _weights_fit_strategy(self) -> SharesConfig:
        if (self.weights is not None) != (self.strategy == "explicit"):
            raise ValueError("weights and strategy: explicit need each other; give both or neither")
        for language, weight in (self.weights or {}).items():
            if not 0 <= weight <= LARGEST_WEIGHT:
                raise ValueError(f"weights.{language} is {weight}; a weight is 0 to {LARGEST_WEIGHT:g}")
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("weights has no language above 0; give at least one")
        if self.strategy != "temperature" and self.temperature != type(self).model_fields["temperature"].default:
            raise ValueError(f"'temperature' applies only to strategy: temperature, not to {self.strategy}")
        return self


class MixtureConfig(SharesConfig):
    """How often each language is sampled, and how translations are paired."""

    pairing: Pairing = Field(
        "reuse",
        description="none; reuse: dominant-language slots take the translations of the step's other items; "
        "fill: reuse, plus unlabelled dominant-language prompts for the items that remain unpaired",
    )


class PairSharesConfig(SharesConfig):
    """How often each language is among the pairs of the parallel corpus."""

    strategy: Strategy = Field("uniform", description="as in data.mixture, over the languages that have pairs")


def language_weights(
    config: SharesConfig, rows_per_language: Mapping[str, int], key: str = "data.mixture", what: str = "training rows"
) -> dict[str, float]:
    """Normalised weights of the languages in the mixture, in the order of `rows_per_language`.

    Args:
        key, what: the section, and what is counted; for messages.

    Raises:
        DataError: a weight names an undeclared language, or a language of the mixture has no rows.
    """
    weights = config.weights or {}
    for language in weights:
        if language not in rows_per_language:
            known = ", ".join(rows_per_language)
            raise DataError(f"{key}.weights.{language}: not a declared language; declared are {known}")
    languages = [code for code in rows_per_language if config.strategy != "explicit" or weights.get(code)]
    for language in languages:
        if rows_per_language[language] < 1:
            raise DataError(f"{key}: language '{language}' has no {what}; add some or leave it out")
    if config.strategy == "explicit":
        raw = [weights[code] for code in languages]
    elif config.strategy == "uniform":
        raw = [1.0] * len(languages)
    else:
        # Relative to the largest, so that a temperature near 0 underflows to 0 instead of overflowing.
        temperature = config.temperature if config.strategy == "temperature" else 1.0
        largest = max(rows_per_language.values())
        raw = [(rows_per_language[code] / largest) ** (1 / temperature) for code in languages]
    total = math.fsum(raw)
    return {code: weight / total for code, weight in zip(languages, raw, strict=True)}


class Quotas:
    """The exact sequence of languages: after any k slots, a language's count is within one of k * n_i / P.

    Attributes:
        counts: (n_languages,) int64, n_i slots per period, summing to P; 0 for a declared language without weight.
    """

    def __init__(self, weights: Mapping[str, float], languages: Sequence[str], period: int) -> None:
        """Computes the sequence of one period.

        Args:
            weights: one per language of the mixture, any scale.
            languages: all declared languages; their order defines the indices.
            period: slots after which the sequence repeats.

        Raises:
            DataError: the mixture has more languages than the period has slots.
        """
        if len(weights) > period:
            raise DataError(
                f"data.mixture.period is {period}, too short for {len(weights)} languages; give at least {len(weights)}"
            )
        self.period = period
        self.counts = np.zeros(len(languages), np.int64)
        indices = [languages.index(code) for code in weights]
        self.counts[indices] = _apportion(list(weights.values()), period)
        self._sequence = _earliest_deadline_first(self.counts)
        self._earlier = np.empty(period, np.int64)  # slots of the same language earlier in the period
        self._earlier[np.argsort(self._sequence, kind="stable")] = _ordinals(self.counts)

    def between(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Languages and cursors of the slots start .. stop-1, each of shape (stop - start,)."""
        periods, places = np.divmod(np.arange(start, stop, dtype=np.int64), self.period)
        languages = self._sequence[places]
        return languages, periods * self.counts[languages] + self._earlier[places]

    def counts_before(self, slot: int) -> npt.NDArray[np.int64]:
        """Number of slots of each language among the slots 0 .. slot-1, (n_languages,)."""
        periods, place = divmod(slot, self.period)
        return periods * self.counts + np.bincount(self._sequence[:place], minlength=len(self.counts))


def _apportion(weights: Sequence[float], period: int) -> list[int]:
    """Integers >= 1 that sum to `period`, in proportion to the weights.

    A language whose share is below one slot gets one; the others share the rest by largest remainder.
    """
    counts = [1] * len(weights)
    free = list(range(len(weights)))
    while True:
        left = period - (len(weights) - len(free))
        total = math.fsum(weights[i] for i in free)
        shares = {i: weights[i] / total * left for i in free}
        large = [i for i in free if shares[i] >= 1]
        if len(large) == len(free):
            break
        free = large
    for i in free:
        counts[i] = math.floor(shares[i])
    by_remainder = sorted(free, key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: period - sum(counts)]:
        counts[i] += 1
    return counts


def _ordinals(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 .. n_i-1 for each language, concatenated, (P,)."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts)


def _earliest_deadline_first(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The language of each of the P slots, (P,).

    A language's j-th slot (from 1) is released at floor((j-1) P / n_i) and due before ceil(j P / n_i). Each slot is
    given to the released job with the earliest deadline. This meets every deadline (Tijdeman 1980), which keeps each
    count within one of its share. Ties are broken by a hash: broken by index, steps with fewer slots than languages
    would repeatedly hold the same few languages together.
    """
    period = int(counts.sum())
    language = np.repeat(np.arange(len(counts)), counts)
    ordinal, total = _ordinals(counts), np.repeat(counts, counts)
    release = ordinal * period // total
    deadline = -(-(ordinal + 1) * period // total)
    tie = mix64(np.arange(1, period + 1, dtype=np.uint64))
    by_urgency = np.lexsort((tie, deadline))
    urgency = np.empty(period, np.int64)
    urgency[by_urgency] = np.arange(period)
    by_release = np.argsort(release, kind="stable")
    waiting = list(zip(release[by_release].tolist(), urgency[by_release].tolist(), strict=True))
    waiting.reverse()
    ready: list[int] = []
    chosen = []
    for slot in range(period):
        while waiting and waiting[-1][0] <= slot:
            heappush(ready, waiting.pop()[1])
        chosen.append(heappop(ready))
    return language[by_urgency[chosen]]
