"""Distributes a step's samples over micro-steps and ranks, as a pure function of their lengths.

A micro-step is the n-th micro-batch of all ranks together. The sample is the unit that ranks are given. A contrast set
lies within one micro-step, its samples on any ranks, those of one node if the balance allows it. Every rank computes
the whole distribution from the same exact lengths, so nothing about it is communicated (docs/methods.md, section 3).

Shapes: N positions of the step's plan, n samples of a micro-step, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from data_pipeline.batching.grid import FEW_ITEMS, Grid, evenly, largest_first
from data_pipeline.records import DataError

Integers = npt.NDArray[np.int64]
BISECTIONS = 20  # of the largest cost of a rank in the padded layout
NODE_TOLERANCE = 1.05  # largest cost of a rank with sets on nodes, relative to that without regard to nodes


@dataclass(frozen=True, slots=True)
class MicroStep:
    """The n-th micro-batch of all ranks."""

    positions: Integers  # (n,) its samples, ascending
    ranks: Integers  # (n,) the rank of each
    sets: tuple[Integers, ...]  # the contrast sets: (P, 2) positions (dominant, other)

    def share(self, rank: int) -> Integers:
        """The positions of a rank's micro-batch, ascending; none: it is idle."""
        return self.positions[self.ranks == rank]

    def shares(self, world_size: int) -> list[Integers]:
        """The positions of every rank's micro-batch."""
        order = np.argsort(self.ranks, kind="stable")
        return np.split(self.positions[order], np.cumsum(np.bincount(self.ranks, minlength=world_size))[:-1])


@dataclass(frozen=True)
class Spread:
    """Distributes samples over ranks.

    Args:
        lengths: (N,) row length of each sample in tokens; 0: there is none.
        labels: (N,) positions of each sample that reach the LM head.
        per_node: ranks per node, which are consecutive; sets prefer those of one node. None: one node.
    """

    grid: Grid
    lengths: Integers
    labels: Integers
    world_size: int
    per_node: int | None = None

    def micro_steps(self, sets: Sequence[Integers]) -> list[MicroStep]:
        """As few micro-steps as hold all samples, evenly over micro-steps and ranks.

        Args:
            sets: contrast sets, (P, 2) positions. Of a pair without one side, the other is a single sample.

        Raises:
            DataError: a contrast set does not fit into one micro-step.
        """
        sets = [pairs[(self.lengths[pairs] > 0).all(axis=1)] for pairs in sets]
        sets = [pairs for pairs in sets if len(pairs)]
        single = self.lengths > 0
        for pairs in sets:
            single[pairs] = False
        singles = np.flatnonzero(single)
        groups = len(sets) + len(singles)
        n_steps = max(-(-self.grid.sides * int(self.lengths.sum()) // (self.world_size * self._budget)), 1)
        while n_steps < groups:
            found = [self._over_all_ranks(*members) for members in self._groups(n_steps, sets, singles)]
            if all(map(self._fits, found)):
                return found
            n_steps += max(n_steps // 16, 1)
        self._refuse_above_budget(sets)
        none, ordered = np.empty(0, np.int64), self._descending(singles)
        alone = [self._over_all_ranks([pairs], none) for pairs in sets]
        starts = range(0, len(ordered), self.world_size)
        return alone + [self._over_all_ranks([], ordered[start : start + self.world_size]) for start in starts]

    @cached_property
    def costs(self) -> npt.NDArray[np.float64]:
        """(N,) cost of each sample without padding, in tokens; a label counts with its cost at the LM head."""
        return self.grid.costs(self.lengths, self.labels)

    @property
    def _budget(self) -> int:
        return self.grid.micro_batch_tokens

    def _groups(
        self, n_steps: int, sets: Sequence[Integers], singles: Integers
    ) -> list[tuple[list[Integers], Integers]]:
        """The sets and single samples of each micro-step: sets first, each to the micro-step with the lowest load.

        In the padded layout a micro-step's single samples are of similar length.
        """
        if n_steps == 1:
            return [(list(sets), singles)]
        of_sets = [float(self.costs[pairs].sum()) for pairs in sets]
        order = sorted(range(len(sets)), key=lambda number: -of_sets[number])
        chosen, _ = largest_first([of_sets[number] for number in order], n_steps)
        sets_of: list[list[Integers]] = [[] for _ in range(n_steps)]
        loads = [0.0] * n_steps
        for number, micro_step in sorted(zip(order, chosen, strict=True)):
            sets_of[micro_step].append(sets[number])
            loads[micro_step] += of_sets[number]
        ordered = self._descending(singles)
        if self.grid.layout == "packed":
            bins, _ = largest_first(self.costs[ordered].tolist(), n_steps, loads)
        else:
            ordered = self._by_length(singles)
            held: list[tuple[float, int]] = []
            sets_of.reverse()  # sets beside the shortest single samples
            for each in sets_of:
                lengths = self.lengths[np.concatenate([np.empty(0, np.int64), *(pairs.ravel() for pairs in each)])]
                held += [(len(lengths) / self.world_size, int(lengths.max(initial=0)))] * self.world_size
            bins = (self._consecutive(ordered, held) // self.world_size).tolist()
        of_step = np.array(bins, np.int64)
        members = [(sets_of[number], ordered[of_step == number]) for number in range(n_steps)]
        return [each for each in members if each[0] or len(each[1])]

    def _over_all_ranks(self, sets: Sequence[Integers], singles: Integers) -> MicroStep:
        """A micro-step of these samples."""
        members = np.sort(np.concatenate([*(pairs.ravel() for pairs in sets), singles]))
        per_node = self.per_node or self.world_size
        n_nodes, uneven = divmod(self.world_size, per_node)
        # Padded rows are chosen by length, which leaves no choice of the node.
        if not sets or n_nodes == 1 or uneven or self.grid.layout == "padded":
            return MicroStep(members, self._over_ranks(members, self.world_size), tuple(sets))
        ranks = np.empty_like(members)
        node_of = self._over_nodes(members, sets, n_nodes)
        order = np.argsort(node_of, kind="stable")
        for node, here in enumerate(np.split(order, np.cumsum(np.bincount(node_of, minlength=n_nodes))[:-1])):
            ranks[here] = node * per_node + self._over_ranks(members[here], per_node)
        if self._has_few(members, self.world_size):
            without_nodes = self._over_ranks(members, self.world_size)
            costs = [self._largest_cost(members, each, self.world_size) for each in (ranks, without_nodes)]
            if costs[0] > NODE_TOLERANCE * costs[1] or len(np.unique(ranks)) < len(np.unique(without_nodes)):
                ranks = without_nodes
        return MicroStep(members, ranks, tuple(sets))

    def _over_nodes(self, members: Integers, sets: Sequence[Integers], n_nodes: int) -> Integers:
        """(n,) nodes: each set's is that with the lowest load, as far as the mean load allows; the rest fill up."""
        mean, loads = float(self.costs[members].sum()) / n_nodes, [0.0] * n_nodes
        node_of = np.full(len(self.lengths), -1)
        costs = [float(self.costs[pairs].sum()) for pairs in sets]
        for number in sorted(range(len(sets)), key=lambda number: -costs[number]):
            node, held, load = loads.index(min(loads)), sets[number], costs[number]
            if loads[node] + load > mean:
                of_set = self._descending(held.ravel())
                held = of_set[loads[node] + np.cumsum(self.costs[of_set]) <= mean]
                load = float(self.costs[held].sum())
            node_of[held] = node
            loads[node] += load
        rest = self._descending(members[node_of[members] < 0])
        node_of[rest], _ = largest_first(self.costs[rest].tolist(), n_nodes, loads)
        return node_of[members]

    def _over_ranks(self, members: Integers, n_ranks: int) -> Integers:
        """(n,) ranks: as even as they get (packed), or consecutive samples by length (padded)."""
        if self.grid.layout == "padded":
            order = np.argsort(-self.lengths[members], kind="stable")
            ranks = np.empty(len(members), np.int64)
            ranks[order] = self._consecutive(members[order], [(0, 0)] * n_ranks)
            return ranks
        found = self._evenly(members, n_ranks)
        rows = -(-int(self.lengths[members].sum()) // (n_ranks * self.grid.longest_row))  # of a rank
        if rows > 1 and self._has_few(members, n_ranks):
            # Ranks of equal totals may differ by the padding of their rows: here rows are made equal instead, and each
            # rank gets rows of similar length.
            row_of = self._evenly(members, rows * n_ranks)
            longest_first = np.argsort(-np.bincount(row_of, self.lengths[members], rows * n_ranks), kind="stable")
            by_rows = (np.argsort(longest_first) // rows)[row_of]
            found = min((found, by_rows), key=lambda ranks: self._largest_cost(members, ranks, n_ranks))
        return found

    def _evenly(self, members: Integers, n_bins: int) -> Integers:
        order = np.argsort(-self.costs[members], kind="stable")
        bins = np.empty(len(members), np.int64)
        bins[order] = evenly(self.costs[members[order]].tolist(), n_bins)
        return bins

    def _has_few(self, members: Integers, n_ranks: int) -> bool:
        return len(members) <= FEW_ITEMS * n_ranks

    def _by_length(self, positions: Integers) -> Integers:
        return positions[np.argsort(-self.lengths[positions], kind="stable")]

    def _consecutive(self, members: Integers, held: Sequence[tuple[float, int]]) -> Integers:
        """(n,) bins: consecutive samples for each, with the lowest largest rectangle.

        Its size is found by bisection: under a limit, each bin in turn takes as many samples as the limit allows, and
        leaves at least one for every empty bin after it.

        Args:
            members: in descending length.
            held: the number and the largest length of the samples that each bin holds at the start.
        """
        label = self.grid.label_cost * float(self.labels[members].mean()) if len(members) else 0.0
        heights = (self.grid.sides * self.lengths[members] + label).tolist()  # cost of a sample in its rectangle
        n, sides = len(heights), self.grid.sides
        empty_later = np.cumsum([0] + [n_held == 0 for n_held, _ in held[:0:-1]])[::-1].tolist()

        def ends(limit: float) -> list[int]:
            places, first = [], 0
            for (n_held, longest), n_later in zip(held, empty_later, strict=True):
                if first < n:
                    fitting = int(limit / max(heights[first], sides * longest + label) - n_held)
                    first += max(min(fitting, n - first - n_later), int(n_held == 0))
                places.append(first)
            return places

        tallest = max([*heights, *(sides * longest + label for _, longest in held)], default=0.0)
        low, high = 0.0, (n + max(n_held for n_held, _ in held) + 1) * tallest
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if ends(middle)[-1] == n else (middle, high)
        return np.searchsorted(ends(high), np.arange(n), "right")

    def _largest_cost(self, members: Integers, ranks: Integers, n_ranks: int) -> float:
        """The largest cost of a rank; as packed, if ranks have few samples and padding decides."""
        if not self._has_few(members, n_ranks):
            return float(np.bincount(ranks, self.costs[members]).max())
        tokens = [self.grid.tokens(self.lengths[members[ranks == rank]].tolist()) for rank in range(n_ranks)]
        labels = np.bincount(ranks, self.labels[members], n_ranks)
        return float((tokens + self.grid.label_cost * labels).max())

    def _fits(self, micro_step: MicroStep) -> bool:
        """Whether every rank's micro-batch is within the budget."""
        lengths = self.lengths[micro_step.positions]
        totals, longest = np.zeros((2, self.world_size), np.int64)
        np.add.at(totals, micro_step.ranks, lengths)
        np.maximum.at(longest, micro_step.ranks, lengths)
        unsure = np.flatnonzero(~self.grid.surely_fit(totals, longest))
        return all(self._needed(micro_step.share(rank)) <= self._budget for rank in unsure.tolist())

    def tokens_needed(self, pairs: Integers) -> int:
        """The smallest `micro_batch_tokens` for a contrast set that has a micro-step to itself."""
        return self._budget_for(self._over_all_ranks([pairs], np.empty(0, np.int64)))

    def _budget_for(self, micro_step: MicroStep) -> int:
        return max(self._needed(share) for share in micro_step.shares(self.world_size))

    def _needed(self, share: Integers) -> int:
        return self.grid.needed(self.lengths[share].tolist())

    def _descending(self, positions: Integers) -> Integers:
        return positions[np.argsort(-self.costs[positions], kind="stable")]

    def _refuse_above_budget(self, sets: Sequence[Integers]) -> None:
        needed, n_pairs = max(((self.tokens_needed(pairs), len(pairs)) for pairs in sets), default=(0, 0))
        if needed > self._budget:
            where = "" if self.world_size == 1 else f" on one of {self.world_size} ranks"
            raise DataError(
                f"data.micro_batch_tokens is {self._budget}, but a contrast set of {n_pairs} pairs takes {needed} "
                f"tokens {self.grid.layout}{where}; set data.micro_batch_tokens to {needed}, lower "
                "objective.contrastive.set_size, or take more ranks"
            )


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly micro-steps occupy the ranks, on the rectangles as packed; of several steps: their sum."""

    largest: float = 0.0  # sum over micro-steps of the largest cost of a rank
    mean: float = 0.0  # sum over micro-steps of the mean cost of a rank
    real_tokens: int = 0
    grid_tokens: int = 0  # with padding
    idle: int = 0  # micro-batches without samples
    micro_batches: int = 0

    @classmethod
    def of(cls, micro_steps: Sequence[MicroStep], spread: Spread) -> Balance:
        """The balance of one step."""
        total = cls()
        for micro_step in micro_steps:
            shares = micro_step.shares(spread.world_size)
            tokens = np.array([spread.grid.tokens(spread.lengths[share].tolist()) for share in shares])
            costs = tokens + spread.grid.label_cost * np.array([spread.labels[share].sum() for share in shares])
            real = spread.grid.sides * int(spread.lengths[micro_step.positions].sum())
            idle = sum(not len(share) for share in shares)
            total += cls(costs.max(), costs.mean(), real, int(tokens.sum()), idle, len(shares))
        return total

    def __add__(self, other: Balance) -> Balance:
        return Balance(
            self.largest + other.largest, self.mean + other.mean, self.real_tokens + other.real_tokens,
            self.grid_tokens + other.grid_tokens, self.idle + other.idle, self.micro_batches + other.micro_batches,
        )  # fmt: skip

    @property
    def ratio(self) -> float:
        """The largest over the mean cost of a rank; 1: all ranks are equally busy."""
        return self.largest / self.mean if self.mean else 1.0

    @property
    def packing_efficiency(self) -> float:
        """Share of the rectangles that is not padding."""
        return self.real_tokens / max(self.grid_tokens, 1)

    @property
    def idle_share(self) -> float:
        """Share of micro-batches without samples."""
        return self.idle / max(self.micro_batches, 1)
