"""The guard: decides whether to stop, skip the update or roll back after a loss spike or a NaN.

The decision depends on the step's loss, which is equal on all ranks; `trainer.py` executes it.
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
LEAST_HISTORY = 8  # steps before a loss can be judged a spike


class GuardConfig(Section):
    """The `guard:` section of the run file."""

    non_finite: Policy = Field(
        "stop", description="for a NaN or infinite loss or gradient: stop; skip the update; or roll back to the last "
        "checkpoint and skip the data since then"
    )  # fmt: skip
    spike: Literal["off", "stop", "skip", "rollback"] = Field(
        "off", description="the same for a loss spike. Costs one more all-reduce in each step, and a wait for the "
        "device before the update, where DeepSpeed itself waits for the gradient norm"
    )  # fmt: skip
    spike_factor: float = Field(3.0, gt=1, description="a spike exceeds the median of the last steps by this factor")
    spike_window: int = Field(50, ge=LEAST_HISTORY, description="number of last steps over which the median is taken")
    max_events: int = Field(5, ge=1, description="limit of skipped updates and rollbacks; one more stops the run")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The policy to apply to a step, and the reason."""

    policy: Policy
    what: str  # "loss is not finite", "loss 9.1 is 4.2 times the median of the last 50 steps"


class Guard:
    """Judges steps. Its state is saved with every checkpoint, so that a resumed run makes the same decisions."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.events = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, loss: float) -> Verdict | None:
        """The verdict on a step with this mean loss; None: update. Called once per step, before its update."""
        if not math.isfinite(loss):
            return self.not_finite("loss")
        usual = median(self._losses) if len(self._losses) >= LEAST_HISTORY else math.inf
        if self.config.spike != "off" and usual > 0 and loss > self.config.spike_factor * usual:
            what = f"loss {loss:.3g} is {loss / usual:.1f} times the median of the last {len(self._losses)} steps"
            return self._bounded(self.config.spike, what)
        self.record(loss)
        return None

    @property
    def needs_loss(self) -> bool:
        """Whether an update waits for the verdict on the step's loss (`judge`); otherwise `record` is called later."""
        return self.config.spike != "off"

    def record(self, loss: float) -> None:
        """Adds a finite loss to the history from which spikes are judged."""
        self._losses.append(loss)

    def not_finite(self, what: str) -> Verdict:
        """The verdict on a step whose loss or gradient is NaN or infinite."""
        return self._bounded(self.config.non_finite, f"{what} is not finite")

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return {"events": self.events, "losses": list(self._losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the state of a checkpoint."""
        self.events = int(state.get("events", 0))
        self._losses = deque(state.get("losses", ()), maxlen=self.config.spike_window)

    def _bounded(self, policy: Policy, what: str) -> Verdict:
        if policy != "stop" and self.events >= self.config.max_events:
            return Verdict("stop", f"{what}, and guard.max_events={self.config.max_events} were used up")
        self.events += policy != "stop"
        return Verdict(policy, what)


def list_samples(output_dir: Path, step: int, verdict: Verdict, by_rank: Mapping[int, Sequence[str]]) -> str:
    """Writes the ids of all samples of a step (from 1) without an update; returns the place for a message."""
    file = output_dir / f"{'not-finite' if 'finite' in verdict.what else 'spike'}-step-{step}.json"
    try:
        file.write_text(json.dumps({"step": step, "what": verdict.what, "sample_ids": by_rank}, indent=1))
    except OSError as error:
        return f"not listed in {file}: {error.strerror}"
    return f"all of them in {file}"


def shown(by_rank: Mapping[int, Sequence[str]]) -> str:
    """The first sample ids of each rank, as text."""
    return "; ".join(
        f"rank {number}: {', '.join(ids[:8])}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"
        for number, ids in by_rank.items()
    )
