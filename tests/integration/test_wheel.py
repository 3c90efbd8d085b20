"""A wheel of the repository, installed without a checkout, contains everything that the commands need."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "mlruns", "tests")
STARTS_WITHIN = 240.0  # seconds, on two busy cores


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with crosslift from its wheel, and this one's other packages; its `bin` folder."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)  # building writes beside the sources
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", folder / "source"],
        check=True,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    own = sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    # Only the paths: .pth files in them, as of an editable install of the checkout, are not read.
    others = [path for path in sys.path if path.endswith("site-packages")]
    Path(own, "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    return python.parent


@pytest.fixture
def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture
def quickstart(installed: Path, tmp_path: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """`crosslift quickstart` in an empty folder, ended with all processes that it started."""
    process = subprocess.Popen(
        [installed / "crosslift", "quickstart"], cwd=tmp_path, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    yield process
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_quickstart_trains_from_the_wheel(quickstart: subprocess.Popen[str], tmp_path: Path) -> None:
    """Only its first steps: the whole quickstart takes minutes."""
    record = tmp_path / "runs" / "quickstart" / "base" / "record.jsonl"

    def trains() -> bool:
        assert quickstart.poll() is None, quickstart.communicate()[0]
        return record.is_file() and '"train/loss"' in record.read_text(encoding="utf-8")

    wait_for(trains, seconds=STARTS_WITHIN)


def test_every_run_file_of_the_repository_is_in_the_wheel(installed: Path, environment: dict[str, str]) -> None:
    program = "import configs, crosslift; print(*configs.__path__); print(crosslift.__file__)"
    done = subprocess.run(
        [installed / "python", "-c", program],
        env=environment,
        cwd=installed,
        capture_output=True,
        text=True,
        check=True,
    )
    folder, module = map(Path, done.stdout.split())
    assert module.is_relative_to(installed.parent)
    assert sorted(path.name for path in folder.glob("*.yaml")) == sorted(
        path.name for path in (ROOT / "configs").glob("*.yaml")
    )
