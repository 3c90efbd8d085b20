"""Finds the layer stack of any Hugging Face model, and hooks the hidden state between two layers.

`h[l]` is the hidden state that enters layer `l` (0-based); `h[number of layers]` is the output of the last layer,
before the final norm. The model may be wrapped by peft, DeepSpeed or another module.

Hooks are placed on `layer.__call__`. transformers checkpoints `layer.forward`, so they stay outside the recomputed
region and run once per forward pass. They touch no parameter, so ZeRO-3 may shard all of them.

Shapes: B rows, T tokens, H hidden, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from modeling.architectures import Architecture, auto_class
from modeling.errors import ModelError

# In a model's config.json, which every checkpoint and export copies: the path of the layers, where they are not found.
LAYERS_KEY = "crosslift_layers"
# Names of position embeddings in transformers: BERT and its variants, GPT-2, OPT and BART, OpenAI-GPT.
POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


def backbone(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face module that owns the layers, inside any wrappers."""
    outermost = _outermost(model)
    inner = outermost.get_decoder()
    # ModernBERT's decoder names its head `decoder`, which transformers then takes for the module of the layers
    return inner if isinstance(inner, PreTrainedModel) else outermost


def _outermost(model: nn.Module) -> PreTrainedModel:
    pretrained = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if pretrained is None:
        raise ModelError(f"{type(model).__name__} contains no Hugging Face model, so its layers cannot be found")
    return pretrained


def position_limit(model: nn.Module) -> int | None:
    """The number of tokens that the model has positions for; None if its config gives none."""
    table = position_table(model)
    if table is None:
        return getattr(backbone(model).config.get_text_config(decoder=True), "max_position_embeddings", None)
    # the first rows of OPT's and RoBERTa's tables belong to no token
    unused = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
    return int(table.num_embeddings - unused)


def position_table(model: nn.Module) -> nn.Embedding | None:
    """The learned position embeddings, as in BERT, GPT-2 and OPT; None for a model that computes positions."""
    tables = (module for name, module in model.named_modules() if name.rpartition(".")[2] in POSITION_TABLES)
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a decoder or encoder in order: the outermost list of `num_hidden_layers` modules.

    For a model that has no such list, the key LAYERS_KEY of its config.json names the list, by its path in the module
    that owns the layers (`backbone`).

    Raises:
        ModelError: there is no such list, or more than one; or the key names none. The message lists what there is.
    """
    inner = backbone(model)
    lists = {name: module for name, module in inner.named_modules() if isinstance(module, nn.ModuleList)}
    if (path := getattr(_outermost(model).config, LAYERS_KEY, None)) is not None:
        if path not in lists:
            raise ModelError(f"config.json: {LAYERS_KEY}: {path!r} is not {_among(inner, lists)}")
        return lists[path]
    number = getattr(inner.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [name for name, module in lists.items() if len(module) == number]
    depth = min((name.count(".") for name in found), default=0)
    outermost = [name for name in found if name.count(".") == depth]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(inner).__name__}: expected one list of {number} layers (num_hidden_layers), found "
            f"{', '.join(outermost) or 'none'}; set {LAYERS_KEY!r} in the model's config.json to "
            f"{_among(inner, lists)}"
        )
    return lists[outermost[0]]


def _among(model: PreTrainedModel, lists: Mapping[str, nn.ModuleList]) -> str:
    """The lists of modules from which the layers can be chosen, those inside another list left out."""
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    named = ", ".join(f"{name!r} (of {len(lists[name])})" for name in outer)
    return f"one of the lists of modules in {type(model).__name__}: {named or 'it has none'}"


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """(name, module) of all linear layers inside the model's blocks, quantised ones too."""
    blocks = {id(module) for block in decoder_layers(model) for module in block.modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in blocks
    ]


def hidden_size(model: nn.Module) -> int:
    """H, the width of the state between layers."""
    return int(backbone(model).config.get_text_config(decoder=True).hidden_size)


def state_hook(model: nn.Module, layer: int, fn: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Calls a function on `h[layer]` in every forward pass.

    Args:
        model: any model with layers.
        layer: 0..number of layers.
        fn: takes the state (B, T, H). What it returns replaces the state; None leaves it unchanged. Functions at the
            same layer run in the order of their installation, each on what the one before returned.

    Raises:
        ModelError: the layer does not exist, or the model skips layers at random (layerdrop).
    """
    layers = decoder_layers(model)
    if not 0 <= layer <= len(layers):
        raise ModelError(f"layer {layer} does not exist: {type(model).__name__} has states 0..{len(layers)}")
    if getattr(backbone(model).config, "layerdrop", 0.0):
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
    """(number, B*T) bool: which tokens belong to each id of range(number). -1 belongs to none.

    A matmul with it sums states by id with the same bits on every run, which `index_add` does not.
    """
    return ids_BT.reshape(1, -1) == torch.arange(number, device=ids_BT.device).unsqueeze(1)


def label_cost(config: PreTrainedConfig, architecture: Architecture) -> float:
    """The cost of a label at the LM head, in tokens of the layers: the ratio of their weights, as of their FLOPs.

    0 for a model without an LM head.
    """
    with torch.device("meta"):
        model = auto_class(architecture).from_config(config)
    head = model.get_output_embeddings()
    if head is None:
        return 0.0
    return head.weight.numel() / sum(weight.numel() for weight in decoder_layers(model).parameters())
