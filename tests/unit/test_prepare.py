"""Artefacts that a run is prepared with: made once, made anew with other ingredients, never under checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.run_folder.prepare import _made_once


@pytest.fixture
def make(tmp_path: Path) -> Any:
    calls: list[str] = []

    def made(ingredient: str) -> str:
        def write(folder: Path) -> None:
            calls.append(ingredient)
            folder.mkdir(exist_ok=True)
            (folder / "content").write_text(ingredient)

        return (_made_once(tmp_path / "thing", {"from": ingredient}, write) / "content").read_text()

    made.calls = calls  # type: ignore[attr-defined]
    return made


def test_the_same_ingredients_make_it_once(make: Any) -> None:
    assert [make("a"), make("a")] == ["a", "a"]
    assert make.calls == ["a"]


def test_other_ingredients_make_it_anew(make: Any) -> None:
    assert [make("a"), make("b")] == ["a", "b"]


def test_what_checkpoints_rest_on_is_never_made_anew(make: Any, tmp_path: Path) -> None:
    make("a")
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert make("b") == "a"
    assert make.calls == ["a"]


def test_a_torn_making_leaves_no_artefact(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _made_once(tmp_path / "thing", {}, fail)
    assert not (tmp_path / "thing").exists()
