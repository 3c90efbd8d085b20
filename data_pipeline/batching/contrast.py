"""The contrast sets of a micro-step as one rank computes them (docs/methods.md, section 1.3).

Shapes: P pairs of a set, C sets in which the rank has a sample, W ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.batching.batch import ContrastSets
from data_pipeline.batching.micro_steps import MicroStep
from data_pipeline.order.plan import StepPlan

Integers = npt.NDArray[np.int64]


def contrast_sets(
    plan: StepPlan, micro_step: MicroStep, rank: int, world_size: int, segments: Integers
) -> ContrastSets | None:
    """The sets of which a member is on this rank, and which states the ranks exchange for them.

    Args:
        segments: the positions of this rank's samples, in the order of the micro-batch's segments.

    Returns:
        None if the micro-step has no sets.
    """
    if not micro_step.sets:
        return None
    rank_of = np.full(len(plan), -1)
    rank_of[micro_step.positions] = micro_step.ranks
    sets = [pairs for pairs in micro_step.sets if (rank_of[pairs] == rank).any()]
    members = np.concatenate([np.empty(0, np.int64), *(pairs.ravel() for pairs in sets)])  # a sample is in one pair
    members = members[np.lexsort((members, rank_of[members], rank_of[members] != rank))]
    own = members[rank_of[members] == rank]
    number_of = np.full(len(plan), -1)
    number_of[members] = np.arange(len(members))
    sent = [[np.empty(0, np.int64)] for _ in range(world_size)]
    for pairs in sets:
        of_set = number_of[pairs[rank_of[pairs] == rank]]
        for other in set(rank_of[pairs].ravel().tolist()) - {rank}:
            sent[other].append(of_set)
    sent_to = [np.sort(np.concatenate(each)) for each in sent]
    received_from = np.bincount(rank_of[members], minlength=world_size)
    received_from[rank] = 0
    segment_of = np.full(len(plan), -1)
    segment_of[segments] = np.arange(len(segments))
    most = max(map(len, sets), default=0)
    numbered, excluded = np.zeros((len(sets), most, 2), np.int64), np.ones((len(sets), most, most), np.bool_)
    for place, pairs in enumerate(sets):
        numbered[place, : len(pairs)] = number_of[pairs]
        excluded[place, : len(pairs), : len(pairs)] = excluded_combinations(
            plan.groups[pairs[:, 0]], plan.contents[pairs]
        )
    excluded[:, np.arange(most), np.arange(most)] = False  # the pair itself is the positive
    return ContrastSets(
        own=torch.from_numpy(segment_of[own]),
        sent=torch.from_numpy(np.concatenate(sent_to)),
        sent_to=tuple(map(len, sent_to)),
        received_from=tuple(received_from.tolist()),
        pairs=torch.from_numpy(numbered),
        excluded=torch.from_numpy(excluded),
        is_reported=torch.tensor([rank == rank_of[pairs].min() for pairs in sets], dtype=torch.bool),
    )


def excluded_combinations(groups: Integers, contents: Integers) -> npt.NDArray[np.bool_]:
    """(P, P): pairs of the same item, and pairs that share a text, are not each other's negatives.

    Args:
        groups: (P,) items.
        contents: (P, 2) hashes of the two texts.
    """
    shared_text = (contents[:, None, :, None] == contents[None, :, None, :]).any(axis=(2, 3))
    return (groups[:, None] == groups) | shared_text
