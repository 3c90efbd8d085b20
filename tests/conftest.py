"""Fixtures of the tiny run (`tiny_run.py`).

`corpus` and `prepared_run` are made once per session; tests must not write into them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import PreparedRun, run_values, write_config, write_data

# For torch in each test worker and its child processes: more threads than cores slow each other down
# (tests/unit on 2 cores with three workers: 121 s with this, 166 s without).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# MLflow variables of a developer's shell must not reach tests or processes that tests start.
for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
    del os.environ[name]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `<language>.jsonl`: 4 languages (en, de, sw, zh), the same 40 items in each."""
    return write_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tiny_run(corpus: Path) -> Callable[..., dict[str, Any]]:
    """`tiny_run(output_dir, **{"data.workers": 2})`: `run_values` on the shared corpus."""

    def make(output_dir: Path, **changes: Any) -> dict[str, Any]:
        return run_values(corpus, output_dir, **changes)

    return make


@pytest.fixture(scope="session")
def run_file(tiny_run: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """`run_file(folder, **changes)`: the tiny run as `folder/run.yaml`, its output_dir `folder/run`."""

    def write(folder: Path, **changes: Any) -> Path:
        return write_config(folder / "run.yaml", tiny_run(folder / "run", **changes))

    return write


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: Callable[..., dict[str, Any]]) -> PreparedRun:
    """The tiny run, prepared once: index built, tokenizer trained, weights initialised."""
    from training.run_file import validate
    from training.run_folder.prepare import prepare

    config = validate(tiny_run(tmp_path_factory.mktemp("prepared") / "run"), "tiny run")
    return PreparedRun(config, prepare(config))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate disk of 2 MB, to be filled. Only root can mount one."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs a small disk, which only root can mount (user {os.geteuid()}): {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
