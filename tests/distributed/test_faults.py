"""Faults on one rank end the run with a message that names it, instead of a hang or a silent skip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_run import RANK_ITEMS, write_data

WORKER = str(Path(__file__).with_name("faults.py"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("faults") / "data", RANK_ITEMS)


def messages(fault: str, data: Path, output: Path) -> list[str]:
    results = run_ranks([WORKER, fault, str(data), str(output)], world_size=2)
    assert [each.returncode for each in results] == [1, 1], results[0].stderr[-3000:]
    return [each.stderr for each in results]


def test_a_rank_that_skips_a_module_is_named_with_the_module(data: Path, tmp_path: Path) -> None:
    for text in messages("module", data, tmp_path / "run"):
        assert "ranks differ at module call" in text
        assert "rank 1 runs 'model.layers.1.mlp.up_proj'" in text
        assert "rank 0 runs 'model.layers.1.mlp.act_fn'" in text


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_value_stops_the_run_with_step_rank_and_samples(where: str, data: Path, tmp_path: Path) -> None:
    for text in messages(where, data, tmp_path / "run"):
        assert "is not finite" in text
        assert where in text
        assert "rank 1: i" in text
    (file,) = (tmp_path / "run").glob("not-finite-step-*.json")
    listed = json.loads(file.read_text())
    assert f"step {listed['step']}:" in text
    assert listed["step"] > 0
    assert "1" in listed["sample_ids"]
    assert ("0" in listed["sample_ids"]) == (where == "gradient")  # a reduced gradient does not show the rank
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
