"""Shared by the benchmarks: starting ranks on this machine, and a description of the machine."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.provenance import git_state, versions

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).resolve().parent.parent


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark that starts itself as ranks; only ranks get `rank_folder`."""
    parser.add_argument("--nproc", type=int, default=2, help="ranks (on GPUs: at most as many as there are)")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)


def usable_ranks(wanted: int) -> int:
    """The number of ranks, limited to the number of GPUs if there are any."""
    from training.distributed import visible_gpus

    return min(wanted, visible_gpus() or wanted)


def run_ranks(module: str, arguments: Sequence[str], nproc: int) -> None:
    """Run `python -m MODULE ARGUMENTS` as `nproc` ranks; a failure ends all and raises ChildFailedError."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc, 1)))
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", monitor_interval=0.2,
    )  # fmt: skip
    elastic_launch(settings, sys.executable)("-m", module, *arguments)


def machine(nproc: int) -> dict[str, Any]:
    """Hardware, software, commit and command line."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": f"{os.cpu_count()} cores {platform.machine()}",
        "memory_gib": round(memory / 2**30, 1),
        "gpu": gpu,
        "ranks": nproc,
        "threads_a_rank": int(os.environ.get("OMP_NUM_THREADS", max((os.cpu_count() or 1) // nproc, 1))),
        "versions": versions(),
        "source": git_state(),
    }


def all_max(value: float, device: torch.device) -> float:
    """Largest value over ranks."""
    import torch
    import torch.distributed as dist

    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())
