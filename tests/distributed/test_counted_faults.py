"""A short version of `benchmarks/faults.py`: one fault, after which the run ends as an undisturbed one does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import Faults
from data_pipeline.toy_problems.corpus import CorpusSizes

FEW = CorpusSizes(english_base=10, other_base=10, finetune=200, test_seen=10, test_unseen=10)


@pytest.mark.timeout(1200)
def test_a_kill_while_saving_changes_nothing(tmp_path: Path) -> None:
    (outcome,) = Faults(tmp_path, seed=0, max_steps=30, sizes=FEW).saving_kills(1)
    assert outcome.fault == "kill -9 while saving"
    assert outcome.passed, outcome
    assert ", resumed from 0;" not in outcome.note, "a checkpoint was loaded"
