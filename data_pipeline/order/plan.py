"""The global batch of any step, as a pure function of (seed, config, data, step), independent of the number of ranks.

A `StepPlan` holds the step's samples and its contrast sets; `batching/micro_steps.py` distributes the samples over
micro-steps and ranks, and `reader.py` reads them. See docs/methods.md, section 3.

Behind the slots and fills follow the texts of the parallel corpus, which have contrast sets of their own.

Pairing reuses slots: a dominant-language slot may hold the translation of another slot's item. Its cursor advances
nevertheless, so the unpaired row of a slot depends only on the slot's number. A row that turns out to be bad when it
is read leaves its slot empty and removes its own pair; nothing else changes. A row that the index marks as bad also
keeps its slot, but its item cannot be read, so it is not used as a translation, and the dominant-language slots of
its step may take other items (the fingerprint of the data differs).

Shapes: S slots per step, N positions: 0 .. S-1 are the slots, S .. N-1 unlabelled: fills, then texts of the parallel
corpus; P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_pipeline.order.mixture import Quotas
from data_pipeline.order.order import order_key, places_at
from data_pipeline.order.pairing import Partner, Partners, PlannedPairing
from data_pipeline.order.parallel import ParallelPairs
from data_pipeline.records import DataError, stable_hash

if TYPE_CHECKING:
    from data_pipeline.sources.index import DataIndex

FILL = -1
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Slot:
    """One sample of a step."""

    number: int  # counted from the run's first slot; -1 without labels, and for a row of a fixed set (probe, held-out)
    row: int  # row id in the data index
    language: int  # index into the declared languages
    labelled: bool  # False for a fill and for a text of the parallel corpus
    partner: Partner | None = None  # the text that the sample is read together with, if the objective uses partners
    seed: tuple[int, int] = (0, 0)  # (run's seed, step), from which all randomness of the sample is derived


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """The global batch of a step."""

    step: int  # the step's number, from 0
    rows: Integers  # (N,) row ids
    languages: Integers  # (N,)
    groups: Integers  # (N,) items
    contents: Integers  # (N,) hashes of texts
    costs: npt.NDArray[np.float64]  # (N,) estimated tokens
    n_slots: int  # S
    sets: tuple[Integers, ...]  # contrast sets: (P, 2) positions (dominant, other) of each one's pairs
    dropped_pairs: int  # translations in no set: both texts are identical, or the language is in no contrast set
    seed: int  # the run's
    partners: Partners | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.rows)

    def slot(self, position: int) -> Slot:
        """The sample at a position."""
        labelled = position < self.n_slots
        number = self.step * self.n_slots + position if labelled else FILL
        row, language = int(self.rows[position]), int(self.languages[position])
        partner = None if self.partners is None else self.partners.of(row, language, self.step)
        return Slot(number, row, language, labelled, partner, (self.seed, self.step))

    @property
    def slots(self) -> list[Slot]:
        """All samples, by position."""
        return [self.slot(position) for position in range(len(self))]


class Planner:
    """Computes the plan of any step from its number, in O(slots)."""

    def __init__(
        self,
        index: DataIndex,
        quotas: Quotas,
        pairing: PlannedPairing,
        slots_per_step: int,
        seed: int,
        tokens_per_byte: Sequence[float] | None = None,
        corpus: ParallelPairs | None = None,
    ) -> None:
        """Checks the mixture against the index.

        Args:
            pairing: without `set_size`, the same rows are planned without contrast sets and without fills.
            slots_per_step: slots of a step on all ranks together.
            tokens_per_byte: one value per language; None: costs are in bytes.
            corpus: pairs of the parallel corpus, in addition to those of the slots.

        Raises:
            DataError: a language of the mixture has no training rows.
        """
        if slots_per_step < 1 or (pairing.set_size is not None and pairing.set_size < 1):
            raise ValueError(f"slots_per_step {slots_per_step} and set_size {pairing.set_size} must be at least 1")
        self._index, self._quotas, self._pairing, self._corpus = index, quotas, pairing, corpus
        self._dominant, self._set_size = pairing.dominant, pairing.set_size
        self._slots_per_step, self._seed = slots_per_step, seed
        self._rows = [index.rows(language) for language in range(len(index.languages))]
        for language in np.flatnonzero(quotas.counts).tolist():
            if not len(self._rows[language]):
                code = index.languages[language]
                raise DataError(f"data.mixture: language '{code}' is in the mixture, but has no training rows")
        self._sizes = np.array([len(rows) for rows in self._rows], np.int64)
        self._keys = np.array([order_key(seed, code) for code in index.languages], np.uint64)
        self._tokens_per_byte = np.ones(len(index.languages)) if tokens_per_byte is None else np.array(tokens_per_byte)

    @property
    def has_sets(self) -> bool:
        """Whether pairs are in contrast sets."""
        return self._set_size is not None

    def slots_by_language(self, steps: int) -> list[int]:
        """Number of slots of each language in the first `steps` steps."""
        return [int(count) for count in self._quotas.counts_before(steps * self._slots_per_step)]

    def step(self, t: int) -> StepPlan:
        """The plan of step `t` (from 0)."""
        first = t * self._slots_per_step
        languages, cursors = self._quotas.between(first, first + self._slots_per_step)
        rows = self._rows_at(languages, places_at(cursors, self._sizes[languages], self._keys[languages]))
        rows, pairs = self._paired(t, rows, languages)
        index = self._index
        dominant, other = rows[pairs].T
        bad = index.bad[dominant] | index.bad[other]
        unfit = (index.content[dominant] == index.content[other]) & ~bad
        if self._set_size is not None:
            unfit |= np.isin(languages[pairs[:, 1]], list(self._pairing.uncontrasted)) & ~bad
        # Pairs with a bad row are removed after the split into sets, so that no other pair changes its set.
        chunks = [chunk[~bad[chunk]] for chunk in _split_into_sets(np.flatnonzero(~unfit), self._set_size)]
        rows, sets = self._without_unused_fills(rows, [pairs[chunk] for chunk in chunks if len(chunk)])
        languages = np.concatenate([languages, np.full(len(rows) - len(languages), self._dominant)])
        dropped = int(unfit.sum())
        if self._corpus is not None and self._set_size is not None:
            of_corpus, kept = self._corpus_pairs(self._corpus, t)
            positions = len(rows) + np.arange(of_corpus.size).reshape(2, -1).T
            rows, languages = np.concatenate([rows, of_corpus.T.ravel()]), np.concatenate([languages, kept.T.ravel()])
            numbers = _split_into_sets(np.arange(len(positions)), self._set_size)
            sets = (*sets, *(positions[chunk] for chunk in numbers))
            dropped += self._corpus.per_step - len(of_corpus)
        costs = index.n_bytes[rows].astype(np.float64) * self._tokens_per_byte[languages]
        return StepPlan(
            t, rows, languages, index.group[rows], index.content[rows], costs, self._slots_per_step, sets,
            dropped, self._seed, self._pairing.partners,
        )  # fmt: skip

    def _corpus_pairs(self, corpus: ParallelPairs, t: int) -> tuple[Integers, Integers]:
        """(P, 2) rows and (P, 2) languages of the pairs of the parallel corpus that are in contrast sets."""
        rows, languages = corpus.step(t)
        contents = self._index.content[rows]
        fit = contents[:, 0] != contents[:, 1]
        fit &= ~np.isin(len(self._rows) + languages, list(self._pairing.uncontrasted))
        both = np.stack([np.full(len(languages), self._dominant), languages], axis=1)
        return rows[fit], both[fit]

    def _without_unused_fills(self, rows: Integers, sets: list[Integers]) -> tuple[Integers, tuple[Integers, ...]]:
        """Removes the fills that are in no set, and renumbers the others."""
        n_slots = self._slots_per_step
        used = np.unique(np.concatenate([[n_slots - 1], *(pairs[:, 0] for pairs in sets)]))
        used = used[used >= n_slots]
        positions = np.arange(len(rows))
        positions[used] = n_slots + np.arange(len(used))
        return np.concatenate([rows[:n_slots], rows[used]]), tuple(positions[pairs] for pairs in sets)

    def _rows_at(self, languages: Integers, places: Integers) -> Integers:
        """The row at each place of its language, (S,)."""
        rows = np.empty(len(places), np.int64)
        order = np.argsort(languages, kind="stable")
        starts = np.flatnonzero(np.diff(languages[order], prepend=-1))
        for chunk in np.split(order, starts[1:]):
            rows[chunk] = self._rows[languages[chunk[0]]][places[chunk]]
        return rows

    def _paired(self, t: int, rows: Integers, languages: Integers) -> tuple[Integers, Integers]:
        """Pairs the step's items with their translations into the dominant language.

        Returns:
            (N,) rows, in which translations have replaced dominant-language slots, and for `fill` follow the slots;
            (P, 2) positions (dominant, other), ordered by the other.
        """
        if self._pairing.mode == "none":
            return rows, np.empty((0, 2), np.int64)
        is_dominant = languages == self._dominant
        dominant_slots, others = np.flatnonzero(is_dominant), np.flatnonzero(~is_dominant)
        translations = self._index.translations(rows[others], self._dominant)
        others, translations = others[translations >= 0], translations[translations >= 0]
        first = np.sort(np.unique(self._index.group[rows[others]], return_index=True)[1])  # one translation per item
        if len(first):
            first = np.roll(first, -(stable_hash("pairing", self._seed, t) % len(first)))
        others, translations = others[first], translations[first]
        n_reused = min(len(dominant_slots), len(others))
        n_fills = len(others) - n_reused if self._pairing.mode == "fill" else 0
        places = np.concatenate([dominant_slots[:n_reused], np.arange(len(rows), len(rows) + n_fills)])
        rows = np.concatenate([rows, np.empty(n_fills, np.int64)])
        rows[places] = translations[: len(places)]
        pairs = np.stack([places, others[: len(places)]], axis=1)
        return rows, pairs[np.argsort(pairs[:, 1])]


def _split_into_sets(pairs: Integers, set_size: int | None) -> list[Integers]:
    """Splits pairs into sets of `set_size` in order; the last set takes the remainder. Without `set_size`: no sets."""
    if set_size is None or not len(pairs):
        return []
    return np.split(pairs, np.arange(1, max(1, len(pairs) // set_size)) * set_size)
