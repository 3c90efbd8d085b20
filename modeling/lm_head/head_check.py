"""Decides whether a model's losses are taken in chunks of label positions, by a check on a tiny model of its class."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.architectures import Architecture, auto_class
from modeling.layout import VOCABULARY, tiny_model
from modeling.lm_head.chunked_losses import LogitChange
from modeling.lm_head.label_head import LabelHead
from modeling.weights.weight_files import one_line

logger = logging.getLogger(__name__)

# Of losses and gradients, relative to the largest; a cap of 30 that is left out changes them by 1e-2.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
SHARPER = 4  # factor of the tiny head's weight, so that caps take effect


def build_label_head(model: PreTrainedModel, architecture: Architecture) -> LabelHead:
    """The label head of a run's model, in chunks if a tiny model of its class has the same losses and gradients so.

    Otherwise the model computes the logits of all label positions, and one line of the log gives the reason. The random
    state does not change.

    Raises:
        ModelError: the model has no output embedding.
    """
    change = LogitChange.of(model.config)
    reason = _not_plain(model.get_output_embeddings()) or _difference_of_tiny(model, architecture, change)
    if reason is None:
        return LabelHead(model, change)
    logger.info("losses are not taken in chunks, so the logits of all label positions are in memory: %s", reason)
    return LabelHead(model)


def _not_plain(head: nn.Module | None) -> str | None:
    """Why the function of a head is not known to be `x @ weight.T + bias`."""
    if type(head) is nn.Linear and "forward" not in vars(head):
        return None
    library = type(head).__module__.partition(".")[0]
    return f"the output embedding is a {type(head).__name__} of {library}, or has a forward of its own"


def _difference_of_tiny(model: PreTrainedModel, architecture: Architecture, change: LogitChange) -> str | None:
    """Why a tiny model of the class has other losses or gradients in chunks than from its own logits."""
    name = model.config.model_type
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("cpu"), torch.enable_grad():
        try:
            tiny = tiny_model(model.config, "eager", auto_class(architecture), pad_token_id=0)
            if type(tiny) is not type(model):
                return f"transformers makes a {type(tiny).__name__} of its config, not a {type(model).__name__}"
            with torch.no_grad():
                tiny.get_output_embeddings().weight.mul_(SHARPER)
            for dtype in {torch.float32: 0, model.dtype: 0}:
                nn.Module.to(tiny, device=device, dtype=dtype)
                plain, chunked = (_losses_and_gradients(tiny, each) for each in (None, change))
                difference = max(
                    float((one - other).abs().max() / other.abs().max())
                    for one, other in zip(chunked, plain, strict=True)
                )
                if not difference <= TOLERANCES[dtype]:
                    return f"losses or gradients of a tiny {name} differ by {difference:.1e} in {dtype}"
        except Exception as error:  # each class fails in its own way; without chunks is then right
            return f"a tiny {name} did not run: {one_line(error)}"
    return None


def _losses_and_gradients(model: PreTrainedModel, change: LogitChange | None) -> tuple[Tensor, Tensor]:
    """The losses of some labels, and the gradients of all parameters in one vector."""
    head = LabelHead(model, change)
    device = model.device
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1)).to(device)
    positions = torch.arange(1, 23, 2).to(device)
    labels = ids.flatten()[positions + 1]
    weights = (torch.arange(len(positions)) % 3).float().to(device)  # some are 0
    losses = head.losses(lambda: model(input_ids=ids), positions, labels, weights)
    head.remove()
    model.zero_grad()
    losses.sum.backward()
    gradients = [parameter.grad.flatten().float() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([losses.sum.detach()[None], losses.each]).float(), torch.cat(gradients)
