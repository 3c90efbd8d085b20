"""Settings of jobs: `~/.config/crosslift/slurm.yaml`, then the project's `slurm.yaml`, then the command line.

A later one overrides key by key; `container`, `environment` and `sbatch` are merged by their own keys, and null
removes a default. Every mistake is reported with its file or option.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.yaml_values import read_yaml
from slurm.errors import SlurmError, mistakes
from slurm.spec import JobSettings

MERGED = ("container", "environment", "sbatch")
PROJECT_FILE = Path("slurm.yaml")


def user_file() -> Path:
    """The file of the user's defaults."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "crosslift" / "slurm.yaml"


def load_settings(options: Mapping[str, Any], files: tuple[Path, ...] | None = None) -> JobSettings:
    """Merge the defaults of `files` (by default those of the user and the project) with `options`.

    Args:
        options: by key of JobSettings; None: not given.

    Raises:
        SlurmError: one line per mistake, with its file and key, or its option.
    """
    found = [file for file in (user_file(), PROJECT_FILE) if file.is_file()] if files is None else files
    layers = [(str(file), _read(file)) for file in found]
    for origin, layer in layers:
        # Each file by itself: a mistake in it must not be hidden by a later file.
        _validated(layer, dict.fromkeys(layer, origin))
    given = {key: value for key, value in options.items() if value is not None}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in (*layers, ("", given)):
        for key, value in layer.items():
            before = values.get(key)
            both = key in MERGED and isinstance(value, dict) and isinstance(before, dict)
            values[key] = {**before, **value} if both and before else value
            origins[key] = origin or f"--{key.replace('_', '-')}"
    return _validated(values, origins)


def _validated(values: dict[str, Any], origins: Mapping[str, str]) -> JobSettings:
    """Validate the settings without null values, which are not given or removed."""
    plain = {
        key: {name: each for name, each in value.items() if each is not None}
        if key in MERGED and isinstance(value, dict)
        else value
        for key, value in values.items()
        if value is not None
    }
    try:
        return JobSettings.model_validate(plain)
    except ValidationError as error:
        raise mistakes(error, JobSettings, origins) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_yaml(file.read_text(encoding="utf-8"))
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
