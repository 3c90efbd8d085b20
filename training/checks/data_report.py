"""Reports what a run will read: epochs and shares per language, rows that are too long, contamination.

`crosslift check` prints the lines; `train` logs the warnings too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.console import table
from data_pipeline.contamination import contaminated_rows
from data_pipeline.order.order import order_key, places_at
from data_pipeline.reader import Reader, overlong_error
from data_pipeline.records import BadRow, Split
from data_pipeline.sources.index import DataIndex
from data_pipeline.tasks.config import WINDOWED
from training.assembly import DataParts
from training.config import DataConfig

LOOKED_AT = 1000  # rows per language on which the share of rows that are too long is estimated
MOST_OVERLONG = 0.01  # share of a language's rows above which `check` warns
# From about here on, repeated data hardly improve a language model (Muennighoff et al. 2023, arXiv 2305.16264).
MOST_EPOCHS = 16
NAMED = 3  # contaminated rows that are named per language


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many of the measured rows are longer than `data.sequence_length`; unusable rows are not measured."""

    overlong: int
    looked_at: int
    rows: int

    @property
    def share(self) -> float:
        return self.overlong / max(self.looked_at, 1)


def mixture_table(
    data: DataConfig, max_steps: int, parts: DataParts, looked_at: int | None = LOOKED_AT
) -> Iterator[str]:
    """A table of each language's slots, epochs, share of the planned steps and rows that are too long; and warnings.

    Args:
        looked_at: rows per language whose length is measured; None: all.

    Raises:
        DataError: a row is too long, and `data.overlong` is "error".
    """
    index = parts.index
    slots = parts.planner.slots_by_language(max_steps)
    windowed = data.kind in WINDOWED  # no row is too long
    yield f"in {max_steps:,} steps of {data.slots_per_step:,} slots:"
    header = ["language", "rows", "slots", "epochs", "share", f"over {data.sequence_length} tokens"]
    table_rows: list[list[str]] = []
    warnings: list[str] = []
    too_long: list[str] = []
    for number, language in enumerate(data.languages):
        rows, share = len(index.rows(number)), slots[number] / max(sum(slots), 1)
        epochs = slots[number] / rows if rows else 0.0
        lengths = None if windowed else _lengths(parts.reader, number, looked_at)
        table_rows.append([language, f"{rows:,}", f"{slots[number]:,}", f"{epochs:.2f}", f"{share:.1%}"])
        if lengths is not None:
            table_rows[-1].append(_measured(lengths))
        warnings += _repeats(language, rows, epochs, slots[number] / max_steps)
        if lengths is not None and lengths.share > MOST_OVERLONG:
            too_long.append(f"{language} {lengths.share:.1%}")
    yield from table(header[:5] if windowed else header, table_rows, text=(0, 5)).splitlines()
    yield from warnings
    if too_long:
        done, other = "left out, their slots stay empty", ", or set data.overlong=truncate"
        if data.overlong == "truncate":
            done, other = "cut to fit", ""
        yield (
            f"warning: rows longer than data.sequence_length ({data.sequence_length}) are {done}: "
            f"{', '.join(too_long)}; raise data.sequence_length{other}"
        )


def contamination(index: DataIndex) -> Iterator[str]:
    """Warnings about held-out texts that are also in training: a line per language, with the first of them."""
    found = contaminated_rows(index)
    for number, language in enumerate(index.languages):
        of_language = [pair for pair in found if index.language[pair[0]] == number]
        if not of_language:
            continue
        named = ", ".join(f"{index.origin(row)} = {index.origin(training)}" for row, training in of_language[:NAMED])
        more = f" and {len(of_language) - NAMED} more" if len(of_language) > NAMED else ""
        yield (
            f"warning: {language}: {len(of_language):,} of {len(index.rows(number, Split.HELD_OUT)):,} held-out texts "
            f"are also in training, under another id (ignoring case, white space, Unicode form): {named}{more}; "
            "their held-out loss is too low: remove either row, or give both the same columns.group"
        )


def _lengths(reader: Reader, language: int, most: int | None) -> Lengths:
    """Measures the first rows of the language's order, which are a random sample of it."""
    index, limit = reader.index, reader.stage.sequence_length
    rows = index.rows(language)
    n = len(rows) if most is None else min(most, len(rows))
    key = np.array([order_key(reader.seed, index.languages[language])], np.uint64)
    chosen = rows[places_at(np.arange(n), np.full(n, len(rows)), key.repeat(n))] if n < len(rows) else rows
    overlong = looked_at = 0
    usable = chosen[~index.bad[chosen]].tolist()
    for row, length in zip(usable, reader.lengths(usable), strict=True):
        if isinstance(length, BadRow):
            continue  # unusable rows are limited by data.max_bad_rows
        looked_at += 1
        overlong += length > limit
        if length > limit and reader.stage.overlong == "error":
            raise overlong_error(index.origin(row), length, limit)
    return Lengths(overlong, looked_at, len(rows))


def _measured(lengths: Lengths) -> str:
    looked_at = f"{lengths.looked_at:,}" if lengths.looked_at else "none"
    of_all = f" rows, a sample of {lengths.rows:,}" if lengths.looked_at < lengths.rows else " rows"
    return f"{lengths.share:.1%} of {looked_at}{of_all}"


def _repeats(language: str, rows: int, epochs: float, slots_per_step: float) -> Iterator[str]:
    if rows and epochs > MOST_EPOCHS:
        each = f"{slots_per_step / rows:.1f} times in every step" if slots_per_step > rows else f"{epochs:.0f} times"
        count = "its one row is" if rows == 1 else f"each of its {rows:,} rows is"
        yield (
            f"warning: {language}: {count} read {each}; above about {MOST_EPOCHS} epochs, a model memorises them and "
            "learns little else: add rows, lower the language's share (data.mixture), or take fewer steps"
        )
