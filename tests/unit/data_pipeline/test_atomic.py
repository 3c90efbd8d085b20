"""`data_pipeline.atomic`: writes are all or nothing, also on errors, kills and with concurrent writers."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import atomic
from data_pipeline.atomic import WriteError, atomic_file, atomic_folder, recover, write_text

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from data_pipeline import atomic
with getattr(atomic, sys.argv[1])(Path(sys.argv[2]), exclusive=True) as path:
    (path / "part" if path.is_dir() else path).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


def text_in(folder: Path) -> str:
    return (folder / "inner" / "file").read_text()


def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.jsonl"
    write_text(target, "one\r\n")
    assert target.read_bytes() == b"one\r\n"
    with atomic_file(target) as temporary:
        temporary.write_text("two")
        assert target.read_text() == "one\n"
        assert not list(target.parent.glob("*.jsonl"))[1:], "the temporary name does not match readers' patterns"
    assert target.read_text() == "two"
    assert names(target.parent) == ["a.jsonl"]


@pytest.mark.parametrize("exclusive", [False, True])
def test_an_error_leaves_the_target_unchanged(tmp_path: Path, exclusive: bool) -> None:
    write_text(tmp_path / "file", "before")
    with atomic_folder(tmp_path / "folder") as temporary:
        fill(temporary, "before")

    def write_file() -> None:
        with atomic_file(tmp_path / "file", exclusive=exclusive) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    def write_folder() -> None:
        with atomic_folder(tmp_path / "folder", exists="replace", exclusive=exclusive) as temporary:
            fill(temporary, "half")
            raise KeyboardInterrupt

    with pytest.raises(ZeroDivisionError):
        write_file()
    with pytest.raises(KeyboardInterrupt):
        write_folder()
    assert ((tmp_path / "file").read_text(), text_in(tmp_path / "folder")) == ("before", "before")
    assert names(tmp_path) == ["file", "folder"]


def test_an_existing_folder_is_refused_kept_or_replaced(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_folder(target) as temporary:
        fill(temporary, "first")
    with (
        pytest.raises(WriteError, match=r"folder: cannot be written: Directory not empty"),
        atomic_folder(target) as temporary,
    ):
        fill(temporary, "refused")
    with atomic_folder(target, exists="keep") as temporary:
        fill(temporary, "second")
    assert text_in(target) == "first"
    with atomic_folder(target, exists="replace") as temporary:
        fill(temporary, "third")
        assert text_in(target) == "first"
    assert text_in(target) == "third"
    assert names(tmp_path) == ["folder"]


def test_concurrent_writers_of_one_target_use_different_temporary_files(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file") as one, atomic_file(tmp_path / "file") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one", "the last writer to finish replaces the file"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_leftovers_of_a_killed_process_are_deleted_by_the_next_writer(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, kind, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".incomplete-target"]
    with getattr(atomic, kind)(target, exclusive=True) as temporary:
        assert temporary.name == ".incomplete-target"
        (temporary / "whole" if temporary.is_dir() else temporary).write_text("whole")
    assert names(tmp_path) == ["target"]
    assert not (target / "part").exists()


def test_an_interrupted_replacement_is_undone_or_completed(tmp_path: Path) -> None:
    target, replaced = tmp_path / "folder", atomic.replaced_path(tmp_path / "folder")
    replaced.mkdir()
    fill(replaced, "old")
    recover(target)  # killed between the two renames
    assert text_in(target) == "old"
    assert names(tmp_path) == ["folder"]
    replaced.mkdir()
    recover(target)  # killed after them
    assert text_in(target) == "old"
    assert names(tmp_path) == ["folder"]
    target.rename(replaced)
    with pytest.raises(ZeroDivisionError), atomic_folder(target, exists="replace", exclusive=True):
        raise ZeroDivisionError
    assert text_in(target) == "old"


def test_all_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = atomic.sync
    monkeypatch.setattr(atomic, "sync", lambda path: synced.append(path.name) or sync(path))
    with atomic_folder(tmp_path / "folder", exclusive=True) as temporary:
        fill(temporary, "text")
    assert sorted(synced[:2]) == ["file", "inner"]
    assert synced[2:] == [".incomplete-folder", tmp_path.name]


def test_disk_errors_name_the_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "below", tmp_path / "file" / "deep" / "below"):
        with pytest.raises(WriteError, match=rf"^{target}: cannot be written: ") as caught:
            write_text(target, "text")
        assert caught.value.exit_status == 2
    with (
        pytest.raises(WriteError, match=r"a: cannot be written: No space left on device"),
        atomic_folder(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_errors_that_do_not_come_from_the_write_are_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="input") as caught, atomic_folder(tmp_path / "a"):
        (tmp_path / "input").read_text()
    assert not isinstance(caught.value, WriteError)
    with pytest.raises(ConnectionResetError), atomic_folder(tmp_path / "a"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
