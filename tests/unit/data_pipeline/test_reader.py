"""reader.py: many rows are read in batches of bounded size, each with the result that it has alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_pipeline import reader as reader_module
from data_pipeline.config import Overlong
from data_pipeline.reader import Reader
from data_pipeline.records import BadRow, ChatSample, Record
from data_pipeline.text.chat import Chat
from data_pipeline.text.stage import ChatStage


class Broken(Chat):
    """A tokenizer for which some rows are bad; it counts what it tokenises together."""

    together: list[int]

    def tokenize_all(self, records: Any, labelled: Any) -> list[ChatSample | BadRow]:
        self.together.append(len(records))
        found = super().tokenize_all(records, labelled)
        return [BadRow(one.origin, "odd") if odd(one) else each for one, each in zip(records, found, strict=True)]


def odd(record: Record) -> bool:
    return len(record.user_text) % 7 == 0


def make(prepared_run: Any, longest: int, overlong: Overlong) -> tuple[Reader, Broken]:
    config, prepared = prepared_run.config, prepared_run.prepared
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    chat = Broken(tokenizer, config.data.template, config.data.languages)
    chat.together = []
    return Reader(prepared.index, ChatStage(chat, longest, overlong)), chat


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_rows_read_in_batches_equal_single_ones(
    prepared_run: Any, monkeypatch: pytest.MonkeyPatch, overlong: Overlong
) -> None:
    reader, chat = make(prepared_run, 45, overlong)
    index = reader.index
    rows = np.random.default_rng(0).permutation(len(index)).tolist()
    slots = [reader.alone(row) for row in rows]
    singly = [reader.read_many([slot])[0] for slot in slots]
    assert {type(each) for each in singly} >= {BadRow, ChatSample}
    assert (None in singly) is (overlong == "drop")
    assert overlong == "drop" or any(each.truncated for each in singly if isinstance(each, ChatSample))
    lengths = [None if odd(record) else len(chat.tokenize(record)) for record in map(index.record, rows)]
    for size in (1, 1000, 1 << 16):
        monkeypatch.setattr(reader_module, "BATCH_BYTES", size)
        chat.together.clear()
        for one, other in zip(reader.read_many(slots), singly, strict=True):
            assert same(one, other)
        lengths = list(reader.lengths(rows))
        assert (
            [each if isinstance(each, int) else None for each in lengths]
            == [None if odd(record := index.record(row)) else len(Chat.tokenize(chat, record)) for row in rows]
            if size == 1000
            else len(lengths) == len(rows)
        )
        together = [n for n in chat.together if n > 1]
        mean = float(index.n_bytes[rows].mean())
        assert (max(together, default=1) == 1) is (size == 1)
        if size == 1000:
            assert max(together) < 4 * size / mean
    found = reader.readable(rows)
    assert found.rows == [row for row, each in zip(rows, singly, strict=True) if isinstance(each, ChatSample)]
    assert len(found.bad) == sum(isinstance(each, BadRow) for each in singly)
    assert reader.read_many([]) == list(reader.lengths([])) == []


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, ChatSample) or not isinstance(other, ChatSample):
        return str(one) == str(other)
    names = [field.name for field in fields(ChatSample)]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
