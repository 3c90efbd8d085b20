"""Progress of training: a bar at a terminal, about twenty lines in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from data_pipeline.console import Progress, duration

log = logging.getLogger(__name__)
SHOWN = {
    "loss": ("train/loss", ".3f"), "tok/s": ("train/tokens_per_second", ".0f"),
    "contrastive": ("train/contrastive", ".3f"), "held-out": ("eval/loss", ".3f"),
}  # fmt: skip
LINES = 20


class TrainingProgress(Progress):
    """Shows steps and some metrics. In a log, lines depend on the step and not on time, so that runs are comparable."""

    def __init__(self, start: int, max_steps: int, shown: bool) -> None:
        super().__init__("training", max_steps, "steps", start=start, shown=shown)
        self.max_steps = max_steps
        self.shown = shown
        self._steps = 0  # done in this start, those before a rollback included
        self._first_end = 0.0  # when the first of them ended, which takes longer than the others
        self._details = ""  # of the last step that logged
        self._line = start // self._every

    @property
    def _every(self) -> int:
        return max(self.max_steps // LINES, 1)

    def step_done(self, done: int, metrics: Mapping[str, float]) -> None:
        """Reports that `done` steps are finished, with the metrics that were logged, if any.

        A line is written by the first step that logs of each twentieth of the run. `done` decreases after a rollback.
        """
        brief = {name: format(metrics[key], form) for name, (key, form) in SHOWN.items() if key in metrics}
        logged = "loss" in brief
        if logged:
            self._details = "  ".join(f"{name} {text}" for name, text in brief.items())
        if self.is_bar:
            self.update(done, self._details)
            return
        now = time.monotonic()
        self._first_end = self._first_end or now
        if logged and self.shown:
            line, self._line = self._line, done // self._every
            if self._line != line or "held-out" in brief or done == self.max_steps:
                left = ""
                if self._steps and done < self.max_steps:
                    mean = (now - self._first_end) / self._steps  # with evaluations and checkpoints
                    left = f"  left {duration(mean * (self.max_steps - done))}"
                log.info("step %d/%d  %s%s", done, self.max_steps, self._details, left)
        self._steps += 1
