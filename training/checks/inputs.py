"""What a run reads from disks, without reading it: every node of a job must find it.

In: a run file's values. Out: files and folders. Next: `crosslift submit`, whose job looks for them on each node.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

GLOB = frozenset("*?[")


def paths_read(values: Mapping[str, Any]) -> list[Path]:
    """Data, and model and tokenizer where they are folders and no hub names; absolute, each once, as far as there.

    Of a glob, the folder in front of it. What lies in `data_dir` is meant with it.
    """
    data_dir = values["data_dir"] or ""
    names = [data_dir, values["model"]["path"], values["tokenizer"]["path"], *_of_sources(values, data_dir)]
    found = [Path(name).absolute() for name in names if name and Path(name).exists()]
    inside = Path(data_dir).absolute() if data_dir else None
    return list(dict.fromkeys(path for path in found if path == inside or not inside or inside not in path.parents))


def _of_sources(values: Mapping[str, Any], data_dir: str) -> Iterator[str]:
    for source in values["data"]["sources"]:
        patterns = [source["hub"]] if source["hub"] is not None else source["files"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if "://" not in pattern:
                yield _before_glob(os.path.join(data_dir, pattern.replace("{data_dir}", data_dir)))


def _before_glob(address: str) -> str:
    """A name that exists is taken as it is, brackets and all."""
    path = Path(address)
    while not path.exists() and GLOB & set(str(path)):
        path = path.parent
    return str(path)
