"""Real ranks for tests: starts processes with a rendezvous of their own, and never waits for ever.

Most of a small rank's life is importing. Ranks are therefore forked from a server that has torch, transformers and
DeepSpeed imported already, once for all tests of a file: processes of their own, with their own place in the run.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

SOURCE = Path(__file__).resolve().parents[2]
_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(["training.export", "training.fit", "transformers.models.llama.modeling_llama"])


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with the source and `tests/tiny_run.py` first on the path and one thread a rank."""
    path = os.pathsep.join([str(SOURCE), str(SOURCE / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(extra or {})}


def run_ranks(
    program: Sequence[str], world_size: int, timeout: float = 400, extra: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """`python PROGRAM` as `world_size` ranks; their exit statuses and output. Kills all at the deadline."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with patch.dict(os.environ, environment()):
        forkserver.ensure_running()
    processes = []
    with TemporaryDirectory() as temporary:
        files = [(Path(temporary, f"{rank}.out"), Path(temporary, f"{rank}.err")) for rank in range(world_size)]
        for rank, (out, err) in enumerate(files):
            place = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            process = _WARM.Process(target=_be_rank, args=(program, environment({**place, **(extra or {})}), out, err))
            process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(max(deadline - time.monotonic(), 0))
            assert all(each.exitcode is not None for each in processes), (
                f"ranks still hang after {timeout} s: {program}"
            )
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            subprocess.CompletedProcess(list(program), process.exitcode or 0, out.read_text(), err.read_text())
            for process, (out, err) in zip(processes, files, strict=True)
        ]


def _be_rank(program: Sequence[str], variables: Mapping[str, str], out: Path, err: Path) -> None:
    """In the forked process: `python PROGRAM` with these variables and outputs, in the source's folder."""
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(SOURCE)
    kind, *arguments = program
    code = arguments.pop(0) if kind in ("-m", "-c") else kind
    sys.argv = [kind if kind == "-c" else code, *arguments]
    sys.path[0:0] = variables["PYTHONPATH"].split(os.pathsep)[:2]
    torch.set_num_threads(1)  # torch read OMP_NUM_THREADS when it was imported
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(code).parent))
        runpy.run_path(code, run_name="__main__")


def checked(results: Sequence[subprocess.CompletedProcess[str]]) -> None:
    """All ranks ended well, or their errors as the assertion's message."""
    failed = [f"rank {rank}: {each.returncode}\n{each.stderr[-3000:]}" for rank, each in enumerate(results)]
    assert all(each.returncode == 0 for each in results), "\n".join(failed)
