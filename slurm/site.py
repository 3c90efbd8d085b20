"""A site's defaults: `~/.config/crosslift/slurm.yaml`, then the project's `slurm.yaml`, then the command line.

In: up to two YAML files and options. Out: JobSettings, with every mistake named by its file or option.
Next: `submit.py`.

The later one wins key by key; `environment` and `sbatch` are merged by their own keys, and null takes a default away.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from slurm.errors import SlurmError, mistakes
from slurm.spec import JobSettings

MERGED = ("environment", "sbatch")
PROJECT_FILE = Path("slurm.yaml")


def user_file() -> Path:
    """The user's own defaults."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "crosslift" / "slurm.yaml"


def load_settings(options: Mapping[str, Any], files: tuple[Path, ...] | None = None) -> JobSettings:
    """Defaults of `files` (those of the user and the project, as far as they exist), with `options` above them.

    Args:
        options: by key of JobSettings; None: not given.

    Raises:
        SlurmError: a line for every mistake, with its file and key, or its option.
    """
    layers = (
        {str(file): _read(file) for file in (user_file(), PROJECT_FILE) if file.is_file()}
        if files is None
        else {str(file): _read(file) for file in files}
    )
    for origin, layer in layers.items():
        # Each file alone: what is wrong in it must not be hidden by what comes above it.
        _validated({key: value for key, value in layer.items() if value is not None}, dict.fromkeys(layer, origin))
    given = {key: value for key, value in options.items() if value is not None}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in (*layers.items(), (None, given)):
        for key, value in layer.items():
            merged = {**values.get(key, {}), **value} if key in MERGED and isinstance(value, dict) else value
            values[key] = _without_nulls(merged) if key in MERGED else merged
            origins[key] = origin or f"--{key.replace('_', '-')}"
    return _validated({key: value for key, value in values.items() if value is not None}, origins)


def _without_nulls(value: Any) -> Any:
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


def _validated(values: dict[str, Any], origins: Mapping[str, str]) -> JobSettings:
    values = {key: _without_nulls(value) if key in MERGED else value for key, value in values.items()}
    try:
        return JobSettings.model_validate(values)
    except ValidationError as error:
        raise mistakes(error, JobSettings, origins) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SlurmError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f":{place.line + 1}" if place else ""
        raise SlurmError(f"{file}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SlurmError(f"{file}: must hold a mapping of keys, not {type(values).__name__}")
    return values
