"""DeepSpeed's CPU Adam for ranks of tests, compiled before they start."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from filelock import FileLock


@pytest.fixture(scope="module")
def cpu_adam(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles the op into a folder of this test run, unless another module or test worker has.

    It takes minutes of two cores, longer than ranks wait for each other. A folder that outlives the test run would keep
    the lock of a build that was killed. The op is for small tensors: it is compiled without optimisation, in half the
    time.
    """
    from training.engine.ops import build_ops

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "torch_extensions"
    folder.mkdir(exist_ok=True)
    compiler, real = folder / "c++", os.environ.get("CXX", "c++")
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        variables.setenv("CXX", str(compiler))
        with FileLock(folder / "tests.lock"):
            compiler.write_text(f'#!/bin/sh\nexec {real} "$@" -O0 -g0\n')
            compiler.chmod(0o755)
            print(*build_ops({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
        yield
