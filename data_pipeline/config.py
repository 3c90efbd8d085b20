"""What a run file says about its data sources.

In: the `data.sources` section of the run file. Out: frozen, checked models. Next: `sources.py`, which opens
what they name. Nothing heavy is imported here, so that a run file is read at once.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PLACEHOLDER = "{language}"


class ColumnMap(BaseModel):
    """Which column of a row holds what. In the wide layout names hold "{language}": "question_{language}"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | None = Field(None, description='The row\'s name; without it "<file stem>:<row>".')
    group: str | None = Field(
        None,
        description="The item: rows with the same value in other languages, in whatever file or source, are"
        " its translations. Without it the id column; without that every row is an item of its own.",
    )
    language: str | None = Field(None, description="The language of the prompt, a code of data.languages.")
    response_language: str | None = Field(None, description="The language of the answer.")
    prompt: str | None = Field(None, description="The user's words.")
    completion: str | None = Field(None, description="The answer.")
    messages: str | None = Field(
        None,
        description="A list of {role, content} (in CSV and TSV: as JSON) instead of prompt and completion.",
    )
    system: str | None = Field(None, description="A system message, where the cell is not empty.")

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> ColumnMap:
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError("give messages, or prompt and completion, not both")
        if self.messages is None and (self.prompt is None or self.completion is None):
            raise ValueError("give messages, or both prompt and completion")
        if self.language is not None and PLACEHOLDER in self.language:
            raise ValueError('language names a column of the long layout and cannot hold "{language}"')
        return self

    def named(self) -> dict[str, str]:
        """The columns that are mapped: {what: column name}."""
        return {what: column for what, column in self if column is not None}

    def in_language(self, language: str) -> ColumnMap:
        """This map with every "{language}" filled in."""
        return ColumnMap(**{what: name.replace(PLACEHOLDER, language) for what, name in self.named().items()})


class SourceConfig(BaseModel):
    """One source: files or a hub dataset with one column map. Long layout unless `languages` is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="For messages, statistics and fingerprints; unique in a run.")
    files: str | tuple[str, ...] | None = Field(
        None,
        description='Paths, globs or fsspec addresses; relative ones, and "{data_dir}", are under data_dir.',
    )
    hub: str | None = Field(None, description="A Hugging Face dataset, or a local dataset directory.")
    hub_config: str | None = Field(None, description="The hub dataset's configuration.")
    split: str = Field("train", description="The hub dataset's split.")
    format: Literal["auto", "jsonl", "parquet", "csv", "tsv"] = Field(
        "auto", description="Of the files; auto goes by each file's suffix."
    )
    languages: tuple[str, ...] | None = Field(
        None, description="Wide layout: each row is an item and gives one sample for each of these languages."
    )
    language: str | None = Field(None, description="The language, where no column says it.")
    response_language: str | None = Field(
        None, description="The answer's language, where no column says it; without it, the prompt's."
    )
    columns: ColumnMap

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
        wide_columns = [name for name in self.columns.named().values() if PLACEHOLDER in name]
        if self.languages is None:
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

    def column_maps(self) -> dict[str | None, ColumnMap]:
        """The column map for each language of the wide layout; for None in the long layout."""
        if self.languages is None:
            return {None: self.columns}
        return {language: self.columns.in_language(language) for language in self.languages}
