"""The description of an evaluation beside its results, in files that are complete or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.atomic import write_text
from data_pipeline.settings import difference
from evals.errors import EvalError

if TYPE_CHECKING:
    from modeling.generation import ShiftedGenerator

RUN_FILE = "run.json"


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


def claim(folder: Path, run: Mapping[str, Any]) -> None:
    """Mark `folder` as this evaluation's, or check that it already is. Raises EvalError if it belongs to another."""
    file = folder / RUN_FILE
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise EvalError(f"{folder}: not empty, and not an evaluation's folder; name a new one")
        write_text(file, json.dumps(run, ensure_ascii=False, indent=2) + "\n")
        return
    if (before := read_run(folder) or {}) != run:
        key = next(iter(difference(before, run)))
        raise EvalError(f"{folder}: holds an evaluation with another {key}; name a new folder")
    if run["model"]["hash"] is None:
        raise EvalError(f"{folder}: holds an evaluation of a model that cannot be identified; name a new folder")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `claim` wrote into the folder; None if nothing. Raises EvalError if it is unreadable."""
    file = folder / RUN_FILE
    if not file.is_file():
        return None
    try:
        run = json.loads(file.read_bytes())
        run["model"]["hash"], run["model"]["dominant"], run["model"]["objective"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(f"{file}: does not describe an evaluation; name a new folder") from error
    return dict(run)


def by_reason(reasons: Mapping[str, str]) -> str:
    """Languages grouped by the reason why they are missing: "no predictions: de, fr; no labels: sw"."""
    languages: dict[str, list[str]] = {}
    for language, reason in reasons.items():
        languages.setdefault(reason, []).append(language)
    return "; ".join(f"{reason}: {', '.join(names)}" for reason, names in languages.items())
