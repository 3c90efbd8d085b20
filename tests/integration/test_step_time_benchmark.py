"""benchmarks/step_time.py: every objective takes a step on its own plan, and the figures are of that round."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_round_of_every_objective_is_timed(tmp_path: Path) -> None:
    file = tmp_path / "step_time.json"
    options = ["--sizes", "0.1M", "--rounds", "1", "--slots", "16", "--nproc", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "benchmarks.step_time", *options], check=True, timeout=300)
    found = json.loads(file.read_text())["sizes"]["0.1M"]
    for objective in ("SFT", "one-pass", "three-pass"):
        assert [seconds > 0 for seconds in found["wall_seconds"][objective]] == [True]
    assert found["rounds"][0]["pairs"] > 0
    assert found["rounds"][0]["three_pass_extra_tokens"] > 0
