"""A short version of `benchmarks/faults.py`: one fault, and the run's end is the undisturbed one's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import Faults


@pytest.mark.timeout(1200)
def test_a_kill_while_saving_changes_nothing(tmp_path: Path) -> None:
    (outcome,) = Faults(tmp_path, seed=0, max_steps=30).saving_kills(1)
    assert outcome.fault == "kill -9 while saving"
    assert outcome.good, outcome
