"""Paths written by users: `~`, `$VAR` and `${VAR}`, glob characters in names, folders to be created."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
MAGIC = re.compile(r"[*?\[]")


class PathError(ValueError):
    """One line: the path, what is wrong with it, and what would be right."""

    exit_status = 2


def expanded(text: str) -> str:
    """`text` with its `~` and environment variables expanded; a name that exists is returned unchanged.

    Raises:
        PathError: an unset variable or an unknown user.
    """
    if ("$" not in text and not text.startswith("~")) or os.path.lexists(text):
        return text

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not (found := os.environ.get(name)):
            raise PathError(
                f"{text!r} names the variable {name}, which is not set here; set it, or give the path itself"
            )
        return found

    filled = _VARIABLE.sub(value, text)
    if not filled.startswith("~"):
        return filled
    home = os.path.expanduser(filled)
    if home.startswith("~"):
        raise PathError(f"{text!r} names the home of an unknown user; write ./{text} for a file of that name")
    return home


def expanded_path(path: Path, name: str) -> Path:
    """An expanded path of the command line; `name` is its option, for the message. Raises PathError."""
    try:
        return Path(expanded(str(path)))
    except PathError as error:
        raise PathError(f"{name}: {error}") from None


def literal_folders(pattern: str, exists: Callable[[str], bool] = os.path.lexists) -> str:
    """A glob in which existing folders with brackets or other glob characters in their names match literally.

    `pattern`: a path with `/`; `exists`: whether a path exists.
    """
    parts = pattern.split("/")
    for number in range(len(parts), 0, -1):
        folder = "/".join(parts[:number])
        if not MAGIC.search(folder) or exists(folder):
            return "/".join([glob.escape(folder), *parts[number:]])
    return pattern


@contextmanager
def without_patterns(folder: Path) -> Iterator[Path]:
    """A path of the folder without glob characters, for libraries that search it with a glob."""
    if not MAGIC.search(str(folder)):
        yield folder
        return
    with TemporaryDirectory(prefix="crosslift-") as scratch:
        link = Path(scratch, "folder")
        link.symlink_to(folder.absolute())
        yield link


def check_folder(path: Path, name: str) -> None:
    """Check that `path` is a folder, or that one can be created there; nothing is created.

    Args:
        name: the key or option, for the message.

    Raises:
        PathError: a file is at that path or above it, or the folder above it is not writable.
    """
    above = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if not above.is_dir():
        where = "is a file" if above == path else f"lies below {above}, which is a file"
        raise PathError(f"{name} {path}: {where}; give a folder, or a path where one can be created")
    if above != path and not os.access(above, os.W_OK | os.X_OK):
        raise PathError(f"{name} {path}: cannot be created, as {above} is not writable; give a writable folder")
