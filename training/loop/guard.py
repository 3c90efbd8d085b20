"""What becomes of a step whose loss leaps or is no number: stop, skip its update, or roll back; bounded and logged.

In: the step's loss, which is the same on every rank. Out: a Verdict. Next: `trainer.py` acts on it.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field

from data_pipeline.settings import Section

Policy = Literal["stop", "skip", "rollback"]
LEAST_HISTORY = 8  # steps before a loss can be called a leap


class GuardConfig(Section):
    """The `guard:` section of the run file."""

    non_finite: Policy = Field(
        "stop", description="a loss or gradient that is no number: stop; skip the update; or roll back to the last "
        "checkpoint and leave out the data since then"
    )  # fmt: skip
    spike: Literal["off", "stop", "skip", "rollback"] = Field("off", description="the same for a loss that leaps")
    spike_factor: float = Field(3.0, gt=1, description="a leap is this many times the median of the last steps")
    spike_window: int = Field(50, ge=LEAST_HISTORY, description="how many last steps that median is of")
    max_events: int = Field(5, ge=1, description="updates skipped and roll-backs in all; one more stops the run")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a step, and why."""

    policy: Policy
    what: str  # "loss is not finite", "loss 9.1 is 4.2 times the median of the last 50 steps"


class Guard:
    """Judges steps; its memory is saved with every checkpoint, so that a resumed run judges alike."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.events = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, loss: float) -> Verdict | None:
        """What to do about a step of this mean loss; None: go on. To be called once a step, before its update."""
        if not math.isfinite(loss):
            return self.not_finite("loss")
        usual = median(self._losses) if len(self._losses) >= LEAST_HISTORY else math.inf
        if self.config.spike != "off" and usual > 0 and loss > self.config.spike_factor * usual:
            what = f"loss {loss:.3g} is {loss / usual:.1f} times the median of the last {len(self._losses)} steps"
            return self._bounded(self.config.spike, what)
        self._losses.append(loss)
        return None

    def not_finite(self, what: str) -> Verdict:
        """What to do about a step whose loss or gradient is no number."""
        return self._bounded(self.config.non_finite, f"{what} is not finite")

    def state(self) -> dict[str, Any]:
        """What a resume has to know."""
        return {"events": self.events, "losses": list(self._losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.events = int(state.get("events", 0))
        self._losses = deque(state.get("losses", ()), maxlen=self.config.spike_window)

    def _bounded(self, policy: Policy, what: str) -> Verdict:
        if policy != "stop" and self.events >= self.config.max_events:
            return Verdict("stop", f"{what}, and guard.max_events={self.config.max_events} were used up before")
        self.events += policy != "stop"
        return Verdict(policy, what)


def list_samples(output_dir: Path, step: int, verdict: Verdict, by_rank: Mapping[int, Sequence[str]]) -> str:
    """Write the ids of all samples of a step (from 1) without an update; for people: where they are, or why not."""
    file = output_dir / f"{'not-finite' if 'finite' in verdict.what else 'spike'}-step-{step}.json"
    try:
        file.write_text(json.dumps({"step": step, "what": verdict.what, "sample_ids": by_rank}, indent=1))
    except OSError as error:
        return f"not listed in {file}: {error.strerror}"
    return f"all of them in {file}"


def shown(by_rank: Mapping[int, Sequence[str]]) -> str:
    """The first of them, by rank."""
    return "; ".join(
        f"rank {number}: {', '.join(ids[:8])}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"
        for number, ids in by_rank.items()
    )
