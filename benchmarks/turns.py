"""Systems that are compared, each in ranks of its own, alive at the same time; one runs while the others wait.

Every system has its own processes, so its peak memory is its own and two trainers share no state of a library. The
parent hands out turns over a TCPStore; a waiting rank blocks on its socket and takes no CPU time.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

STORE = "CROSSLIFT_TURNS"  # port of the parent's store
TURN_TIMEOUT = timedelta(hours=1)
POLL_SECONDS = 0.05
IDLE_SECONDS = 0.3  # between turns: background threads of the last system come to rest


class Turns:
    """A rank's side: `begin` waits for its turn, `end` reports on it."""

    def __init__(self, system: str) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", int(os.environ[STORE]), is_master=False, timeout=TURN_TIMEOUT)
        self._system = system
        self._turn = 0
        self._wall = self._cpu = 0.0

    def begin(self) -> None:
        self._store.wait([f"{self._system}/{self._turn}"], TURN_TIMEOUT)
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        if self._turn == 1:  # after the unmeasured turn
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def end(self, **figures: float) -> None:
        """Reports the turn's figures with its seconds, CPU time and the peak memory so far."""
        figures |= {"wall_seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}
        figures["peak_bytes"] = peak_bytes()
        ctypes.CDLL(None).malloc_trim(0)  # the systems' freed memory together would exceed the machine's
        self._store.set(f"{self._system}/{self._turn}/{os.environ['RANK']}", json.dumps(figures))
        self._turn += 1


def peak_bytes() -> int:
    """Peak resident memory of this process since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def take_turns(commands: Mapping[str, Sequence[str]], nproc: int, rounds: int) -> dict[str, list[list[dict[str, Any]]]]:
    """Starts every system and gives each one turn a round, in rotating order; round 0 is not measured.

    Args:
        commands: by system, the command that starts its ranks.

    Returns:
        By system, for each measured round, the figures of each rank.

    Raises:
        RuntimeError: a system ended before its last turn.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**os.environ, STORE: str(store.port)}
    running = {name: subprocess.Popen(command, env=environment) for name, command in commands.items()}
    names = list(commands)
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    try:
        for number in range(rounds + 1):
            for place in range(len(names)):
                name = names[(place + number) % len(names)]
                store.set(f"{name}/{number}", "go")
                keys = [f"{name}/{number}/{rank}" for rank in range(nproc)]
                while not store.check(keys):
                    time.sleep(POLL_SECONDS)
                    if running[name].poll() is not None and not store.check(keys):
                        raise RuntimeError(f"{name} ended in round {number} with status {running[name].returncode}")
                found[name].append([json.loads(store.get(key)) for key in keys])
                seconds = max(each["wall_seconds"] for each in found[name][-1])
                print(f"round {number}: {name} {seconds:.2f} s", file=sys.stderr, flush=True)
                time.sleep(IDLE_SECONDS)
        for name, process in running.items():
            if process.wait(timeout=120):
                raise RuntimeError(f"{name} ended with status {process.returncode}")
    finally:
        for process in running.values():
            process.terminate()
    return {name: turns[1:] for name, turns in found.items()}
