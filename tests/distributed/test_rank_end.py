"""A finished rank ends with status 0: gloo threads that are still busy do not abort it at exit."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
from ranks import environment

from training.launch.launcher import Launcher
from training.launch.status_exchange import NodePlace

# Leaves reductions with which gloo's threads are still busy when the function returns.
BUSY = """
    from datetime import timedelta
    from types import SimpleNamespace
    import torch, torch.distributed as dist
    def leave_work():
        for _ in range(200):
            dist.all_reduce(torch.ones(100_000), async_op=True)
"""
LEAVES_THE_GROUP = """
    from training.engine.engine import process_group
    with process_group(timeout_minutes=1):
        leave_work()
    assert not dist.is_initialized()
"""
# Like a run that ends at once, in a process group that is not destroyed.
IS_A_RANK = """
    import runpy
    from training import fit, run_file
    from training.launch import preflight
    def end_at_once(*_):
        preflight.join(None, timedelta(minutes=1))
        leave_work()
    fit.fit = end_at_once
    run_file.load_config = lambda run_folder, _: SimpleNamespace(output_dir=run_folder)
    runpy.run_module("training", run_name="__main__")
"""


@pytest.mark.parametrize("program", [LEAVES_THE_GROUP, IS_A_RANK], ids=["leaves the group", "is a rank"])
def test_a_finished_rank_is_not_aborted_at_exit(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", textwrap.dedent(BUSY + program), str(tmp_path)]
    assert Launcher(NodePlace(), command, 2, tmp_path).run() == 0
