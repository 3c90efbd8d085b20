"""An idle micro-batch runs the same modules as any other and adds nothing to any term of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_encoders import unigram
from transformers import AutoConfig

from data_pipeline.batching.grid import Grid
from data_pipeline.batching.packer import Packer
from data_pipeline.batching.tasks import TaskCollator
from data_pipeline.tasks.config import TaskConfig
from modeling.architectures import auto_class
from modeling.tasks.encoders import TASK_ARCHITECTURES
from training.objectives.finetune import FineTuneConfig, TaskFineTuning
from training.objectives.xmixup import XMixup, XMixupConfig

LABELS = ("a", "b", "c")


class PlainEngine:
    """The methods of an engine that an objective uses, without DeepSpeed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@pytest.mark.parametrize("kind", ["classification", "tagging", "qa"])
@pytest.mark.parametrize("paired", [False, True])
def test_an_idle_micro_batch_adds_nothing_to_losses_and_gradients(kind: Any, paired: bool) -> None:
    labels = () if kind == "qa" else LABELS
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "xlm-roberta", vocab_size=len(unigram()), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=20, initializer_range=1.0, pad_token_id=1,
        num_labels=len(labels) or 2,
    )  # fmt: skip
    model = auto_class(TASK_ARCHITECTURES[kind]).from_config(config)
    objective: Any = TaskFineTuning()
    if paired:
        settings = XMixupConfig(name="xmixup", layer=1, alpha=0.4)
        objective = XMixup(model, kind, settings, unigram().all_special_ids)
    collator = TaskCollator(1, TaskConfig(kind=kind, labels=labels), paired=paired, has_token_types=False)
    batch = Packer(Grid("padded", 64, 64, collator.sides), collator).idle()
    terms = objective.loss_terms(PlainEngine(model), batch)
    assert float(terms.label_losses.detach().sum()) == 0
    assert tuple(terms.terms) == (XMixupConfig.terms if paired else FineTuneConfig.terms)
    for name, term in terms.terms.items():
        assert float(term.sum.detach()) == 0, name
    total = sum(term.weight * term.sum for term in terms.terms.values())
    total.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
