"""Names of the metrics that a run records at every checkpoint: `checkpoint.best` must be one of them.

A test compares them with a real run's record.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from training.objectives.base import ObjectiveConfig

_OF_EVERY_STEP = (
    "train/loss", "train/grad_norm", "train/learning_rate", "train/step_seconds", "train/tokens_per_second",
    "data/wait_seconds", "data/overlong", "data/dropped_pairs", "data/step_fingerprint",
    "memory/host_peak_gib", "memory/gpu_peak_gib",
)  # fmt: skip
_BY_LANGUAGE = ("train/loss", "train/token_share", "data/slot_share", "data/label_share")


def metric_names(objective: ObjectiveConfig, languages: Sequence[str], swapped_prompts: bool) -> list[str]:
    """Names of the held-out losses and of the metrics that every step has.

    Metrics of some steps only, such as those after a refresh of the shift, are excluded.
    """
    held_out = ["eval/loss", *(["eval/loss_swapped"] if swapped_prompts else [])]
    return [
        *held_out,
        *_OF_EVERY_STEP,
        *(f"train/{term}" for term in objective.terms if term != "sft"),  # which is train/loss
        *(f"{name}/{language}" for name in (*held_out, *_BY_LANGUAGE) for language in languages),
    ]


def unknown_metric(best: str, names: Sequence[str]) -> str:
    """The message about a `checkpoint.best` that is not among `names`."""
    near = difflib.get_close_matches(best, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "such as 'eval/loss', or 'eval/loss/' and a language"
    return f"'checkpoint.best' is {best!r}, which this run does not measure at its checkpoints; {hint}"
