"""The words of the tasks that encoders learn: Example and TaskRecord.

In: nothing. Out: plain frozen data. Next: `rows.py`, which reads them from a row, and `tokenize.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One text with its labels: a row's own side, or its translation into the dominant language.

    texts       classification: (text,) or (text_a, text_b); qa: (question, context); tagging: the words; text: (text,)
    label       classification
    tags        tagging: a tag a word
    soft_tags   tagging: for each word the probability of each of `task.labels`
    answers     qa: (text, where it starts in the context, in characters); training takes the first
    """

    texts: tuple[str, ...]
    label: str | None = None
    tags: tuple[str, ...] | None = None
    soft_tags: tuple[tuple[float, ...], ...] | None = None
    answers: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One labelled sample in one language, as read from a source.

    `group` is the item: TaskRecords with the same group in different languages are translations of each other.
    `back` is the same text translated into the dominant language, where the row has it.
    """

    id: str
    group: str
    language: str
    origin: str  # "file.jsonl:17", for messages to people
    example: Example
    back: Example | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """What is written in it, in its own language."""
        return self.example.texts

    @property
    def user_text(self) -> str:
        """All its texts, joined: what a translation pair has in common."""
        return "\n".join(self.texts)

    @property
    def response_language(self) -> str:
        """The same as `language`: nothing is answered here in another one."""
        return self.language

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of its texts."""
        return sum(len(text.encode()) for text in self.texts)
