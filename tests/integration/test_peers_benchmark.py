"""benchmarks/peers.py: systems take turns; crosslift's own run on the same rows; the arithmetic; a missing TRL."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.turns import take_turns

RANK = """
import os
from benchmarks.turns import Turns
turns = Turns("{name}")
for turn in range({turns}):
    turns.begin()
    with open("{log}", "a") as log:
        log.write("{name}")
    turns.end(number=turn)
"""


@pytest.fixture
def rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def system(name: str, turns: int, log: Path) -> list[str]:
    return [sys.executable, "-c", RANK.format(name=name, turns=turns, log=log)]


@pytest.mark.usefixtures("rank_zero")
def test_systems_run_one_at_a_time_in_rotating_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = take_turns({name: system(name, 3, log) for name in "AB"}, nproc=1, rounds=2)
    assert log.read_text() == "AB" + "BA" + "AB"
    assert [turn[0]["number"] for turn in found["B"]] == [1, 2]  # round 0 is not measured
    assert all(turn[0]["peak_bytes"] > 2**20 for turn in found["A"])


@pytest.mark.usefixtures("rank_zero")
def test_a_system_that_ends_early_is_named(tmp_path: Path) -> None:
    commands = {name: system(name, turns, tmp_path / "log") for name, turns in (("A", 3), ("B", 1))}
    with pytest.raises(RuntimeError, match="B ended in round 1 with status 0"):
        take_turns(commands, nproc=1, rounds=2)


def test_crosslift_alone_runs_without_trl_on_the_same_rows(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    command = ["--sizes", "0.4M", "--systems", "SFT", "ShifCon", "--rounds", "1", "--slots", "16", "--nproc", "1"]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *command, "--json", str(file)], check=True, timeout=300
    )  # it refuses systems with different tokens or labels in a step
    rounds = json.loads(file.read_text())["sizes"]["0.4M"]["rounds"]
    assert set(rounds) == {"SFT", "ShifCon"}
    assert rounds["SFT"][0]["label_tokens"] == rounds["ShifCon"][0]["label_tokens"] > 0


def test_rates_are_compared_within_a_round() -> None:
    def figures(tokens: float, wall: float, cpu: float) -> dict[str, float]:
        return {
            "tokens": tokens, "label_tokens": tokens / 2, "computed_tokens": 2 * tokens, "wall_seconds": wall,
            "cpu_seconds": cpu, "peak_bytes": 2.0**30,
        }  # fmt: skip

    rows: dict[str, Any] = peers.summary(
        {"SFT": [figures(100, 1, 2), figures(100, 4, 2)], "TRL packed": [figures(50, 1, 1), figures(200, 4, 8)]}
    )
    assert rows["TRL packed"]["sft_to_it_by_wall_seconds"] == [0.5, 1.25, 2.0]  # 100 : 50 and 25 : 50
    assert rows["TRL packed"]["sft_to_it_by_cpu_seconds"] == [1.0, 1.5, 2.0]
    assert rows["SFT"]["tokens_a_second"] == 62.5
    assert rows["SFT"]["padding_share"] == 0.5
    assert "0.50 to 2.00" in peers.table("0.4M", rows)


def test_a_missing_trl_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["peers"])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == 2
    assert "pip install -c constraints.txt trl" in capsys.readouterr().err
