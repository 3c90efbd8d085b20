"""Ranks on this machine: `crosslift train` without torchrun's noise.

In: a config's path and how many ranks. Out: an exit status. Next: `python -m training`, once a rank.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path


def visible_gpus() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def launch(config: Path, overrides: Sequence[str], nproc: int, options: Sequence[str]) -> int:
    """Start `nproc` ranks of `python -m training` and wait: 0, or the exit status of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What failed is said by the rank itself; elastic's own reports of it are noise.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    source = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc, 1)))
    os.environ["CROSSLIFT_ONE_MESSAGE"] = "1"  # every rank meets the same user error: rank 0 says it
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", monitor_interval=0.2,
    )  # fmt: skip
    arguments = ["-m", "training", str(config), *overrides, *options]
    try:
        elastic_launch(settings, sys.executable)(*arguments)
    except ChildFailedError as error:
        first = error.get_first_failure()[1]
        if first.exitcode < 0:
            print(f"crosslift: rank {first.local_rank} was killed by signal {-first.exitcode}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 1
    except SignalException as stopped:
        print(f"crosslift: stopped by {stopped.sigval.name}; the same command goes on from the last checkpoint",
              file=sys.stderr)  # fmt: skip
        return 128 + stopped.sigval
    return 0
