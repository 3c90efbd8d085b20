"""Loads steps: plans the global batch, takes this rank's share, reads and packs it, in background threads.

A step depends on its number only, so workers prepare steps in any order and a run can resume at any step. A row that
is unusable or too long leaves its slot empty and changes no other slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.batching.batch import Batch, SampleUnit, summed
from data_pipeline.batching.packer import Packer
from data_pipeline.order.plan import Planner, Slot, StepPlan, Unit, assign
from data_pipeline.reader import Reader
from data_pipeline.records import BadRow, Sample

OUTCOMES = ("filled", "truncated", "overlong", "unusable")  # of slots; truncated slots are also counted as filled
Integers = npt.NDArray[np.int64]
FINGERPRINT_RANGE = 2**40  # the sum over 8,192 samples is below 2**53, which a float represents exactly


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's share of a step's global batch."""

    step: int
    micro_batches: tuple[Batch[Any], ...]  # the samples as tensors
    counts: Mapping[str, float]  # this rank's part of the denominators of loss terms
    tokens: Integers  # (languages,) processed tokens, by the language of their text
    samples: Integers  # (languages,)
    slots: Integers  # (OUTCOMES, languages) outcomes of this rank's slots; unlabelled fills are not counted
    bad_rows: tuple[BadRow, ...]  # one for each slot or fill that a bad row left empty
    overlong: int  # slots and fills left empty by samples that are too long
    fingerprint: int  # sum of a hash of each sample; the sum over ranks identifies the step's samples
    dropped_pairs: int  # of the whole step, as planned; equal on all ranks


def no_slots(n_languages: int) -> Integers:
    """Slot counts of zero, (OUTCOMES, languages)."""
    return np.zeros((len(OUTCOMES), n_languages), np.int64)


class Loader:
    """Loads the steps of one rank in advance, in `workers` threads (tokenizers release the GIL)."""

    def __init__(
        self, reader: Reader, planner: Planner, packer: Packer, rank: int, world_size: int, workers: int = 1
    ) -> None:
        self.reader = reader
        self.planner = planner
        self.packer = packer
        self.rank = rank
        self.world_size = world_size
        self.workers = workers

    def load(self, step: int) -> Step:
        """This rank's share of step `step`, as a pure function of (seed, config, data, step, rank, world size)."""
        plan = self.planner.step(step)
        return self.read(plan, assign(plan, self.world_size)[self.rank])

    def empty(self, step: int) -> Step:
        """Step `step` without samples, for a rank whose share could not be read."""
        return self.read(self.planner.step(step), [])

    def read(self, plan: StepPlan, share: Sequence[Unit]) -> Step:
        """Reads and packs a rank's share of a step's plan."""
        n_languages = len(self.reader.index.languages)
        slots = no_slots(n_languages)
        bad_rows: list[BadRow] = []
        overlong = 0
        units = []
        for unit in share:
            samples: list[Sample] = []
            place: dict[int, int] = {}  # slot of the unit -> its sample
            for number, slot in enumerate(unit.slots):
                result = self._sample(slot)
                if isinstance(result, BadRow):
                    outcomes = ["unusable"]
                    bad_rows.append(result)
                elif result is None:
                    outcomes = ["overlong"]
                    overlong += 1
                else:
                    outcomes = ["filled", "truncated"] if result.truncated else ["filled"]
                    place[number] = len(samples)
                    samples.append(result)
                for outcome in outcomes:
                    slots[OUTCOMES.index(outcome), slot.language] += slot.labelled
            if samples:  # with the pairs of which both sides were read
                pairs = tuple((place[a], place[b]) for a, b in unit.pairs if a in place and b in place)
                units.append(SampleUnit(tuple(samples), pairs))
        read = [sample for unit in units for sample in unit.samples]
        tokens, counted = np.zeros(n_languages, np.int64), np.zeros(n_languages, np.int64)
        for sample in read:
            counted[sample.language] += 1
            for language, n in sample.tokens_by_language():
                tokens[language] += n
        batches = tuple(self.packer.pack(units))
        return Step(
            step=plan.step,
            micro_batches=batches,
            counts=summed([batch.counts() for batch in batches], self.packer.collator.counts),
            tokens=tokens,
            samples=counted,
            slots=slots,
            bad_rows=tuple(bad_rows),
            overlong=overlong,
            fingerprint=sum(sample.fingerprint() % FINGERPRINT_RANGE for sample in read),
            dropped_pairs=plan.dropped_pairs,
        )

    def _sample(self, slot: Slot) -> Sample | BadRow | None:
        """The sample of a slot, its bad row, or None if it is too long."""
        try:
            return self.reader.read(slot)
        except BadRow as bad:
            return bad

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


def fixed_batches(samples: Sequence[Sample], packer: Packer, rank: int, world_size: int) -> list[Batch[Any]]:
    """This rank's micro-batches of a fixed set of samples (probe, held-out), equal in number on all ranks.

    Every rank holds all samples and packs the shares of all ranks, so the number needs no communication; shares with
    fewer micro-batches are extended by idle ones.
    """
    units = [SampleUnit((sample,)) for sample in samples]
    shares = [packer.pack(units[r::world_size]) for r in range(world_size)]
    longest = max(len(share) for share in shares)
    return [*shares[rank], *(packer.idle() for _ in range(longest - len(shares[rank])))]
