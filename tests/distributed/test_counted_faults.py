"""A short version of `benchmarks/faults.py`: one fault of two kinds, and the run's end is the undisturbed one's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import Faults


@pytest.mark.timeout(1200)
def test_a_kill_while_saving_and_a_torn_checkpoint_change_nothing(tmp_path: Path) -> None:
    faults = Faults(tmp_path, seed=0, max_steps=30)
    outcomes = [*faults.saving_kills(1), *faults.truncated(1)]
    assert [each.fault for each in outcomes] == ["kill -9 while saving", "a checkpoint's file truncated"]
    assert all(each.good for each in outcomes), outcomes
