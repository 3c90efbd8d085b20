"""Command line of one node's launcher; a job runs it once per node.

python -m training.launch CONFIG [k=v ...] --nproc G [--nodes N --node-rank R --rendezvous HOST:PORT] [--resume ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.errors import ConfigError
from training.launch.launcher import launch
from training.launch.status_exchange import NodePlace
from training.messages import print_message


def main(arguments: list[str] | None = None) -> int:
    """Launch this node's ranks; returns the run's exit status: 2 after a user error, printed as one line."""
    parser = argparse.ArgumentParser(prog="python -m training.launch", description="Starts one node's ranks of a run.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--nproc", type=_positive, required=True, help="ranks on this node")
    parser.add_argument("--nodes", type=_positive, default=1, help="nodes of the run")
    parser.add_argument("--node-rank", type=int, default=0, help="index of this node, from 0")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="a free port of node 0; not needed for one node")
    parser.add_argument("--resume", default="auto", help="auto, never, or the folder of a checkpoint or run")
    parser.add_argument("--accept-changes", action="store_true", help="resume although data or config differ")
    parser.add_argument("--profile", type=_positive, metavar="N", help="steps of which rank 0 writes a profile")
    options = parser.parse_intermixed_args(arguments)
    passed = ["--resume", options.resume, *(["--accept-changes"] if options.accept_changes else [])]
    passed += ["--profile", str(options.profile)] if options.profile else []
    place = NodePlace(options.nodes, options.node_rank, options.rendezvous)
    try:
        return launch(options.config, options.overrides, options.nproc, passed, place)
    except ConfigError as error:
        print_message(str(error))
        return error.exit_status


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
