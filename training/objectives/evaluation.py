"""Held-out loss per language during training.

The metrics are `eval/loss/<language>` and, with `evaluation.swapped_prompts`, `eval/loss_swapped/<language>`: the loss
of the same answers after the prompt of another item, which is higher for a model that uses the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_pipeline.batching.batch import Batch
from data_pipeline.batching.packer import Packer
from data_pipeline.loader import ThisRank, fixed_batches
from data_pipeline.reader import Reader
from data_pipeline.records import DataError, Sample, Split
from training.config import EvaluationConfig
from training.distributed import all_sum
from training.engine.engine import Engine
from training.errors import ConfigError
from training.objectives.base import Objective


class HeldOut:
    """A fixed held-out set, packed once, split over ranks."""

    def __init__(self, reader: Reader, packer: Packer, config: EvaluationConfig, this_rank: ThisRank) -> None:
        """Raises ConfigError or DataError if a language has no held-out sample that is usable and not too long."""
        self.languages = reader.index.languages
        chosen = [_choose(reader, number, config.items) for number in range(len(self.languages))]
        sets = {"loss": [sample for _, of_language in chosen for sample in of_language]}
        if config.swapped_prompts:
            records = [[reader.index.record(row) for row in rows] for rows, _ in chosen]
            sets["loss_swapped"] = [sample for each in records for sample in reader.stage.swapped_prompts(each)]
        self.sets = {name: fixed_batches(samples, packer, this_rank) for name, samples in sets.items()}

    def metrics(self, engine: Engine, objective: Objective) -> dict[str, float]:
        """`eval/loss/<language>` in nats per label token, and their unweighted mean `eval/loss`."""
        return {
            f"eval/{name}{suffix}": value
            for name, batches in self.sets.items()
            for suffix, value in self._losses(engine, objective, batches).items()
        }

    def _losses(self, engine: Engine, objective: Objective, batches: Sequence[Batch[Any]]) -> dict[str, float]:
        n_languages = len(self.languages)
        sums = torch.zeros(2, n_languages, dtype=torch.float64, device=engine.device)
        with engine.evaluating():
            for batch in batches:
                on_device = batch.to(engine.device)
                terms = objective.loss_terms(engine, on_device)
                sums[0].index_add_(0, terms.label_languages, terms.label_losses.double())
                sums[1].index_add_(0, terms.label_languages, terms.label_weights.double())
        totals, tokens = all_sum(sums, engine.device)
        means = (totals / tokens.clamp(min=1)).tolist()
        each = {f"/{language}": mean for language, mean in zip(self.languages, means, strict=True)}
        return {"": float(np.mean(means)), **each}


def _choose(reader: Reader, language: int, items: int) -> tuple[list[int], list[Sample]]:
    """The first held-out rows of a language that are usable and not too long, and their samples."""
    rows = reader.index.rows(language, Split.HELD_OUT)
    usable = [int(row) for row in rows if not reader.index.bad[row]]
    found = reader.readable(usable[: 4 * items])
    if not found.rows and found.bad:
        raise DataError(
            f"{found.bad[0]} (none of the held-out rows looked at in language {reader.index.languages[language]!r} is "
            "usable)"
        )
    if not found.rows:
        raise ConfigError(
            f"data.heldout_items: none of them in {reader.index.languages[language]!r} has a usable sample within "
            "data.sequence_length; hold out more items"
        )
    return found.rows[:items], found.samples[:items]
