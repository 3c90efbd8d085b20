"""Low-rank adapters (LoRA, arXiv 2106.09685): a few per cent of the weights are trained, and merged at the end.

In: a model with its weights, sharded or not. Out: the same model, whose linear layers of the blocks have adapters and
whose other weights are frozen (`add_adapters`); for an export, the weights of the model without adapters, each merged
(`merged`). Next: `training/engine/engine.py` trains what is not frozen; `training/checkpoints/export.py` writes what
was merged.

PEFT makes the adapters. They are made outside ZeRO-3's construction context, which would skip their initial values;
the engine shards them afterwards, as it does with X-Mixup's two numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.errors import ModelError
from modeling.layers import decoder_layers
from modeling.tasks.encoders import in_head

ADAPTER = "default"
BASE, DOWN, UP = ".base_layer.", f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}."


def add_adapters(
    model: PreTrainedModel, rank: int, alpha: int, dropout: float, targets: Sequence[str] | None, seed: int
) -> None:
    """Gives linear layers adapters, `W x + alpha / rank * B A x`, and freezes all else but a task's head; in place.

    targets: last parts of names of linear layers, such as q_proj; None: every linear layer of every block. B begins
    at 0, so the model's outputs do not change; A depends on `seed` alone, the same on every rank.

    Raises ModelError: a target that no block has, or a model without linear layers there.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = _linear_layers(model)
    known = {name.rpartition(".")[2] for name in names}
    if unknown := [target for target in targets or () if target not in known]:
        there = ", ".join(sorted(known))
        raise ModelError(f"model.lora.targets: no linear layer {unknown[0]!r} in the model's blocks; there are {there}")
    if targets is not None:
        names = [name for name in names if name.rpartition(".")[2] in targets]
    if not names:
        raise ModelError(f"model.lora: {type(model).__name__} has no linear layers in its blocks to adapt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
        inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter_weight(name) or _in_task_head(model, name))


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter's name is of an adapter."""
    return DOWN in name or UP in name


def completed(trained: Mapping[str, Tensor], base: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of a whole adapted model, from what was trained and the model that it was adapted from."""
    adapted = {name.partition(DOWN)[0] for name in trained if DOWN in name}
    yield from trained.items()
    for name, weight in base:
        layer, _, last = name.rpartition(".")
        if name not in trained:
            yield (f"{layer}{BASE}{last}" if layer in adapted else name), weight


def merged(weights: Iterable[tuple[str, Tensor]], scaling: float) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of an adapted model -> those of the model without adapters, `W + scaling * B A` in fp32.

    `scaling` is alpha / rank. The two weights of an adapter may come in any order; at most one layer's wait.
    Raises ModelError for an adapter without its layer.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights:
        part = next((part for part in (BASE, DOWN, UP) if part in name), None)
        if part is None or (part == BASE and name.endswith(".bias")):
            yield name.replace(BASE, "."), weight
            continue
        layer = name.partition(part)[0]
        parts = waiting.setdefault(layer, {})
        parts[part] = weight
        if len(parts) == 3:
            del waiting[layer]
            yield f"{layer}.weight", parts[BASE].float() + scaling * (parts[UP].float() @ parts[DOWN].float())
    if waiting:
        raise ModelError(f"lora: {next(iter(waiting))}: an adapter or its layer is missing")


def _linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers inside the model's blocks."""
    blocks = {id(module) for block in decoder_layers(model) for module in block.modules()}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in blocks]


def _in_task_head(model: PreTrainedModel, name: str) -> bool:
    """A task's own head begins at random and must be learned; a language model's is pretrained and stays."""
    return model.get_output_embeddings() is None and in_head(model, name)
