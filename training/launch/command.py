"""Starts a node's ranks: the command that a job runs once a node, and what `crosslift train` calls.

In: a config's path, how many ranks, which node of how many. Out: the run's exit status. Next: `launcher.py`.

    python -m training.launch CONFIG [k=v ...] --nproc G [--nodes N --node-rank R --rendezvous HOST:PORT] [--resume ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from training.config import RunConfig
from training.errors import ConfigError
from training.launch.launcher import USER_ERROR, Launcher, say
from training.launch.logs import make_logs_folder
from training.launch.nodes import Nodes, Place
from training.launch.stop import allocation_end
from training.run_file import load_config
from training.run_folder.lock import held, refuse_other
from training.tracking.tracker import target_of


def visible_gpus() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def launch(
    config: Path, overrides: Sequence[str], nproc: int, options: Sequence[str], place: Place | None = None
) -> int:
    """Start this node's `nproc` ranks of `python -m training`, and wait for the run to end: its exit status.

    Raises:
        ConfigError: a mistake in the run file or in `place`, a folder that cannot be written or is another run's, a
            taken port.
    """
    command = [sys.executable, "-m", "training", str(config), *overrides, *options]
    settings: RunConfig = load_config(config, overrides)
    allocation_end()  # its error comes once, before any rank starts
    target_of(settings.tracking, settings.output_dir)  # its error comes before any rank starts
    place = place or Place()
    port = place.address()[1]
    with ExitStack() as folder:
        if place.node == 0:
            folder.enter_context(held(settings.output_dir, port))
        else:
            refuse_other(settings.output_dir, port)
        make_logs_folder(settings.output_dir)
        stall_seconds = settings.watchdog.stall_minutes * 60
        return Launcher(Nodes(place), command, nproc, settings.output_dir, stall_seconds).run()


def main(arguments: list[str] | None = None) -> int:
    """One node's launcher from the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m training.launch", description="Starts one node's ranks of a run.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--nproc", type=_positive, required=True, help="ranks on this node")
    parser.add_argument("--nodes", type=_positive, default=1, help="nodes of the run")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="a free port of node 0; not needed for one node")
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's or run's folder")
    parser.add_argument("--accept-changes", action="store_true", help="resume although data or config differ")
    options = parser.parse_intermixed_args(arguments)
    passed = ["--resume", options.resume, *(["--accept-changes"] if options.accept_changes else [])]
    place = Place(options.nodes, options.node_rank, options.rendezvous)
    try:
        place.address()
        load_config(options.config, options.overrides)  # its errors come before any rank starts
        return launch(options.config, options.overrides, options.nproc, passed, place)
    except ConfigError as error:
        say(str(error))
        return USER_ERROR


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above 0")
    return int(text)
