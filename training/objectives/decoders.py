"""What a step optimises, on decoders: SFT, ShifCon. A micro-batch in, loss terms out.

In: a MicroBatch on the device and the engine. Out: LossTerms, sums that `scaling.step_loss_share` weights.
Next: `trainer.py`. An objective never runs a second forward pass, and runs the same modules on every rank
whatever the batch holds. Those for encoders are in `objectives/encoders.py`.

Shapes: B rows, T tokens, H hidden, N label positions, S segments, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_pipeline.packing import MicroBatch
from data_pipeline.records import NO_LANGUAGE
from modeling.export_info import VECTORS_FILE
from modeling.label_head import LabelHead, token_losses
from modeling.shifcon.contrastive import ContentPooling, contrastive_loss
from modeling.shifcon.language_vectors import LanguageVectors, StateMeans, restoration_error
from modeling.shifcon.shift import LanguageShift
from training.distributed import all_sum, rank
from training.engine.engine import Engine
from training.objectives.config import ShifConConfig
from training.objectives.scaling import LossTerm


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums over one micro-batch, not yet divided by anything.

    The label losses are those that a person wants to see by language: of answer tokens, or of the target texts'
    labels. `terms` are what is optimised (and, with weight 0, what is only reported).
    """

    label_losses: Tensor  # (N,) fp32, 0 at the stand-in of a micro-batch without labels
    label_weights: Tensor  # (N,) 1, or 0 where the label does not count
    label_languages: Tensor  # (N,) int64
    terms: Mapping[str, LossTerm]


class Objective(Protocol):
    """What the trainer asks of an objective."""

    term_names: tuple[str, ...]  # of `LossTerms.terms`, the same on every rank and in every micro-batch

    def loss_terms(self, engine: Engine, batch: Any) -> LossTerms:
        """One forward pass and its loss terms; works with and without gradients."""

    def before_step(self, engine: Engine, step: int) -> dict[str, float]:
        """What is due before step `step` (a refresh of the vectors); metrics of it."""

    def save(self, engine: Engine, directory: Path) -> None:
        """Write what a resume or an export needs, beside the engine's state; every rank calls it, rank 0 writes."""

    def load(self, directory: Path) -> None:
        """Take it back."""


class SupervisedFineTuning:
    """Cross-entropy on label tokens; the LM head sees no other position."""

    term_names: tuple[str, ...] = ("sft",)
    sft_weight = 1.0

    def __init__(self, model: PreTrainedModel) -> None:
        self.head = LabelHead(model)

    def loss_terms(self, engine: Engine, batch: MicroBatch) -> LossTerms:
        losses = self._token_losses(engine, batch)
        sft = LossTerm(losses.sum(), per="label_tokens", weight=self.sft_weight)
        return LossTerms(losses, batch.label_weights, batch.label_languages, {"sft": sft})

    def before_step(self, engine: Engine, step: int) -> dict[str, float]:
        return {}

    def save(self, engine: Engine, directory: Path) -> None:
        """SFT keeps nothing beside the weights."""

    def load(self, directory: Path) -> None:
        """SFT keeps nothing beside the weights."""

    def _token_losses(self, engine: Engine, batch: MicroBatch) -> Tensor:
        with self.head.select(batch.label_positions):
            logits_1NV = engine.forward(**model_inputs(batch)).logits
        return token_losses(logits_1NV[0], batch.label_ids) * batch.label_weights


class ShifCon(SupervisedFineTuning):
    """ShifCon in one pass: the SFT forward is shifted, and its states feed the contrastive loss.

    Formulas: docs/methods.md, section 1.
    """

    term_names: tuple[str, ...] = ("sft", "contrastive")

    def __init__(
        self,
        model: PreTrainedModel,
        config: ShifConConfig,
        languages: Sequence[str],
        dominant: str,
        probe: Sequence[MicroBatch],
    ) -> None:
        super().__init__(model)
        toward, back = config.layers
        self.config = config
        self.sft_weight = config.sft_weight
        self.languages = tuple(languages)
        self.dominant = dominant
        self.probe = probe
        # Order matters: pooling must see the states after the shift.
        self.shift = LanguageShift(model, toward, back)
        self.pooling = ContentPooling(model, range(toward, back))
        self.vectors: LanguageVectors | None = None

    def loss_terms(self, engine: Engine, batch: MicroBatch) -> LossTerms:
        with (
            self.shift.batch(self._shifted_languages(batch)),
            self.pooling.batch(batch.segment_ids, batch.content, batch.n_segments) as pooled,
        ):
            fine_tuning = super().loss_terms(engine, batch)
        contrastive = contrastive_loss(
            pooled, batch.pairs, batch.pair_sets, batch.pair_groups, batch.pair_contents,
            scale=self.config.contrastive.scale,
        )  # fmt: skip
        return self._with_contrastive(fine_tuning, contrastive)

    def _with_contrastive(self, fine_tuning: LossTerms, contrastive: Tensor) -> LossTerms:
        term = LossTerm(contrastive, per="pairs", weight=self.config.contrastive.weight)
        return replace(fine_tuning, terms={**fine_tuning.terms, "contrastive": term})

    def before_step(self, engine: Engine, step: int) -> dict[str, float]:
        if step % self.config.refresh_every and self.vectors is not None:
            return {}
        return self.refresh(engine)

    def refresh(self, engine: Engine) -> dict[str, float]:
        """Estimate the language vectors on the probe set, then measure how well the shift is undone.

        Two passes over the probe without gradients: unshifted for the vectors, shifted for the restoration
        error. Sums are fp64 and run over all ranks.
        """
        with self.shift.disabled():
            unshifted = self._means_over_probe(engine)
        vectors = unshifted.vectors(self.languages, self.dominant, self.config.layers)
        self.set_vectors(vectors)
        shifted = self._means_over_probe(engine)
        error = restoration_error(vectors, shifted.means()[:, 1])
        metrics = {f"shift/restoration_error/{language}": value for language, value in error.items()}
        return metrics | {f"shift/norm/{name}": value for name, value in self.shift.shift_norms().items()}

    def set_vectors(self, vectors: LanguageVectors) -> None:
        """Shift with these vectors from now on."""
        self.vectors = vectors
        self.shift.set_vectors(vectors)

    def save(self, engine: Engine, directory: Path) -> None:
        if self.vectors is not None and rank() == 0:
            self.vectors.save(directory / VECTORS_FILE)

    def load(self, directory: Path) -> None:
        self.set_vectors(LanguageVectors.load(directory / VECTORS_FILE))

    def _means_over_probe(self, engine: Engine) -> StateMeans:
        """Mean states entering `toward` and `back`, by language, over every rank's share of the probe set."""
        first = torch.zeros(1, dtype=torch.int64, device=engine.device)
        with (
            StateMeans(engine.module, self.config.layers, len(self.languages)) as means,
            engine.evaluating(),
            self.head.select(first),  # nobody reads the logits: one position is enough
        ):
            for batch in self.probe:
                on_device = batch.to(engine.device)
                with (
                    self.shift.batch(self._shifted_languages(on_device)),
                    means.batch(on_device.vector_languages),
                ):
                    engine.forward(**model_inputs(on_device))
        for total in (means.sums, means.norms, means.counts):
            total.copy_(all_sum(total, engine.device))
        return means

    def _shifted_languages(self, batch: MicroBatch) -> Tensor:
        if self.config.shift_first_token:
            return batch.languages
        return batch.languages.masked_fill(batch.position_ids == 0, NO_LANGUAGE)


def model_inputs(batch: MicroBatch) -> dict[str, Any]:
    """Arguments of a forward pass. Packed rows need all three of: no mask, positions that restart, no cache."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
