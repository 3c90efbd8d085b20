"""Cross-entropy of the LM head in chunks of label positions, whose gradients are computed in the forward pass.

The logits of a chunk exist only until its losses and its share of the gradients are computed, so that neither the
logits of all positions nor their gradients ever exist, and nothing is computed twice (as in Liger Kernel, arXiv
2410.10989, section 3.2). The gradients are those of the weighted sum of the losses; the backward pass only multiplies
them by the gradient of that sum.

Shapes: N label positions, H hidden, V vocabulary; n positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedConfig

CHUNK_ELEMENTS = 1 << 24  # logits of a chunk: 64 MiB in fp32; more if that is less than these positions
# Every chunk reads and writes the gradient of the weight once, however few positions it has. With `hidden size / 4` of
# them, the chunk's two fp32 tensors of logits are half the size of that gradient.
CHUNK_POSITIONS = 512
# Names in configs. Granite divides its logits, Cohere and Falcon-H1 multiply them, Gemma and xLSTM cap them.
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, slots=True)
class LogitChange:
    """What a model does to its logits after the head: `cap * tanh(scale * x / cap)`, or `scale * x` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LogitChange:
        """The change that a model's config states."""
        text = config.get_text_config(decoder=True)
        values = {name: getattr(text, name, None) for name in (*FACTORS, *DIVISORS, *CAPS)}
        given = {name: float(value) for name, value in values.items() if isinstance(value, int | float) and value}
        scale = 1.0
        for name in FACTORS:
            scale *= given.get(name, 1.0)
        for name in DIVISORS:
            scale /= given.get(name, 1.0)
        return cls(scale, next((given[name] for name in CAPS if name in given), None))

    def apply_(self, logits: Tensor) -> None:
        """Changes the head's outputs in place."""
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)

    def backward_(self, gradient: Tensor, logits: Tensor) -> None:
        """Turns the gradient of changed logits into that of the head's outputs, in place; overwrites `logits`."""
        if self.cap is not None:
            gradient.mul_(logits.div_(self.cap).square_().neg_().add_(1))
        if self.scale != 1:
            gradient.mul_(self.scale)


def chunk_positions(vocabulary: int, hidden: int) -> int:
    """The number of label positions of a chunk."""
    return max(1, CHUNK_ELEMENTS // vocabulary, min(CHUNK_POSITIONS, hidden // 4))


def loss_memory(positions: int, weight_VH: Tensor, change: LogitChange) -> tuple[int, int]:
    """Bytes of the weight's gradient until the backward pass, and of the most temporary tensors at once."""
    vocabulary, hidden = weight_VH.shape
    chunk = min(positions, chunk_positions(vocabulary, hidden))
    item = weight_VH.element_size()
    sum_item = item if chunk == positions else 4
    of_chunk = chunk * vocabulary * (8 if item == 4 or change.cap is None else 8 + item)
    if not weight_VH.requires_grad:
        return 0, of_chunk
    rounded = item if sum_item != item else 0
    return sum_item * vocabulary * hidden, max(of_chunk, rounded * vocabulary * hidden)


def chunked_losses(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, ids_N: Tensor, weights_N: Tensor, change: LogitChange
) -> tuple[Tensor, Tensor]:
    """The weighted losses of labels under `change(hidden @ weight.T + bias)`, in fp32.

    Only the sum has a gradient: that of each loss is fixed by its weight when the chunk is computed.

    Args:
        weights_N: fp32; a loss is multiplied by its weight.

    Returns:
        Their sum, a scalar; and each, (N,), without a gradient.
    """
    if torch.is_grad_enabled():
        return _ChunkedLosses.apply(hidden_NH, weight_VH, bias_V, ids_N, weights_N, change)
    losses_N = weights_N.new_empty(len(ids_N))
    for chunk in _chunks(len(ids_N), weight_VH):
        logits_nV = _logits(hidden_NH[chunk], weight_VH, bias_V, change)
        losses_N[chunk] = F.cross_entropy(logits_nV.float(), ids_N[chunk], reduction="none")
        del logits_nV  # before the next chunk's
    losses_N *= weights_N
    return losses_N.sum(), losses_N


class _ChunkedLosses(torch.autograd.Function):
    """Saves the gradients of the sum with respect to states, weight and bias.

    Those of weight and bias are summed over chunks in fp32, as a sum in bf16 would lose more the more chunks there are,
    and are rounded to the weight's number format once, in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        ids_N: Tensor,
        weights_N: Tensor,
        change: LogitChange,
    ) -> tuple[Tensor, Tensor]:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        sum_dtype = weight_VH.dtype if len(ids_N) <= chunk_positions(*weight_VH.shape) else torch.float32
        gradient_NH = torch.empty_like(hidden_NH) if for_hidden else None
        gradient_VH = torch.zeros_like(weight_VH, dtype=sum_dtype) if for_weight else None
        gradient_V = torch.zeros_like(weight_VH[:, 0], dtype=torch.float32) if for_bias else None
        losses_N = weights_N.new_empty(len(ids_N))
        for chunk in _chunks(len(ids_N), weight_VH):
            hidden_nH, ids_n1 = hidden_NH[chunk], ids_N[chunk].unsqueeze(1)
            logits_nV = _logits(hidden_nH, weight_VH, bias_V, change)
            if change.cap is None and not logits_nV.is_cuda:  # only GPUs convert as part of the softmax
                logits_nV = logits_nV.float()
            log_nV = F.log_softmax(logits_nV, dim=-1, dtype=torch.float32)
            losses_N[chunk] = -log_nV.gather(1, ids_n1).squeeze(1)
            gradient_nV = log_nV.exp_()
            gradient_nV.scatter_add_(1, ids_n1, torch.full_like(ids_n1, -1, dtype=torch.float32))
            gradient_nV.mul_(weights_N[chunk].unsqueeze(1))
            change.backward_(gradient_nV, logits_nV)
            del logits_nV, log_nV
            rounded_nV = gradient_nV.to(weight_VH.dtype)
            if gradient_NH is not None:
                torch.mm(rounded_nV, weight_VH, out=gradient_NH[chunk])
            if gradient_V is not None:
                gradient_V += gradient_nV.sum(0)
            if gradient_VH is not None:
                _add_product(gradient_VH, gradient_nV, rounded_nV, hidden_nH)
            del gradient_nV, rounded_nV  # before the next chunk's logits
        losses_N *= weights_N
        ctx.save_for_backward(gradient_NH, gradient_VH, gradient_V)
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype, weight_VH.dtype
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: autograd refuses a second backward pass of the same graph, as its saved tensors were changed.
        each = [
            None if saved is None else saved.mul_(gradient).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*each, None, None, None)


def _chunks(n: int, weight_VH: Tensor) -> Iterator[slice]:
    step = chunk_positions(*weight_VH.shape)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _logits(hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, change: LogitChange) -> Tensor:
    logits_nV = torch.mm(hidden_nH, weight_VH.T) if bias_V is None else torch.addmm(bias_V, hidden_nH, weight_VH.T)
    change.apply_(logits_nV)
    return logits_nV


def _add_product(sum_VH: Tensor, gradient_nV: Tensor, rounded_nV: Tensor, hidden_nH: Tensor) -> None:
    """Adds `gradient.T @ hidden`, in fp32 if the sum is; GPUs multiply bf16 faster, and add the products in fp32."""
    if sum_VH.dtype == rounded_nV.dtype:
        sum_VH.addmm_(rounded_nV.T, hidden_nH)
    elif sum_VH.is_cuda:
        torch.addmm(sum_VH, rounded_nV.T, hidden_nH, out_dtype=torch.float32, out=sum_VH)
    else:
        sum_VH.addmm_(gradient_nV.T, hidden_nH.float())
