"""What the front door hands to `crosslift submit` of the other rooms: a run file's values, and the files it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import run_values, write_config

import crosslift
from training.errors import ConfigError


def values_of(folder: Path, source: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run file; `source` changes its only source."""
    values = run_values(folder / "data", folder / "run", **changes)
    values["data"]["sources"][0] |= source or {}
    return write_config(folder / "run.yaml", values)


INHERITED = "in the shell that submits, from which jobs inherit it"


@pytest.mark.parametrize(
    ("key", "address", "instead"),
    [
        ("tracking.uri", "https://me:hush@host/x", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("tracking.uri", "http://hush@host", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("tracking.uri", "postgresql://me:hush@host/db", "as the database's driver reads it (such as PGPASSWORD)"),
        ("data.sources.0.files.1", "s3://key:hush@bucket/x.jsonl", "as its file system reads it (such as AWS_SECRET"),
    ],
)
def test_a_login_that_the_job_would_miss_is_refused(tmp_path: Path, key: str, address: str, instead: str) -> None:
    """Frozen run files hold none."""
    of_data = {"files": ["a.jsonl", address]} if key.startswith("data") else {}
    of_tracking = {"tracking.uri": address} if key.startswith("tracking") else {}
    config = values_of(tmp_path, of_data, **of_tracking)
    with pytest.raises(ConfigError) as refused:
        crosslift._load_values(config, [])
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{config}: {key}: holds a login")
    assert instead in line
    assert line.endswith(INHERITED)
    assert "hush" not in line


def test_addresses_without_a_login_are_no_matter(tmp_path: Path) -> None:
    for address in ("http://host:5000", "postgresql://me@host/db", "sqlite:////a/b@c.db"):
        values = crosslift._load_values(values_of(tmp_path, tracking={"uri": address}), [])
        assert values["tracking"]["uri"] == address
