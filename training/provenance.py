"""Provenance of runs and results: versions of the software and the commit of the source."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

_SOURCE = Path(__file__).resolve().parent.parent
NOTED = "git.json"  # git state of the original, in a copy of the source without `.git`
_PACKAGES = ("crosslift", "torch", "deepspeed", "transformers", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages, by name. Imports none of them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_tags(known: Mapping[str, object] = MappingProxyType({})) -> dict[str, str]:
    """MLflow's standard tags: user, run file (or program), and the commit if `known` has it."""
    files = [each for each in sys.argv[1:] if each.endswith((".yaml", ".yml")) and "=" not in each]
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": files[0] if files else sys.argv[0] or "python"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        tags["mlflow.user"] = str(os.getuid())
    if commit := known.get("commit"):
        tags["mlflow.source.git.commit"] = str(commit)
    return tags


def git_state(source: Path = _SOURCE) -> dict[str, str]:
    """`{"commit": 40 hex digits, "dirty": "true" | "false"}` of the source tree; empty if it is not a checkout.

    Dirty means that a tracked file differs from the commit. `.git` must be in `source` itself, as a package may be
    installed inside another project's checkout.
    """
    if (noted := source / NOTED).is_file():
        return dict(json.loads(noted.read_text(encoding="utf-8")))
    if not (source / ".git").exists():
        return {}
    try:
        commit = _git(source, "rev-parse", "HEAD")
        dirty = _git(source, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # git is not installed, or there is no commit
        return {}
    return {"commit": commit, "dirty": str(bool(dirty)).lower()}


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def description() -> dict[str, str]:
    """Versions of the software, and the commit of the source with whether the tree is dirty."""
    return {**versions(), **git_state()}
