"""The source and the run files as they are now, copied beside the run: later edits do not reach a queued job.

In: this installation and values of run files. Out: files of a submission. Next: `submit.py`.

Only the packages' own source is copied, by its kind: no hidden file, nothing that merely lies in a checkout.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_pipeline.yaml_values import write_yaml

SOURCE = Path(__file__).resolve().parent.parent
ROOMS = ("training", "modeling", "data_pipeline", "evals", "slurm")
FRONT_DOOR = "crosslift.py"
GIT_STATE = "git.json"  # where `training.provenance` looks
KINDS = (".py", ".yaml")  # yaml: the data of packages


def freeze_source(target: Path, git: dict[str, str], source: Path = SOURCE) -> int:
    """Copy the front door and all rooms into the new folder `target`, `git` (commit, dirty) beside them.

    Returns the number of source files.
    """
    files = [source / FRONT_DOOR]
    for room in ROOMS:
        for folder, names, found in os.walk(source / room):
            names[:] = sorted(name for name in names if not name.startswith((".", "__pycache__")))
            files += [Path(folder, name) for name in sorted(found) if _is_source(Path(folder, name))]
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    if git:  # without it the runs of a copy would not know their commit
        (target / GIT_STATE).write_text(json.dumps(git), encoding="utf-8")
    return len(files)


def freeze_config(target: Path, values: dict[str, Any]) -> None:
    """A run file with every value in it, defaults and overrides included."""
    target.write_text(write_yaml(values), encoding="utf-8")


def _is_source(file: Path) -> bool:
    return file.suffix in KINDS and not file.name.startswith(".") and not file.is_symlink()
