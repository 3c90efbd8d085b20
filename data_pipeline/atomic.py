"""Files and folders that are written whole or not at all.

Content is written under a temporary name beside its target, synced to disk, and then renamed: after a crash the target
is either unchanged or complete. After an error, temporary files are removed. Temporary names begin with
`.incomplete-`; what is being replaced is renamed to `.replaced-NAME`.

This module imports the standard library only, so that `slurm`, `evals` and `training` can all use it.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_SYNC_THREADS = 16
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})  # from network disks that cannot sync a folder


class WriteError(OSError):
    """One line: the path that cannot be written, and the reason."""

    exit_status = 2

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written: {self.strerror}"


@contextmanager
def atomic_file(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; the file becomes `path` when the block ends without an error.

    Args:
        path: the target. Folders above it are created; an existing file is replaced.
        exclusive: no other process writes `path` at the same time. The temporary name is then always the same, and
            what a killed process left under it is deleted first.

    Raises:
        WriteError: the file cannot be written.
    """
    with _temporary(path, exclusive) as temporary:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def write_text(path: Path, text: str, *, exclusive: bool = False) -> None:
    """Write a UTF-8 file, whole or not at all, with the line ends of `text`. Raises WriteError."""
    with atomic_file(path, exclusive=exclusive) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def atomic_folder(
    path: Path, *, exists: Literal["refuse", "keep", "replace"] = "refuse", exclusive: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it becomes `path` when the block ends without an error.

    Args:
        path: the target. Folders above it are created.
        exists: what happens if `path` exists at the end. "refuse": a WriteError. "keep": it stays, because another
            process wrote the same content first. "replace": it is deleted once the new folder is renamed to `path`.
        exclusive: as for `atomic_file`. A replacement that a killed process left between its two renames is undone
            first, as `recover` does.

    Raises:
        WriteError: the folder cannot be written, or `path` is not empty and must be kept.
    """
    if exclusive and exists == "replace":
        recover(path)
    with _temporary(path, exclusive) as temporary:
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        if exists == "replace":
            replaced = replaced_path(path) if exclusive else _beside(path, "replaced", uuid.uuid4().hex[:8])
            swap(temporary, path, replaced)
            shutil.rmtree(replaced, ignore_errors=True)
            return
        try:
            temporary.rename(path)
        except OSError:
            if exists == "refuse" or not path.is_dir():
                raise
        sync(path.parent)


def swap(new: Path, path: Path, replaced: Path) -> None:
    """Rename the folder `new` to `path`; an existing `path` is renamed to `replaced` before, which is deleted first."""
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    new.rename(path)
    sync(path.parent)


def recover(path: Path) -> None:
    """Complete the replacement of a folder, or undo it if the new one was not renamed yet. Raises OSError."""
    replaced = replaced_path(path)
    if not replaced.exists():
        return
    if path.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(path)


def incomplete_path(path: Path) -> Path:
    """The temporary name of an exclusive target."""
    return _beside(path, "incomplete")


def replaced_path(path: Path) -> Path:
    """The name that an exclusive target's earlier content has while it is replaced."""
    return _beside(path, "replaced")


def sync_tree(folder: Path, skip: Collection[Path] = ()) -> None:
    """Sync a folder and all files and folders in it to disk, but not the files in `skip`, which are synced already."""
    files = [file for file in folder.rglob("*") if not file.is_symlink() and file not in skip]
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:  # many small files: a disk commits several at once
        list(pool.map(sync, files))
    sync(folder)


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(path: Path, exclusive: bool) -> Iterator[Path]:
    """A temporary path, removed before and after the block; errors of its disk become WriteErrors."""
    temporary = incomplete_path(path) if exclusive else _beside(path, "incomplete", uuid.uuid4().hex[:8])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
    except WriteError:
        raise
    except OSError as error:
        if error.errno in _DISK_ERRORS or _concerns(error, path, temporary):
            raise WriteError(path, error) from error
        raise
    finally:
        _remove(temporary)


def _concerns(error: OSError, path: Path, temporary: Path) -> bool:
    """Whether an error is about the target, the temporary path or what is in it, or a folder above them."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return any(each in (path, temporary, *path.parents) or temporary in each.parents for each in named)


def _beside(path: Path, what: str, suffix: str = "") -> Path:
    return path.with_name("-".join(filter(None, (f".{what}", path.name, suffix))))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()
