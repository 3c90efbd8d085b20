"""The text stage of decoders: tokenises conversations, truncates long ones and checks their label masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from data_pipeline.config import Overlong
from data_pipeline.reader import Outcome, SlotRecord, TextStage, overlong_error
from data_pipeline.records import BadRow, ChatSample, Record, Sample
from data_pipeline.text.chat import Chat, describe
from data_pipeline.text.label_check import check_labels
from data_pipeline.text.truncation import truncate


@dataclass(frozen=True, slots=True)
class ChatStage(TextStage):
    """Turns records into ChatSamples."""

    chat: Chat
    sequence_length: int
    overlong: Overlong = "drop"
    longest_parallel: int | None = None  # tokens of a text of the parallel corpus; None: `sequence_length`

    def _lengths(self, records: Sequence[Record]) -> list[int | BadRow]:
        samples = self.chat.tokenize_all(records, [True] * len(records))
        return [each if isinstance(each, BadRow) else len(each) for each in samples]

    def _samples(self, items: Sequence[SlotRecord]) -> list[Outcome]:
        """With `overlong` "truncate", None only if the prompt cannot be shortened enough.

        A text of the parallel corpus that is too long is never shortened: the pair would no longer be a translation.
        """
        fitted = self._fitted([item.record for item in items], [item.slot.labelled for item in items])
        if self.overlong == "error":
            for item, outcome in zip(items, fitted, strict=True):
                if outcome is None and not item.record.parallel:
                    length = len(self.chat.tokenize(item.record))
                    raise overlong_error(item.record.origin, length, self.sequence_length)
        return [*fitted]

    def _fitted(self, records: Sequence[Record], labelled: Sequence[bool]) -> list[ChatSample | BadRow | None]:
        """The samples of records; if one is too long and `overlong` is "truncate", with a shortened prompt.

        Returns:
            For each record its sample, its BadRow, or None if it is still longer than `sequence_length`.

        Raises:
            DataError: a label mask is wrong.
        """
        found: list[ChatSample | BadRow | None] = [*self.chat.tokenize_all(records, labelled)]
        written = [*records]  # as they are tokenised
        for place, sample in enumerate(found):
            if isinstance(sample, ChatSample) and len(sample) > self._most(records[place]):
                written[place], found[place] = self._shortened(records[place], sample, labelled[place])
        checked = [
            (place, sample) for place, sample in enumerate(found) if isinstance(sample, ChatSample) and labelled[place]
        ]
        bad = check_labels(self.chat, [written[place] for place, _ in checked], [sample for _, sample in checked])
        for (place, _), each in zip(checked, bad, strict=True):
            found[place] = each or found[place]
        return found

    def _most(self, record: Record) -> int:
        """Tokens of the longest sample."""
        if record.parallel and self.longest_parallel is not None:
            return min(self.sequence_length, self.longest_parallel)
        return self.sequence_length

    def _shortened(
        self, record: Record, sample: ChatSample, labelled: bool
    ) -> tuple[Record, ChatSample | BadRow | None]:
        """A record that is too long, with a shorter prompt if `overlong` is "truncate"; its sample, or None."""
        if self.overlong != "truncate" or record.parallel:
            return record, None
        try:
            return truncate(self.chat, record, sample, self.sequence_length, labelled=labelled) or (record, None)
        except BadRow as bad:
            return record, bad

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
            swapped.append(replace(record, content=replace(conversation, messages=messages)))
        samples: list[Sample] = []
        for found in self._fitted(swapped, [True] * len(swapped)):
            if isinstance(found, BadRow):
                raise found
            if found is not None:
                samples.append(found)
        return samples
