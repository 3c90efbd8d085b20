"""DeepSpeed's CPU Adam for ranks of tests, compiled before they start."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def cpu_adam(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles the op into a folder of this test run, or waits for another test worker that does.

    It takes minutes of two cores, longer than ranks wait for each other. A folder that outlives the test run would keep
    the lock of a build that was killed.
    """
    from training.engine.ops import build_ops

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "torch_extensions"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        with FileLock(folder / "tests.lock"):
            print(*build_ops({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
        yield
