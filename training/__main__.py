"""One rank of a run: `torchrun --nproc-per-node N -m training CONFIG [k=v ...]`, `deepspeed --module training ...`
or `srun` start this same loop; `crosslift train` does it for one machine.
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
    """Run this rank to the end; 0; 2 after one line about what the user can mend; 3, 4: finished, but the export failed
    its check, or there is none; 75 stopped on request.
    """
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's or run's folder")
    parser.add_argument("--accept-changes", action="store_true", help="resume although data or config differ")
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
            if (
                status := getattr(error, "exit_status", None)
            ) is not None:  # all ranks meet it: the launcher says it once
                logs.report_failure(f"crosslift: {error}")
                return int(status)
            if type(error).__module__.startswith("training."):  # it says all there is to say
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
    fit(config, expanded(options.resume), options.accept_changes, stop)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's exit. A rank that failed would wait there for peers that are stuck in a collective;
    # one that ended well may be aborted there (SIGABRT), where a thread of gloo lets go of its last tensors (pytorch
    # #179291): DeepSpeed's groups keep such threads after they are destroyed.
    os._exit(status)
