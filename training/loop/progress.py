"""What a person sees of a run: a progress bar at a terminal, about twenty lines in a log.

In: a step's metrics. Out: text on stderr, on rank 0. Next: the reader.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from tqdm import tqdm

from training.launch.logs import terminal

log = logging.getLogger(__name__)
SHOWN = {
    "loss": ("train/loss", ".3f"), "tok/s": ("train/tokens_per_second", ".0f"),
    "contrastive": ("train/contrastive", ".3f"), "held-out": ("eval/loss", ".3f"),
}  # fmt: skip
LINES = 20


class Progress:
    """A bar where stderr is a terminal; else a line now and then."""

    def __init__(self, start: int, max_steps: int, shown: bool) -> None:
        self.max_steps = max_steps
        self.shown = shown
        self._bar = tqdm(
            total=max_steps, initial=start, unit="step", dynamic_ncols=True, file=terminal(),
            disable=not (shown and terminal().isatty()),
        )  # fmt: skip

    def step_done(self, done: int, metrics: Mapping[str, float]) -> None:
        """`done` steps are finished, the last of them with these metrics; fewer than before after a roll-back."""
        if not self.shown:
            return
        brief = {name: format(metrics[key], form) for name, (key, form) in SHOWN.items() if key in metrics}
        self._bar.update(done - self._bar.n)
        self._bar.set_postfix(brief)
        every = max(self.max_steps // LINES, 1)
        if self._bar.disable and (done % every == 0 or "held-out" in brief or done == self.max_steps):
            log.info(
                "step %d/%d  %s", done, self.max_steps, "  ".join(f"{name} {text}" for name, text in brief.items())
            )

    def close(self) -> None:
        self._bar.close()
