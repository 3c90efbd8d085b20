"""`crosslift check --all-rows`: reads and tokenises every row before a run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipeline.console import Progress
from data_pipeline.reader import Reader
from data_pipeline.records import BadRow, DataError
from training.config import DataConfig, RunConfig

CHUNK = 64  # rows per task of a thread
NAMED = 3  # rows listed per reason


def survey(data: DataConfig, reader: Reader) -> Iterator[str]:
    """Reads every row of the index, held-out ones too; lists the unusable ones by reason.

    Raises:
        DataError: more rows are unusable than `data.max_bad_rows`.
    """
    index = reader.index
    bad = [BadRow(origin, reason) for origin, reason in index.bad_rows]
    rows = np.flatnonzero(~index.bad)
    chunks = [rows[start : start + CHUNK].tolist() for start in range(0, len(rows), CHUNK)]
    with ThreadPoolExecutor(data.workers, thread_name_prefix="survey") as pool:
        read = pool.map(lambda chunk: reader.readable(chunk).bad, chunks)
        with Progress("reading all rows", len(rows), "rows") as progress:
            for chunk, found in zip(chunks, read, strict=True):
                bad += found
                progress.advance(len(chunk))
    yield f"all rows: {len(rows) + len(index.bad_rows):,} read, {len(bad):,} of them unusable"
    yield from by_reason(bad)
    refuse_bad_rows(bad, data.max_bad_rows)


def without_limit(config: RunConfig) -> RunConfig:
    """The run without a limit on unusable rows, for an index that lists all of them."""
    return config.model_copy(update={"data": config.data.model_copy(update={"max_bad_rows": sys.maxsize})})


def by_reason(bad: list[BadRow]) -> Iterator[str]:
    """The rows grouped by their reason without quoted text and numbers; the most frequent first."""
    kinds: dict[str, list[BadRow]] = {}
    for row in bad:
        kinds.setdefault(_kind(row.reason), []).append(row)
    for rows in sorted(kinds.values(), key=len, reverse=True):
        yield f"unusable, {len(rows):,} row{'s' if len(rows) > 1 else ''}, such as {rows[0]}"
        if more := ", ".join(row.origin for row in rows[1:NAMED]):
            yield f"    {more}{f' and {len(rows) - NAMED:,} more' if len(rows) > NAMED else ''}"


def refuse_bad_rows(bad: list[BadRow], most: int, of: str = "") -> None:
    """Raises DataError, naming the first row, if there are more than `most` (`data.max_bad_rows`)."""
    if len(bad) > most:
        n = f"{len(bad):,} unusable row{'s' if len(bad) > 1 else ''}{of}"
        raise DataError(f"{bad[0]} ({n}; data.max_bad_rows is {most})")


def _kind(reason: str) -> str:
    return re.sub(r"\bU\+[0-9A-F]+|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+", "", reason)
