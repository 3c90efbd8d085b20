"""What a run was made with: versions of the software and the commit of the source.

In: the installed packages and the source tree. Out: two flat dictionaries of text. Next: `tracking.Tracker`,
as tags, and everything that is saved with a checkpoint.
"""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_SOURCE = Path(__file__).resolve().parent.parent
NOTED = "git.json"  # in a copy of the source, which has no `.git`: the state that it was copied from
_PACKAGES = ("crosslift", "torch", "deepspeed", "transformers")


def versions() -> dict[str, str]:
    """Versions by name, Python's included; what is not installed is absent. Imports none of them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(source: Path = _SOURCE) -> dict[str, str]:
    """`{"commit": 40 hex digits, "dirty": "true" | "false"}` of the source tree; empty if it is no checkout.

    Dirty means: a tracked file differs from the commit. A package installed somewhere inside another
    project's checkout is not one itself, hence the look at `.git`.
    """
    if (noted := source / NOTED).is_file():
        return dict(json.loads(noted.read_text(encoding="utf-8")))
    if not (source / ".git").exists():
        return {}
    try:
        commit = _git(source, "rev-parse", "HEAD")
        dirty = _git(source, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout without a commit
        return {}
    return {"commit": commit, "dirty": str(bool(dirty)).lower()}


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
