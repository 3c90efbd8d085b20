"""Restricts the LM head to label positions in training, and takes the losses of these labels.

Shapes: B rows, T tokens, H hidden, N label positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from modeling.errors import ModelError
from modeling.lm_head.chunked_losses import CHUNK_ELEMENTS, LogitChange, chunked_losses, loss_memory


@dataclass(frozen=True, slots=True)
class LabelLosses:
    """Cross-entropy of labels in nats, multiplied by their weights, fp32."""

    sum: Tensor  # scalar; gradients come from it alone
    each: Tensor  # (N,), without gradients


class LabelHead:
    """Hooks on the model and its output embedding that, inside `select()`, drop all but the chosen positions.

    The hooks touch no parameter, so tied and sharded heads work. What the model does to logits after the head
    (scaling, capping) applies to the chosen ones. The model's logits become (1, N, V).
    """

    def __init__(self, model: PreTrainedModel, change: LogitChange | None = None) -> None:
        """Installs the hooks. Called before the engine is built, whose hooks must see what these return.

        Args:
            change: what the model does to its logits. With it, `losses` are taken in chunks of positions; None: the
                model itself computes the logits of all positions. `build_label_head` chooses.

        Raises:
            ModelError: the model has no output embedding.
        """
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ModelError(f"{type(model).__name__} has no output embedding: it is not a language model")
        self.change = change
        self._head: Any = head  # a Linear, if there is a `change`
        self._positions: Tensor | None = None
        self._reached = False
        self._sum: Tensor | None = None
        self._handles = [
            head.register_forward_pre_hook(self._choose),
            model.register_forward_hook(self._replace_logits),
        ]

    def losses(self, forward: Callable[[], Any], positions: Tensor, ids: Tensor, weights: Tensor) -> LabelLosses:
        """The losses of labels in one forward pass.

        Args:
            forward: runs the model's forward pass once and returns its outputs.
            positions: (N,) int64, flat indices into B*T of the states that predict the labels; N may be 0.
            ids: (N,) int64, the labels.
            weights: (N,) fp32.
        """
        if self.change is None:
            with self.select(positions):
                logits_1NV = forward().logits
            losses = token_losses(logits_1NV[0], ids) * weights
            return LabelLosses(losses.sum(), losses.detach())
        with self.select(positions), self._chunked(ids, weights, self.change) as taken:
            total = forward().logits
        return LabelLosses(total, taken[0])

    @contextmanager
    def select(self, positions: Tensor) -> Iterator[None]:
        """Inside, forward passes compute logits of the given positions only.

        Args:
            positions: (N,) int64, flat indices into B*T; N may be 0.

        Raises:
            ModelError: on leaving, if no forward pass reached the head.
        """
        self._positions, self._reached = positions, False
        try:
            yield
        finally:
            self._positions = None
        if not self._reached:
            raise ModelError("no forward pass called the model's output embedding, so no label was selected")

    def loss_memory(self, positions: int) -> tuple[int, int] | None:
        """`chunked_losses.loss_memory` of a micro-batch; None without chunks."""
        return None if self.change is None else loss_memory(positions, self._head.weight, self.change)

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def _chunked(self, ids: Tensor, weights: Tensor, change: LogitChange) -> Iterator[list[Tensor]]:
        """Inside, one call of the head computes losses instead of logits; yields a list that gets each of them.

        Under ZeRO-3 a call gathers the head's weight, and only inside it the weight is whole. So all chunks are in one
        call. Its sum becomes the model's `logits`, past what the model does to logits: the engine's backward pass
        begins at the model's outputs.
        """
        head = self._head
        losses: list[Tensor] = []

        def forward(hidden_1NH: Tensor) -> tuple[Tensor, Tensor]:
            return chunked_losses(hidden_1NH[0], head.weight, head.bias, ids, weights, change)

        def take(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> Tensor:
            self._sum, each = output
            losses.append(each)
            return each.new_empty(1, len(each), 0)  # to the model: logits without content

        head.forward = forward
        handle = head.register_forward_hook(take)  # after the hooks of the engine, which see the sum
        try:
            yield losses
        finally:
            handle.remove()
            del head.forward
            self._sum = None

    def _choose(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._positions is None:
            return None
        self._reached = True
        hidden_BTH = args[0]
        return hidden_BTH.flatten(0, 1)[self._positions].unsqueeze(0), *args[1:]

    def _replace_logits(self, _: nn.Module, __: Any, outputs: Any) -> Any:
        if self._sum is not None:
            outputs.logits = self._sum
        return outputs


def token_losses(logits_NV: Tensor, label_ids_N: Tensor) -> Tensor:
    """(N,) fp32: the cross entropy of each label under its logits, in nats.

    Logits of a lower precision are converted to fp32 in chunks, and again in the backward pass, so that fp32 logits of
    all N x V never exist at once. The chunks change no bit of the result.
    """
    rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[-1])
    if len(label_ids_N) <= rows:
        return _losses(logits_NV, label_ids_N)
    # split, not slices: its backward pass joins the chunks' gradients once instead of adding full-size ones
    chunks = zip(logits_NV.split(rows), label_ids_N.split(rows), strict=True)
    return torch.cat(
        [
            checkpoint(_losses, logits, labels, use_reentrant=False, preserve_rng_state=False)
            for logits, labels in chunks
        ]
    )


def _losses(logits_NV: Tensor, label_ids_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), label_ids_N, reduction="none")
