"""Composes the stages: plan -> this rank's share -> read -> tokenise -> pack, with background workers.

In: a DataIndex, a Chat, a Planner and a Packer. Out: one RankStep a step. Next: `training.trainer`.

A step depends on nothing but its number, so workers prepare steps in any order and a resume starts anywhere.
An unusable, over-long or empty row leaves its slot empty; nothing else moves. What is the same for decoders and
for the tasks of encoders (`tasks/reader.py`) is in PlannedLoader.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data_pipeline.chat import Chat, check_labels
from data_pipeline.index import DataIndex
from data_pipeline.packing import MicroBatch, Packer, TokenizedUnit
from data_pipeline.plan import Planner, StepPlan, Unit, assign
from data_pipeline.records import BadRow, TokenizedSample, stable_hash

FINGERPRINT_RANGE = 2**40  # 8,192 samples add up to less than 2**53, which a float holds exactly

Step = TypeVar("Step")
Item = TypeVar("Item")
ItemOf = TypeVar("ItemOf", contravariant=True)
Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class RankStep:
    """One rank's share of a step's global batch."""

    step: int
    micro_batches: tuple[MicroBatch, ...]
    label_tokens: int
    pairs: int
    tokens: npt.NDArray[np.int64]  # (languages,) processed tokens, by the sample's language
    samples: npt.NDArray[np.int64]  # (languages,)
    bad_rows: tuple[str, ...]  # one line each: "file:line: reason"
    overlong: int
    fingerprint: int  # sum over samples of a hash of each: adds up over ranks to one number for the step
    dropped_pairs: int  # of the whole step, as planned; the same on every rank

    @property
    def counts(self) -> dict[str, float]:
        """This rank's part of what loss terms are divided by."""
        return {"label_tokens": self.label_tokens, "pairs": self.pairs}


class SampleReader:
    """Row numbers -> tokenised samples."""

    def __init__(self, index: DataIndex, chat: Chat, sequence_length: int) -> None:
        self.index = index
        self.chat = chat
        self.sequence_length = sequence_length

    def read(self, row: int, *, labelled: bool = True) -> TokenizedSample | None:
        """The sample of a row; None where it is longer than `sequence_length`. Raises BadRow, DataError."""
        record = self.index.record(row)
        sample = self.chat.tokenize(record, labelled=labelled)
        if len(sample) > self.sequence_length:
            return None
        if labelled:
            check_labels(self.chat, record, sample)
        return sample

    def readable(self, rows: Sequence[int]) -> tuple[list[int], list[TokenizedSample]]:
        """Of these rows, those that are usable and fit, and their samples: for fixed sets, which need no slot."""
        kept: list[int] = []
        samples: list[TokenizedSample] = []
        for row in rows:
            try:
                sample = self.read(row)
            except BadRow:
                continue  # counted, and bounded by max_bad_rows, where a slot of training meets it
            if sample is not None:
                kept.append(row)
                samples.append(sample)
        return kept, samples


class PlannedLoader(ABC, Generic[Step]):
    """Steps of one rank, prepared ahead by `workers` threads (tokenisers release the interpreter lock)."""

    def __init__(self, planner: Planner, rank: int, world_size: int, workers: int) -> None:
        self.planner = planner
        self.rank = rank
        self.world_size = world_size
        self.workers = workers

    @abstractmethod
    def load(self, step: int) -> Step:
        """This rank's share of step `step`; a pure function of (seed, config, data, step, rank, world size)."""

    def share(self, plan: StepPlan) -> list[Unit]:
        """This rank's part of a step's plan."""
        return assign(plan, self.world_size)[self.rank]

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Steps `start` .. `stop - 1`, in order."""
        ahead = self.workers + 1
        with ThreadPoolExecutor(self.workers, thread_name_prefix="data") as pool:
            waiting: list[Future[Step]] = []
            try:
                for step in range(start, stop):
                    while len(waiting) < ahead and (following := step + len(waiting)) < stop:
                        waiting.append(pool.submit(self.load, following))
                    yield waiting.pop(0).result()
            finally:
                for future in waiting:
                    future.cancel()


class StepLoader(PlannedLoader[RankStep]):
    """Conversations, tokenised and packed for a decoder."""

    def __init__(
        self, reader: SampleReader, planner: Planner, packer: Packer, rank: int, world_size: int, workers: int = 1
    ) -> None:
        super().__init__(planner, rank, world_size, workers)
        self.reader = reader
        self.packer = packer

    def load(self, step: int) -> RankStep:
        plan = self.planner.step(step)
        bad_rows: list[str] = []
        overlong = 0
        tokenized = []
        for unit in self.share(plan):
            read, too_long = self._read_unit(unit, bad_rows)
            overlong += too_long
            if read.samples:
                tokenized.append(read)
        n_languages = len(self.reader.index.languages)
        samples = [sample for unit in tokenized for sample in unit.samples]
        languages = np.array([sample.language for sample in samples], dtype=np.int64)
        lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
        return RankStep(
            step=step,
            micro_batches=tuple(self.packer.pack(tokenized)),
            label_tokens=sum(int(sample.labels[1:].sum()) for sample in samples),
            pairs=sum(len(unit.pairs) for unit in tokenized),
            tokens=np.bincount(languages, weights=lengths, minlength=n_languages).astype(np.int64),
            samples=np.bincount(languages, minlength=n_languages).astype(np.int64),
            bad_rows=tuple(bad_rows),
            overlong=overlong,
            fingerprint=sum(stable_hash(sample.language, sample.id) % FINGERPRINT_RANGE for sample in samples),
            dropped_pairs=plan.dropped_pairs,
        )

    def _read_unit(self, unit: Unit, bad_rows: list[str]) -> tuple[TokenizedUnit, int]:
        """The unit's readable samples and the pairs that still have both sides; how many were too long."""
        samples: list[TokenizedSample] = []
        place: dict[int, int] = {}
        overlong = 0
        for number, slot in enumerate(unit.slots):
            try:
                sample = self.reader.read(slot.row, labelled=slot.labelled)
            except BadRow as error:
                bad_rows.append(str(error))
                continue
            if sample is None:
                overlong += 1
                continue
            place[number] = len(samples)
            samples.append(sample)
        pairs = tuple((place[a], place[b]) for a, b in unit.pairs if a in place and b in place)
        return TokenizedUnit(tuple(samples), pairs), overlong


class SupportsPacking(Protocol[ItemOf, Batch]):
    """`packing.Packer` and `tasks.batches.TaskPacker` are such."""

    def pack(self, items: Sequence[ItemOf], /) -> list[Batch]: ...

    def idle(self) -> Batch: ...


def shared_batches(
    items: Sequence[Item], packer: SupportsPacking[Item, Batch], rank: int, world_size: int
) -> list[Batch]:
    """Micro-batches of this rank over a fixed set: equal in number on every rank.

    Every rank sees all items and packs every rank's share, so no communication is needed to agree on the
    number; idle micro-batches fill up the shorter ones.
    """
    shares = [packer.pack(items[r::world_size]) for r in range(world_size)]
    longest = max(len(share) for share in shares)
    return [*shares[rank], *(packer.idle() for _ in range(longest - len(shares[rank])))]


def fixed_batches(samples: Sequence[TokenizedSample], packer: Packer, rank: int, world_size: int) -> list[MicroBatch]:
    """`shared_batches` over samples that are each a unit of their own (probe, held-out)."""
    return shared_batches([TokenizedUnit((sample,)) for sample in samples], packer, rank, world_size)
