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

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batching.batch import ChatBatch, SampleUnit
from data_pipeline.batching.packer import Packer
from data_pipeline.loader import Step
from data_pipeline.records import ChatSample
from modeling.shifcon.contrastive import contrastive_loss
from training.engine.engine import Engine
from training.objectives.base import LossTerms
from training.objectives.sft import SupervisedFineTuning
from training.objectives.shifcon import ShifCon


@dataclass(frozen=True, slots=True)
class Texts:
    """One side of a micro-batch's pairs, packed; `segments` (P,) is the segment of each pair's text."""

    batch: ChatBatch
    segments: Tensor

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int((self.batch.targets.segment_ids >= 0).sum())


class ThreePassShifCon(ShifCon):
    """Three-pass ShifCon; call `prepare` with each Step before training on it."""

    def prepare(self, step: Step, packer: Packer, device: torch.device) -> int:
        """Pack the texts of both sides, as the authors' loader would; returns the tokens that they add to the step."""
        self._texts: dict[int, tuple[Texts, Texts]] = {}
        for micro_batch in step.micro_batches:
            english, translated = pair_texts(micro_batch, packer, device)
            self._texts[id(micro_batch.units)] = english, translated
        idle = Texts(packer.idle().to(device), torch.zeros(0, dtype=torch.int64, device=device))
        self._idle = (idle, idle)
        return sum(side.tokens for sides in self._texts.values() for side in sides)

    def loss_terms(self, engine: Engine, batch: ChatBatch) -> LossTerms:
        english, translated = (
            self._sentence_means(engine, side) for side in self._texts.get(id(batch.units), self._idle)
        )
        with self.shift.batch(self._shifted_languages(batch)):
            fine_tuning = SupervisedFineTuning.loss_terms(self, engine, batch)
        return self._with_contrastive(fine_tuning, self._batch_contrastive(english, translated, batch))

    def _sentence_means(self, engine: Engine, texts: Texts) -> list[Tensor]:
        """A full forward pass; (P, H) for each layer of the area."""
        side = texts.batch
        with self.pooling.batch(side.targets.segment_ids, side.targets.content, side.targets.n_segments) as pooled:
            engine.forward(**side.model_inputs())
        return [states_SH[texts.segments] for states_SH in pooled]

    def _batch_contrastive(self, english: Sequence[Tensor], translated: Sequence[Tensor], batch: ChatBatch) -> Tensor:
        states, items = [], batch.targets.pairs
        for english_PH, other_PH in zip(english, translated, strict=True):
            if len(english_PH):
                english_PH, other_PH = F.normalize(english_PH, dim=-1), F.normalize(other_PH, dim=-1)
                other_PH = other_PH - other_PH.mean(0) + english_PH.mean(0)
            states.append(torch.cat([english_PH, other_PH]))
        numbers = torch.arange(len(items.segments), device=items.segments.device)
        pairs = torch.stack([numbers, numbers + len(numbers)], dim=1)
        return contrastive_loss(
            states, pairs, torch.zeros_like(numbers), items.groups, items.contents,
            scale=self.config.contrastive.scale,
        )  # fmt: skip


def pair_texts(batch: ChatBatch, packer: Packer, device: torch.device) -> tuple[Texts, Texts]:
    """The texts of the micro-batch's pairs, dominant and other side, each packed into one forward pass."""
    samples = [(unit.samples[a], unit.samples[b]) for unit in batch.units for a, b in unit.pairs]
    whole = Packer(packer.layout, sys.maxsize, packer.row_tokens, packer.collator)
    sides = []
    for side in range(2):
        bare = [_bare(pair[side], str(number)) for number, pair in enumerate(samples)]
        packed = whole.pack([SampleUnit((sample,)) for sample in bare])
        texts = packed[0] if packed else whole.idle()
        place = {name: segment for segment, name in enumerate(texts.sample_ids)}
        segments = torch.tensor([place[sample.id] for sample in bare], dtype=torch.int64, device=device)
        sides.append(Texts(texts.to(device), segments))
    return sides[0], sides[1]


def _bare(sample: ChatSample, name: str) -> ChatSample:
    """The user's text without a template, after the sequence's first token."""
    input_ids = np.concatenate([sample.input_ids[:1], sample.input_ids[sample.content]])
    content = np.ones(len(input_ids), dtype=np.bool_)
    content[0] = False
    none = np.zeros_like(content)
    return replace(sample, id=name, input_ids=input_ids, labels=none, content=content, answer=none)
