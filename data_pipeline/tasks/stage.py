"""The text stage of encoders: a record -> one window of its text with labels, and the matching window of its source.

The window and the masked tokens are pure functions of (seed, step, sample), so they are equal on all ranks and after
a resume.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from data_pipeline.config import Overlong, TaskKind
from data_pipeline.order.plan import Slot
from data_pipeline.reader import Outcome, SlotRecord, TextStage, overlong_error
from data_pipeline.records import BadRow, Example, Record, Sample, stable_hash
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.masking import mask_tokens
from data_pipeline.tasks.sample import SideLabels, SourceSide, TaskSample
from data_pipeline.tasks.tokenize import NO_ANSWER, EncodedSide, TaskTokenizer, Windows

GIVE_WAY = 16  # samples after which threads that wait for the interpreter's lock get it


class TaskStage(TextStage):
    """Turns records into TaskSamples."""

    def __init__(self, tokenizer: TaskTokenizer, overlong: Overlong = "truncate") -> None:
        """`overlong` applies to target texts that are too long; source texts are always truncated."""
        self.tokenizer = tokenizer
        self.sequence_length = tokenizer.sequence_length
        self.overlong = overlong
        self.label_ids = {label: number for number, label in enumerate(tokenizer.config.labels)}

    def _lengths(self, records: Sequence[Record]) -> list[int | BadRow]:
        return [windows.uncut for windows in self.tokenizer.windows_of_all([record.example for record in records])]

    def _samples(self, items: Sequence[SlotRecord]) -> list[Outcome]:
        partners = [_partner_example(item) for item in items]
        examples = [item.record.example for item in items]
        windows = self.tokenizer.windows_of_all([*examples, *(each for each in partners if each is not None)])
        of_partners = iter(windows[len(items) :])
        found: list[Outcome] = []
        for number, (item, partner, own) in enumerate(zip(items, partners, windows[: len(items)], strict=True)):
            if number % GIVE_WAY == GIVE_WAY - 1:
                time.sleep(1e-6)  # NumPy's generators release and retake the lock faster than a waiting thread wakes
            other = None if partner is None else (partner, next(of_partners))
            try:
                found.append(self._sample(item, own, other))
            except BadRow as bad:
                found.append(bad)
        return found

    def _sample(self, item: SlotRecord, windows: Windows, other: tuple[Example, Windows] | None) -> TaskSample | None:
        """The sample of a slot, from the windows of its record and those of its partner, if that is another text."""
        slot, record, _ = item
        too_long = windows.uncut > self.sequence_length
        if too_long and self.overlong == "error":
            raise overlong_error(record.origin, windows.uncut, self.sequence_length)
        if too_long and self.overlong == "drop":
            return None
        number = _drawn("window", record, slot) % len(windows)
        target, labels = self._labelled(record.example, windows[number], record.origin, _drawn("mask", record, slot))
        return TaskSample(
            id=record.id, group=stable_hash(record.group), language=slot.language, target=target, target_labels=labels,
            truncated=too_long, source=self._source(item, windows, number, other),
            gold=slot.partner is None or slot.partner.gold_step,
        )  # fmt: skip

    def describe(self, sample: Sample, uncut: int) -> Iterator[str]:
        """The decoded text and labels of both sides."""
        assert isinstance(sample, TaskSample)
        yield f"{len(sample)} tokens"
        yield f"target: {self._decoded(sample.target, sample.target_labels)}"
        if (source := sample.source) is not None:
            kind = "itself" if source.is_itself else "gold" if source.is_gold else "back-translation"
            yield f"source ({kind}): {self._decoded(source.side, source.labels)}"

    def _source(
        self, item: SlotRecord, windows: Windows, number: int, other: tuple[Example, Windows] | None
    ) -> SourceSide | None:
        """The partner's window that matches window `number` of the record's text; None without partners."""
        slot, record, partner = item
        if slot.partner is None:
            return None
        is_gold = slot.partner.kind != "back-translation"
        counts = self.tokenizer.config.kind == "classification" or (is_gold and slot.partner.gold_step)
        example, side = record.example, windows[number]
        if other is not None:
            example, of_partner = other
            side = _counterpart(of_partner, windows, number, self.tokenizer.config.kind)
        origin = (partner or record).origin
        side, labels = self._labelled(example, side, origin, as_source=True, counts=counts)
        return SourceSide(side, labels, slot.partner.language, is_gold, counts, is_itself=other is None)

    def _decoded(self, side: EncodedSide, labels: SideLabels) -> str:
        decode, names = self.tokenizer.tokenizer.decode, self.tokenizer.config.labels
        text = decode(side.input_ids)
        if labels.classes is not None:
            best = [
                names[each] if row.any() else "-"
                for each, row in zip(labels.classes.argmax(1), labels.classes, strict=True)
            ]
            return f"{text}  ->  {' '.join(best)}"
        if labels.ids is not None:
            return f"{text}  ->  {decode(labels.ids)}"
        if side.span is None or side.span == NO_ANSWER:
            return f"{text}  ->  (no answer in this window)"
        return f"{text}  ->  {decode(side.input_ids[side.span[0] : side.span[1] + 1])}"

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
        """A window and its labels. Raises BadRow if `counts` and the labels are missing."""
        config: TaskConfig = self.tokenizer.config
        if config.kind == "classification":
            return side, SideLabels(classes=self._one_hot([example.label]))
        if config.kind == "tagging":
            return side, SideLabels(classes=self._tag_classes(example, side, origin, as_source, counts))
        if config.kind == "qa":
            if counts and side.span is None:
                why = "no answers, which training needs" if not example.answers else "no token covers the answer"
                raise BadRow(origin, why)
            return side, SideLabels()
        masked, positions = mask_tokens(
            side.input_ids, side.content, config.mask_probability, self.tokenizer.mask_id,
            self.tokenizer.ordinary_ids, mask_seed,
        )  # fmt: skip
        return replace(side, input_ids=masked), SideLabels(positions=positions, ids=side.input_ids[positions])

    def _tag_classes(
        self, example: Example, side: EncodedSide, origin: str, as_source: bool, counts: bool
    ) -> npt.NDArray[np.float32]:
        """Classes (words of the window, C). If there are both, a target uses its soft tags and a source its tags."""
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
        """One row per label, (labels, C); zeros for None."""
        classes = np.zeros((len(labels), len(self.label_ids)), np.float32)
        for number, label in enumerate(labels):
            if label is not None:
                classes[number, self.label_ids[label]] = 1
        return classes


def _partner_example(item: SlotRecord) -> Example | None:
    """The text of a slot's partner; None without partner, or if the sample is its own source."""
    if item.slot.partner is None or item.slot.partner.kind == "itself":
        return None
    if item.slot.partner.kind == "translation":
        assert item.partner is not None
        return item.partner.example
    assert item.record.back is not None  # the plan chooses it only if the index has one
    return item.record.back


def _counterpart(of_source: Windows, of_target: Windows, number: int, kind: TaskKind) -> EncodedSide:
    """The source's window that matches window `number` of the target.

    Tagging: the window whose middle is nearest to that of the target's window, both relative to the text's length.
    If the target's window contains the answer: a window that contains it too, the nearest in number. Otherwise: the
    window with the same number.
    """
    if len(of_source) == 1:
        return of_source[0]
    if kind == "tagging":
        return of_source.nearest_to(of_target, number)
    if of_target[number].span not in (None, NO_ANSWER):
        answering = [n for n, side in enumerate(of_source) if side.span not in (None, NO_ANSWER)]
        if answering:
            return of_source[min(answering, key=lambda n: abs(n - number))]
    return of_source[min(number, len(of_source) - 1)]


def _drawn(what: str, record: Record, slot: Slot) -> int:
    return stable_hash(what, *slot.seed, record.language, record.id)
