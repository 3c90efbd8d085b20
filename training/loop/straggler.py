"""A rank that is slow, and therefore makes all others slow: seen and named.

In: a step's end, and how long this rank waited for its data. Out: `ranks/*` metrics, a warning with rank and host.
Next: `trainer.py` puts them into the record, and MLflow shows them.

Under ZeRO-3 every layer is a collective call, so the ranks' step times are all the slowest one's and tell nothing.
What a rank does alone tells: a fixed computation that talks to nobody, timed once a step (under a millisecond), of
which the median over many steps is compared: one alone mostly shows what else the machine did at that moment. And
the seconds that a rank waited for its own data, since the others wait just as long in the next all-reduce. The
computation draws no random number and touches no weight.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections import deque

import torch

from training.distributed import gather_objects, rank, world_size
from training.launch.watchdog import WatchdogConfig

log = logging.getLogger(__name__)
SLOW = 1.5  # times the median rank's time
REMEMBERED = 50  # steps, at least, that the median is taken over
FEWEST = 10  # steps without which nobody is called slow
SIZES = {"cpu": 192, "cuda": 4096}  # rows and columns: a fraction of a millisecond


class Stragglers:
    """Compares the ranks' speed every so many steps; every rank calls it at the same steps."""

    def __init__(self, config: WatchdogConfig, device: torch.device) -> None:
        self.every = config.straggler_every if world_size() > 1 else 0
        self._device = device
        self._waited: list[float] = []
        self._probes: deque[float] = deque(maxlen=max(self.every, REMEMBERED))
        size = SIZES[device.type]
        values = torch.linspace(-1, 1, size * size, device=device).reshape(size, size) if self.every else None
        self._matrix = values if device.type == "cpu" or values is None else values.bfloat16()

    def after(self, done: int, waited: float) -> dict[str, float]:
        """Metrics after `done` steps, the last of which waited `waited` seconds for data; empty where none are due."""
        if not self.every:
            return {}
        self._waited.append(waited)
        self._probes.append(self._probe())
        if done % self.every:
            return {}
        mine = (statistics.median(self._probes), statistics.fmean(self._waited), socket.gethostname())
        metrics, warnings = compare(gather_objects(mine))
        self._waited.clear()
        for line in warnings if rank() == 0 and len(self._probes) >= FEWEST else ():
            log.warning("step %d: %s", done, line)
        return metrics

    def _probe(self) -> float:
        """Seconds of a fixed matrix product, on this rank alone."""
        assert self._matrix is not None
        torch.mm(self._matrix, self._matrix)  # wakes a core, loads a kernel
        self._settle()
        started = time.perf_counter()
        torch.mm(self._matrix, self._matrix)
        self._settle()
        return time.perf_counter() - started

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def compare(told: list[tuple[float, float, str]]) -> tuple[dict[str, float], list[str]]:
    """Metrics and warnings of every rank's (median probe seconds, mean seconds waited for data, host).

    The median is the lower one, so that of two ranks the slow one is measured against the other.
    """
    probes = [probe for probe, _, _ in told]
    waits = [wait for _, wait, _ in told]
    slowest = max(range(len(told)), key=probes.__getitem__)
    slowdown = probes[slowest] / max(statistics.median_low(probes), 1e-9)
    metrics = {
        "ranks/slowest": float(slowest),
        "ranks/slowdown": slowdown,
        "ranks/data_wait_seconds_max": max(waits),
        "ranks/data_wait_seconds_median": statistics.median_low(waits),
    }
    warnings = []
    if slowdown > SLOW:
        times = f"{slowdown:.1f} times as slowly as the median rank"
        warnings.append(f"rank {slowest} on {told[slowest][2]} computes {times}; all wait for it")
    return metrics, warnings
