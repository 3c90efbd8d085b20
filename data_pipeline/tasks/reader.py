"""Row numbers -> task samples, alone or paired with their source text; steps of them, with background workers.

In: a DataIndex, a TaskTokenizer, a Planner and a TaskPacker. Out: one TaskStep a step. Next: `training.loop.trainer`.

What a sample is paired with, which of its windows is read and which tokens are covered are pure functions of
(seed, step, row): every rank and every resume sees the same. Sources follow X-Mixup (arXiv 2205.04182): gold text
with a probability that falls from step to step, else the back-translation, as testing will bring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from data_pipeline.config import Overlong, TaskKind
from data_pipeline.loader import (
    FINGERPRINT_RANGE,
    OUTCOMES,
    PlannedLoader,
    Readable,
    count_slot,
    no_slots,
    overlong_error,
    read_rows,
)
from data_pipeline.order.plan import Planner, StepPlan, Unit
from data_pipeline.records import BadRow, DataError, stable_hash
from data_pipeline.sources.index import DataIndex
from data_pipeline.tasks.batches import SideLabels, TaskBatch, TaskPacker, TaskSample
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.masking import mask_tokens
from data_pipeline.tasks.records import Example, TaskRecord
from data_pipeline.tasks.tokenize import NO_ANSWER, EncodedSide, TaskTokenizer, Windows


def gold_probability(step: int, k: float) -> float:
    """How probable gold sources are at a step, `k / (k + exp(step / k))` (docs/methods.md, section 2.3)."""
    exponent = step / k - math.log(k)
    return 1 / (1 + math.exp(exponent)) if exponent < 700 else 0.0


@dataclass(frozen=True, slots=True)
class _Source:
    """What a sample is paired with."""

    example: Example
    origin: str
    language: int
    is_gold: bool
    is_itself: bool = False


class TaskReader:
    """Row numbers -> TaskSamples."""

    def __init__(
        self,
        index: DataIndex,
        tokenizer: TaskTokenizer,
        *,
        paired: bool,
        dominant: int,
        seed: int,
        source_schedule: float | None,
        overlong: Overlong = "truncate",
    ) -> None:
        """`dominant` is the language of the sources; `source_schedule` the k of `gold_probability`, None: always gold.
        `overlong`: what becomes of a row whose own texts are cut; a source's texts are cut in any case.

        Raises DataError where texts without labels are to be paired.
        """
        if paired and tokenizer.config.kind == "text":
            raise DataError("data.task.kind: 'text' has no labels, so there is nothing to pair samples for")
        self.index = index
        self.tokenizer = tokenizer
        self.paired = paired
        self.dominant = dominant
        self.seed = seed
        self.source_schedule = source_schedule
        self.overlong = overlong
        self.label_ids = {label: number for number, label in enumerate(tokenizer.config.labels)}

    def gold(self, step: int) -> bool:
        """Whether the sources of a step are gold text: drawn once a step, the same on every rank."""
        if self.source_schedule is None:
            return True
        return stable_hash(self.seed, "source", step) / 2**63 < gold_probability(step, self.source_schedule)

    def length(self, row: int) -> int:
        """Tokens of a row's own texts, uncut; 0 where long ones are read in windows. Raises BadRow, DataError."""
        return self.tokenizer.windows(self.index.task_record(row).example).uncut

    def read(self, row: int, step: int) -> TaskSample | None:
        """The sample that a row gives in a step; None where it is too long and left out. Raises BadRow, DataError."""
        record = self.index.task_record(row)
        windows = self.tokenizer.windows(record.example)
        too_long = windows.uncut > self.tokenizer.sequence_length
        if too_long and self.overlong == "error":
            raise overlong_error(record.origin, windows.uncut, self.tokenizer.sequence_length)
        if too_long and self.overlong == "drop":
            return None
        number = self._drawn("window", record, step) % len(windows)
        target = windows[number]
        target, labels = self._labelled(record.example, target, record.origin, self._drawn("mask", record, step))
        language = int(self.index.language[row])
        sample = TaskSample(record.id, language, int(self.index.group[row]), target, labels, truncated=too_long)
        if not self.paired:
            return sample
        found = self._source(record, row, language, step)
        counts = self.tokenizer.config.kind == "classification" or (found.is_gold and self.gold(step))
        source = target
        if not found.is_itself:
            source = _counterpart(self.tokenizer.windows(found.example), windows, number, self.tokenizer.config.kind)
        source, labels = self._labelled(found.example, source, found.origin, as_source=True, counts=counts)
        return replace(
            sample, source=source, source_labels=labels, source_language=found.language,
            source_is_gold=found.is_gold, source_counts=counts, unpaired=found.is_itself,
        )  # fmt: skip

    def readable(self, rows: Sequence[int], step: int = 0) -> Readable[TaskSample]:
        """Reads rows for a fixed set, which needs no slot. Raises DataError."""
        return read_rows(rows, lambda row: self.read(row, step))

    def _drawn(self, what: str, record: TaskRecord, step: int) -> int:
        return stable_hash(what, self.seed, step, record.language, record.id)

    def _source(self, record: TaskRecord, row: int, language: int, step: int) -> _Source:
        """The text that the step wants, else the other one, else the sample itself."""
        gold_row = self.index.translation(row, self.dominant) if language != self.dominant else -1
        if gold_row >= 0 and (record.back is None or self.gold(step)):
            gold = self.index.task_record(gold_row)
            return _Source(gold.example, gold.origin, self.dominant, is_gold=True)
        if record.back is not None:
            return _Source(record.back, record.origin, self.dominant, is_gold=False)
        return _Source(record.example, record.origin, language, is_gold=True, is_itself=True)

    def _labelled(
        self,
        example: Example,
        side: EncodedSide,
        origin: str,
        mask_seed: int = 0,
        *,
        as_source: bool = False,
        counts: bool = True,
    ) -> tuple[EncodedSide, SideLabels]:
        """A window with its labels. `counts`: they must be there. Raises BadRow."""
        config: TaskConfig = self.tokenizer.config
        if config.kind == "classification":
            return side, SideLabels(classes=self._one_hot([example.label]))
        if config.kind == "tagging":
            return side, SideLabels(classes=self._tag_classes(example, side, origin, as_source, counts))
        if config.kind == "qa":
            if counts and side.span is None:
                why = "no answers, which training needs" if not example.answers else "no token stands for the answer"
                raise BadRow(origin, why)
            return side, SideLabels()
        covered, positions = mask_tokens(
            side.input_ids, side.content, config.mask_probability, self.tokenizer.mask_id,
            self.tokenizer.ordinary_ids, mask_seed,
        )  # fmt: skip
        return replace(side, input_ids=covered), SideLabels(positions=positions, ids=side.input_ids[positions])

    def _tag_classes(
        self, example: Example, side: EncodedSide, origin: str, as_source: bool, counts: bool
    ) -> npt.NDArray[np.float32]:
        """(words of the window, C): a target's soft tags come before its tags, a source's tags before its soft tags."""
        words = slice(*side.words)
        if example.soft_tags is not None and not (as_source and example.tags is not None):
            soft = np.array(example.soft_tags[words], np.float32)
            return soft / soft.sum(axis=1, keepdims=True)
        if example.tags is not None:
            return self._one_hot(example.tags[words])
        if counts:
            raise BadRow(origin, "neither tags nor soft_tags, one of which training needs")
        return self._one_hot([None] * (side.words[1] - side.words[0]))

    def _one_hot(self, labels: Sequence[str | None]) -> npt.NDArray[np.float32]:
        """(labels, C); zeros where there is none."""
        classes = np.zeros((len(labels), len(self.label_ids)), np.float32)
        for number, label in enumerate(labels):
            if label is not None:
                classes[number, self.label_ids[label]] = 1
        return classes


def _counterpart(of_source: Windows, of_target: Windows, number: int, kind: TaskKind) -> EncodedSide:
    """The source's window that goes with window `number` of the target.

    In tagging the one whose middle lies nearest to that of the target's, both as shares of their texts. Where the
    target's window holds the answer, the one that holds it too, and of those the nearest in number. Else the one of
    the same number.
    """
    if len(of_source) == 1:
        return of_source[0]
    if kind == "tagging":
        middles, wanted = _middles(of_source), _middles(of_target)[number]
        return of_source[min(range(len(middles)), key=lambda n: abs(middles[n] - wanted))]
    if of_target[number].span not in (None, NO_ANSWER):
        answering = [n for n, side in enumerate(of_source) if side.span not in (None, NO_ANSWER)]
        if answering:
            return of_source[min(answering, key=lambda n: abs(n - number))]
    return of_source[min(number, len(of_source) - 1)]


def _middles(windows: Windows) -> list[float]:
    """The middle of each window in words, as a share of the text."""
    n_words = windows.ranges[-1][1]
    return [(first + stop) / 2 / n_words for first, stop in windows.ranges]


@dataclass(frozen=True, slots=True)
class TaskStep:
    """One rank's share of a step's global batch, like `loader.RankStep`."""

    step: int
    micro_batches: tuple[TaskBatch, ...]
    counts: Mapping[str, float]  # this rank's part of what loss terms are divided by
    tokens: npt.NDArray[np.int64]  # (languages,) processed tokens, by the language of the row they are in
    samples: npt.NDArray[np.int64]  # (languages,) of the targets
    slots: npt.NDArray[np.int64]  # (OUTCOMES, languages): what became of this rank's slots
    bad_rows: tuple[BadRow, ...]  # one a slot that they left empty
    overlong: int  # slots left empty by texts that are too long: classification under `overlong: drop`
    fingerprint: int  # sum over samples of a hash of each: adds up over ranks to one number for the step
    gold: bool  # the step's sources are gold text, not back-translations
    unpaired: int  # samples that are their own source, having no other
    dropped_pairs: int  # of the whole step, as planned; the same on every rank


class TaskLoader(PlannedLoader[TaskStep]):
    """A task's samples, tokenised and packed for an encoder."""

    def __init__(
        self, reader: TaskReader, planner: Planner, packer: TaskPacker, rank: int, world_size: int, workers: int = 1
    ) -> None:
        super().__init__(planner, rank, world_size, workers)
        self.reader = reader
        self.packer = packer

    def read(self, plan: StepPlan, share: Sequence[Unit]) -> TaskStep:
        samples: list[TaskSample] = []
        bad_rows: list[BadRow] = []
        n_languages = len(self.reader.index.languages)
        slots = no_slots(n_languages)
        step = plan.step
        for slot in (slot for unit in share for slot in unit.slots):
            try:
                sample = self.reader.read(slot.row, step)
            except BadRow as error:
                bad_rows.append(error)
                count_slot(slots, slot, "unusable")
                continue
            if sample is None:
                count_slot(slots, slot, "overlong")
                continue
            samples.append(sample)
            count_slot(slots, slot, "filled")
            if sample.truncated:
                count_slot(slots, slot, "truncated")
        gold = self.reader.gold(step)
        batches = tuple(self.packer.pack(samples, gold=gold))
        tokens = np.zeros(n_languages, np.int64)
        for sample in samples:
            tokens[sample.language] += len(sample.target)
            if sample.source is not None:
                tokens[sample.source_language] += len(sample.source)
        return TaskStep(
            step=step,
            micro_batches=batches,
            counts=_counts(batches),
            tokens=tokens,
            samples=np.bincount([sample.language for sample in samples], minlength=n_languages).astype(np.int64),
            slots=slots,
            bad_rows=tuple(bad_rows),
            overlong=int(slots[OUTCOMES.index("overlong")].sum()),
            fingerprint=sum(_fingerprint(sample) for sample in samples),
            gold=gold,
            unpaired=sum(sample.unpaired for sample in samples),
            dropped_pairs=plan.dropped_pairs,
        )


def _counts(batches: Sequence[TaskBatch]) -> dict[str, float]:
    """Label units that are learned from, on either side, and pairs."""
    counts = {"target_labels": 0.0, "source_labels": 0.0, "pairs": 0.0}
    for batch in batches:
        of_source = float(batch.label_weights[batch.label_is_source].sum())
        counts["target_labels"] += float(batch.label_weights.sum()) - of_source
        counts["source_labels"] += of_source
        counts["pairs"] += batch.n_pairs
    return counts


def _fingerprint(sample: TaskSample) -> int:
    """Of what was read: the sample, the window, and the kind of source."""
    read = (sample.language, sample.id, sample.target.words, sample.source_is_gold, len(sample))
    return stable_hash(*read) % FINGERPRINT_RANGE
