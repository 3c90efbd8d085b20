"""The cluster that the tests of this folder share, and a reference run on it (`slurm_runs.py`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import TwoNodeCluster, missing
from slurm_runs import SlurmRun, reference_values


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodeCluster]:
    """Two real nodes, stopped before the tests of other files, which must find no cluster.

    Skipped if there is no Slurm, unless CROSSLIFT_REQUIRE_SLURM is set.
    """
    if reason := missing():
        if os.environ.get("CROSSLIFT_REQUIRE_SLURM"):
            pytest.fail(f"CROSSLIFT_REQUIRE_SLURM is set, but {reason}")
        pytest.skip(reason)
    with TwoNodeCluster(tmp_path_factory.mktemp("cluster")) as started, started.use():
        yield started


@pytest.fixture(scope="module")
def reference(cluster: TwoNodeCluster, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    """A finished run without interruptions on both nodes, followed by an evaluation."""
    folder: Path = tmp_path_factory.mktemp("reference")
    run = SlurmRun(cluster, folder, reference_values(folder))
    run.submit_with_evaluation()
    return run
