"""Low-rank adapters by peft: added for training, saved as a peft adapter directory, merged for an export.

LoRA (arXiv 2106.09685), optionally with DoRA (arXiv 2402.09353) and rank-stabilised scaling (rsLoRA, arXiv
2312.03732), to weights that may be quantised (QLoRA, `quantisation/`). Training uses `add_adapters`, which keeps the
names of all other weights. An export uses `adapted_model`, a peft model of the base and the trained weights:
`save_adapter` writes it as a directory, its own `merge_and_unload` merges it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.architectures import Architecture
from modeling.errors import ModelError
from modeling.export_info import BASE_MODEL_FILE
from modeling.layers import linear_layers
from modeling.tasks.encoders import in_head
from modeling.weights.weight_match import named

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# peft's task types; peft has none for masked language models.
_TASK_TYPES: dict[Architecture, str] = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
}


class LoraSettings(Protocol):
    """What `training.config.LoraSettings` holds: `model.lora` of a run file."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def targets(self) -> Sequence[str] | None: ...
    @property
    def use_dora(self) -> bool: ...
    @property
    def use_rslora(self) -> bool: ...


def add_adapters(model: PreTrainedModel, settings: LoraSettings, seed: int) -> None:
    """Adds adapters to linear layers in place, and freezes all other weights but those of a task's head.

    The adapters start at zero, so the model's outputs do not change. Under ZeRO-3 the model may be sharded; with DoRA,
    whose magnitudes are the norms of the base weights, call it inside `Construction.known_to_peft`.

    Args:
        model: a model with its weights.
        settings: `targets` are the last parts of names of linear layers in the blocks, such as q_proj; None: all.
        seed: of the adapters' initial weights, which are the same on every rank.

    Raises:
        ModelError: a target that no block has, or a model without linear layers in its blocks.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_lora_config(model, settings), model)
    for name, parameter in model.named_parameters():
        if _in_task_head(model, name):
            parameter.requires_grad_(True)


def adapted_model(
    base: PreTrainedModel, architecture: Architecture, settings: LoraSettings, trained: Mapping[str, Tensor]
) -> PeftModel:
    """The peft model of a base model and the weights that a run trained on it.

    Args:
        base: the model that the run started from; it becomes part of the result.
        architecture: of `base`.
        settings: those of the run.
        trained: every trained weight, by its name in a model after `add_adapters`. Adapters are kept in fp32 whatever
            the base's number format.

    Raises:
        ModelError: a weight of an adapter is missing, or the model has no such weight.
    """
    from peft import get_peft_model

    head = {name: weight for name, weight in trained.items() if _in_task_head(base, name)}
    base.load_state_dict(head, strict=False)
    config = _lora_config(base, settings)
    config.task_type = _TASK_TYPES.get(architecture)
    config.modules_to_save = _head_modules(base, head) or None  # saved with the adapters
    model: PeftModel = get_peft_model(base, config)
    adapters = {name: weight for name, weight in trained.items() if name not in head}
    loaded = model.get_base_model().load_state_dict(adapters, strict=False)
    if loaded.unexpected_keys:
        raise ModelError(f"lora: weights that the model does not have: {named(loaded.unexpected_keys)}")
    if missing := [name for name in loaded.missing_keys if f".{model.base_model.prefix}" in name]:
        raise ModelError(f"lora: weights of adapters are missing: {named(missing)}")
    return model


def save_adapter(
    model: PeftModel, directory: Path, base_name: str, base_hash: str, quantise: str | None = None
) -> None:
    """Writes an adapter directory that `PeftModel.from_pretrained(base, directory)` opens.

    Args:
        model: not merged yet.
        directory: is created; holds `adapter_config.json`, `adapter_model.safetensors` and `base_model.json`.
        base_name: directory or hub name of the base model.
        base_hash: `weight_files.directory_hash` of the weights that the run started from: the base model's, with a new
            head where a task needs one.
        quantise: the number format of the base weights in training, if they were quantised.
    """
    config = cast("LoraConfig", model.active_peft_config)
    config.base_model_name_or_path = base_name
    config.target_modules = sorted(config.target_modules or ())  # a set, whose order would differ between processes
    model.save_pretrained(str(directory), save_embedding_layers=False)  # embeddings are not trained
    (directory / "README.md").unlink(missing_ok=True)  # peft's form to fill in; the export has a card
    content = {"name": base_name, "hash": base_hash, **({} if quantise is None else {"quantised": quantise})}
    (directory / BASE_MODEL_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _lora_config(model: PreTrainedModel, settings: LoraSettings) -> LoraConfig:
    from peft import LoraConfig

    names = [name for name, _ in linear_layers(model)]
    known = {name.rpartition(".")[2] for name in names}
    if unknown := [target for target in settings.targets or () if target not in known]:
        existing = ", ".join(sorted(known))
        raise ModelError(
            f"model.lora.targets: no linear layer {unknown[0]!r} in the model's blocks; there are {existing}"
        )
    if settings.targets is not None:
        names = [name for name in names if name.rpartition(".")[2] in settings.targets]
    if not names:
        raise ModelError(f"model.lora: {type(model).__name__} has no linear layers in its blocks to adapt")
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names,
        use_dora=settings.use_dora, use_rslora=settings.use_rslora,
    )  # fmt: skip


def _in_task_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight is of a task's head, which starts at random and is trained; a language model's is pretrained."""
    return model.get_output_embeddings() is None and in_head(model, name)


def _head_modules(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the outermost modules that hold these weights of a task's head, such as `classifier`."""
    prefix = f"{model.base_model_prefix}."
    return sorted(
        {
            ".".join(name.split(".")[:2]) if name.startswith(prefix) else name.split(".")[0]  # a pooler, or the head
            for name in weights
        }
    )
