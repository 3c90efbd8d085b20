"""Totals of a run by language: slots by outcome, label tokens, unusable rows.

The totals are saved with every checkpoint, so after a resume or a rollback they are those of the whole run.

Shapes: L languages.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.console import table
from data_pipeline.loader import OUTCOMES, no_slots
from data_pipeline.records import BadRow, DataError
from training.distributed import rank

log = logging.getLogger(__name__)
Integers = npt.NDArray[np.int64]


class RunTotals:
    """Counts over the trained steps, equal on all ranks."""

    def __init__(self, languages: Sequence[str]) -> None:
        self.languages = tuple(languages)
        self.steps = 0  # counted steps; excludes those before a checkpoint without counts
        self.slots: Integers = no_slots(len(languages))
        self.labels: Integers = np.zeros(len(languages), np.int64)
        self.bad_rows: dict[str, None] = {}  # origin of each unusable row, "file:line", in order of appearance

    def add_step(self, slots: Integers, labels: Integers) -> None:
        """Adds one trained step: its slots (OUTCOMES, L) and label tokens (L,), summed over ranks."""
        self.steps += 1
        self.slots += slots
        self.labels += labels

    def add_bad_rows(self, rows: Sequence[BadRow], most: int) -> None:
        """Adds the unusable rows of a step, of all ranks. A row is counted once per run.

        Raises:
            DataError: the run has more than `most` unusable rows; then none of these is added, as the step fails.
        """
        known = dict(self.bad_rows)
        for row in rows:
            if row.origin in known:
                continue
            known[row.origin] = None
            if (met := len(known)) > most:
                raise DataError(f"{row} ({met} unusable rows so far; data.max_bad_rows is {most})")
            if rank() == 0:
                log.warning("an unusable row, whose slot stays empty each time it comes up: %s", row)
        self.bad_rows = known

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps, as plain JSON data."""
        counts = {**dict(zip(OUTCOMES, self.slots, strict=True)), "labels": self.labels}
        by_language = {name: dict(zip(self.languages, values.tolist(), strict=True)) for name, values in counts.items()}
        return {"steps": self.steps, "bad_rows": list(self.bad_rows), **by_language}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the totals from a state; zeros for what it lacks, as in checkpoints of older versions."""

        def counts(name: str) -> list[int]:
            by_language = state.get(name, {})
            return [by_language.get(language, 0) for language in self.languages]

        self.steps = state.get("steps", 0)
        self.slots = np.array([counts(name) for name in OUTCOMES], np.int64)
        self.labels = np.array(counts("labels"), np.int64)
        self.bad_rows = dict.fromkeys(state.get("bad_rows", ()))

    def metrics(self) -> dict[str, float]:
        """By language: realised shares; counts of empty slots and of truncated samples, if not zero."""
        filled, truncated, overlong, unusable = self.slots
        shares = {"data/slot_share": _shares(filled), "data/label_share": _shares(self.labels)}
        counts = {
            "data/truncated_slots": truncated, "data/overlong_slots": overlong, "data/unusable_slots": unusable,
        }  # fmt: skip
        return {
            f"{name}/{language}": float(value)
            for name, values in (shares | counts).items()
            for language, value in zip(self.languages, values, strict=True)
            if value or name in shares
        }

    def table(self) -> Iterator[str]:
        """Lines to print: a table of the realised mixture by language, then the number of empty slots, if any."""
        yield f"read in {self.steps:,} steps; slots left empty are not refilled:"
        header = ["language", "filled slots", "share", "label tokens", "share", "cut to fit", "too long", "unusable"]
        rows = []
        shares, label_shares = _shares(self.slots[0]), _shares(self.labels)
        for number, language in enumerate(self.languages):
            filled, truncated, overlong, unusable = self.slots[:, number].tolist()
            labels = f"{self.labels[number]:,}", f"{label_shares[number]:.1%}"
            lost = (f"{count:,}" for count in (truncated, overlong, unusable))
            rows.append([language, f"{filled:,}", f"{shares[number]:.1%}", *labels, *lost])
        yield from table(header, rows).splitlines()
        of_run = dict(zip(OUTCOMES, self.slots.sum(axis=1).tolist(), strict=True))
        if empty := of_run["overlong"] + of_run["unusable"]:
            planned = empty + of_run["filled"]
            yield f"{empty:,} of {planned:,} slots stayed empty ({empty / planned:.1%})"


def _shares(counts: Integers) -> npt.NDArray[np.float64]:
    return counts / max(int(counts.sum()), 1)
