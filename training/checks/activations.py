"""Counts the bytes that a forward pass keeps for its backward pass, on a model without data.

The model's own forward pass runs on PyTorch's meta device, where tensors have shapes and no data, with the hooks of
the run's objective on it; every tensor that autograd saves is counted once. Only attention is replaced, since the
device decides which kernel runs: the replacement saves what that kernel saves. So the count follows the installed
transformers, whatever the architecture. A model that cannot run this way (a router that reads values, a class with its
own attention) is estimated by the formula of arXiv 2205.05198; then `Activations.counted` is False.

Shapes: B rows, T tokens a row, H hidden, N label positions, S segments, P pairs, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_pipeline.batching.batch import Batch, BatchShape
from modeling.adapters import add_adapters
from modeling.architectures import ARCHITECTURE_OF, auto_class
from modeling.layers import decoder_layers, hidden_size
from modeling.lm_head.chunked_losses import CHUNK_ELEMENTS
from modeling.quantisation.linear import quantised_blocks
from training.config import DataConfig, RunConfig
from training.engine.memory import Activations
from training.objectives.base import Objective, ObjectiveConfig, ObjectiveParts

COUNTING = "crosslift_counting"  # name of the attention that replaces the kernel while counting
Kernel = Literal["eager", "sdpa", "flash_attention_2"]
LAYER_FORMULA = 34  # bytes per token and hidden unit in 16 bit, without attention scores (arXiv 2205.05198, eq. 1)


def count_activations(
    config: RunConfig,
    model_config: PreTrainedConfig,
    kernel: Kernel,
    dtype: torch.dtype,
    shape: BatchShape,
    blank: Callable[[BatchShape], Batch[Any]],
) -> Activations:
    """The activations of a run's micro-batch of that shape.

    Args:
        kernel: a resolved attention.
        blank: makes a micro-batch without content (`Collator.blank`).
    """
    try:
        model_class = auto_class(ARCHITECTURE_OF[config.data.kind])
        make = partial(model_class.from_config, model_config, dtype=dtype, attn_implementation=COUNTING)
        with torch.device("meta"), _counting_attention(kernel), quantised_blocks(make, config.model.quantise, dtype):
            model = make().train()
            model.tie_weights()
            if (lora := config.model.lora) is not None:
                add_adapters(model, lora, config.seed)
                for parameter in model.parameters():  # PEFT adopts the base's dtype only if the base has data
                    if parameter.is_floating_point():
                        parameter.data = parameter.data.to(dtype)
            model.config.use_cache = False
            objective = build_without_engine(config.data, config.objective, model)
            return _counted(model, objective, forward_without_engine(objective, model, blank(shape)), shape)
    except Exception:  # any class may fail on tensors without data in its own way
        text = model_config.get_text_config()
        return _by_formula(text.num_hidden_layers, text.hidden_size, text.vocab_size, dtype, shape)


def build_without_engine(data: DataConfig, objective: ObjectiveConfig, model: PreTrainedModel) -> Objective:
    """The objective, with its hooks on the model."""
    return objective.build(model, ObjectiveParts(data.kind, data.languages, data.dominant))


def forward_without_engine(objective: Objective, model: PreTrainedModel, batch: Batch[Any]) -> Callable[[], Tensor]:
    """The objective's forward pass and losses, as far as they save large tensors."""
    engine: Any = _PlainEngine(model)
    return lambda: objective.saved_loss(engine, batch)


@dataclass
class _PlainEngine:
    """The parts of `Engine` that an objective uses, without DeepSpeed."""

    module: PreTrainedModel

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def _counted(
    model: PreTrainedModel, objective: Objective, forward: Callable[[], Tensor], shape: BatchShape
) -> Activations:
    layers = list(decoder_layers(model))
    with SavedBytes(model, layers) as saved:
        loss = forward()
    del loss
    state = shape.tokens * hidden_size(model) * next(model.parameters()).element_size()
    # Work: the largest gradient and the tensor it is computed from, and the loss's temporary tensors.
    memory = objective.loss_memory(shape.labels)
    if memory is None:
        fixed, loss_work = 0, 3 * 4 * min(CHUNK_ELEMENTS, shape.labels * model.config.get_text_config().vocab_size)
    else:
        fixed, loss_work = memory[0], memory[1] + state  # the states of all positions live while the head runs
        saved.each_outside.remove(fixed)  # a gradient itself: none is computed from it
    return Activations(
        tuple(saved.inside), saved.outside, state,
        2 * saved.largest_inside, 2 * max(saved.each_outside) + loss_work, counted=True, fixed=fixed,
    )  # fmt: skip


class SavedBytes:
    """Context that counts the bytes of all storages that autograd saves: in each of `layers`, and outside them.

    A storage counts once, where it is first saved; weights and buffers do not count.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        self.inside = [0] * len(layers)
        self.outside = 0
        self.largest_inside = 0
        self.each_outside = [0]
        self._layers = layers
        self._here: int | None = None
        owned = [*model.parameters(), *model.buffers()]
        self._seen = {tensor.untyped_storage()._cdata for tensor in owned}
        self._kept: list[Any] = []  # keeps storages alive, as a freed one's address could be reused

    def __enter__(self) -> SavedBytes:
        def enter(number: int) -> Callable[..., None]:
            return lambda *_: setattr(self, "_here", number)

        self._handles = [
            handle
            for number, layer in enumerate(self._layers)
            for handle in (
                layer.register_forward_pre_hook(enter(number)),
                layer.register_forward_hook(lambda *_: setattr(self, "_here", None)),
            )
        ]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._kept.clear()

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(storage)
            size = storage.nbytes()
            if self._here is None:
                self.outside += size
                self.each_outside.append(size)
            else:
                self.inside[self._here] += size
                self.largest_inside = max(self.largest_inside, size)
        return tensor


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves: inputs, mask, output, and one fp32 number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, tokens, _ = query.shape
        output = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)  # as the kernels lay it out
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("counting runs no backward pass")


@contextmanager
def _counting_attention(kernel: Kernel) -> Iterator[None]:
    """Context in which transformers has an attention named `COUNTING` that saves the same tensors as `kernel`."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """query (B, heads, T, D), key and value (B, key heads, T, D) -> (B, T, heads, D)."""
        groups, mask = query.shape[1] // key.shape[1], None
        if kernel != "flash_attention_2":
            # Samples are separated by a mask, which sdpa converts to the states' dtype in every layer; with a mask,
            # keys and values are repeated for each query head.
            key, value = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (key, value))
            mask = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2])
        if kernel == "eager":
            scores = query @ key.mT * query.shape[-1] ** -0.5 + mask
            weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), options["dropout"])
            output = weights @ value
        else:
            output = _FusedAttention.apply(query, key, value, mask)
        return output.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[COUNTING] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[COUNTING]


def _by_formula(n_layers: int, hidden: int, vocabulary: int, dtype: torch.dtype, shape: BatchShape) -> Activations:
    state = shape.tokens * hidden * dtype.itemsize
    logits = shape.labels * vocabulary * dtype.itemsize
    layers = (state * LAYER_FORMULA // 2,) * n_layers
    return Activations(layers, 3 * state + logits, state, 8 * state, 2 * logits, counted=False)
