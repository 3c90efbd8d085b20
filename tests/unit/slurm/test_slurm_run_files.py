"""The run file of a job: its values without logins, and the files that each node must be able to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import run_values, write_config

from slurm.request import load_values
from training.checks.inputs import paths_read
from training.errors import ConfigError


def values_of(folder: Path, source: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run file; `source` changes its only data source."""
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
def test_an_address_with_a_login_is_refused(tmp_path: Path, key: str, address: str, instead: str) -> None:
    """Frozen run files contain no logins, so the job would lack it."""
    of_data = {"files": ["a.jsonl", address]} if key.startswith("data") else {}
    of_tracking = {"tracking.uri": address} if key.startswith("tracking") else {}
    config = values_of(tmp_path, of_data, **of_tracking)
    with pytest.raises(ConfigError) as refused:
        load_values(config, [])
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{config}: {key}: holds a login")
    assert instead in line
    assert line.endswith(INHERITED)
    assert "hush" not in line


def test_addresses_without_a_login_are_accepted(tmp_path: Path) -> None:
    for address in ("http://host:5000", "postgresql://me@host/db", "sqlite:////a/b@c.db"):
        values = load_values(values_of(tmp_path, tracking={"uri": address}), [])
        assert values["tracking"]["uri"] == address


def test_the_files_that_a_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside and outside of data_dir."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.jsonl", "other/b.jsonl", "globbed/deep/c.jsonl", "[x]/d.jsonl", "tokens/tokenizer.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = [f"{tmp_path}/other/b.jsonl", f"{tmp_path}/globbed/*/c.jsonl", "[x]/d.jsonl", "s3://bucket/e.jsonl"]
    expected = [tmp_path / "tokens", tmp_path / "other" / "b.jsonl", tmp_path / "globbed", tmp_path / "[x]" / "d.jsonl"]
    changes = {"tokenizer": {"path": "tokens"}, "model": {"path": "some/hub-name"}}
    config = values_of(tmp_path, {"files": files}, **changes)
    assert paths_read(load_values(config, ["data_dir=null"])) == expected
    inside = values_of(tmp_path, {"files": ["a.jsonl", "{data_dir}/*.jsonl", *files[:1]]}, **changes)
    values = load_values(inside, ["data_dir=data"])
    assert paths_read(values) == [tmp_path / "data", *expected[:2]]
    values["data"]["sources"][0] |= {"files": None, "hub": str(tmp_path / "globbed")}
    assert paths_read(values) == [tmp_path / "data", tmp_path / "tokens", tmp_path / "globbed"]
