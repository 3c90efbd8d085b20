"""The global batch of any step, as a pure function of (seed, config, data, step), independent of the number of ranks.

A `StepPlan` holds the step's slots in units that stay together; `assign` distributes the units over ranks, and
`reader.py` reads a rank's units. See docs/methods.md, section 3.

Pairing reuses slots: a dominant-language slot may hold the translation of another slot's item. Its cursor advances
nevertheless, so the unpaired row of a slot depends only on the slot's number. A row that turns out to be bad when it
is read leaves its slot empty and removes its own pair; nothing else changes. A row that the index marks as bad also
keeps its slot, but its item cannot be read, so it is not used as a translation, and the dominant-language slots of
its step may take other items (the fingerprint of the data differs).

Legend: S slots per step; positions 0 .. S-1 are slots, positions from S are unlabelled fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_pipeline.order.mixture import Quotas
from data_pipeline.order.order import order_key, places_at
from data_pipeline.order.pairing import Partner, PlannedPairing
from data_pipeline.records import DataError, stable_hash

if TYPE_CHECKING:
    from data_pipeline.sources.index import DataIndex

FILL = -1
Pair = tuple[int, int]  # positions (dominant, other)


@dataclass(frozen=True, slots=True)
class Slot:
    """One sample of a step."""

    number: int  # counted from the run's first slot; -1 for a fill, and for a row of a fixed set (probe, held-out)
    row: int  # row id in the data index
    language: int  # index into the declared languages
    labelled: bool  # False for a fill, which has no labels
    cost: float  # estimated tokens
    partner: Partner | None = None  # the text that the sample is read together with, if the objective uses partners
    seed: tuple[int, int] = (0, 0)  # (run's seed, step), from which all randomness of the sample is derived


@dataclass(frozen=True, slots=True)
class Unit:
    """Slots that stay on one rank and in one micro-batch. A unit with pairs is a contrast set."""

    slots: tuple[Slot, ...]
    pairs: tuple[tuple[int, int], ...] = ()  # (dominant, other), indices into `slots`

    @property
    def cost(self) -> float:
        """Estimated tokens of all slots."""
        return sum(slot.cost for slot in self.slots)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The global batch of a step."""

    step: int  # the step's number, from 0
    units: tuple[Unit, ...]
    dropped_pairs: int  # translations that were not paired because both texts are identical

    @property
    def slots(self) -> list[Slot]:
        """All slots in the order of their numbers, fills last."""
        slots = (slot for unit in self.units for slot in unit.slots)
        return sorted(slots, key=lambda slot: (slot.number == FILL, slot.number))


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
    ) -> None:
        """Checks the mixture against the index.

        Args:
            pairing: without `set_size`, the same rows are planned as one unit each, without fills.
            slots_per_step: slots of a step on all ranks together.
            tokens_per_byte: one value per language; None: costs are in bytes.

        Raises:
            DataError: a language of the mixture has no training rows.
        """
        if slots_per_step < 1 or (pairing.set_size is not None and pairing.set_size < 1):
            raise ValueError(f"slots_per_step {slots_per_step} and set_size {pairing.set_size} must be at least 1")
        self._index, self._quotas, self._pairing = index, quotas, pairing
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

    def slots_by_language(self, steps: int) -> list[int]:
        """Number of slots of each language in the first `steps` steps."""
        return [int(count) for count in self._quotas.counts_before(steps * self._slots_per_step)]

    def step(self, t: int) -> StepPlan:
        """The plan of step `t` (from 0)."""
        first = t * self._slots_per_step
        languages, cursors = self._quotas.between(first, first + self._slots_per_step)
        places = places_at(cursors, self._sizes[languages], self._keys[languages])
        rows = [int(self._rows[i][place]) for i, place in zip(languages.tolist(), places.tolist(), strict=True)]
        pairs = [] if self._pairing.mode == "none" else self._pair(t, rows, languages.tolist())
        broken, same = self._check_pairs(rows, pairs)
        kept = [pair for pair, is_same in zip(pairs, same, strict=True) if not is_same]
        slots = self._slots(t, rows, languages)
        # Pairs with a bad row are removed after the split into sets, so that no other pair changes its set.
        sets = [[pair for pair in chunk if pair not in broken] for chunk in _split_into_sets(kept, self._set_size)]
        units = [
            Unit(
                tuple(slots[position] for pair in chunk for position in pair),
                tuple((2 * i, 2 * i + 1) for i in range(len(chunk))),
            )
            for chunk in sets
            if chunk
        ]
        paired = {position for chunk in sets for pair in chunk for position in pair}
        units += [Unit((slots[i],)) for i in range(self._slots_per_step) if i not in paired]
        return StepPlan(t, tuple(units), sum(same))

    def _pair(self, t: int, rows: list[int], languages: list[int]) -> list[Pair]:
        """Writes translations into `rows`: into dominant-language slots, and for `fill` after the slots.

        Returns:
            Positions (dominant, other), ordered by the position of the other.
        """
        groups = self._index.group[rows].tolist()
        items: dict[int, tuple[int, int]] = {}  # group -> (position, dominant row): one translation per item
        for position, (row, language, group) in enumerate(zip(rows, languages, groups, strict=True)):
            if language != self._dominant and group not in items:
                translation = self._index.translation(row, self._dominant)
                if translation >= 0:
                    items[group] = (position, translation)
        rotated = list(items.values())
        if rotated:
            offset = stable_hash("pairing", self._seed, t) % len(rotated)
            rotated = rotated[offset:] + rotated[:offset]
        dominant_slots = [place for place, language in enumerate(languages) if language == self._dominant]
        pairs = []
        for place, (position, translation) in zip(dominant_slots, rotated, strict=False):
            rows[place] = translation
            pairs.append((place, position))
        if self._pairing.mode == "fill":
            for position, translation in rotated[len(dominant_slots) :]:
                pairs.append((len(rows), position))
                rows.append(translation)
        return sorted(pairs, key=lambda pair: pair[1])

    def _check_pairs(self, rows: list[int], pairs: list[Pair]) -> tuple[set[Pair], list[bool]]:
        """The pairs with a bad row; and for each pair, whether both texts are identical (False if one is bad)."""
        ids = np.array(rows)[np.array(pairs, np.int64).reshape(-1, 2)]
        bad = self._index.bad[ids].any(axis=1)
        content = self._index.content[ids]
        same = (content[:, 0] == content[:, 1]) & ~bad
        return {pair for pair, is_bad in zip(pairs, bad, strict=True) if is_bad}, same.tolist()

    def _slots(self, t: int, rows: list[int], languages: npt.NDArray[np.int64]) -> list[Slot]:
        """Slots of the step's rows; the rows after the step's own slots are fills in the dominant language."""
        first, n_fills = t * self._slots_per_step, len(rows) - len(languages)
        languages = np.concatenate([languages, np.full(n_fills, self._dominant)])
        costs = self._index.n_bytes[rows] * self._tokens_per_byte[languages]
        numbers = [*range(first, first + self._slots_per_step), *[FILL] * n_fills]
        columns = zip(numbers, rows, languages.tolist(), costs.tolist(), strict=True)
        partners, seed = self._pairing.partners, (self._seed, t)
        return [
            Slot(
                number, row, language, number != FILL, cost,
                None if partners is None else partners.of(row, language, t), seed,
            )
            for number, row, language, cost in columns
        ]  # fmt: skip


def _split_into_sets(pairs: list[Pair], set_size: int | None) -> list[list[Pair]]:
    """Splits pairs into sets of `set_size` in order; the last set takes the remainder. Without `set_size`: no sets."""
    if set_size is None or not pairs:
        return []
    starts = [i * set_size for i in range(max(1, len(pairs) // set_size))]
    return [pairs[start:stop] for start, stop in zip(starts, [*starts[1:], len(pairs)], strict=True)]


def assign(plan: StepPlan, world_size: int) -> list[list[Unit]]:
    """Distributes the units over ranks, largest first, each to the rank with the lowest load.

    Ties go to the rank with the fewest units, then to the lowest rank.

    Returns:
        For each rank its units in plan order; a rank may have none.
    """
    costs = [unit.cost for unit in plan.units]
    loads = [(0.0, 0, rank) for rank in range(world_size)]  # sorted, so already a heap
    chosen: list[list[int]] = [[] for _ in range(world_size)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, n_units, rank = loads[0]
        heapreplace(loads, (load + costs[i], n_units + 1, rank))
        chosen[rank].append(i)
    return [[plan.units[i] for i in sorted(indices)] for indices in chosen]
