"""One rank of a run, started by `torchrun --nproc-per-node N -m training CONFIG [k=v ...]`, `deepspeed --module
training ...`, `srun`, or by `crosslift train` on one machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path

from data_pipeline.sources.paths import expanded
from training.distributed import rank
from training.errors import ConfigError
from training.launch import logs
from training.launch.heartbeat import heartbeat
from training.launch.stop import StopRequest
from training.run_file import load_config
from training.run_folder.lock import held, refuse_other


def main(arguments: list[str] | None = None) -> int:
    """Run this rank to the end.

    Returns:
        The exit status: 0; 2 after a user error, which is printed as one line; 3 or 4 if training finished, but the
        export failed its check or there is none; 75 if stopped on request; 1 for anything else.
    """
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's or run's folder")
    parser.add_argument("--accept-changes", action="store_true", help="resume although data or config differ")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="steps of which rank 0 writes a profile")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", "29500")
    if options.local_rank is not None:
        os.environ["LOCAL_RANK"] = str(options.local_rank)
    try:
        stop = StopRequest()
    except ConfigError as error:
        logs.report_failure(f"crosslift: {error}")
        return error.exit_status
    stop.install()
    heartbeat.attach()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    logs.log_to_terminal(rank())
    with ExitStack() as at_end:
        try:
            _run(options, stop, at_end)
        except Exception as error:
            status = getattr(error, "exit_status", None)
            if status is not None:  # all ranks raise it: the launcher prints it once
                logs.report_failure(f"crosslift: {error}")
                return int(status)
            if type(error).__module__.startswith("training."):  # its message is complete
                logs.report_failure(f"crosslift: rank {rank()}: {error}")
                return 1
            logs.report_failure(traceback.format_exc().rstrip())
            return 1
    return 0


def _run(options: argparse.Namespace, stop: StopRequest, at_end: ExitStack) -> None:
    from training.fit import fit

    config = load_config(options.config, options.overrides)
    port = int(os.environ["MASTER_PORT"])
    if rank() == 0:
        at_end.enter_context(held(config.output_dir, port))
    else:
        refuse_other(config.output_dir, port)
    at_end.enter_context(logs.run_logs(config.output_dir, rank()))
    fit(config, expanded(options.resume), options.accept_changes, stop, options.profile)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Skips the interpreter's shutdown. There a failed rank would wait for ranks that are stuck in a collective call,
    # and a finished rank may be aborted (SIGABRT) when a gloo thread releases its last tensors (pytorch #179291):
    # DeepSpeed's groups keep such threads after they are destroyed.
    os._exit(status)
