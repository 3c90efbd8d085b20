"""The pairs of the parallel corpus (`data.pairs`) in any step, as a pure function of (seed, config, data, step).

A language's pairs are its texts that have a translation into the dominant language. They are visited as training rows
are: each once an epoch, in another order every time (`order.py`), in the shares of `Quotas`.

Shapes: P pairs of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_pipeline.order.mixture import PairSharesConfig, Quotas, language_weights
from data_pipeline.order.order import order_key, places_at
from data_pipeline.records import DataError, Split

if TYPE_CHECKING:
    from data_pipeline.sources.index import DataIndex

Integers = npt.NDArray[np.int64]


class ParallelPairs:
    """Chooses the pairs of a step.

    Attributes:
        per_step: pairs of a step on all ranks together.
        counts: (languages,) the number of pairs of each language.
    """

    def __init__(self, index: DataIndex, dominant: int, shares: PairSharesConfig, per_step: int, seed: int) -> None:
        """Finds the pairs.

        Args:
            dominant: index of the dominant language.

        Raises:
            DataError: no text has a translation, or a language with a weight has no pair.
        """
        self.per_step = per_step
        self._pairs = [self._pairs_of(index, language, dominant) for language in range(len(index.languages))]
        self.counts = np.array([len(pairs) for pairs in self._pairs], np.int64)
        if not self.counts.any():
            raise DataError(
                f"data.pairs: no text has a translation into {index.languages[dominant]!r}; map columns.group to a "
                "column that is the same in translations, or give files of parallel lines"
            )
        explicit = shares.strategy == "explicit"
        counts = {
            code: int(count)
            for number, (code, count) in enumerate(zip(index.languages, self.counts, strict=True))
            if count or (explicit and number != dominant)
        }
        weights = language_weights(shares, counts, "data.pairs.mixture", "pairs")
        self._quotas = Quotas(weights, index.languages, shares.period)
        self._keys = np.array([order_key(seed, f"pairs {code}") for code in index.languages], np.uint64)

    @staticmethod
    def _pairs_of(index: DataIndex, language: int, dominant: int) -> Integers:
        """(pairs, 2) rows (dominant, other) of a language, in file order; none for the dominant one."""
        if language == dominant:
            return np.empty((0, 2), np.int64)
        rows = index.rows(language, Split.PARALLEL)
        translations = index.translations(rows, dominant)
        there = translations >= 0
        return np.stack([translations[there], rows[there]], axis=1)

    def step(self, t: int) -> tuple[Integers, Integers]:
        """(P, 2) rows (dominant, other) of the pairs of step `t`, and (P,) the other's language."""
        first = t * self.per_step
        languages, cursors = self._quotas.between(first, first + self.per_step)
        places = places_at(cursors, self.counts[languages], self._keys[languages])
        chosen = zip(languages.tolist(), places.tolist(), strict=True)
        rows = [self._pairs[language][place] for language, place in chosen]
        return np.array(rows, np.int64).reshape(-1, 2), languages
