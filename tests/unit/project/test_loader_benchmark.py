"""`benchmarks/loader.py` sees a lock that is held, counts tokens, and runs from the generated texts to its table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.loader import beside, main, summary

STEP_S = 0.05


def loader(work: Callable[[], object]) -> Any:
    """Steps of 30 tokens, which take STEP_S each."""

    def steps(start: int, stop: int) -> Iterator[SimpleNamespace]:
        for _ in range(start, stop):
            began = time.perf_counter()
            work()
            time.sleep(max(began + STEP_S - time.perf_counter(), 0))
            yield SimpleNamespace(tokens=np.array([10, 20]))

    return SimpleNamespace(steps=steps)


def test_a_loader_that_holds_the_lock_keeps_the_thread_waiting() -> None:
    numbers = list(range(1_500_000))
    began = time.perf_counter()
    sum(numbers)  # one call, in which no other thread runs
    held_ms = (time.perf_counter() - began) * 1e3
    found, speed = beside(loader(lambda: sum(numbers)), 0, 1.0)
    assert (found > held_ms / 2 / 1e3).sum() > 5
    assert summary(found)["max"] > held_ms / 2
    free, _ = beside(loader(lambda: None), 0, 1.0)
    assert np.median(free) < held_ms / 4 / 1e3
    assert len(found) < len(free)
    assert 30 / STEP_S / 3 < speed < 1.5 * 30 / STEP_S


def test_a_loader_that_fails_ends_the_benchmark() -> None:
    with pytest.raises(ZeroDivisionError):
        beside(loader(lambda: 1 // 0), 0, 0.1)


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.parallel_data.ITEMS", 100)
    file = tmp_path / "figures.json"
    arguments = ["--kinds", "qa", "--workers", "1", "--rounds", "1", "--seconds", "0.2", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["loader", *arguments])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("| qa | 1 |")]
    measured = json.loads(file.read_text())["runs"]["qa"]["1"]
    assert measured["tokens_a_second_a_worker"][0] > 1000
    assert measured["beside"]["n"] > 5
