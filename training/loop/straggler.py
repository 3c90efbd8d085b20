"""Straggler detection: finds and names the rank that slows down all others.

Sharded training makes a collective call in every layer, so all ranks take the same time per step, that of the slowest.
Two measurements tell the ranks apart. First, a fixed matrix product without communication, timed once a step (under a
millisecond); the median over many steps is compared, because a single time mostly reflects other load on the machine.
On a GPU, the times are events in its queue, which are read once they have passed: nothing waits for the device.
Second, the seconds that a rank waited for its own data: the others wait as long in the next collective call. The matrix
product draws no random numbers and touches no weights.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections import deque

import torch

from training.distributed import gather_objects, rank, world_size

log = logging.getLogger(__name__)
SLOW_FACTOR = 1.5  # of the median rank's time
WINDOW_STEPS = 50  # minimum number of steps over which the median is taken
MIN_STEPS = 10  # fewer steps give no warning
MATRIX_SIZES = {"cpu": 192, "cuda": 4096}  # a fraction of a millisecond


class StragglerMonitor:
    """Compares the speed of the ranks at intervals; every rank calls it after every step."""

    def __init__(self, every: int, device: torch.device) -> None:
        """`every`: steps between two comparisons; 0: none."""
        self.every = every if world_size() > 1 else 0
        self._device = device
        self._waited: list[float] = []
        self._probes: deque[float] = deque(maxlen=max(self.every, WINDOW_STEPS))
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # begin and end; not read yet
        size = MATRIX_SIZES[device.type]
        values = torch.linspace(-1, 1, size * size, device=device).reshape(size, size) if self.every else None
        self._matrix = values if device.type == "cpu" or values is None else values.bfloat16()

    def after_step(self, done: int, waited: float) -> dict[str, float]:
        """Metrics after `done` steps; empty if no comparison is due.

        Args:
            waited: seconds that this rank waited for the data of the last step.
        """
        if not self.every:
            return {}
        self._waited.append(waited)
        self._probe()
        if done % self.every:
            return {}
        if not self._probes:  # the first of all: the other ranks may have theirs
            self._events[0][1].synchronize()
            self._read_events()
        own = (statistics.median(self._probes), statistics.fmean(self._waited), socket.gethostname())
        metrics, warnings = compare(gather_objects(own))
        self._waited.clear()
        for line in warnings if rank() == 0 and len(self._probes) >= MIN_STEPS else ():
            log.warning("step %d: %s", done, line)
        return metrics

    def _probe(self) -> None:
        """Times a fixed matrix product on this rank, after one that wakes a core or loads a kernel."""
        assert self._matrix is not None
        torch.mm(self._matrix, self._matrix)
        if self._device.type != "cuda":
            started = time.perf_counter()
            torch.mm(self._matrix, self._matrix)
            self._probes.append(time.perf_counter() - started)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(self._matrix, self._matrix)
        end.record()
        self._events.append((begin, end))
        self._read_events()

    def _read_events(self) -> None:
        """Keeps the times of the events that the device has passed."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._probes.append(begin.elapsed_time(end) / 1000)


def compare(ranks: list[tuple[float, float, str]]) -> tuple[dict[str, float], list[str]]:
    """Metrics and warnings from every rank's (median probe seconds, mean seconds waited for data, host).

    The median is the lower one, so that of two ranks the slow one is compared with the other.
    """
    probes = [probe for probe, _, _ in ranks]
    waits = [wait for _, wait, _ in ranks]
    slowest = max(range(len(ranks)), key=probes.__getitem__)
    slowdown = probes[slowest] / max(statistics.median_low(probes), 1e-9)
    metrics = {
        "ranks/slowest": float(slowest),
        "ranks/slowdown": slowdown,
        "ranks/data_wait_seconds_max": max(waits),
        "ranks/data_wait_seconds_median": statistics.median_low(waits),
    }
    warnings = []
    if slowdown > SLOW_FACTOR:
        factor = f"{slowdown:.1f} times as slowly as the median rank"
        warnings.append(f"rank {slowest} on {ranks[slowest][2]} computes {factor}; all wait for it")
    return metrics, warnings
