"""run_totals.py: slots and label tokens read, by language: in metrics, in the final table and in checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipeline.records import BadRow, DataError
from training.loop.run_totals import RunTotals


@pytest.fixture
def totals() -> RunTotals:
    made = RunTotals(["en", "sw"])
    made.add_step(np.array([[6, 1], [1, 0], [0, 3], [2, 0]]), np.array([60, 20]))
    made.add_step(np.array([[7, 2], [0, 0], [0, 2], [1, 0]]), np.array([80, 40]))
    return made


def test_metrics_are_realised_shares_and_lost_slots(totals: RunTotals) -> None:
    assert totals.metrics() == {
        "data/slot_share/en": 13 / 16, "data/slot_share/sw": 3 / 16,
        "data/label_share/en": 0.7, "data/label_share/sw": 0.3,
        "data/truncated_slots/en": 1, "data/overlong_slots/sw": 5, "data/unusable_slots/en": 3,
    }  # fmt: skip


def test_the_table_has_a_line_per_language_and_the_number_of_empty_slots(totals: RunTotals) -> None:
    title, header, _, *lines, empty = totals.table()
    assert title == "read in 2 steps; slots left empty are not refilled:"
    assert header.split() == [
        "language", "filled", "slots", "share", "label", "tokens", "share", "cut", "to", "fit", "too", "long",
        "unusable",
    ]  # fmt: skip
    assert [line.split() for line in lines] == [
        ["en", "13", "81.2%", "140", "70.0%", "1", "0", "3"],
        ["sw", "3", "18.8%", "60", "30.0%", "0", "5", "0"],
    ]
    assert empty == "8 of 24 slots stayed empty (33.3%)"


def test_without_lost_slots_only_shares_are_reported() -> None:
    made = RunTotals(["en"])
    made.add_step(np.array([[4], [0], [0], [0]]), np.array([9]))
    assert len(list(made.table())) == 4
    assert made.metrics() == {"data/slot_share/en": 1, "data/label_share/en": 1}


def test_a_checkpoint_keeps_totals_by_language(totals: RunTotals) -> None:
    """Languages in another order, one more and one less (`--accept-changes`): each keeps its totals."""
    totals.add_bad_rows([BadRow("sw.jsonl:3", "no text")], most=1)
    kept = json.loads(json.dumps(totals.state()))
    again = RunTotals(["en", "sw"])
    again.restore(kept)
    assert again.state() == totals.state()
    others = RunTotals(["de", "sw"])
    others.restore(kept)
    assert others.slots.tolist() == [[0, 3], [0, 0], [0, 5], [0, 0]]
    assert others.labels.tolist() == [0, 60]
    others.restore({})
    assert others.state() == RunTotals(["de", "sw"]).state()


def test_a_row_that_is_bad_in_two_languages_counts_once() -> None:
    """As when the index is built: rows of files count, not their translations in the wide layout."""
    made = RunTotals(["en", "sw"])
    made.add_bad_rows([BadRow("wide.csv:3", "no answer in en"), BadRow("wide.csv:3", "no answer in sw")], most=1)
    made.add_bad_rows([BadRow("wide.csv:3", "no answer in en")], most=1)
    with pytest.raises(DataError, match=r"wide.csv:4: no text \(2 unusable rows so far; data.max_bad_rows is 1"):
        made.add_bad_rows([BadRow("wide.csv:4", "no text")], most=1)
