"""A rank that ended well says so: gloo's threads, which may be at work still, do not abort it on its way out."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
from ranks import environment

from training.launch.launcher import Launcher
from training.launch.nodes import Nodes, Place

# Sums that threads of gloo are still busy with when the function returns.
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
# As a run that is over at once, in a process group that nobody ended.
IS_A_RANK = """
    import runpy
    from training import fit, run_file
    from training.launch import preflight
    def over_at_once(*_):
        preflight.join(None, timedelta(minutes=1))
        leave_work()
    fit.fit = over_at_once
    run_file.load_config = lambda run_folder, _: SimpleNamespace(output_dir=run_folder)
    runpy.run_module("training", run_name="__main__")
"""


@pytest.mark.parametrize("program", [LEAVES_THE_GROUP, IS_A_RANK], ids=["leaves the group", "is a rank"])
def test_a_rank_that_ended_well_is_not_aborted_on_its_way_out(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", textwrap.dedent(BUSY + program), str(tmp_path)]
    assert Launcher(Nodes(Place()), command, 2).run() == 0
