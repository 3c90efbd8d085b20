"""Checks which modules a model calls in a forward pass, on a tiny model of its class.

Ranks work together on each module: ZeRO-3 gathers its weights before it runs, and all stages reduce gradients in the
order of the backward pass. So each pass must call the same modules in the same order, whatever the tokens. The experts
of transformers' own classes are 3-D weights of one module and meet this; an `nn.ModuleList` of experts, of which only
those with tokens are called, does not. The shift needs layers that run once per pass.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from itertools import zip_longest

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from modeling.architectures import Architecture, auto_class
from modeling.errors import ModelError
from modeling.layers import decoder_layers
from modeling.layout import tiny_model
from modeling.weights.weight_files import one_line

logger = logging.getLogger(__name__)
# Tokens of each pass: a router sends the single ones to different experts, and the last ones to more of them.
PASSES = ((1,), (20,), (40,), tuple(range(1, 60, 7)))


def check_module_calls(config: PreTrainedConfig, architecture: Architecture, ranks: int) -> None:
    """Checks that each forward pass runs every layer once and, on several ranks, the same modules.

    The tiny model has all layers, since the first ones of a mixture of experts may be dense. A class that does not run
    at these sizes is not checked; one line of the log says so. The random state does not change.

    Args:
        config: of the model to train.
        architecture: the head.
        ranks: of the run.

    Raises:
        ModelError: a layer runs never or more than once, or the modules that run depend on the tokens.
    """
    try:
        model = tiny_model(config, "eager", auto_class(architecture), pad_token_id=0, all_layers=True)
        layers = [id(layer) for layer in decoder_layers(model)]
        passes = [module_calls(model, torch.tensor([tokens])) for tokens in PASSES]
    except ModelError:
        raise
    except Exception as error:  # each class fails in its own way
        level = logging.WARNING if ranks > 1 else logging.INFO
        logger.log(level, "module calls are not checked: a tiny %s did not run: %s", config.model_type, one_line(error))
        return
    names = {id(module): name for name, module in model.named_modules()}
    for called in passes:
        if (found := [each for each in called if each in layers]) != layers:
            counts = Counter(found)
            odd = next((layer for layer in layers if counts[layer] != 1), layers[0])
            raise ModelError(
                f"{type(model).__name__}: {names[odd]} runs {counts[odd]} times in a forward pass; the shift needs "
                "layers that run once each, one after the other"
            )
    for called in passes if ranks > 1 else ():
        for one, other in zip_longest(called, passes[0]):
            if one != other:
                here, there = (names.get(each, "none") for each in (one, other))
                raise ModelError(
                    f"{type(model).__name__}: the modules that run depend on the tokens (here {here}, there {there}), "
                    f"as in a list of experts, so {ranks} ranks would wait for each other's weights; train on one "
                    "rank, or take a model class whose experts are one module"
                )


def module_calls(model: nn.Module, ids_BT: Tensor) -> list[int]:
    """The `id` of each module, in the order of their calls in one pass; ZeRO-3 follows those without weights too."""
    called: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.append(id(module))) for module in model.modules()
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return called
