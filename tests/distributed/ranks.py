"""Real ranks for tests: starts processes with a rendezvous of their own, and never waits for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]


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
    processes = []
    for rank in range(world_size):
        place = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, *program],
                env=environment({**place, **(extra or {})}),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=SOURCE,
            )
        )

    def end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    try:
        with ThreadPoolExecutor(world_size) as pool:  # all are read at once: one whose pipe is full would wait for ever
            return list(pool.map(end, processes))
    except subprocess.TimeoutExpired as expired:
        raise AssertionError(f"ranks still hang after {timeout} s: {program}") from expired
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def checked(results: Sequence[subprocess.CompletedProcess[str]]) -> None:
    """All ranks ended well, or their errors as the assertion's message."""
    failed = [f"rank {rank}: {each.returncode}\n{each.stderr[-3000:]}" for rank, each in enumerate(results)]
    assert all(each.returncode == 0 for each in results), "\n".join(failed)
