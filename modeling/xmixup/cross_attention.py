"""Cross-attention of X-Mixup (arXiv 2205.04182, section 3.2): its weights, and the entropy of a pair's attention.

The entropy is low where the two texts align well; the mixing ratio depends on it (docs/methods.md, section 2.1). All
arithmetic is in fp32 at least, whatever the model's number format.

Shapes: scores are (n, heads, T target, T source), for n pairs.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

EntropyName = Literal["true", "authors"]
ENTROPIES: tuple[str, ...] = get_args(EntropyName)
NEVER = torch.finfo(torch.float32).min  # finite, so that a row without any key gives no NaN


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scaled_scores(query: Tensor, key: Tensor) -> Tensor:
    """(n, heads, Tt, Ts): `q k^T / sqrt(head size)`, unmasked, of (n, heads, T, head size) each."""
    return wide(query) @ wide(key).mT * query.shape[-1] ** -0.5


def attention_weights(scores: Tensor, source_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the valid source tokens, and its logarithm; source_valid: (n, Ts) bool."""
    logs = scores.masked_fill(~source_valid[:, None, None, :], NEVER).log_softmax(dim=-1)
    return logs.exp(), logs


def pair_entropy(
    scores: Tensor, over_source: tuple[Tensor, Tensor], target_valid: Tensor, source_valid: Tensor, form: EntropyName
) -> Tensor:
    """(n,): the entropy of attention over the source plus that over the target (by the transposed scores).

    Args:
        scores: (n, heads, Tt, Ts), unmasked.
        over_source: the `attention_weights` of these scores.
        target_valid: (n, Tt) bool.
        source_valid: (n, Ts) bool.
        form: "true" gives entropies in nats, averaged over heads and valid query positions; padding changes nothing.
            "authors" is what the authors' code (yhy1117/X-Mixup) computes: the cross entropy of each softmax over valid
            keys and the softmax of the scores with those of padding set to 0, averaged over heads and all query
            positions. Padding is part of that second softmax and of the mean, so it changes the result.
    """
    over_target = attention_weights(scores.mT, target_valid)
    if form == "true":
        return _true_entropy(*over_source, target_valid) + _true_entropy(*over_target, source_valid)
    return _authors_entropy(scores, over_source[0], source_valid) + _authors_entropy(
        scores.mT, over_target[0], target_valid
    )


def _true_entropy(weights: Tensor, logs: Tensor, query_valid: Tensor) -> Tensor:
    entropies = -(weights * logs).sum(dim=-1).mean(dim=1)  # (n, queries)
    counted = query_valid.to(entropies.dtype)
    return (entropies * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _authors_entropy(scores: Tensor, weights: Tensor, key_valid: Tensor) -> Tensor:
    logits = scores * key_valid[:, None, None, :]
    return (logits.logsumexp(dim=-1) - (weights * logits).sum(dim=-1)).mean(dim=(1, 2))
