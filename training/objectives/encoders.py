"""What a step optimises, on encoders: masked words, a task, X-Mixup. A micro-batch in, loss terms out.

In: a TaskBatch on the device and the engine. Out: LossTerms. Next: `trainer.py`.
One forward pass a micro-batch, for X-Mixup too: its two sides are the halves of one batch.

Shapes: R rows (n targets, then their n sources), T tokens, H hidden, N label units (rows, words or tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_pipeline.tasks.batches import TaskBatch
from modeling.label_head import LabelHead, token_losses
from modeling.tasks.encoder_states import EncoderStates
from modeling.tasks.task_losses import classification_losses, span_losses, tagging_losses
from modeling.xmixup.consistency import consistency, content_mask, representations
from modeling.xmixup.mixup import CrossLingualMixup
from modeling.xmixup.mixup_state import MIXUP_FILE
from training.distributed import rank
from training.engine.engine import Engine, gathered
from training.objectives.config import FineTuneConfig, MaskedLMConfig, XMixupConfig
from training.objectives.decoders import LossTerms
from training.objectives.scaling import LossTerm


def build_task_objective(
    settings: MaskedLMConfig | FineTuneConfig | XMixupConfig,
    model: PreTrainedModel,
    kind: str,
    special_ids: Sequence[int],
) -> TaskFineTuning:
    """The objective of an encoder's run; hooks and parameters are placed on `model` before the engine is made."""
    if isinstance(settings, XMixupConfig):
        return XMixup(model, kind, settings, special_ids)
    return MaskedLM(model) if isinstance(settings, MaskedLMConfig) else TaskFineTuning(kind)


class TaskFineTuning:
    """A task's loss on single texts: what zero-shot transfer and translate-train are trained with."""

    term_names: tuple[str, ...] = ("task",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def loss_terms(self, engine: Engine, batch: TaskBatch) -> LossTerms:
        losses = self._unit_losses(engine, batch)
        task = LossTerm(losses.sum(), per="target_labels", weight=1.0)
        return LossTerms(losses, batch.label_weights, batch.label_languages, {"task": task})

    def before_step(self, engine: Engine, step: int) -> dict[str, float]:
        return {}

    def save(self, engine: Engine, directory: Path) -> None:
        """Nothing is kept beside the weights."""

    def load(self, directory: Path) -> None:
        """Nothing is kept beside the weights."""

    def _unit_losses(self, engine: Engine, batch: TaskBatch) -> Tensor:
        return unit_losses(self.kind, engine.forward(**encoder_inputs(batch)), batch)


class MaskedLM(TaskFineTuning):
    """Cross-entropy on masked tokens; the LM head's matrix sees no other position."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__("text")
        self.head = LabelHead(model)

    def _unit_losses(self, engine: Engine, batch: TaskBatch) -> Tensor:
        assert batch.label_positions is not None
        assert batch.label_ids is not None
        with self.head.select(batch.label_positions):
            logits_1NV = engine.forward(**encoder_inputs(batch)).logits
        return token_losses(logits_1NV[0], batch.label_ids) * batch.label_weights


class XMixup(TaskFineTuning):
    """X-Mixup (arXiv 2205.04182): `alpha * task(source) + (1 - alpha) * task(target) + consistency`.

    With back-translations as sources, whose labels are not gold, only the target's task counts; a class stays the
    class, so classification keeps both (docs/methods.md, section 2.2). `train/loss` is the target's.
    """

    term_names: tuple[str, ...] = ("target", "source", "consistency", "mixup_ratio")

    def __init__(self, model: PreTrainedModel, kind: str, config: XMixupConfig, special_ids: Sequence[int]) -> None:
        super().__init__(kind)
        self.config = config
        self.special_ids = tuple(special_ids)
        self.states = EncoderStates(model)
        self.mixup = CrossLingualMixup(model, config.layer, config.max_ratio, config.entropy, config.ratio)

    def loss_terms(self, engine: Engine, batch: TaskBatch) -> LossTerms:
        config, n = self.config, batch.n_pairs
        with self.mixup.batch(batch.attention_mask, n, mix=config.mix), self.states.batch() as states:
            outputs = engine.forward(**encoder_inputs(batch))
        losses = unit_losses(self.kind, outputs, batch)
        apart = self._consistency(states[self.states.last], outputs, batch)
        target, source = losses[~batch.label_is_source], losses[batch.label_is_source]
        labelled = batch.gold or self.kind == "classification"
        alpha = config.alpha if labelled else 0.0
        real_n = real_rows(batch)[:n]
        ratio = self.mixup.last_ratio if config.mix and self.mixup.last_ratio is not None else torch.zeros_like(real_n)
        terms = {
            "target": LossTerm(target.sum(), per="target_labels", weight=1 - alpha),
            "source": LossTerm(source.sum(), per="source_labels", weight=alpha),
            "consistency": LossTerm((apart * real_n).sum(), per="pairs", weight=config.consistency_weight),
            "mixup_ratio": LossTerm((ratio * real_n).sum(), per="pairs", weight=0.0),
        }
        of_target = ~batch.label_is_source
        return LossTerms(target, batch.label_weights[of_target], batch.label_languages[of_target], terms)

    def save(self, engine: Engine, directory: Path) -> None:
        """The settings and the learned ratio, for the export; a resume takes them from the engine's own state."""
        with gathered(self.mixup.parameters()):
            state = self.mixup.state()
        if rank() == 0:
            state.save(directory / MIXUP_FILE)

    def _consistency(self, hidden_RTH: Tensor, outputs: Any, batch: TaskBatch) -> Tensor:
        """(n,) distance of the two sides of each pair."""
        if self.kind == "classification":
            return consistency(representations(hidden_RTH), batch.n_pairs, outputs.logits)
        content_RT = content_mask(batch.input_ids, batch.attention_mask, self.special_ids)
        return consistency(representations(hidden_RTH, content_RT), batch.n_pairs)


def unit_losses(kind: str, outputs: Any, batch: TaskBatch) -> Tensor:
    """(N,) fp32 loss of each label unit of a task model's outputs, 0 at stand-ins."""
    if kind == "classification":
        assert batch.label_classes is not None
        losses = classification_losses(outputs.logits, batch.label_classes, batch.label_rows)
    elif kind == "tagging":
        assert batch.label_classes is not None
        assert batch.token_word is not None
        losses = tagging_losses(outputs.logits, batch.label_classes, batch.token_word)
    else:
        assert batch.label_spans is not None
        losses = span_losses(
            outputs.start_logits, outputs.end_logits, batch.attention_mask, batch.label_spans, batch.label_rows
        )
    return losses * batch.label_weights


def real_rows(batch: TaskBatch) -> Tensor:
    """(R,) 1 for rows that a label counts for, 0 for those of an idle micro-batch."""
    weights_R = batch.input_ids.new_zeros(len(batch.input_ids), dtype=torch.float32)
    return (weights_R.index_add(0, batch.label_rows, batch.label_weights) > 0).float()


def encoder_inputs(batch: TaskBatch) -> dict[str, Any]:
    """Arguments of a forward pass of an encoder."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return inputs if batch.token_type_ids is None else {**inputs, "token_type_ids": batch.token_type_ids}
