"""Loss arithmetic over a whole step and the learning-rate schedule: pure functions.

A step's loss is a weighted sum of terms (SFT, contrastive; target, source, consistency), and each term is a sum
over the step divided by that term's own global denominator: label tokens, pairs (docs/methods.md, section 4). A
micro-batch contributes its share of each, so gradients do not depend on how the batch is split over micro-batches
and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from training.config import ScheduleConfig
from training.objectives.base import LossTerm


def denominator(counts: Mapping[str, int], name: str) -> int:
    """The count that a term's sums are divided by; 1 if it is 0 in the whole step."""
    return max(counts[name], 1)


def step_loss_share(terms: Mapping[str, LossTerm], counts: Mapping[str, int]) -> Tensor:
    """One micro-batch's share of the step's loss, `sum of weight * sum / denominator` over the terms, a scalar.

    Args:
        counts: label tokens, pairs, ... of the whole step, on all ranks.
    """
    shares = [term.weight * term.sum / denominator(counts, term.denominator) for term in terms.values()]
    return sum(shares[1:], start=shares[0])


def learning_rate(step: int, max_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of step `step` (0-based), a pure function, so that checkpoints need no scheduler state."""
    warmup = round(schedule.warmup_ratio * max_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    progress = (step - warmup) / max(max_steps - warmup, 1)
    shape = 1 - progress if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * shape)
