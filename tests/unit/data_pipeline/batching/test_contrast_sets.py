"""batching/contrast.py and ShifCon's loss over ranks: members, candidates, and gradients equal to those of one process.

The plans are made by hand and the micro-steps are random: samples of a set lie on any of 1 to 6 ranks. A plain loop
over the sets of the whole micro-step is the reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from steps import exchanged
from torch import Tensor

from data_pipeline.batching.batch import ContrastSets
from data_pipeline.batching.contrast import contrast_sets
from data_pipeline.batching.micro_steps import MicroStep
from data_pipeline.order.plan import StepPlan
from training.objectives.base import LossTerm
from training.objectives.contrast import ContrastiveConfig, contrastive_terms

Integers = npt.NDArray[np.int64]
SEEDS = range(60)
LAYERS, HIDDEN, SCALE = 2, 8, 3.0


def plan_of(groups: Integers, contents: Integers, sets: Sequence[Integers]) -> StepPlan:
    n = len(groups)
    return StepPlan(
        step=0, rows=np.arange(n), languages=np.zeros(n, np.int64), groups=groups, contents=contents,
        costs=np.ones(n), n_slots=n, sets=tuple(sets), dropped_pairs=0, seed=0,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A micro-step of a plan, and the order of each rank's samples in its micro-batch."""

    plan: StepPlan
    micro_step: MicroStep
    orders: list[Integers]  # positions, by rank

    @property
    def ranks(self) -> range:
        return range(len(self.orders))

    def contrasts(self) -> list[ContrastSets]:
        found = [
            contrast_sets(self.plan, self.micro_step, rank, len(self.orders), self.orders[rank]) for rank in self.ranks
        ]
        assert all(each is not None for each in found)
        return [each for each in found if each is not None]

    def sets_of(self, rank: int) -> list[list[list[int]]]:
        """The sets in which a rank has a sample."""
        own = set(self.orders[rank].tolist())
        return [pairs.tolist() for pairs in self.micro_step.sets if own & set(pairs.ravel().tolist())]

    def excluded(self, one: Sequence[int], other: Sequence[int]) -> bool:
        """Whether two pairs are of one item, or have a text in common."""
        groups, contents = self.plan.groups, self.plan.contents
        return groups[one[0]] == groups[other[0]] or bool({*contents[[*one]].tolist()} & {*contents[[*other]].tolist()})


def case(seed: int) -> Case:
    """Two to five sets of one to five pairs, of which the micro-step holds at least one, and single samples.

    Few items and texts, so that pairs of one set often share them.
    """
    random = np.random.default_rng(seed)
    n, world_size = 60, int(random.integers(1, 7))
    order, sets, start = random.permutation(n), [], 0
    for _ in range(random.integers(2, 6)):
        n_pairs = int(random.integers(1, 6))
        sets.append(order[start : start + 2 * n_pairs].reshape(-1, 2))
        start += 2 * n_pairs
    groups, contents = random.integers(0, 25, n), random.integers(2**60, 2**60 + 60, n)
    for pairs in sets:
        groups[pairs[:, 1]] = groups[pairs[:, 0]]
    chosen = [sets[number] for number in np.sort(random.choice(len(sets), random.integers(1, len(sets) + 1), False))]
    singles = order[start : start + int(random.integers(0, 6))]
    positions = np.sort(np.concatenate([singles, *(pairs.ravel() for pairs in chosen)]))
    ranks = random.choice(random.permutation(world_size)[: random.integers(1, world_size + 1)], len(positions))
    orders = [random.permutation(positions[ranks == rank]) for rank in range(world_size)]
    return Case(plan_of(groups, contents, sets), MicroStep(positions, ranks, tuple(chosen)), orders)


def cases() -> Iterator[Case]:
    for seed in SEEDS:
        yield case(seed)


def members_of(each: Case, contrasts: Sequence[ContrastSets]) -> list[list[int]]:
    """The positions of every rank's members after the exchange."""
    batches: Any = [SimpleNamespace(targets=SimpleNamespace(contrast=contrast)) for contrast in contrasts]
    return exchanged(batches, [order.tolist() for order in each.orders])


def test_every_rank_gets_the_members_of_the_sets_in_which_it_has_a_sample() -> None:
    """Each once and nothing else; its own first, then the other ranks', by rank."""
    received = without = 0
    for each in cases():
        rank_of = dict(zip(each.micro_step.positions.tolist(), each.micro_step.ranks.tolist(), strict=True))
        for rank, members in enumerate(members_of(each, each.contrasts())):
            expected = {position for pairs in each.sets_of(rank) for pair in pairs for position in pair}
            assert Counter(members) == Counter(expected)
            sources = [-1 if rank_of[member] == rank else rank_of[member] for member in members]
            assert sources == sorted(sources)
            received += sources.count(-1) < len(sources)
            without += not members
    assert received > 50
    assert without > 20, "ranks without a member"


def test_pairs_and_candidates_equal_a_plain_loop() -> None:
    """Sets in the order of the micro-step, padded to the rank's largest; padding is no candidate of any pair."""
    padded = excluded_pairs = 0
    for each in cases():
        contrasts = each.contrasts()
        for rank, (contrast, members) in enumerate(zip(contrasts, members_of(each, contrasts), strict=True)):
            sets = each.sets_of(rank)
            most = max(map(len, sets), default=0)
            assert contrast.pairs.shape == (len(sets), most, 2)
            assert contrast.excluded.shape == (len(sets), most, most)
            assert contrast.pairs.dtype == torch.int64
            for number, pairs in enumerate(sets):
                numbered = contrast.pairs[number].tolist()
                assert [[members[a], members[b]] for a, b in numbered[: len(pairs)]] == pairs
                assert numbered[len(pairs) :] == [[0, 0]] * (most - len(pairs))
                for i in range(most):
                    for j in range(most):
                        is_padding = max(i, j) >= len(pairs)
                        expected = i != j and (is_padding or each.excluded(pairs[i], pairs[j]))
                        assert contrast.excluded[number, i, j] == expected
                        excluded_pairs += expected and not is_padding
                        padded += is_padding
    assert padded > 500
    assert excluded_pairs > 50


@pytest.mark.parametrize(
    ("name", "values", "source", "target"),
    [
        ("groups", "groups", (0, 1), (6, 7)),
        ("the dominant text", "contents", (2,), (8,)),
        ("the other text", "contents", (5,), (11,)),
        ("one's translation and another's original", "contents", (13,), (14,)),
    ],
)
def test_pairs_that_share_an_item_or_a_text_are_no_negatives(
    name: str, values: str, source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    """Of eight pairs of different items and texts, these two and no others; in both directions."""
    pairs = np.arange(16).reshape(8, 2)
    micro_step = MicroStep(np.arange(16), np.zeros(16, np.int64), (pairs,))
    plan = plan_of(np.arange(16) // 2 + 100, np.arange(16) + 2**60, [pairs])

    def excluded(plan: StepPlan) -> list[list[int]]:
        contrast = contrast_sets(plan, micro_step, 0, 1, np.arange(16))
        assert contrast is not None
        return contrast.excluded[0].nonzero().tolist()

    assert excluded(plan) == []
    changed = getattr(plan, values).copy()
    changed[[*target]] = changed[[*source]]
    one, other = source[0] // 2, target[0] // 2
    assert excluded(replace(plan, **{values: changed})) == [[one, other], [other, one]], name


def test_each_set_is_reported_by_one_rank() -> None:
    for each in cases():
        reports = Counter(
            str(pairs)
            for rank, contrast in enumerate(each.contrasts())
            for pairs, reported in zip(each.sets_of(rank), contrast.is_reported.tolist(), strict=True)
            if reported
        )
        assert reports == Counter(str(pairs.tolist()) for pairs in each.micro_step.sets)


def test_a_micro_step_without_sets_has_none_on_any_rank() -> None:
    plan = plan_of(np.arange(4), np.arange(4), [np.array([[0, 1]])])
    micro_step = MicroStep(np.array([2, 3]), np.array([0, 1]), ())
    assert [contrast_sets(plan, micro_step, rank, 3, micro_step.share(rank)) for rank in range(3)] == [None] * 3


# --- the loss


def loss_of_all(each: Case, states_KNH: Tensor) -> Tensor:
    """Each layer, set and pair: the mean of both directions' cross entropies over the permitted candidates."""
    total = torch.zeros((), dtype=torch.float64)
    for states in states_KNH.double():
        normal = states / states.norm(dim=1, keepdim=True)
        scaled = SCALE * normal @ normal.T
        for pairs in each.micro_step.sets:
            pairs = pairs.tolist()
            for i, (dominant, other) in enumerate(pairs):
                candidates = [pair for j, pair in enumerate(pairs) if j == i or not each.excluded(pairs[i], pair)]
                row = scaled[dominant, [b for _, b in candidates]]
                column = scaled[[a for a, _ in candidates], other]
                total = total + (row.exp().sum().log() + column.exp().sum().log()) / 2 - scaled[dominant, other]
    return total / len(states_KNH)


def terms_of(
    each: Case, contrasts: Sequence[ContrastSets], states: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch
) -> list[LossTerm]:
    """The contrastive term of every rank, from its states (K, S, H); the exchange runs in this process."""
    sent = [
        (states_KSH.detach()[:, contrast.own].transpose(0, 1)[contrast.sent]).split(contrast.sent_to)
        for states_KSH, contrast in zip(states, contrasts, strict=True)
    ]
    terms = []
    for rank, (states_KSH, contrast) in enumerate(zip(states, contrasts, strict=True)):

        def exchange(rows: Tensor, *_: Any, rank: int = rank) -> Tensor:
            return torch.cat([rows, *(of_sender[rank] for of_sender in sent)])

        monkeypatch.setattr("training.objectives.members.exchange_rows", exchange)
        terms.append(
            contrastive_terms(list(states_KSH), contrast, ContrastiveConfig(weight=0.5, scale=SCALE))[0]["contrastive"]
        )
    return terms


def test_losses_and_gradients_summed_over_ranks_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a rank's loss reaches its own states only; the reported loss counts every set once."""
    straddling = 0
    for each in islice(cases(), 24):
        random = torch.Generator().manual_seed(len(each.orders))
        whole_KNH = torch.randn(LAYERS, len(each.plan), HIDDEN, generator=random, requires_grad=True)
        expected = loss_of_all(each, whole_KNH)
        (expected_KNH,) = torch.autograd.grad(expected, whole_KNH)
        # a rank without samples has one segment without content, whose state is zero
        states = [
            whole_KNH.detach()[:, order] if len(order) else torch.zeros(LAYERS, 1, HIDDEN) for order in each.orders
        ]
        for own in states:
            own.requires_grad_(True)
        terms = terms_of(each, each.contrasts(), states, monkeypatch)
        found_KNH = torch.zeros_like(expected_KNH)
        for order, own, term in zip(each.orders, states, terms, strict=True):
            assert (term.denominator, term.weight) == ("pairs", 0.5)
            (gradient,) = torch.autograd.grad(term.sum, own)
            found_KNH[:, order] += gradient[:, : len(order)]
            assert not gradient[:, len(order) :].any()
        torch.testing.assert_close(found_KNH, expected_KNH, rtol=0, atol=1e-6)
        reported = sum(float(term.reported.detach()) for term in terms if term.reported is not None)
        assert reported == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-6)
        straddling += sum(float(term.sum.detach()) for term in terms) > float(expected.detach()) + 1e-3
    assert straddling > 12, "sets that lie on several ranks, each of which computes them"
