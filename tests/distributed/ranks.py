"""Real ranks for tests: starts processes with their own rendezvous and kills them at a deadline."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ports import free_port
from warm import SOURCE, Program, Warm, environment

__all__ = ["SOURCE", "checked", "environment", "kill_ranks_when", "run_command", "run_ranks"]

WARM = Warm("training.checkpoints.export", "training.fit", "transformers.models.llama.modeling_llama")


def run_ranks(
    program: Sequence[str], world_size: int, timeout: float = 400, extra: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """`python PROGRAM` as `world_size` ranks; their exit statuses and output. Kills all at the deadline."""
    return WARM.run_together([program] * world_size, _rank_variables(world_size, extra), timeout)


def run_command(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """`crosslift ARGUMENTS` by a process that has imported what ranks import."""
    return WARM.run(["crosslift.py", *map(str, arguments)], environment(), timeout)


def kill_ranks_when(due: Callable[[], bool], program: Sequence[str], world_size: int, log: Path) -> None:
    """Run `python PROGRAM` as ranks until `due()`; then SIGKILL the last one and, as a launcher would, the others."""
    started: list[int] = []
    deadline = time.monotonic() + 200
    try:
        for rank, variables in enumerate(_rank_variables(world_size)):
            started.append(WARM.start(Program(program, variables, *[log.with_suffix(f".{rank}")] * 2)))
        while not due():
            assert time.monotonic() < deadline, "the ranks were not due to be killed in time"
            assert all(WARM.status(each, 0.02) is None for each in started), "the run ended before it was killed"
    finally:
        for each in reversed(started):
            WARM.kill(each)


def _rank_variables(world_size: int, extra: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """Environment variables of each rank, with a free rendezvous port."""
    port = free_port()
    return [
        environment({
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(extra or {}),
        })
        for rank in range(world_size)
    ]  # fmt: skip


def checked(results: Sequence[subprocess.CompletedProcess[str]]) -> None:
    """Assert that all ranks ended with status 0; their errors are the message."""
    failed = [f"rank {rank}: {each.returncode}\n{each.stderr[-3000:]}" for rank, each in enumerate(results)]
    assert all(each.returncode == 0 for each in results), "\n".join(failed)
