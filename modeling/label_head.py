"""Restricts the LM head to label positions in training, and takes their losses in fp32 in chunks.

Shapes: B rows, T tokens, H hidden, N label positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from modeling.errors import ModelError

CHUNK_ELEMENTS = 1 << 24  # fp32 logits that exist at once: 64 MiB


class LabelHead:
    """A hook on the model's output embedding that, inside `select()`, drops all but the chosen positions.

    The hook touches no parameter, so tied and sharded heads work. What the model does to logits after the head
    (scaling, capping) applies to the chosen ones. The model's logits become (1, N, V).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Installs the hook.

        Raises:
            ModelError: the model has no output embedding.
        """
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ModelError(f"{type(model).__name__} has no output embedding: it is not a language model")
        self._positions: Tensor | None = None
        self._reached = False
        self._handle = head.register_forward_pre_hook(self._choose)

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

    def remove(self) -> None:
        """Removes the hook from the model."""
        self._handle.remove()

    def _choose(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._positions is None:
            return None
        self._reached = True
        hidden_BTH = args[0]
        return hidden_BTH.flatten(0, 1)[self._positions].unsqueeze(0), *args[1:]


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
