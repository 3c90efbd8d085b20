"""The text stage of decoders: tokenises conversations, truncates long ones and checks their label masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from data_pipeline.config import Overlong
from data_pipeline.reader import Outcome, SlotRecord, TextStage, overlong_error
from data_pipeline.records import BadRow, ChatSample, Record, Sample
from data_pipeline.text.chat import Chat, check_labels, describe
from data_pipeline.text.truncation import truncate


@dataclass(frozen=True, slots=True)
class ChatStage(TextStage):
    """Turns records into ChatSamples."""

    chat: Chat
    sequence_length: int
    overlong: Overlong = "drop"

    def length(self, record: Record) -> int:
        return len(self.chat.tokenize(record))

    def samples(self, items: Sequence[SlotRecord]) -> list[Outcome]:
        """See `TextStage.samples`. With `overlong` "truncate", None only if the prompt cannot be shortened enough."""
        return [self._outcome(item) for item in items]

    def _outcome(self, item: SlotRecord) -> Outcome:
        try:
            sample = self.fitted(item.record, labelled=item.slot.labelled)
            if sample is None and self.overlong == "error":
                raise overlong_error(item.record.origin, self.length(item.record), self.sequence_length)
        except BadRow as bad:
            return bad
        return sample

    def fitted(self, record: Record, *, labelled: bool = True) -> ChatSample | None:
        """The sample of a record; if it is too long and `overlong` is "truncate", with a shortened prompt.

        Returns:
            None if it is still longer than `sequence_length`.

        Raises:
            BadRow: the record is unusable.
            DataError: the label mask is wrong.
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

    def describe(self, sample: Sample, uncut: int) -> Iterator[str]:
        assert isinstance(sample, ChatSample)
        cut = f", cut from {uncut}" if sample.truncated else ""
        yield f"{len(sample)} tokens{cut}, {sample.n_labels} labels"
        yield describe(sample, self.chat.tokenizer)

    def swapped_prompts(self, records: Sequence[Record]) -> list[Sample]:
        swapped = []
        for record, other in zip(records, [*records[1:], *records[:1]], strict=True):
            conversation = record.conversation
            messages = (*other.conversation.messages[:-1], conversation.messages[-1])
            swapped.append(self.fitted(replace(record, content=replace(conversation, messages=messages))))
        return [sample for sample in swapped if sample is not None]
