"""Finds the layer stack of any Hugging Face model and reads or changes the state between two layers.

In: a model, bare or inside PEFT, DeepSpeed or another wrapper. Out: hooks at `h[l]`, the hidden state that
ENTERS layer `l` (0-based; `h[number of layers]` leaves the last one, before the final norm).
Next: `shifcon/shift.py`, which shifts that state.

Hooks sit on `layer.__call__`. transformers checkpoints `layer.forward`, so they stay outside the recomputed
region and run once a forward pass; they touch no parameter, so ZeRO-3 may partition all of them.

Shapes: B rows, T tokens, H hidden, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from modeling.errors import ModelError

# What transformers calls a table of positions: BERT and its kin, GPT-2, OPT and BART, OpenAI-GPT.
POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


def _backbone(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face module that owns the layers, whatever is wrapped around it."""
    pretrained = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if pretrained is None:
        raise ModelError(f"{type(model).__name__} holds no Hugging Face model, so its layers cannot be found")
    return pretrained.get_decoder()


def position_limit(model: nn.Module) -> int | None:
    """How many tokens the model has positions for, None if it does not say; RoBERTa's begin behind the padding's."""
    table = position_table(model)
    if table is None:
        return getattr(_backbone(model).config.get_text_config(decoder=True), "max_position_embeddings", None)
    # OPT's and RoBERTa's tables begin with rows that are no token's
    unused = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
    return int(table.num_embeddings - unused)


def position_table(model: nn.Module) -> nn.Embedding | None:
    """The vectors of a BERT's, GPT-2's or OPT's positions, beyond which it can read nothing; None: computed ones."""
    tables = (module for name, module in model.named_modules() if name.rpartition(".")[2] in POSITION_TABLES)
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's layers, in order: the outermost list as long as the config's `num_hidden_layers`.

    Works for decoders and for encoders. Raises ModelError, naming the class, if there is no such list or
    more than one.
    """
    backbone = _backbone(model)
    number = backbone.config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    }
    depth = min((name.count(".") for name in lists), default=0)
    outermost = [name for name in lists if name.count(".") == depth]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(backbone).__name__}: expected one list of {number} layers (num_hidden_layers), "
            f"found {', '.join(outermost) or 'none'}"
        )
    return lists[outermost[0]]


def hidden_size(model: nn.Module) -> int:
    """H, the width of the state between layers."""
    return int(_backbone(model).config.get_text_config(decoder=True).hidden_size)


def state_hook(model: nn.Module, layer: int, fn: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Calls `fn(hidden_BTH)` on `h[layer]` in every forward pass; what it returns replaces the state.

    `None` leaves the state as it is. Hooks at the same place run in the order of their installation, each
    seeing what the one before returned. Raises ModelError if `layer` is not in 0..number of layers, or if the
    model skips layers at random (then the state would sometimes not pass here).
    """
    layers = decoder_layers(model)
    if not 0 <= layer <= len(layers):
        raise ModelError(f"layer {layer} does not exist: {type(model).__name__} has states 0..{len(layers)}")
    if getattr(_backbone(model).config, "layerdrop", 0.0):
        raise ModelError(f"{type(model).__name__} skips layers at random: set layerdrop to 0 in its config")

    def entering(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        changed = fn(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    def leaving(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        changed = fn(output[0] if isinstance(output, tuple) else output)
        if changed is None or not isinstance(output, tuple):
            return changed
        return (changed, *output[1:])

    if layer == len(layers):
        return layers[-1].register_forward_hook(leaving)
    return layers[layer].register_forward_pre_hook(entering, with_kwargs=True)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, tensors keep their number formats; also on devices that have no autocast, such as meta."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def membership(ids_BT: Tensor, number: int) -> Tensor:
    """(number, B*T) bool: which tokens belong to which id of range(number). -1 belongs to none.

    As a matrix it sums states by id: a matmul, which unlike `index_add` gives the same bits on every run.
    """
    return ids_BT.reshape(1, -1) == torch.arange(number, device=ids_BT.device).unsqueeze(1)
