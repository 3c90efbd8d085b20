"""Prepared artifacts of a run: made once, remade when their inputs change, never remade once checkpoints exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.run_folder.prepare import _created_once


@pytest.fixture
def make(tmp_path: Path) -> Any:
    calls: list[str] = []

    def made(content: str) -> str:
        def write(folder: Path) -> None:
            calls.append(content)
            folder.mkdir(exist_ok=True)
            (folder / "content").write_text(content)

        return (_created_once(tmp_path / "thing", {"from": content}, write) / "content").read_text()

    made.calls = calls  # type: ignore[attr-defined]
    return made


def test_the_same_inputs_make_the_artifact_once(make: Any) -> None:
    assert [make("a"), make("a")] == ["a", "a"]
    assert make.calls == ["a"]


def test_other_inputs_remake_the_artifact(make: Any) -> None:
    assert [make("a"), make("b")] == ["a", "b"]


def test_an_artifact_that_checkpoints_depend_on_is_never_remade(make: Any, tmp_path: Path) -> None:
    make("a")
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert make("b") == "a"
    assert make.calls == ["a"]


def test_a_failed_write_leaves_no_artifact(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _created_once(tmp_path / "thing", {}, fail)
    assert not (tmp_path / "thing").exists()
