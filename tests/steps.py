"""Steps of several ranks loaded in one process, and the contrast sets that their micro-batches describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from data_pipeline.batching.batch import Batch, ChatTargets
from data_pipeline.loader import Loader, Step, ThisRank

T = TypeVar("T")


def load(loader: Loader, step: int) -> Step:
    """A step of the only rank."""
    scan = loader.scan(step)
    return loader.load(scan, scan.measures)


def load_on_ranks(make: Callable[[ThisRank], Loader], world_size: int, step: int, per_node: int = 0) -> list[Step]:
    """Every rank's part of a step."""
    loaders = [make(ThisRank(rank, world_size, per_node or world_size)) for rank in range(world_size)]
    scans = [loader.scan(step) for loader in loaders]
    measures = np.sum([scan.measures for scan in scans], axis=0)
    return [loader.load(scan, measures) for loader, scan in zip(loaders, scans, strict=True)]


def exchanged(batches: Sequence[Batch[ChatTargets]], own: Sequence[Sequence[T]]) -> list[list[T]]:
    """The members of every rank in one micro-step, if `own[rank]` holds a value for each segment of a rank."""
    sets = [batch.targets.contrast for batch in batches]
    members = [[own[rank][segment] for segment in each.own.tolist()] for rank, each in enumerate(sets)]
    sent = []  # by sender, then receiver
    for rank, each in enumerate(sets):
        numbers = iter(each.sent.tolist())
        sent.append([[members[rank][next(numbers)] for _ in range(count)] for count in each.sent_to])
        assert next(numbers, None) is None
        assert each.sent_to[rank] == each.received_from[rank] == 0
        assert each.received_from == tuple(other.sent_to[rank] for other in sets)
    return [[*members[rank], *(row for sender in sent for row in sender[rank])] for rank in range(len(sets))]


def sets_of(steps: Sequence[Step]) -> Iterator[list[tuple[tuple[str, int], tuple[str, int]]]]:
    """Each contrast set once, as pairs of (sample id, language): that of the rank which reports it."""
    for batches in zip(*(step.micro_batches for step in steps), strict=True):
        if batches[0].targets.contrast is None:
            assert all(batch.targets.contrast is None for batch in batches)
            continue
        names = [[(sample.id, sample.language) for sample in batch.samples] for batch in batches]
        for batch, members in zip(batches, exchanged(batches, names), strict=True):
            contrast = batch.targets.contrast
            for pairs, excluded, reported in zip(
                contrast.pairs.tolist(), contrast.excluded, contrast.is_reported.tolist(), strict=True
            ):
                real = [pair for place, pair in enumerate(pairs) if place == 0 or pair != [0, 0]]
                assert excluded[len(real) :, : len(real)].all(), "padding is excluded"
                assert excluded[: len(real), len(real) :].all()
                assert not excluded.diagonal().any()
                if reported:
                    yield [(members[a], members[b]) for a, b in real]
