"""Three-pass ShifCon, the baseline of `step_time.py`: a step as the authors' public code runs it.

Three full forward passes: the English texts of the pairs, their translations, and the SFT batch. The first two run
unshifted on raw text (no template), through the LM head at every position, although their logits are not used. The
contrastive loss uses sentence means at every layer of the area: L2-normalised, with the translations moved onto the
English batch mean, and candidates from the whole batch. The third pass is the shifted SFT pass of `ShifCon`.

Simplifications in favour of the baseline: texts are packed like ours instead of padded, only label positions pass the
LM head in the SFT pass, states are pooled by hooks instead of kept by `output_hidden_states`, language vectors are
given, and pairs are those of our plan (the authors' run had 12 pairs and 14 SFT samples).

Shapes: T tokens, S segments, P pairs, H hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batching.batch import ChatBatch
from data_pipeline.batching.contrast import excluded_combinations
from data_pipeline.batching.packer import Packer
from data_pipeline.loader import Loader, Step
from data_pipeline.records import ChatSample
from modeling.shifcon.contrastive import contrastive_losses, pair_cosines
from training.engine.engine import Engine
from training.objectives.base import LossTerm, LossTerms
from training.objectives.sft import SupervisedFineTuning
from training.objectives.shifcon import ShifCon


@dataclass(frozen=True, slots=True)
class Texts:
    """One side of a rank's pairs, packed; `segments` (P,) is the segment of each pair's text."""

    batch: ChatBatch
    segments: Tensor
    excluded: Tensor | None = None  # (P, P) combinations of pairs that are no negatives

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int((self.batch.targets.segment_ids >= 0).sum())


class ThreePassShifCon(ShifCon):
    """Three-pass ShifCon; call `prepare` with each Step before training on it."""

    def prepare(self, loader: Loader, step: Step, device: torch.device) -> int:
        """Packs the texts of both sides of this rank's share of the step's pairs; returns the tokens that they add.

        As the authors' loader would: every rank has its own pairs, in whichever micro-batch.
        """
        plan, this = loader.planner.step(step.step), loader.this_rank
        pairs = np.concatenate(plan.sets)[this.rank :: this.world_size]
        slots = [[plan.slot(position) for position in pair] for pair in pairs.tolist()]
        read = [loader.reader.read_many(pair) for pair in slots]
        kept = [number for number, pair in enumerate(read) if all(isinstance(side, ChatSample) for side in pair)]
        busy = [batch for batch in step.micro_batches if batch.samples]
        self._texts: dict[int, list[Texts]] = {}
        self._idle = [Texts(loader.packer.idle().to(device), torch.zeros(0, dtype=torch.int64, device=device))] * 2
        for batch, numbers in zip(busy, np.array_split(kept, max(len(busy), 1)), strict=False):
            own = pairs[numbers]
            excluded = torch.from_numpy(excluded_combinations(plan.groups[own[:, 0]], plan.contents[own])).to(device)
            excluded.fill_diagonal_(False)  # the pair itself is the positive
            samples = [read[number] for number in numbers.tolist()]
            sides = [_texts([pair[side] for pair in samples], loader.packer, device) for side in range(2)]
            self._texts[id(batch.samples)] = [replace(side, excluded=excluded) for side in sides]
        return sum(side.tokens for sides in self._texts.values() for side in sides)

    def loss_terms(self, engine: Engine, batch: ChatBatch) -> LossTerms:
        sides = self._texts.get(id(batch.samples), self._idle)
        english, translated = (self._sentence_means(engine, side) for side in sides)
        with self.shift.batch(self._shifted_languages(batch)):
            fine_tuning = SupervisedFineTuning.loss_terms(self, engine, batch)
        loss = self._batch_contrastive(english, translated, sides[0].excluded)
        contrastive = LossTerm(loss, "pairs", self.config.contrastive.weight)
        not_counted = LossTerm(torch.zeros_like(loss), "pairs", 0.0)
        return replace(fine_tuning, terms={**fine_tuning.terms, "contrastive": contrastive, "retrieval": not_counted})

    def _sentence_means(self, engine: Engine, texts: Texts) -> list[Tensor]:
        """A full forward pass; (P, H) for each layer of the area."""
        side = texts.batch
        with self.pooling.batch(side.targets.segment_ids, side.targets.content, side.targets.n_segments) as pooled:
            engine.forward(**side.model_inputs())
        return [states_SH[texts.segments] for states_SH in pooled]

    def _batch_contrastive(
        self, english: Sequence[Tensor], translated: Sequence[Tensor], excluded_PP: Tensor | None
    ) -> Tensor:
        states = []
        for english_PH, other_PH in zip(english, translated, strict=True):
            if len(english_PH):
                english_PH, other_PH = F.normalize(english_PH, dim=-1), F.normalize(other_PH, dim=-1)
                other_PH = other_PH - other_PH.mean(0) + english_PH.mean(0)
            states.append(torch.cat([english_PH, other_PH]))
        members = torch.stack(states)
        if excluded_PP is None:
            return members.sum() * 0.0
        numbers = torch.arange(len(excluded_PP), device=excluded_PP.device)
        pairs = torch.stack([numbers, numbers + len(numbers)], dim=1)
        cosines = pair_cosines(members, pairs[None])
        return contrastive_losses(cosines, excluded_PP[None], self.config.contrastive.scale).sum()


def _texts(samples: Sequence[Any], packer: Packer, device: torch.device) -> Texts:
    """The bare texts of one side, packed into one forward pass."""
    bare = [_bare(sample, str(number)) for number, sample in enumerate(samples)]
    packed = Packer(replace(packer.grid, micro_batch_tokens=sys.maxsize), packer.collator).batch(bare)
    place = {name: segment for segment, name in enumerate(packed.sample_ids)}
    segments = torch.tensor([place[sample.id] for sample in bare], dtype=torch.int64, device=device)
    return Texts(packed.to(device), segments)


def _bare(sample: ChatSample, name: str) -> ChatSample:
    """The user's text without a template, after the sequence's first token."""
    input_ids = np.concatenate([sample.input_ids[:1], sample.input_ids[sample.content]])
    content = np.ones(len(input_ids), dtype=np.bool_)
    content[0] = False
    none = np.zeros_like(content)
    return replace(sample, id=name, input_ids=input_ids, labels=none, content=content, answer=none)
