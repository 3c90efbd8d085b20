"""Loads steps in background threads: plans the global batch, reads and packs this rank's part of it.

A step is loaded in three parts. `scan` tokenises a share of the step's samples on each rank. `measures` are then summed
over ranks, so that every rank knows the exact length and readability of every sample. From these `load` computes the
same distribution over micro-steps and ranks on every rank, and packs this rank's samples. The sum is a collective call
in the main thread, some steps ahead; the rest runs in `workers` threads.

A step depends on its number only, so workers prepare steps in any order and a run can resume at any step. A row that
is unusable or too long leaves its slot empty and changes no other slot.

Shapes: N positions of the step's plan.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.batching.batch import Batch
from data_pipeline.batching.contrast import contrast_sets
from data_pipeline.batching.micro_steps import MicroStep, Spread
from data_pipeline.batching.packer import Packer
from data_pipeline.order.plan import Planner, StepPlan
from data_pipeline.reader import Reader
from data_pipeline.records import BadRow, DataError, Sample

OUTCOMES = ("filled", "truncated", "overlong", "unusable")  # of slots; truncated slots are also counted as filled
FILLED, TRUNCATED, OVERLONG, UNUSABLE = range(1, 5)  # values of the measure "outcome", in the same order
# of a sample, besides its counts (`Sample.counts`)
MEASURES = ("outcome", "row_length", "n_labels", "fingerprint", "tokens", "partner_tokens", "partner_language")
Integers = npt.NDArray[np.int64]
FINGERPRINT_RANGE = 2**53  # integers below it are exact as floats


@dataclass(frozen=True, slots=True)
class ThisRank:
    """This process among the ranks of a run. By default the only one."""

    rank: int = 0
    world_size: int = 1
    per_node: int | None = None  # ranks of a node, consecutive; None: all
    sum: Callable[[Integers], Integers] = np.asarray  # exact element-wise sum over ranks


@dataclass(frozen=True, slots=True)
class Scan:
    """A rank's share of a step's samples, tokenised."""

    plan: StepPlan
    measures: Integers  # (N, columns of `Loader.dtype`), 0 at positions of other ranks
    samples: Mapping[int, Sample]  # by position
    bad_rows: tuple[BadRow, ...] = ()
    error: DataError | None = None  # why the share could not be read


@dataclass(frozen=True, slots=True)
class Step:
    """A step's global batch, with this rank's micro-batches. Counts are those of all ranks."""

    step: int
    micro_batches: tuple[Batch[Any], ...]  # equally many on all ranks; idle ones without samples
    counts: Mapping[str, int]  # denominators of loss terms
    tokens: Integers  # (languages,) processed tokens, by the language of their text
    labels: Integers  # (languages,) reported labels, by the language of their slot
    slots: Integers  # (OUTCOMES, languages) outcomes of slots; unlabelled fills are not counted
    bad_rows: tuple[BadRow, ...]  # unusable rows that this rank has read
    unusable: int  # slots and fills left empty by unusable rows
    overlong: int  # slots and fills left empty by samples that are too long
    fingerprint: int  # identifies the step's samples, below 2^53
    dropped_pairs: int  # `StepPlan.dropped_pairs`


def no_slots(n_languages: int) -> Integers:
    """Slot counts of zero, (OUTCOMES, languages)."""
    return np.zeros((len(OUTCOMES), n_languages), np.int64)


class Loader:
    """Loads the steps of one rank in advance, in `workers` threads (tokenizers release the GIL)."""

    def __init__(
        self, reader: Reader, planner: Planner, packer: Packer, this_rank: ThisRank | None = None, workers: int = 1
    ) -> None:
        self.reader = reader
        self.planner = planner
        self.packer = packer
        self.this_rank = this_rank or ThisRank()
        self.workers = workers
        self.waited = 0.0  # seconds that the last step waited for this rank's own work
        self.dtype = np.dtype([(name, np.int64) for name in (*MEASURES, *packer.collator.counts)])

    def scan(self, step: int) -> Scan:
        """Reads this rank's share of a step's samples, so that all ranks together read each once."""
        plan = self.planner.step(step)
        measures = np.zeros(len(plan), self.dtype)
        positions = range(self.this_rank.rank, len(plan), self.this_rank.world_size)
        samples: dict[int, Sample] = {}
        bad_rows = []
        try:
            outcomes = self.reader.read_many([plan.slot(position) for position in positions])
        except DataError as error:
            return Scan(plan, self._integers(measures), {}, error=error)
        for position, outcome in zip(positions, outcomes, strict=True):
            if isinstance(outcome, BadRow):
                measures[position]["outcome"] = UNUSABLE
                bad_rows.append(outcome)
            elif outcome is None:
                measures[position]["outcome"] = OVERLONG
            else:
                measures[position] = self._measured(outcome)
                samples[position] = outcome
        return Scan(plan, self._integers(measures), samples, tuple(bad_rows))

    def load(self, scan: Scan, measures: Integers) -> Step:
        """The step and this rank's micro-batches, from its scan and the sum of all ranks' measures.

        Raises:
            DataError: the scan's error; a contrast set does not fit into a micro-step; or a row has changed.
        """
        if scan.error is not None:
            raise scan.error
        plan, table = scan.plan, self.table(measures)
        micro_steps = self.spread(table, self.this_rank).micro_steps(plan.sets)
        samples = self._own_samples(scan, table, micro_steps)
        batches = tuple(self._batch(plan, micro_step, samples) for micro_step in micro_steps)
        counted = self.packer.collator.counts
        counts = {name: int(table[name].sum()) for name in counted}
        if self.planner.has_sets:
            counts["pairs"] = sum(len(pairs) for micro_step in micro_steps for pairs in micro_step.sets)
        return Step(
            step=plan.step,
            micro_batches=batches or (self.packer.idle(),),
            counts=counts,
            tokens=self._by_language(plan.languages, table["tokens"])
            + self._by_language(table["partner_language"], table["partner_tokens"]),
            labels=self._by_language(plan.languages, table[counted[0]]),
            slots=self._slots(plan, table["outcome"]),
            bad_rows=scan.bad_rows,
            unusable=int((table["outcome"] == UNUSABLE).sum()),
            overlong=int((table["outcome"] == OVERLONG).sum()),
            fingerprint=int(table["fingerprint"].sum()) % FINGERPRINT_RANGE,  # a sum modulo 2^64, exact as such
            dropped_pairs=plan.dropped_pairs,
        )

    def table(self, measures: Integers) -> npt.NDArray[Any]:
        """(N,) measures of each sample, with their names."""
        return measures.view(self.dtype)[:, 0]

    def spread(self, table: npt.NDArray[Any], ranks: ThisRank) -> Spread:
        """The distribution of samples of these measures over `ranks`."""
        return Spread(self.packer.grid, table["row_length"], table["n_labels"], ranks.world_size, ranks.per_node)

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Steps `start` .. `stop - 1`, in order. Called on all ranks alike, as their measures are summed."""
        ahead = self.workers + 1
        with ThreadPoolExecutor(self.workers, thread_name_prefix="data") as pool:
            scans: deque[Future[Scan]] = deque()
            steps: deque[Future[Step]] = deque()
            try:
                scanned = loaded = start
                for step in range(start, stop):
                    self.waited = 0.0
                    while loaded < min(step + ahead, stop):
                        while scanned < min(loaded + ahead, stop):
                            scans.append(pool.submit(self.scan, scanned))
                            scanned += 1
                        scan = self._result(scans.popleft())
                        steps.append(pool.submit(self.load, scan, self.this_rank.sum(scan.measures)))
                        loaded += 1
                    yield self._result(steps.popleft())
            finally:
                for scanning in scans:
                    scanning.cancel()
                for loading in steps:
                    loading.cancel()

    def _result(self, future: Future[Any]) -> Any:
        began = time.perf_counter()
        result = future.result()
        self.waited += time.perf_counter() - began
        return result

    def _batch(self, plan: StepPlan, micro_step: MicroStep, samples: Mapping[int, Sample]) -> Batch[Any]:
        this = self.this_rank
        positions = micro_step.share(this.rank)
        own = [samples[position] for position in positions.tolist()]
        rows = self.packer.rows(own)
        order = positions[np.array([number for row in rows for number in row], np.int64)]
        contrast = contrast_sets(plan, micro_step, this.rank, this.world_size, order)
        return self.packer.collate(own, rows, contrast)

    def _own_samples(self, scan: Scan, table: npt.NDArray[Any], micro_steps: Sequence[MicroStep]) -> dict[int, Sample]:
        """The samples that this rank has scanned and those of its micro-batches, which are read here, by position."""
        positions = [each for micro_step in micro_steps for each in micro_step.share(self.this_rank.rank).tolist()]
        missing = [position for position in positions if position not in scan.samples]
        slots = [scan.plan.slot(position) for position in missing]
        read = dict(zip(missing, self.reader.read_many(slots), strict=True))
        for position, outcome in read.items():
            if not isinstance(outcome, Sample) or self._measured(outcome) != table[position].item():
                origin = self.reader.index.origin(int(scan.plan.rows[position]))
                raise DataError(f"{origin}: read differently by two ranks; do all see the same file and tokenizer?")
        return {**scan.samples, **read}

    def _measured(self, sample: Sample) -> tuple[int, ...]:
        """The measures of a sample, in the order of `dtype`."""
        outcome = TRUNCATED if sample.truncated else FILLED
        (_, tokens), (partner_language, partner_tokens) = [*sample.tokens_by_language(), (0, 0)][:2]
        counts = sample.counts()
        return (
            outcome, sample.row_length, sample.n_labels, sample.fingerprint(), tokens, partner_tokens,
            partner_language, *(counts[name] for name in self.packer.collator.counts),
        )  # fmt: skip

    def _integers(self, measures: npt.NDArray[Any]) -> Integers:
        return measures.view(np.int64).reshape(len(measures), -1)

    def _by_language(self, languages: Integers, values: Integers) -> Integers:
        total = np.zeros(len(self.reader.index.languages), np.int64)
        np.add.at(total, languages, values)
        return total

    def _slots(self, plan: StepPlan, outcomes: Integers) -> Integers:
        outcomes, languages = outcomes[: plan.n_slots], plan.languages[: plan.n_slots]
        values = range(FILLED, UNUSABLE + 1)
        slots = np.stack([self._by_language(languages, outcomes == value) for value in values])
        slots[FILLED - 1] += slots[TRUNCATED - 1]
        return slots


def fixed_batches(samples: Sequence[Sample], packer: Packer, this_rank: ThisRank) -> list[Batch[Any]]:
    """This rank's micro-batches of a fixed set of samples (probe, held-out), equal in number on all ranks.

    Every rank holds all samples, so their distribution needs no communication.
    """
    lengths = np.array([sample.row_length for sample in samples], np.int64)
    labels = np.array([sample.n_labels for sample in samples], np.int64)
    spread = Spread(packer.grid, lengths, labels, this_rank.world_size, this_rank.per_node)
    shares = [micro_step.share(this_rank.rank) for micro_step in spread.micro_steps([])]
    return [packer.batch([samples[number] for number in share]) for share in shares]
