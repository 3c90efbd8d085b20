"""Tiny, untrained exports of task models, for tests that need a trained one.

`export` writes the files of `training.checkpoints.export`: weights, tokenizer, `crosslift.json` and, if requested,
X-Mixup's file. The weights are larger than usual for an untrained model, so that different inputs give clearly
different outputs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from small_encoders import unigram, wordpiece

Family = Literal["bert", "xlm-roberta"]
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 140, "initializer_range": 1.0, "hidden_dropout_prob": 0.1,
}  # fmt: skip


def export(
    folder: Path,
    kind: str,
    labels: tuple[str, ...] = (),
    *,
    family: Family = "xlm-roberta",
    length: int = 24,
    mixup_layer: int | None = None,
    step: int = 7,
    seed: int = 1,
    **task: Any,
) -> Path:
    """A model of one task below `folder`. `task`: further options of TaskConfig."""
    from transformers import AutoConfig

    from data_pipeline.tasks.config import TaskConfig
    from modeling.architectures import auto_class
    from modeling.tasks.encoders import TASK_ARCHITECTURES
    from modeling.weights.weight_files import directory_hash
    from modeling.xmixup.mixup import CrossLingualMixup
    from modeling.xmixup.mixup_state import MIXUP_FILE

    tokenizer = wordpiece() if family == "bert" else unigram()
    changes = {"id2label": dict(enumerate(labels)), "label2id": {each: n for n, each in enumerate(labels)}}
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SIZES, **(changes if labels else {})
    )
    torch.manual_seed(seed)
    model = auto_class(TASK_ARCHITECTURES[kind]).from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = TaskConfig(kind=kind, labels=labels, **task)  # type: ignore[arg-type]
    about = {
        "format": 1, "step": step, "objective": "finetune" if mixup_layer is None else "xmixup",
        "languages": ["en", "de"], "dominant": "en", "sequence_length": length,
        "task": settings.model_dump(mode="json"),
    }  # fmt: skip
    (folder / "crosslift.json").write_text(json.dumps(about), encoding="utf-8")
    if mixup_layer is not None:
        state = CrossLingualMixup(model, mixup_layer, lam0=0.9).state(directory_hash(folder))
        replace(state, w=0.7, b=0.4).save(folder / MIXUP_FILE)
    return folder
