"""`--profile N`: a trace of some steps of rank 0 by torch's profiler, for Perfetto (ui.perfetto.dev) or chrome://tracing.

The trace's ranges are the phases that the heartbeat reports: "waiting for data", "agreeing on the step", "forward 1",
"backward", "all-reduce", "update". A range lasts until the next phase begins, so the loss is in the range of its
forward pass. Without `--profile`, nothing is recorded and nothing is slower.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from training.distributed import rank
from training.launch.heartbeat import WAITING_FOR_DATA, heartbeat

log = logging.getLogger(__name__)
UNSEEN_STEPS = 1  # of a start: its first step also runs checks
WARM_UP_STEPS = 1  # profiled, but not written: the profiler's own start


@contextmanager
def profiled_steps(steps: int, output_dir: Path, start: int) -> Iterator[None]:
    """Context of a training from step `start` of which `steps` steps are profiled, on rank 0; 0: none.

    The trace is written when they are done, or when training ends before.
    """
    if not steps or rank() != 0:
        yield
        return
    first = start + UNSEEN_STEPS + WARM_UP_STEPS + 1
    recorder = _Recorder(steps, output_dir / "profile", first)
    heartbeat.listener = recorder.phase
    try:
        yield
    finally:
        heartbeat.listener = None
        recorder.end()


class _Recorder:
    """Follows the phases of the loop, and starts and ends torch's profiler with its steps."""

    def __init__(self, steps: int, folder: Path, first: int) -> None:
        self._folder, self._first, self._left = folder, first, UNSEEN_STEPS + WARM_UP_STEPS + steps
        self._written = False
        self._range: record_function | None = None
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # its lines about its own start and end
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = profile(
            activities=activities,
            schedule=schedule(skip_first=UNSEEN_STEPS, wait=0, warmup=WARM_UP_STEPS, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()
        self._step: int | None = None  # the heartbeat's

    def phase(self, name: str) -> None:
        """The phase `name` begins, and with the first "waiting for data" of a step that step."""
        if self._profile is None:
            return
        self._end_range()
        if name == WAITING_FOR_DATA and heartbeat.step != self._step:
            if self._step is not None:
                self._profile.step()
                self._left -= 1
            self._step = heartbeat.step
        if not self._left:
            self.end()
            return
        self._range = record_function(name)
        self._range.__enter__()

    def end(self) -> None:
        """Ends the profile, and writes the trace if that is not done."""
        if self._profile is None:
            return
        self._end_range()
        ended, self._profile = self._profile, None
        ended.stop()
        if not self._written:
            log.warning("--profile: training ended before step %d, the first that is profiled", self._first)

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _write(self, ended: profile) -> None:
        self._written = True
        path = self._folder / f"from-step-{self._first}.json.gz"
        part = self._folder / "part.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            ended.export_chrome_trace(str(part))
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # such as a full disk
            log.warning("--profile: %s could not be written: %s", path, error)
            return
        log.info("profile of rank 0 from step %d: %s; ui.perfetto.dev opens it", self._first, path)
