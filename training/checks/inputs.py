"""The files and folders that a run reads: those that every node must see, and those that are missing."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.sources.paths import PathError, expanded, literal_folders

GLOB = frozenset("*?[")


def paths_read(values: Mapping[str, Any]) -> list[Path]:
    """The existing inputs of a run, as absolute paths: data, and model and tokenizer if they are folders.

    For a glob, the folder before its first pattern. Paths inside `data_dir` are left out, since it is listed itself.
    """
    data_dir = values["data_dir"] or ""
    names = [data_dir, values["model"]["path"], values["tokenizer"]["path"], *_of_sources(values, data_dir)]
    found = [Path(name).absolute() for name in names if name and Path(name).exists()]
    inside = Path(data_dir).absolute() if data_dir else None
    return list(dict.fromkeys(path for path in found if path == inside or not inside or inside not in path.parents))


def missing_inputs(values: Mapping[str, Any]) -> Iterator[str]:
    """A line for every local input that a run file's values name and that is missing; nothing is fetched.

    Values of a wrong type are ignored here, as validation reports them. A model or tokenizer counts as local if its
    name cannot be that of a repository on the hub.
    """
    data_dir = _text(values.get("data_dir"))
    if data_dir is not None and not Path(data_dir).is_dir():
        yield f"data_dir: {data_dir}: no such folder"
    for section in ("model", "tokenizer"):
        name = _text(_section(values.get(section)).get("path"))
        if name is not None and _is_local(name) and not Path(name).exists():
            yield f"{section}.path: {name}: no such folder"
    if data_dir is not None and not Path(data_dir).is_dir():
        return  # then its files are missing too
    data = _section(values.get("data"))
    for key, holder in (("data.sources", data), ("data.pairs.sources", _section(data.get("pairs")))):
        yield from _missing_files(key, holder.get("sources"), data_dir)


def _missing_files(key: str, sources: Any, data_dir: str | None) -> Iterator[str]:
    for number, source in enumerate(sources if isinstance(sources, list | tuple) else ()):
        for pattern in _patterns(_section(source).get("files")):
            text = _text(pattern)
            if text is None or "://" in text or ("{data_dir}" in text and data_dir is None):
                continue
            address = os.path.join(data_dir or "", text.replace("{data_dir}", data_dir or ""))
            if not any(os.path.isfile(name) for name in glob.iglob(literal_folders(address), recursive=True)):
                yield f"{key}.{number}.files: no file matches {address}"


def _patterns(files: Any) -> list[Any]:
    """The values of a source's `files`: one, a list, or one for each language."""
    if isinstance(files, Mapping):
        return list(files.values())
    return list(files) if isinstance(files, list | tuple) else [files]


def _text(value: Any) -> str | None:
    """The path in a value, with `~` and variables expanded; None if it is no path or a variable is not set."""
    try:
        return expanded(str(value)) if isinstance(value, str | Path) else None
    except PathError:
        return None


def _section(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_local(name: str) -> bool:
    """Whether a name can only be a path: a hub's are NAME or OWNER/NAME."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def _of_sources(values: Mapping[str, Any], data_dir: str) -> Iterator[str]:
    data = values["data"]
    for source in (*data["sources"], *(data["pairs"] or {"sources": ()})["sources"]):
        for pattern in _patterns(source["hub"] if source["hub"] is not None else source["files"]):
            if "://" not in pattern:
                yield _before_glob(os.path.join(data_dir, pattern.replace("{data_dir}", data_dir)))


def _before_glob(address: str) -> str:
    """The folder before the first pattern; a name that exists is returned unchanged, even with brackets."""
    path = Path(address)
    while not path.exists() and GLOB & set(str(path)):
        path = path.parent
    return str(path)
