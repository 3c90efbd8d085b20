"""Token-weighted loss arithmetic and the learning-rate schedule: pure functions.

In: sums over one micro-batch, counts over the whole step. Out: the number that goes into backward.
Next: `objectives.py` and `trainer.py`.

The loss of a step is a sum over tokens divided by the step's global number of label tokens; the contrastive
term has its own global denominator, the step's pairs (design, decision 4). A micro-batch contributes its share
of both, so gradients do not depend on how the batch is split over micro-batches and ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from training.config import ScheduleConfig


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What all ranks agree on before the first forward of a step."""

    label_tokens: int
    pairs: int
    micro_batches: int  # the largest number any rank has


def step_loss_share(
    token_loss_sum: Tensor,
    contrastive_sum: Tensor | None,
    totals: StepTotals,
    sft_weight: float,
    contrastive_weight: float,
) -> Tensor:
    """One micro-batch's share of `a * SFT + b * contrastive` (methods.md, step 7), a scalar.

    A step without labels (or pairs) on any rank divides a zero sum by one.
    """
    share = sft_weight * token_loss_sum / max(totals.label_tokens, 1)
    if contrastive_sum is not None:
        share = share + contrastive_weight * contrastive_sum / max(totals.pairs, 1)
    return share


def learning_rate(step: int, max_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of step `step` (0-based): a pure function, so nothing of it needs to be saved."""
    warmup = round(schedule.warmup_ratio * max_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    progress = (step - warmup) / max(max_steps - warmup, 1)
    shape = 1 - progress if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * shape)
