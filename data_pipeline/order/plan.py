"""The global batch of any step: a pure function of (seed, config, data, step), whatever the number of ranks.

In: the data index and the quotas. Out: a `StepPlan`, the step's slots in units that stay together, and
`assign`, which shares the units among ranks. Next: `reader.py`, which each rank runs on its own units.

Pairing reuses slots: a dominant-language slot may hold the translation of another slot's item. Its own cursor
moves on all the same, so the row that a slot would have by itself depends on nothing but its number. A row that is
found bad when it is read leaves its slot empty, and breaks its own pair, and nothing else changes. One that the index
knows as bad keeps its slot too; but its item cannot be read, so it is nobody's translation, and the dominant slots
of its step may take other items (the fingerprint of the data is another one).

Legend: S slots of a step; positions 0 .. S-1 are slots, from S on label-free fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.order.mixture import Quotas
from data_pipeline.order.order import order_key, places_at
from data_pipeline.order.pairing import Partner, Partners, PlannedPairing
from data_pipeline.records import DataError, stable_hash

FILL = -1
Pair = tuple[int, int]  # positions (dominant, other)


class PlannedIndex(Protocol):
    """What a plan needs to know of the data: arrays over rows, and two look-ups. `index.DataIndex` is one."""

    @property
    def languages(self) -> Sequence[str]: ...
    @property
    def group(self) -> npt.NDArray[np.int64]: ...
    @property
    def content(self) -> npt.NDArray[np.int64]: ...
    @property
    def n_bytes(self) -> npt.NDArray[np.int32]: ...
    @property
    def bad(self) -> npt.NDArray[np.bool_]: ...
    def rows(self, language: int) -> npt.NDArray[np.int64]:
        """Row ids of the language's training split, in file order."""
        ...

    def translation(self, row: int, language: int) -> int:
        """The row of the same group and split in that language, or -1."""
        ...


@dataclass(frozen=True, slots=True)
class Slot:
    """One sample of a step.

    Attributes:
        number: from the run's first slot, -1 for a fill.
        language: an index into the declared languages.
        cost: estimated tokens.
        partner: the text that it is read together with, where samples come with partners.
        seed: (run's seed, step): what is random about the sample derives from it.
    """

    number: int
    row: int
    language: int
    labelled: bool
    cost: float
    partner: Partner | None = None
    seed: tuple[int, int] = (0, 0)

    @classmethod
    def alone(cls, row: int, language: int, seed: int, step: int = 0, partners: Partners | None = None) -> Slot:
        """A row of a fixed set (probe, held-out), outside of any step's slots; read as at `step`."""
        partner = None if partners is None else partners.of(row, language, step)
        return cls(FILL, row, language, True, 0.0, partner, (seed, step))


@dataclass(frozen=True, slots=True)
class Unit:
    """Slots that go to one rank and one micro-batch. With pairs it is a contrast set, and atomic.

    `pairs` (dominant, other) index into `slots`.
    """

    slots: tuple[Slot, ...]
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def cost(self) -> float:
        """Estimated tokens."""
        return sum(slot.cost for slot in self.slots)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's global batch. `dropped_pairs`: translations not paired because both texts are the same."""

    step: int
    units: tuple[Unit, ...]
    dropped_pairs: int

    @property
    def slots(self) -> list[Slot]:
        """All slots by number, fills last."""
        slots = (slot for unit in self.units for slot in unit.slots)
        return sorted(slots, key=lambda slot: (slot.number == FILL, slot.number))


class Planner:
    """Plans any step in O(slots), from the step's number alone."""

    def __init__(
        self,
        index: PlannedIndex,
        quotas: Quotas,
        pairing: PlannedPairing,
        slots_per_step: int,
        seed: int,
        tokens_per_byte: Sequence[float] | None = None,
    ) -> None:
        """Checks the mixture against the index.

        Args:
            pairing: without `set_size`, the same rows are planned, each a unit of its own, and no fills, which nothing
                would learn from.
            tokens_per_byte: of each language; without it, cost is in bytes.

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
                raise DataError(f"data.mixture: language '{code}' takes part, but has no training rows")
        self._sizes = np.array([len(rows) for rows in self._rows], np.int64)
        self._keys = np.array([order_key(seed, code) for code in index.languages], np.uint64)
        self._tokens_per_byte = np.ones(len(index.languages)) if tokens_per_byte is None else np.array(tokens_per_byte)

    def slots_by_language(self, steps: int) -> list[int]:
        """How many slots each language has in the first `steps` steps."""
        return [int(count) for count in self._quotas.counts_before(steps * self._slots_per_step)]

    def step(self, t: int) -> StepPlan:
        """The plan of step `t` (from 0)."""
        first = t * self._slots_per_step
        languages, cursors = self._quotas.between(first, first + self._slots_per_step)
        places = places_at(cursors, self._sizes[languages], self._keys[languages])
        rows = [int(self._rows[i][place]) for i, place in zip(languages.tolist(), places.tolist(), strict=True)]
        pairs = [] if self._pairing.mode == "none" else self._pair(t, rows, languages.tolist())
        broken, same = self._judge(rows, pairs)
        kept = [pair for pair, is_same in zip(pairs, same, strict=True) if not is_same]
        slots = self._slots(t, rows, languages)
        # A pair with a bad row is left out only after the cut, so that it moves no other pair to another set.
        sets = [[pair for pair in chunk if pair not in broken] for chunk in _cut(kept, self._set_size)]
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
        """Puts translations into `rows`: in dominant slots, and for `fill` behind the slots.

        Returns positions (dominant, other), in the order of the other's slot.
        """
        groups = self._index.group[rows].tolist()
        items: dict[int, tuple[int, int]] = {}  # group -> (position, dominant row): one translation an item
        for position, (row, language, group) in enumerate(zip(rows, languages, groups, strict=True)):
            if language != self._dominant and group not in items:
                translation = self._index.translation(row, self._dominant)
                if translation >= 0:
                    items[group] = (position, translation)
        turned = list(items.values())
        if turned:
            turn = stable_hash("pairing", self._seed, t) % len(turned)
            turned = turned[turn:] + turned[:turn]
        dominant_slots = [place for place, language in enumerate(languages) if language == self._dominant]
        pairs = []
        for place, (position, translation) in zip(dominant_slots, turned, strict=False):
            rows[place] = translation
            pairs.append((place, position))
        if self._pairing.mode == "fill":
            for position, translation in turned[len(dominant_slots) :]:
                pairs.append((len(rows), position))
                rows.append(translation)
        return sorted(pairs, key=lambda pair: pair[1])

    def _judge(self, rows: list[int], pairs: list[Pair]) -> tuple[set[Pair], list[bool]]:
        """The pairs with a bad row; and per pair, whether both texts are the same (never, if one is bad)."""
        ids = np.array(rows)[np.array(pairs, np.int64).reshape(-1, 2)]
        bad = self._index.bad[ids].any(axis=1)
        content = self._index.content[ids]
        same = (content[:, 0] == content[:, 1]) & ~bad
        return {pair for pair, is_bad in zip(pairs, bad, strict=True) if is_bad}, same.tolist()

    def _slots(self, t: int, rows: list[int], languages: npt.NDArray[np.int64]) -> list[Slot]:
        """Slots of the step's rows; those behind the step's own are fills in the dominant language."""
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


def _cut(pairs: list[Pair], set_size: int | None) -> list[list[Pair]]:
    """Sets of `set_size` pairs in order; the remainder joins the last. None: no sets."""
    if set_size is None or not pairs:
        return []
    starts = [i * set_size for i in range(max(1, len(pairs) // set_size))]
    return [pairs[start:stop] for start, stop in zip(starts, [*starts[1:], len(pairs)], strict=True)]


def assign(plan: StepPlan, world_size: int) -> list[list[Unit]]:
    """Each rank's units, in plan order: largest first to the least loaded rank.

    Ties go to the rank with fewest units, then the lowest. A rank may get nothing.
    """
    costs = [unit.cost for unit in plan.units]
    loads = [(0.0, 0, rank) for rank in range(world_size)]  # sorted, so already a heap
    chosen: list[list[int]] = [[] for _ in range(world_size)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, n_units, rank = loads[0]
        heapreplace(loads, (load + costs[i], n_units + 1, rank))
        chosen[rank].append(i)
    return [[plan.units[i] for i in sorted(indices)] for indices in chosen]
