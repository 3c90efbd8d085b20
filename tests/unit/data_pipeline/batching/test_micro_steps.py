"""batching/micro_steps.py: each sample once, sets whole, within the budget, evenly over ranks.

Properties over random steps, and the balance of ranks at the settings of `configs/llama-8b-shifcon.yaml`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_pipeline.batching.grid import Grid
from data_pipeline.batching.micro_steps import NODE_TOLERANCE, Balance, MicroStep, Spread
from data_pipeline.records import DataError

Integers = npt.NDArray[np.int64]
SEEDS = range(400)
LONGEST = 40


@dataclass(frozen=True)
class Case:
    """A random step: its distribution, and its contrast sets as planned."""

    spread: Spread
    sets: tuple[Integers, ...]

    @property
    def lengths(self) -> Integers:
        return self.spread.lengths

    @property
    def kept(self) -> list[list[list[int]]]:
        """The sets without pairs that lack a side."""
        kept = [[pair for pair in pairs.tolist() if min(self.lengths[pair]) > 0] for pairs in self.sets]
        return [pairs for pairs in kept if pairs]

    def micro_steps(self) -> list[MicroStep]:
        return self.spread.micro_steps(self.sets)

    def tokens(self, positions: Sequence[int]) -> int:
        """Rows x longest row of a micro-batch."""
        lengths, grid = self.lengths[positions].tolist(), self.spread.grid
        if not lengths:
            return 0
        if grid.layout == "padded":
            return grid.sides * len(lengths) * max(lengths)
        rows = grid.rows(lengths)
        return len(rows) * max(sum(lengths[number] for number in row) for row in rows)


def case(seed: int, roomy: bool = True) -> Case:
    """Packed and padded rows, also of both texts of a pair; 1 to 16 ranks; a tenth of the samples is missing.

    Args:
        roomy: every set fits into one micro-step.
    """
    random = np.random.default_rng(seed)
    sides = 2 if seed % 4 == 3 else 1
    row = (LONGEST, 3 * LONGEST, None)[seed % 3]
    world_size = int(random.integers(1, 17))
    per_node = int(random.choice([each for each in (1, 2, 4, 8) if each <= world_size]))
    n = int(random.integers(0, 120))
    lengths = np.clip(random.exponential(float(random.uniform(4, 30)), n), 1, LONGEST).astype(np.int64)
    lengths[random.random(n) < 0.1] = 0
    order, sets, start = random.permutation(n), [], 0
    while sides == 1 and len(sets) < seed % 5 and start + 2 <= n:
        n_pairs = int(min(random.integers(1, 6), (n - start) // 2))
        sets.append(order[start : start + 2 * n_pairs].reshape(-1, 2))
        start += 2 * n_pairs
    budget = max(row or 0, sides * LONGEST, 10 * LONGEST if roomy else 0) + int(random.integers(0, 100))
    grid = Grid("packed" if seed % 2 == 0 else "padded", budget, row, sides, float(random.choice([0.0, 0.5])))
    return Case(Spread(grid, lengths, random.integers(0, 9, n), world_size, per_node), tuple(sets))


def test_every_sample_is_on_one_rank_of_one_micro_step() -> None:
    for seed in SEEDS:
        each = case(seed)
        found: Counter[int] = Counter()
        for micro_step in each.micro_steps():
            shares = [micro_step.share(rank) for rank in range(each.spread.world_size)]
            assert [share.tolist() for share in shares] == [
                share.tolist() for share in micro_step.shares(each.spread.world_size)
            ], seed
            assert all((np.diff(share) > 0).all() for share in shares), "ascending"
            found.update(position for share in shares for position in share.tolist())
            assert len(micro_step.positions) == sum(map(len, shares)) > 0
        assert found == Counter(np.flatnonzero(each.lengths).tolist()), seed


def test_sets_are_whole_and_pairs_without_a_side_are_single_samples() -> None:
    dropped = 0
    for seed in SEEDS:
        each = case(seed)
        found = []
        for micro_step in each.micro_steps():
            for pairs in micro_step.sets:
                found.append(pairs.tolist())
                assert set(pairs.ravel().tolist()) <= set(micro_step.positions.tolist()), seed
        assert sorted(found) == sorted(each.kept), seed
        dropped += sum(map(len, each.sets)) - sum(map(len, found))
    assert dropped > 100


def test_every_micro_batch_is_within_the_budget() -> None:
    for seed in SEEDS:
        each = case(seed)
        for micro_step in each.micro_steps():
            for share in micro_step.shares(each.spread.world_size):
                assert each.tokens(share) <= each.spread.grid.micro_batch_tokens, seed


def test_no_rank_is_idle_where_there_are_samples_for_all() -> None:
    """Also on several nodes, and in each of several micro-steps."""
    idle = 0
    for seed in range(4 * len(SEEDS)):
        each = case(seed)
        for micro_step in each.micro_steps():
            empty = each.spread.world_size - len(set(micro_step.ranks.tolist()))
            assert empty == max(each.spread.world_size - len(micro_step.positions), 0), seed
            idle += empty
    assert idle > 100


def fewest_micro_steps(layout: str, lengths: Integers, budget: int, world_size: int) -> int:
    """A lower bound: of packed samples by all tokens, of padded ones by full micro-batches in descending length."""
    if layout == "packed":
        return -(-int(lengths.sum()) // (world_size * budget))
    descending, start, micro_batches = np.sort(lengths)[::-1].tolist(), 0, 0
    while start < len(descending):
        start += budget // descending[start]
        micro_batches += 1
    return -(-micro_batches // world_size)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_samples_take_as_few_micro_steps_as_hold_them(layout: Any) -> None:
    above = several = 0
    for seed in SEEDS[::2]:
        random = np.random.default_rng(seed)
        world_size, n_rows, n = (int(random.integers(*span)) for span in ((1, 9), (5, 11), (1, 1500)))
        budget = 200 * n_rows
        lengths = np.clip(random.exponential(40.0, n), 1, 100).astype(np.int64)
        spread = Spread(Grid(layout, budget, 200), lengths, np.zeros_like(lengths), world_size, world_size)
        fewest = fewest_micro_steps(layout, lengths, budget, world_size)
        found = len(spread.micro_steps([]))
        assert fewest <= found <= 1.2 * fewest + 1, seed
        several += fewest > 3
        above += found - fewest
    assert several > 50
    assert above <= 0.15 * several


def test_a_long_sample_among_short_ones_has_a_micro_step_of_its_own() -> None:
    """Padded rows of 10 tokens, three of them: 30 tokens, but one and two rows of the same samples are 10 and 2."""
    lengths = np.array([1, 10, 1])
    spread = Spread(Grid("padded", 10, 10), lengths, np.zeros_like(lengths), world_size=1, per_node=1)
    assert [micro_step.positions.tolist() for micro_step in spread.micro_steps([])] == [[1], [0, 2]]


def test_nothing_takes_no_micro_step() -> None:
    for n in (0, 3):
        nothing = np.zeros(n, np.int64)
        assert Spread(Grid("packed", 10, 10), nothing, nothing, 2, 2).micro_steps([]) == []
    pair = np.array([[0, 1]])
    (micro_step,) = Spread(Grid("packed", 10, 10), np.array([0, 4, 0]), np.zeros(3, np.int64), 2, 2).micro_steps([pair])
    assert (micro_step.positions.tolist(), micro_step.sets) == ([1], ())


def as_lists(micro_steps: Sequence[MicroStep]) -> list[tuple[list[int], list[int], list[list[list[int]]]]]:
    return [
        (each.positions.tolist(), each.ranks.tolist(), [pairs.tolist() for pairs in each.sets]) for each in micro_steps
    ]


def test_every_rank_computes_the_same_distribution() -> None:
    """From its own arrays, which may be columns of a table, and leaves them as they are."""
    for seed in SEEDS:
        each = case(seed)
        expected = as_lists(each.micro_steps())
        table = np.zeros(len(each.lengths), [("length", np.int64), ("other", np.int64), ("labels", np.int64)])
        table["length"], table["labels"] = each.lengths, each.spread.labels
        before = table.copy()
        for _ in range(2):
            own = replace(each.spread, lengths=table["length"], labels=table["labels"])
            assert as_lists(own.micro_steps([pairs.copy() for pairs in each.sets])) == expected, seed
        assert (table == before).all()


# --- contrast sets that do not fit


def test_a_set_above_the_budget_is_refused_with_one_that_holds_it() -> None:
    """The budget in the message is enough for all sets of the step; steps whose sets fit are not refused."""
    refused = 0
    for seed in SEEDS:
        each = case(seed, roomy=False)
        grid = each.spread.grid
        needed = max((each.spread.tokens_needed(np.array(pairs)) for pairs in each.kept), default=0)
        if needed <= grid.micro_batch_tokens:
            for micro_step in each.micro_steps():
                shares = micro_step.shares(each.spread.world_size)
                assert max(map(each.tokens, shares)) <= grid.micro_batch_tokens, seed
            continue
        with pytest.raises(DataError) as refusal:
            each.micro_steps()
        numbers = re.findall(r"\d+", str(refusal.value))
        stated, ranks = int(numbers[-1]), each.spread.world_size
        assert [int(number) for number in numbers] == [
            grid.micro_batch_tokens, int(numbers[1]), stated, *([ranks] if ranks > 1 else []), stated
        ], seed  # fmt: skip
        assert int(numbers[1]) in [len(pairs) for pairs in each.kept]
        assert stated == needed, seed
        replace(each.spread, grid=replace(grid, micro_batch_tokens=stated)).micro_steps(each.sets)
        refused += 1
    assert refused > 10


def test_of_several_sets_the_refusal_names_the_largest() -> None:
    """By its rectangle, not by its tokens: six rows of 30 tokens with 35 real ones, eight full rows of 10."""
    sets = [np.arange(6).reshape(3, 2), np.arange(6, 14).reshape(4, 2)]
    lengths = np.full(20, 10)
    lengths[:6] = [30, 1, 1, 1, 1, 1]
    spread = Spread(Grid("padded", 50, 30), lengths, np.zeros_like(lengths), 1, 1)
    for order in (sets, sets[::-1]):
        with pytest.raises(
            DataError, match=r"set of 3 pairs takes 180 tokens padded; set data\.micro_batch_tokens to 180,"
        ):
            spread.micro_steps(order)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_refusal_says_what_to_change(layout: Any) -> None:
    """6 samples of 20 tokens in one set: 120 tokens on one rank, 60 on each of two."""
    lengths, pairs = np.full(9, 20), np.array([[0, 3], [8, 5], [1, 2]])
    spread = Spread(Grid(layout, 100, 20), lengths, np.zeros_like(lengths), 1, 1)
    with pytest.raises(DataError) as refusal:
        spread.micro_steps([pairs])
    assert str(refusal.value).startswith(
        f"data.micro_batch_tokens is 100, but a contrast set of 3 pairs takes 120 tokens {layout}"
    )
    assert "set data.micro_batch_tokens to 120, lower objective.contrastive.set_size, or take more ranks" in str(
        refusal.value
    )
    (micro_step,) = replace(spread, world_size=2, per_node=2).micro_steps([pairs])
    assert sorted(map(len, micro_step.shares(2))) == [4, 5]


# --- balance


def lognormal(random: np.random.Generator, mean: float, sd: float, n: int) -> Integers:
    variance = np.log(1 + (sd / mean) ** 2)
    drawn = random.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), n)
    return np.clip(drawn, 1, 1024).astype(np.int64)


Step = tuple[Integers, Integers, list[Integers]]  # lengths, labels, contrast sets


def with_sets(random: np.random.Generator) -> Step:
    """128 slots, 16 of each of eight languages; `pairing: fill` gives 112 pairs, 96 of them with a label-free fill."""
    languages = random.permutation(np.repeat(np.arange(8), 16))
    lengths = np.concatenate([lognormal(random, 185, 60, 128), lognormal(random, 105, 35, 96)])
    labels = np.concatenate([lognormal(random, 70, 25, 128), np.zeros(96, np.int64)])
    others = random.permutation(np.flatnonzero(languages != 0))
    dominant = np.concatenate([np.flatnonzero(languages == 0), 128 + np.arange(96)])
    pairs = np.stack([dominant, others], axis=1)
    return lengths, labels, np.split(pairs[np.argsort(others)], 7)


def without_sets(random: np.random.Generator) -> Step:
    return lognormal(random, 185, 60, 128), lognormal(random, 70, 25, 128), []


def with_partners(random: np.random.Generator) -> Step:
    """512 samples of which each has a partner; a sample's row is as long as the longer text."""
    return lognormal(random, 100, 30, 512), random.integers(1, 20, 512), []


SETTINGS: list[tuple[Callable[[np.random.Generator], Step], Grid]] = [
    (with_sets, Grid("packed", 16384, None, label_cost=0.075)),
    (with_sets, Grid("packed", 16384, 1024, label_cost=0.075)),
    (without_sets, Grid("packed", 16384, None, label_cost=0.075)),
    (without_sets, Grid("packed", 16384, 1024, label_cost=0.075)),
    (with_partners, Grid("padded", 16384, 512, sides=2)),
]


@pytest.mark.parametrize(("draw", "grid"), SETTINGS)
@pytest.mark.parametrize(("world_size", "bound"), [(8, 1.05), (32, 1.10), (64, 1.20)])
def test_ranks_are_equally_busy(
    draw: Callable[[np.random.Generator], Step], grid: Grid, world_size: int, bound: float
) -> None:
    """Largest over mean cost of a rank, on the rectangles as packed, over 100 steps; no rank is without samples."""
    total = Balance()
    for seed in range(100):
        lengths, labels, sets = draw(np.random.default_rng(seed))
        spread = Spread(grid, lengths, labels, world_size, per_node=8)
        total += Balance.of(spread.micro_steps(sets), spread)
    assert total.ratio <= bound
    assert total.idle == 0
    assert total.micro_batches >= 100 * world_size


def on_fullest_node(micro_steps: Sequence[MicroStep], per_node: int) -> list[float]:
    """Of each set: the share of its samples that is on the node with most of them."""
    shares = []
    for micro_step in micro_steps:
        for pairs in micro_step.sets:
            ranks = micro_step.ranks[np.isin(micro_step.positions, pairs)]
            shares.append(max(Counter((ranks // per_node).tolist()).values()) / pairs.size)
    return shares


@pytest.mark.parametrize(("n_nodes", "on_one", "otherwise"), [(2, 0.85, 0.65), (4, 0.75, 0.45)])
def test_sets_prefer_the_ranks_of_one_node(n_nodes: int, on_one: float, otherwise: float) -> None:
    """As far as the balance allows: of seven sets, one is divided between two nodes."""
    grid = Grid("packed", 16384, 1024, label_cost=0.075)
    by_node, anywhere = [], []
    for seed in range(50):
        lengths, labels, sets = with_sets(np.random.default_rng(seed))
        spread = Spread(grid, lengths, labels, 8 * n_nodes, per_node=8)
        by_node += on_fullest_node(spread.micro_steps(sets), 8)
        anywhere += on_fullest_node(replace(spread, per_node=8 * n_nodes).micro_steps(sets), 8)
    assert len(by_node) == len(anywhere) == 50 * 7
    assert np.mean(by_node) > on_one
    assert np.mean(anywhere) < otherwise


def test_nodes_cost_little_balance() -> None:
    """The largest cost of a rank is at most 5 % above that without regard to nodes."""
    assert NODE_TOLERANCE == 1.05
    by_nodes = 0
    for seed in SEEDS:
        each = case(seed)
        without = replace(each.spread, per_node=each.spread.world_size)
        for one, other in zip(each.micro_steps(), without.micro_steps(each.sets), strict=True):
            largest = [np.bincount(step.ranks, each.spread.costs[step.positions]).max() for step in (one, other)]
            assert largest[0] <= 1.05 * largest[1] + 1e-9, seed
            by_nodes += not np.array_equal(one.ranks, other.ranks)
    assert by_nodes > 10


def test_the_largest_padded_rectangle_is_near_the_best_of_all_splits() -> None:
    """Consecutive samples by length: compared with all such splits, by dynamic programming."""
    for seed in range(60):
        random = np.random.default_rng(seed)
        n, world_size = int(random.integers(1, 25)), int(random.integers(1, 7))
        lengths = random.integers(1, 60, n)
        spread = Spread(Grid("padded", 10**6, 100), lengths, np.zeros(n, np.int64), world_size, world_size)
        (micro_step,) = spread.micro_steps([])
        descending = np.sort(lengths)[::-1].tolist()
        best = [0.0] + [np.inf] * n  # the largest rectangle of the first k samples, over the ranks so far
        for _ in range(world_size):
            best = [
                min(max(best[start], (k - start) * descending[min(start, n - 1)]) for start in range(k + 1))
                for k in range(n + 1)
            ]
        found = max(len(share) * max(lengths[share], default=0) for share in micro_step.shares(world_size))
        assert best[n] <= found, seed
        spare = 1 if n >= 2 * world_size else 2
        assert found <= spare * best[n] * (1 + 1e-4), seed


def test_the_balance_of_two_micro_steps_by_hand() -> None:
    """Rank 0: rows of 18 and 12, 36 tokens, 4 labels of half a token; rank 1: 10 tokens, 6 labels; rank 2: none."""
    lengths, labels = np.array([12, 18, 10, 5, 5, 7]), np.array([4, 0, 6, 0, 0, 0])
    spread = Spread(Grid("packed", 100, 20, label_cost=0.5), lengths, labels, 3, 3)
    first = MicroStep(np.array([0, 1, 2]), np.array([0, 0, 1]), ())
    second = MicroStep(np.array([3, 4, 5]), np.array([0, 1, 2]), ())
    assert Balance.of([first], spread) == Balance(38, 51 / 3, 40, 46, 1, 3)
    both = Balance.of([first, second], spread)
    assert both == Balance(38 + 7, pytest.approx(51 / 3 + 17 / 3), 40 + 17, 46 + 17, 1, 6)
    assert both == Balance.of([first], spread) + Balance.of([second], spread)
    assert both.ratio == pytest.approx(45 / (68 / 3))
    assert (both.packing_efficiency, both.idle_share) == (57 / 63, 1 / 6)


def test_the_balance_counts_both_sides_of_padded_pairs() -> None:
    lengths = np.array([4, 2, 3])
    spread = Spread(Grid("padded", 100, 20, sides=2), lengths, np.zeros(3, np.int64), 2, 2)
    found = Balance.of([MicroStep(np.array([0, 1, 2]), np.array([0, 0, 1]), ())], spread)
    assert found == Balance(16, 11, 18, 22, 0, 2)
    assert (Balance().ratio, Balance().packing_efficiency, Balance().idle_share) == (1.0, 0.0, 0.0)
