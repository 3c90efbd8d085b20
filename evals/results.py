"""Results that describe their own run, in files that are complete or absent."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.atomic import write_text
from evals.errors import EvalError

if TYPE_CHECKING:
    from modeling.generation import ShiftedGenerator

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"


def described_model(generator: ShiftedGenerator) -> dict[str, Any]:
    """Path, hashes of weights and language vectors, number format; hash None if the model is not in a folder."""
    from modeling.export_info import VECTORS_FILE
    from modeling.weights.weight_files import directory_hash

    path = str(generator.model.name_or_path)
    vectors = Path(path) / VECTORS_FILE
    return {
        "path": path,
        "hash": directory_hash(path) if path and Path(path).is_dir() else None,
        "objective": generator.info.objective,
        "dominant": generator.info.dominant,
        "vectors": sha256(vectors.read_bytes()).hexdigest() if path and vectors.is_file() else None,
        "dtype": str(generator.model.dtype).removeprefix("torch."),
    }


def described_versions() -> dict[str, str | None]:
    """The software that computed a score; `commit` ends in "-dirty" if files were changed since."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("crosslift", "torch", "transformers", "tokenizers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
        versions["commit"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):  # an installed copy, or no git
        versions["commit"] = None
    return versions


def claim(folder: Path, run: Mapping[str, Any]) -> None:
    """Mark `folder` as this evaluation's, or check that it already is. Raises EvalError if it is another's."""
    file = folder / RUN_FILE
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise EvalError(f"{folder}: not empty, and no evaluation's folder; name a new one")
        write_text(file, json.dumps(run, ensure_ascii=False, indent=2) + "\n")
        return
    if (before := read_run(folder)) != run:
        difference = _difference(before, run)
        raise EvalError(f"{folder}: holds an evaluation with another {difference}; name a new folder")
    if run["model"]["hash"] is None:
        raise EvalError(f"{folder}: holds an evaluation of a model that cannot be identified; name a new folder")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `claim` wrote there, None if it never did. Raises EvalError if that is unreadable."""
    file = folder / RUN_FILE
    if not file.is_file():
        return None
    try:
        run = json.loads(file.read_bytes())
        run["model"]["hash"], run["model"]["dominant"], run["model"]["objective"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(f"{file}: describes no evaluation; name a new folder") from error
    return dict(run)


def _difference(before: Any, now: Any) -> str:
    """The first key, such as "protocol.limit", in which two nested dicts differ."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return ""
    key = next(key for key in {**now, **before} if before.get(key) != now.get(key))
    rest = _difference(before.get(key), now.get(key))
    return f"{key}.{rest}" if rest else str(key)


def by_reason(reasons: Mapping[str, str]) -> str:
    """Languages grouped by the reason why they are missing: "no predictions: de, fr; no labels: sw"."""
    languages: dict[str, list[str]] = {}
    for language, reason in reasons.items():
        languages.setdefault(reason, []).append(language)
    return "; ".join(f"{reason}: {', '.join(names)}" for reason, names in languages.items())
