"""plan.py: a step's global batch depends on the step number only, not on the number of ranks."""

from __future__ import annotations

import timeit
from collections import Counter
from typing import Any

import numpy as np
import pytest

from data_pipeline.order.mixture import Pairing, Quotas
from data_pipeline.order.order import row_at
from data_pipeline.order.pairing import PlannedPairing
from data_pipeline.order.plan import FILL, Planner, Slot, StepPlan
from data_pipeline.records import DataError, stable_hash

LANGUAGES = ("en", "de", "sw")
SEED = 11
GOLDEN = 7901787409761802509


class FakeIndex:
    """Rows in memory, language after language; `groups[i]` are the items that language i has."""

    def __init__(self, languages: tuple[str, ...], groups: list[list[int]]) -> None:
        self.languages = languages
        self.language = np.repeat(np.arange(len(groups)), [len(items) for items in groups])
        self.group = np.array([item for items in groups for item in items], np.int64)
        self.content = self.group * 100 + self.language
        self.n_bytes = (self.group % 17 + 1).astype(np.int32)
        self.bad = np.zeros(len(self.group), np.bool_)
        self._rows = [np.flatnonzero(self.language == i) for i in range(len(groups))]
        keys = zip(self.group.tolist(), self.language.tolist(), strict=True)
        self._row_of = {key: row for row, key in enumerate(keys)}

    def rows(self, language: int) -> np.ndarray:
        return self._rows[language]

    def translation(self, row: int, language: int) -> int:
        return self._row_of.get((int(self.group[row]), language), -1)

    def translations(self, rows: np.ndarray, language: int) -> np.ndarray:
        return np.array([self.translation(row, language) for row in rows.tolist()], np.int64)


def parallel_index(items: int = 90) -> FakeIndex:
    """English has all items, German all but every third, Swahili five of the English ones and two others."""
    german = [item for item in range(items) if item % 3]
    return FakeIndex(LANGUAGES, [list(range(items)), german, [1, 2, 3, 4, 5, 1001, 1002]])


def planner(
    index: FakeIndex,
    pairing: Pairing = "reuse",
    set_size: int | None = 4,
    slots: int = 24,
    seed: int = SEED,
    weights: dict[str, float] | None = None,
    rates: list[float] | None = None,
) -> Planner:
    quotas = Quotas(weights or {"en": 0.4, "de": 0.4, "sw": 0.2}, index.languages, 256)
    return Planner(index, quotas, PlannedPairing(0, pairing, set_size), slots, seed, rates)


def sets_of(plan: StepPlan) -> list[list[tuple[Slot, Slot]]]:
    return [[(plan.slot(a), plan.slot(b)) for a, b in pairs.tolist()] for pairs in plan.sets]


def pairs_of(plan: StepPlan) -> list[tuple[Slot, Slot]]:
    return [pair for pairs in sets_of(plan) for pair in pairs]


def facts(plan: StepPlan) -> tuple[Any, ...]:
    return plan.step, plan.slots, sets_of(plan), plan.costs.tolist(), plan.dropped_pairs


def rows_of(plan: StepPlan) -> list[int]:
    return [slot.row for slot in plan.slots if slot.number != FILL]


def test_rows_equal_those_of_one_cursor_per_language_from_slot_zero() -> None:
    """Reference: all slots from 0, with one cursor per language. Swahili's 7 rows wrap around many times."""
    index = parallel_index()
    plans = planner(index, "none")
    quotas = Quotas({"en": 0.4, "de": 0.4, "sw": 0.2}, LANGUAGES, 256)
    cursors = [0, 0, 0]
    for t in range(30):
        plan = plans.step(t)
        assert [slot.number for slot in plan.slots] == list(range(24 * t, 24 * t + 24))
        assert all(slot.labelled for slot in plan.slots)
        assert not plan.sets
        for slot in plan.slots:
            language = int(quotas.between(slot.number, slot.number + 1)[0][0])
            row = row_at(index.rows(language), cursors[language], SEED, LANGUAGES[language])
            assert (slot.language, slot.row) == (language, row)
            cursors[language] += 1
    assert cursors[2] > 7 * 10


def test_a_plan_depends_only_on_its_step() -> None:
    index = parallel_index()
    forwards = planner(index, "fill")
    plans = [facts(forwards.step(t)) for t in range(12)]
    again = planner(index, "fill")
    assert [facts(again.step(t)) for t in reversed(range(12))] == plans[::-1]
    assert facts(planner(index, "fill", seed=SEED + 1).step(3)) != plans[3]


def test_plans_are_the_same_in_every_version() -> None:
    """A literal: if it changes, no older run can be resumed."""
    plans = planner(parallel_index(), "fill", rates=[0.25, 0.5, 0.75])
    rows = [[(slot.number, slot.row) for slot in plans.step(t).slots] for t in range(5)]
    pairs = [[(a.row, b.row) for a, b in pairs_of(plans.step(t))] for t in range(5)]
    assert stable_hash(rows, pairs) == GOLDEN


def test_reuse_puts_translations_into_dominant_slots_only() -> None:
    index = parallel_index()
    reuse, own = planner(index, "reuse"), planner(index, "none")
    paired = 0
    for t in range(40):
        plan, own_plan = reuse.step(t), own.step(t)
        pairs = pairs_of(plan)
        replaced = {dominant.number: dominant.row for dominant, _ in pairs}
        assert rows_of(plan) == [replaced.get(slot.number, slot.row) for slot in own_plan.slots]
        for dominant, other in pairs:
            assert (dominant.language, other.language != 0) == (0, True)
            assert index.group[dominant.row] == index.group[other.row]
        others = [slot.row for slot in own_plan.slots if slot.language]
        items = {int(index.group[row]) for row in others if index.translation(row, 0) >= 0}
        dominant_slots = [slot.number for slot in own_plan.slots if slot.language == 0]
        assert len(pairs) == min(len(items), len(dominant_slots))
        assert len({int(index.group[other.row]) for _, other in pairs}) == len(pairs)
        assert sorted(replaced) == dominant_slots[: len(pairs)]
        paired += len(pairs)
    assert paired > 300


def test_an_item_that_occurs_twice_is_paired_once() -> None:
    index = FakeIndex(LANGUAGES, [[1, 2, 3], [1], [1]])
    for pairing in ("reuse", "fill"):
        plan = planner(index, pairing, slots=12).step(0)
        assert sum(slot.language > 0 for slot in plan.slots) > 5
        [(dominant, other)] = pairs_of(plan)
        assert index.group[dominant.row] == index.group[other.row] == 1
        assert other.number == min(slot.number for slot in plan.slots if slot.language > 0)
        assert len(plan.slots) == 12


def test_the_items_that_get_a_dominant_slot_rotate_with_the_step() -> None:
    """One dominant slot and nine items: over many steps each position among the items is paired."""
    index = FakeIndex(("en", "de"), [list(range(900)), list(range(900))])
    plans = planner(index, slots=10, weights={"en": 0.1, "de": 0.9})
    paired = Counter()
    for t in range(600):
        plan = plans.step(t)
        others = [slot.number for slot in plan.slots if slot.language == 1]
        paired.update(others.index(other.number) for _, other in pairs_of(plan))
    assert min(paired[place] for place in range(8)) > 30


def test_fill_adds_label_free_prompts_for_unpaired_items() -> None:
    index = parallel_index()
    weights = {"en": 0.1, "de": 0.8, "sw": 0.1}
    reuse, fill = planner(index, "reuse", weights=weights), planner(index, "fill", weights=weights)
    for t in range(10):
        with_fills = fill.step(t)
        assert rows_of(with_fills) == rows_of(reuse.step(t))
        pairs = pairs_of(with_fills)
        fills = [slot for slot in with_fills.slots if slot.number == FILL]
        assert all(not slot.labelled and slot.language == 0 for slot in fills)
        assert all(slot.labelled for slot in with_fills.slots[:24])
        assert sum(dominant.number == FILL for dominant, _ in pairs) == len(fills) > 0
        unpaired = {int(index.group[slot.row]) for slot in with_fills.slots if slot.language}
        unpaired -= {int(index.group[other.row]) for _, other in pairs}
        assert all(item not in range(90) for item in unpaired)


def test_a_dominant_language_outside_the_mixture_is_paired_only_by_fill() -> None:
    index = parallel_index()
    weights = {"de": 0.5, "sw": 0.5}
    assert not sets_of(planner(index, "reuse", weights=weights).step(0))
    pairs = pairs_of(planner(index, "fill", weights=weights).step(0))
    assert {(dominant.number, dominant.labelled) for dominant, _ in pairs} == {(FILL, False)}


def test_identical_texts_are_not_paired_but_keep_their_slots() -> None:
    index = parallel_index()
    before = planner(index, "fill").step(2)
    (dominant, other), *rest = pairs_of(before)
    index.content[other.row] = index.content[dominant.row]
    after = planner(index, "fill").step(2)
    assert (before.dropped_pairs, after.dropped_pairs) == (0, 1)
    assert rows_of(after) == rows_of(before)
    assert pairs_of(after) == rest
    assert other in after.slots
    index.content[:] = 0
    nothing = planner(index, "fill").step(2)
    assert nothing.dropped_pairs == len(rest) + 1
    assert not any(slot.number == FILL for slot in nothing.slots)


@pytest.mark.parametrize("pairing", ["none", "reuse", "fill"])
def test_a_bad_row_changes_no_other_row_or_pair(pairing: Pairing) -> None:
    """Whichever rows are bad, the same rows are in the same slots and the other pairs in the same sets."""
    draw = np.random.default_rng(0)
    index = parallel_index()
    whole = [planner(index, pairing).step(t) for t in range(10)]
    broken = 0
    for rate in (0.05, 0.5):
        index.bad = draw.random(len(index.group)) < rate
        index.content[index.bad] = 0
        for plan in whole:
            with_bad = planner(index, pairing).step(plan.step)
            assert rows_of(with_bad) == rows_of(plan)
            good = [[(a, b) for a, b in pairs if not index.bad[[a.row, b.row]].any()] for pairs in sets_of(plan)]
            assert sets_of(with_bad) == [pairs for pairs in good if pairs]
            assert with_bad.dropped_pairs == 0
            broken += len(pairs_of(plan)) - len(pairs_of(with_bad))
    assert (broken > 50) == (pairing != "none")


@pytest.mark.parametrize("set_size", [1, 2, 4, 1000])
def test_pairs_are_cut_into_sets_in_slot_order(set_size: int) -> None:
    plans = planner(parallel_index(), "fill", set_size)
    for t in range(20):
        plan = plans.step(t)
        sizes = [len(pairs) for pairs in sets_of(plan)]
        assert sizes[:-1] == [set_size] * (len(sizes) - 1)
        assert set_size <= sizes[-1] < 2 * set_size or len(sizes) == 1
        order = [other.number for _, other in pairs_of(plan)]
        assert order == sorted(order)
        positions = [position for pairs in plan.sets for position in pairs.ravel().tolist()]
        assert len(set(positions)) == len(positions), "a sample is in one pair"


def test_without_sets_the_same_rows_are_planned_without_fills() -> None:
    for pairing in ("reuse", "fill"):
        index = parallel_index()
        alone, together = planner(index, pairing, None).step(3), planner(index, pairing, 4).step(3)
        assert rows_of(alone) == rows_of(together)
        assert all(slot.labelled for slot in alone.slots)
        assert not alone.sets


def test_cost_is_bytes_times_the_languages_tokens_per_byte() -> None:
    index, rates = parallel_index(), [0.25, 0.5, 2.0]
    plan = planner(index, "fill", rates=rates).step(1)
    expected = [index.n_bytes[slot.row] * rates[slot.language] for slot in plan.slots]
    assert plan.costs.tolist() == expected


def test_a_plan_can_seek_to_step_ten_million() -> None:
    """16 slots divide the period of 256, so far steps have the languages of near steps, with later cursors."""
    index = parallel_index()
    plans = planner(index, "none", slots=16)
    counts = Quotas({"en": 0.4, "de": 0.4, "sw": 0.2}, LANGUAGES, 256).counts
    assert timeit.timeit(lambda: plans.step(10**7), number=1) < 0.5
    far, near = plans.step(10**7), plans.step(0)
    assert 10**7 * 16 % 256 == 0
    cursors = counts * (10**7 * 16 // 256)
    assert [slot.number for slot in far.slots] == list(range(16 * 10**7, 16 * 10**7 + 16))
    for slot, first in zip(far.slots, near.slots, strict=True):
        assert slot.language == first.language
        at = int(cursors[slot.language])
        assert slot.row == row_at(index.rows(slot.language), at, SEED, LANGUAGES[slot.language])
        cursors[slot.language] += 1


def test_a_scarce_language_repeats_evenly_and_changes_no_other_slot() -> None:
    """One row of Swahili instead of seven: its slots hold that row, every other slot is unchanged."""
    many = parallel_index()
    one = FakeIndex(LANGUAGES, [many.group[many.rows(0)].tolist(), many.group[many.rows(1)].tolist(), [1001]])
    seen: Counter[int] = Counter()
    for t in range(20):
        left, right = planner(many, "none").step(t), planner(one, "none").step(t)
        seen.update(slot.row for slot in left.slots if slot.language == 2)
        assert {slot.row for slot in right.slots if slot.language == 2} == {int(one.rows(2)[0])}
        assert [s for s in left.slots if s.language < 2] == [s for s in right.slots if s.language < 2]
    assert len(seen) == 7
    assert max(seen.values()) - min(seen.values()) <= 1


def test_a_language_of_the_mixture_needs_rows() -> None:
    index = FakeIndex(LANGUAGES, [[1], [1], []])
    with pytest.raises(DataError, match="'sw' is in the mixture, but has no training rows"):
        planner(index)
    assert planner(index, weights={"en": 1.0, "de": 1.0}).step(0).slots


def test_a_large_step_is_planned_fast() -> None:
    index = FakeIndex(tuple(f"l{i}" for i in range(50)), [list(range(2000))] * 50)
    plans = planner(index, "fill", 16, slots=512, weights=dict.fromkeys(index.languages, 1.0))
    assert min(timeit.repeat(lambda: plans.step(7), number=1, repeat=7)) < 0.05
