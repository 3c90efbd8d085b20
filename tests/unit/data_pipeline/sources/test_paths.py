"""Paths with `~`, variables and glob characters, and paths below a file."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.sources.paths import PathError, check_folder, expanded, without_patterns
from data_pipeline.sources.sources import _files

HOSTILE = "[v1] a*{b}?#é"


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("DISK", "/disk")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs", "/home/ada/runs"), ("$DISK/a", "/disk/a"), ("${DISK}/a", "/disk/a"), ("a/$DISK.d", "a//disk.d"),
        ("plain", "plain"), ("a~b", "a~b"), ("5$", "5$"), ("$(echo x)", "$(echo x)"), ("s3://b/${DISK}", "s3://b//disk"),
    ],
)  # fmt: skip
def test_home_and_variables_are_expanded(text: str, path: str) -> None:
    assert expanded(text) == path


def test_an_unset_variable_is_named() -> None:
    for text in ("$NOWHERE/a", "a/${NOWHERE}/b"):
        with pytest.raises(PathError, match=r"names the variable NOWHERE, which is not set here") as refused:
            expanded(text)
        assert refused.value.exit_status == 2
    with pytest.raises(PathError, match="of an unknown user"):
        expanded("~nobody-of-that-name/a")


def test_an_existing_file_is_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$NOWHERE").touch()
    assert expanded("$NOWHERE") == "$NOWHERE"


@pytest.mark.parametrize("pattern", ["*.jsonl", "e[mn].jsonl", "en.jsonl", "{data_dir}/*.jsonl", "**/*.jsonl"])
def test_a_folder_with_brackets_is_literal_while_patterns_match(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    (folder / "en.jsonl").touch()
    (tmp_path / "v").mkdir()  # what the brackets would match as a pattern
    assert files(pattern, folder) == [str(folder / "en.jsonl")]


@pytest.mark.parametrize("address", ["", "file://"])
def test_a_folder_with_brackets_inside_a_pattern_is_literal(tmp_path: Path, address: str) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    (folder / "en.jsonl").touch()
    assert files(f"{address}{folder}/*.jsonl", None) == [f"{address}{folder}/en.jsonl"]


def files(pattern: str, data_dir: Path | None) -> list[str]:
    return _files(SourceConfig(name="a", files=pattern, language="en", columns={"text": "text"}), data_dir)


def test_a_path_at_or_below_a_file_is_refused_and_the_file_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "dangling").symlink_to("nothing")
    check_folder(tmp_path, "--output")
    check_folder(tmp_path / "a" / "b", "--output")
    for path in (file, file / "a" / "b", tmp_path / "dangling"):
        with pytest.raises(PathError, match=r"^--output .*is a file"):
            check_folder(path, "--output")
    assert list(tmp_path.iterdir()) != []
    assert not (tmp_path / "a").exists()


def test_libraries_that_glob_get_a_name_without_patterns(tmp_path: Path) -> None:
    """DeepSpeed globs for a checkpoint's files: below such a folder it found none to export or resume from."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    (folder / "a.pt").write_text("a")
    assert glob.glob(f"{folder}/*.pt") == []
    with without_patterns(folder) as plain:
        (found,) = glob.glob(f"{plain}/*.pt")
        assert Path(found).read_text() == "a"
        (plain / "b.pt").write_text("b")
    assert sorted(path.name for path in folder.iterdir()) == ["a.pt", "b.pt"]
    assert not plain.is_symlink()
    with without_patterns(tmp_path) as plain:
        assert plain == tmp_path
