"""Held-out loss per language during training.

In: the held-out items of the index. Out: `eval/loss/<language>`, and with `evaluation.swapped_prompts`
`eval/loss_swapped/<language>`: the loss of the same answers behind another item's prompt. A model that reads
the question does worse on those. Next: `trainer.py` logs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from data_pipeline.loader import SampleReader, fixed_batches, shared_batches
from data_pipeline.packing import MicroBatch, Packer
from data_pipeline.records import DataError, TokenizedSample
from data_pipeline.tasks.batches import TaskBatch, TaskPacker
from data_pipeline.tasks.reader import TaskReader
from training.config import EvaluationConfig
from training.distributed import all_sum
from training.engine.engine import Engine
from training.errors import ConfigError
from training.objectives.decoders import Objective


class HeldOut:
    """A fixed held-out set, packed once, split over ranks."""

    def __init__(
        self,
        reader: SampleReader | TaskReader,
        packer: Packer | TaskPacker,
        config: EvaluationConfig,
        rank: int,
        world_size: int,
    ) -> None:
        """Raises ConfigError or DataError where a language has no held-out sample that fits, or is usable."""
        self.languages = reader.index.languages
        chosen = [_choose(reader, number, config.items) for number in range(len(self.languages))]
        samples: list[Any] = [sample for _, of_language in chosen for sample in of_language]
        self.sets: dict[str, Sequence[MicroBatch | TaskBatch]] = {}
        if isinstance(packer, TaskPacker):
            batches: list[TaskBatch] = shared_batches(samples, packer, rank, world_size)
            self.sets["loss"] = batches
            return
        self.sets["loss"] = fixed_batches(samples, packer, rank, world_size)
        if config.swapped_prompts:
            assert isinstance(reader, SampleReader)  # a packer of conversations comes with their reader
            swapped = [sample for rows, _ in chosen for sample in _swapped_prompts(reader, rows)]
            self.sets["loss_swapped"] = fixed_batches(swapped, packer, rank, world_size)

    def metrics(self, engine: Engine, objective: Objective) -> dict[str, float]:
        """`eval/loss/<language>` in nats per label token, and their unweighted mean `eval/loss`."""
        return {
            f"eval/{name}{suffix}": value
            for name, batches in self.sets.items()
            for suffix, value in self._losses(engine, objective, batches).items()
        }

    def _losses(
        self, engine: Engine, objective: Objective, batches: Sequence[MicroBatch | TaskBatch]
    ) -> dict[str, float]:
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


def _choose(reader: SampleReader | TaskReader, language: int, items: int) -> tuple[list[int], Sequence[Any]]:
    """The first held-out rows of a language that fit, and their samples."""
    rows = reader.index.rows(language, heldout=True)
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


def _swapped_prompts(reader: SampleReader, rows: Sequence[int]) -> list[TokenizedSample]:
    """Every answer behind the next item's prompt, as far as that fits or can be made to."""
    records = [reader.index.record(row) for row in rows]
    swapped = [
        reader.fitted(replace(record, messages=(*other.messages[:-1], record.messages[-1])))
        for record, other in zip(records, [*records[1:], *records[:1]], strict=True)
    ]
    return [sample for sample in swapped if sample is not None]
