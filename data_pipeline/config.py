"""The `data.sources` section of a run file.

No large library is imported here, so that a run file is read quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import PathText, Section

PLACEHOLDER = "{language}"
LINE = "line"  # the column of a file of lines (format: lines)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two sets of run file values, section by section; `above` overrides `below`, lists are replaced."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


TaskKind = Literal["classification", "tagging", "qa", "text"]
RowKind = TaskKind | Literal["chat"]  # kind of the rows of a run: those of one task, or conversations
Overlong = Literal["error", "drop", "truncate"]  # what happens to a sample that is too long

# The columns of each kind of task: required and optional ones.
TASK_COLUMNS: dict[TaskKind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "classification": (("text_a",), ("text_b", "label", "back_text_a", "back_text_b")),
    "tagging": (("words",), ("tags", "soft_tags", "back_words")),
    "qa": (("question", "context"), ("answers", "back_question", "back_context", "back_answers")),
    "text": (("text",), ()),
}
# Columns that require other columns.
NEEDED_WITH = {
    "back_text_b": ("back_text_a", "text_b"),
    "back_question": ("back_context",),
    "back_context": ("back_question",),
    "back_answers": ("back_context",),
}
CHAT_COLUMNS = ("prompt", "completion", "messages", "system", "response_language")
# The text of a row: in the wide layout, a language without it has no translation of the row.
TEXT_COLUMNS = ("prompt", "completion", "messages", "text_a", "text_b", "words", "question", "context", "text")
# Some files of a source may lack these: English text has no back-translation, a translation no gold tags.
OPTIONAL_COLUMNS = frozenset(
    {"label", "tags", "soft_tags", "answers"}
    | {f"back_{what}" for what in ("text_a", "text_b", "words", "question", "context", "answers")}
)


class ColumnMap(Section):
    """The columns of a row. In the wide layout, names contain "{language}": "question_{language}".

    The columns are those of a conversation, or those of one kind of task. `back_*` hold the row's text translated into
    the dominant language.
    """

    id: str | None = Field(None, description='The row\'s name; default: "<file stem>:<row>".')
    group: str | None = Field(
        None,
        description="The item: rows with the same value in other languages, in any file or source, are its"
        " translations; values are compared in Unicode form NFC. Default: the id column; without one, every row is a"
        " separate item.",
    )
    language: str | None = Field(None, description="The language of the prompt, a code of data.languages.")
    response_language: str | None = Field(None, description="The language of the answer.")
    prompt: str | None = Field(None, description="The user's message.")
    completion: str | None = Field(None, description="The answer.")
    messages: str | None = Field(
        None,
        description="A list of {role, content} or {from, value} (in CSV and TSV: as JSON) instead of prompt and"
        " completion. An assistant turn with `weight: 0` is read but not learned; unsupported keys (tool_calls,"
        " reasoning_content, ...) make the row unusable; others are metadata.",
    )
    system: str | None = Field(None, description="A system message, if the cell is not empty.")
    text_a: str | None = Field(None, description="Classification: the text, or the first of two.")
    text_b: str | None = Field(None, description="Classification: the second text of a pair.")
    label: str | None = Field(None, description="Classification: the label, one of task.labels.")
    back_text_a: str | None = Field(None, description="The first text, translated.")
    back_text_b: str | None = Field(None, description="The second text, translated.")
    words: str | None = Field(
        None, description="Tagging: the sentence's words, a list (as JSON in CSV and TSV, like all lists)."
    )
    tags: str | None = Field(None, description="Tagging: one tag per word, each one of task.labels.")
    soft_tags: str | None = Field(
        None, description="Tagging: for each word one probability per label; training prefers them to tags."
    )
    back_words: str | None = Field(None, description="The sentence, translated, as words.")
    question: str | None = Field(None, description="Question answering: the question.")
    context: str | None = Field(None, description="Question answering: the text that contains the answer.")
    answers: str | None = Field(
        None,
        description="Question answering: a list of {text, answer_start}, the start counted in characters of the"
        " context. The first one is trained on.",
    )
    back_question: str | None = Field(None, description="The question, translated.")
    back_context: str | None = Field(None, description="The context, translated.")
    back_answers: str | None = Field(None, description="The answers in the translated context.")
    text: str | None = Field(None, description="Masked language modelling: the text.")

    @property
    def kind(self) -> RowKind:
        """The kind of data of these columns."""
        if self.text_a is not None:
            return "classification"
        if self.words is not None:
            return "tagging"
        if self.question is not None:
            return "qa"
        return "chat" if self.text is None else "text"

    @model_validator(mode="after")
    def _one_kind(self) -> ColumnMap:
        mapped = self.named()
        families: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {"a conversation": ((), CHAT_COLUMNS)}
        families.update(TASK_COLUMNS.items())
        used = {
            kind: found
            for kind, (needed, others) in families.items()
            if (found := [what for what in (*needed, *others) if what in mapped])
        }
        if len(used) > 1:
            (kind, found), (other, others), *_ = used.items()
            raise ValueError(f"{found[0]!r} belongs to {kind} and {others[0]!r} to {other}: a source is of one kind")
        for kind, found in used.items():
            for what in found:
                for needed in (*families[kind][0], *NEEDED_WITH.get(what, ())):
                    if needed not in mapped:
                        raise ValueError(f"{what!r} needs {needed!r} too")
        if "text_b" in mapped and "back_text_a" in mapped and "back_text_b" not in mapped:
            raise ValueError("texts come in pairs, so 'back_text_a' needs 'back_text_b' too")
        return self

    @model_validator(mode="after")
    def _no_conflicting_columns(self) -> ColumnMap:
        if self.language is not None and PLACEHOLDER in self.language:
            raise ValueError('language names a column of the long layout and cannot hold "{language}"')
        if self.kind != "chat":
            return self
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError("give messages, or prompt and completion, not both")
        if self.messages is None and (self.prompt is None or self.completion is None):
            raise ValueError("give messages, or both prompt and completion")
        return self

    def named(self) -> dict[str, str]:
        """The mapped columns: {role: column name}."""
        return {what: column for what, column in self if column is not None}

    def in_language(self, language: str) -> ColumnMap:
        """This map with every "{language}" filled in."""
        return ColumnMap(**{what: name.replace(PLACEHOLDER, language) for what, name in self.named().items()})


class SourceConfig(Section):
    """One source: files or a hub dataset with one column map. Long layout unless `languages` is given."""

    name: str = Field(min_length=1, description="Name in messages, statistics and fingerprints; unique in a run.")
    files: PathText | tuple[PathText, ...] | dict[str, PathText] | None = Field(
        None,
        description='Paths, globs or fsspec addresses; relative ones, and "{data_dir}", are under data_dir. A mapping'
        " of language codes to one file each: line i of every file is the same item.",
    )
    hub: PathText | None = Field(None, description="A Hugging Face dataset, or a local dataset directory.")
    hub_config: str | None = Field(None, description="The hub dataset's configuration.")
    split: str = Field("train", description="The hub dataset's split.")
    format: Literal["auto", "jsonl", "parquet", "csv", "tsv", "lines"] = Field(
        "auto", description="Format of the files; auto: by each file's suffix. lines (.txt): one text a line."
    )
    quoting: Literal["none"] | None = Field(
        None,
        description='CSV and TSV: "none" reads quotes as ordinary characters, as most corpora in TSV use them;'
        " by default quotes enclose a field.",
    )
    languages: tuple[str, ...] | None = Field(
        None, description="Wide layout: each row is an item and gives one sample for each of these languages."
    )
    language: str | None = Field(None, description="The language, if no column holds it.")
    response_language: str | None = Field(
        None, description="The answer's language, if no column holds it; default: the prompt's."
    )
    columns: ColumnMap

    @model_validator(mode="before")
    @classmethod
    def _line_columns(cls, values: Any) -> Any:
        """One file a language has lines of text, unless columns are given."""
        if isinstance(values, dict) and isinstance(values.get("files"), dict) and "columns" not in values:
            return {"format": "lines", **values, "columns": {"text": LINE}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if (self.files is None) == (self.hub is None):
            raise ValueError("give exactly one of files and hub")
        if self.files is not None and not self.files:
            raise ValueError("files is empty")
        if self.hub is None and (self.hub_config is not None or self.split != "train"):
            raise ValueError("hub_config and split go with hub, not with files")
        if self.hub is not None and self.format != "auto":
            raise ValueError("format goes with files, not with hub")
        if self.quoting is not None and (self.hub is not None or self.format in ("jsonl", "parquet")):
            raise ValueError("quoting goes with CSV and TSV files")
        if self.response_language is not None and self.columns.kind != "chat":
            raise ValueError(f"response_language goes with conversations, not with {self.columns.kind}")
        wide_columns = [name for name in self.columns.named().values() if PLACEHOLDER in name]
        if isinstance(self.files, dict):
            if self.languages is not None or self.language is not None or self.columns.language is not None:
                raise ValueError("files names each file's language: leave out languages, language, columns.language")
            if wide_columns:
                raise ValueError(f"column {wide_columns[0]!r} holds {PLACEHOLDER}, but files names a file a language")
        elif self.languages is None:
            if wide_columns:
                raise ValueError(f"column {wide_columns[0]!r} holds {PLACEHOLDER}: list the languages it stands for")
            if self.columns.language is None and self.language is None:
                raise ValueError("the language is not known: give columns.language, or language, or languages")
        else:
            if not self.languages or len(set(self.languages)) < len(self.languages):
                raise ValueError("languages must name each language once, and at least one")
            if not wide_columns:
                raise ValueError(f'languages is the wide layout, so a column must hold "{PLACEHOLDER}"')
            if self.columns.language is not None or self.language is not None:
                raise ValueError("languages (wide layout) excludes language and columns.language (long layout)")
        return self

    @property
    def file_languages(self) -> tuple[str, ...] | None:
        """The language of each file, where each language has one."""
        return tuple(self.files) if isinstance(self.files, dict) else None

    @property
    def named_languages(self) -> tuple[str, ...]:
        """All languages that the section names."""
        single = [each for each in (self.language, self.response_language) if each is not None]
        return (*(self.languages or ()), *(self.file_languages or ()), *single)

    def column_maps(self) -> dict[str | None, ColumnMap]:
        """The column map for each language of the wide layout; for None in the long layout."""
        if self.languages is None:
            return {None: self.columns}
        return {language: self.columns.in_language(language) for language in self.languages}
