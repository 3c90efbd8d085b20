"""Composes the stages: plan -> this rank's share -> read -> tokenise -> pack, with background workers.

In: a DataIndex, a Chat, a Planner and a Packer. Out: one RankStep a step. Next: `training.loop.trainer`.

A step depends on nothing but its number, so workers prepare steps in any order and a resume starts anywhere.
An unusable, over-long or empty row leaves its slot empty; nothing else moves. What is the same for decoders and
for the tasks of encoders (`tasks/reader.py`) is in PlannedLoader.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data_pipeline.config import Overlong
from data_pipeline.order.plan import Planner, Slot, StepPlan, Unit, assign
from data_pipeline.packing import MicroBatch, Packer, TokenizedUnit
from data_pipeline.records import BadRow, DataError, Record, TokenizedSample, stable_hash
from data_pipeline.sources.index import DataIndex
from data_pipeline.text.chat import Chat, check_labels
from data_pipeline.text.truncation import truncate

OUTCOMES = ("filled", "truncated", "overlong", "unusable")  # of slots; the truncated are filled, too
Integers = npt.NDArray[np.int64]
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
    slots: Integers  # (OUTCOMES, languages): what became of this rank's slots; a label-free fill is none
    bad_rows: tuple[BadRow, ...]  # one a slot or fill that they left empty
    overlong: int  # slots and fills left empty by samples that are too long
    fingerprint: int  # sum over samples of a hash of each: adds up over ranks to one number for the step
    dropped_pairs: int  # of the whole step, as planned; the same on every rank

    @property
    def counts(self) -> dict[str, float]:
        """This rank's part of what loss terms are divided by."""
        return {"label_tokens": self.label_tokens, "pairs": self.pairs}


class Readable(NamedTuple, Generic[Item]):
    """Of some rows, those that are usable and fit, their samples, and why others are not usable."""

    rows: list[int]
    samples: list[Item]
    bad: list[BadRow]


class SampleReader:
    """Row numbers -> tokenised samples."""

    def __init__(self, index: DataIndex, chat: Chat, sequence_length: int, overlong: Overlong = "drop") -> None:
        self.index = index
        self.chat = chat
        self.sequence_length = sequence_length
        self.overlong = overlong

    def length(self, row: int) -> int:
        """Tokens of a row's whole sample, however long. Raises BadRow, DataError."""
        return len(self.chat.tokenize(self.index.record(row)))

    def read(self, row: int, *, labelled: bool = True) -> TokenizedSample | None:
        """The sample of a row; None where it is too long and left out. Raises BadRow, DataError.

        Too long is longer than `sequence_length`. Under `overlong` "truncate" only a sample whose answers alone are too
        long is left out; under "error" one that is too long is a DataError.
        """
        record = self.index.record(row)
        sample = self.fitted(record, labelled=labelled)
        if sample is None and self.overlong == "error":
            raise overlong_error(record.origin, self.length(row), self.sequence_length)
        return sample

    def fitted(self, record: Record, *, labelled: bool = True) -> TokenizedSample | None:
        """The sample of a record, its prompt cut where it is too long and `overlong` is "truncate"; None where it is
        longer than `sequence_length` still. Raises BadRow, DataError.
        """
        sample = self.chat.tokenize(record, labelled=labelled)
        if len(sample) > self.sequence_length:
            if self.overlong != "truncate":
                return None
            cut = truncate(self.chat, record, sample, self.sequence_length, labelled=labelled)
            if cut is None:
                return None
            record, sample = cut
        if labelled:
            check_labels(self.chat, record, sample)
        return sample

    def readable(self, rows: Sequence[int]) -> Readable[TokenizedSample]:
        """Reads rows for a fixed set, which needs no slot. Raises DataError."""
        return read_rows(rows, self.read)


def read_rows(rows: Sequence[int], read: Callable[[int], Item | None]) -> Readable[Item]:
    """What `read` gives of the rows: None for one that is left out; an unusable one is a BadRow that it raises."""
    found: Readable[Item] = Readable([], [], [])
    for row in rows:
        try:
            sample = read(row)
        except BadRow as bad:
            found.bad.append(bad)
            continue
        if sample is not None:
            found.rows.append(row)
            found.samples.append(sample)
    return found


def overlong_error(origin: str, length: int, most: int) -> DataError:
    """Of a row that is too long, under `data.overlong: error`."""
    return DataError(
        f"{origin}: {length} tokens, data.sequence_length is {most}; shorten the row, raise data.sequence_length, or "
        "set data.overlong to drop or truncate"
    )


def no_slots(n_languages: int) -> Integers:
    """Counts of slots, all 0: (OUTCOMES, languages)."""
    return np.zeros((len(OUTCOMES), n_languages), np.int64)


def count_slot(counts: Integers, slot: Slot, outcome: str) -> None:
    """Adds one slot to `counts` (OUTCOMES, languages); a label-free fill is none."""
    counts[OUTCOMES.index(outcome), slot.language] += slot.labelled


class PlannedLoader(ABC, Generic[Step]):
    """Steps of one rank, prepared ahead by `workers` threads (tokenisers release the interpreter lock)."""

    def __init__(self, planner: Planner, rank: int, world_size: int, workers: int) -> None:
        self.planner = planner
        self.rank = rank
        self.world_size = world_size
        self.workers = workers

    def load(self, step: int) -> Step:
        """This rank's share of step `step`; a pure function of (seed, config, data, step, rank, world size)."""
        plan = self.planner.step(step)
        return self.read(plan, self.share(plan))

    def share(self, plan: StepPlan) -> list[Unit]:
        """This rank's part of a step's plan."""
        return assign(plan, self.world_size)[self.rank]

    def empty(self, step: int) -> Step:
        """Step `step` without any sample: the stand-in on a rank whose share could not be read."""
        return self.read(self.planner.step(step), [])

    @abstractmethod
    def read(self, plan: StepPlan, share: Sequence[Unit]) -> Step:
        """A rank's share of a step's plan, read and packed."""

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

    def read(self, plan: StepPlan, share: Sequence[Unit]) -> RankStep:
        n_languages = len(self.reader.index.languages)
        slots = no_slots(n_languages)
        bad_rows: list[BadRow] = []
        overlong = 0
        tokenized = []
        for unit in share:
            read, too_long = self._read_unit(unit, slots, bad_rows)
            overlong += too_long
            if read.samples:
                tokenized.append(read)
        samples = [sample for unit in tokenized for sample in unit.samples]
        languages = np.array([sample.language for sample in samples], dtype=np.int64)
        lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
        return RankStep(
            step=plan.step,
            micro_batches=tuple(self.packer.pack(tokenized)),
            label_tokens=sum(int(sample.labels[1:].sum()) for sample in samples),
            pairs=sum(len(unit.pairs) for unit in tokenized),
            tokens=np.bincount(languages, weights=lengths, minlength=n_languages).astype(np.int64),
            samples=np.bincount(languages, minlength=n_languages).astype(np.int64),
            slots=slots,
            bad_rows=tuple(bad_rows),
            overlong=overlong,
            fingerprint=sum(stable_hash(sample.language, sample.id) % FINGERPRINT_RANGE for sample in samples),
            dropped_pairs=plan.dropped_pairs,
        )

    def _read_unit(self, unit: Unit, slots: Integers, bad_rows: list[BadRow]) -> tuple[TokenizedUnit, int]:
        """The unit's readable samples and the pairs that still have both sides; how many were too long.

        Adds to `slots` what became of its slots.
        """
        samples: list[TokenizedSample] = []
        place: dict[int, int] = {}
        overlong = 0
        for number, slot in enumerate(unit.slots):
            try:
                sample = self.reader.read(slot.row, labelled=slot.labelled)
            except BadRow as error:
                bad_rows.append(error)
                count_slot(slots, slot, "unusable")
                continue
            if sample is None:
                overlong += 1
                count_slot(slots, slot, "overlong")
                continue
            count_slot(slots, slot, "filled")
            if sample.truncated:
                count_slot(slots, slot, "truncated")
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
