"""Consistency losses of X-Mixup (arXiv 2205.04182, section 3.3): distances between the two sides of a pair.

Batches are stacked, targets first, then their sources (docs/methods.md, section 2.2).

Shapes: R rows (n targets, then n sources, in paired batches), T tokens, H hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from modeling.layers import without_autocast


def content_mask(input_ids_RT: Tensor, attention_mask_RT: Tensor, special_ids: Iterable[int]) -> Tensor:
    """(R, T) bool: valid tokens except the given special ones (start, separators, end)."""
    special = torch.tensor(sorted(special_ids), dtype=input_ids_RT.dtype, device=input_ids_RT.device)
    return (attention_mask_RT != 0) & ~torch.isin(input_ids_RT, special)


def representations(hidden_RTH: Tensor, content_RT: Tensor | None = None) -> Tensor:
    """(R, H) fp32: the state of each row's first token or, given `content_RT` (bool), the mean over its content tokens.

    Classification uses the first token, tagging and question answering the mean. A row without content, as in an idle
    batch, gives zeros.
    """
    if content_RT is None:
        return hidden_RTH[:, 0].float()
    weights = content_RT.float()
    with without_autocast(hidden_RTH.device):
        sums = (weights.unsqueeze(1) @ hidden_RTH.float()).squeeze(1)
    return sums / weights.sum(dim=1, keepdim=True).clamp(min=1)


def consistency(representations_RH: Tensor, n_pairs: int, logits_RC: Tensor | None = None) -> Tensor:
    """(n,) fp32: the distance between the two sides of each pair.

    It is the mean over H of the squared difference of the representations. With `logits_RC`, for classification,
    KL(source || target) of the two predictions is added, summed over classes, in nats. Both sides get gradients.
    """
    target, source = _sides(representations_RH.float(), n_pairs)
    distance = (target - source).square().mean(dim=1)
    if logits_RC is None:
        return distance
    target_log, source_log = _sides(logits_RC.float().log_softmax(dim=1), n_pairs)
    return distance + (source_log.exp() * (source_log - target_log)).sum(dim=1)


def _sides(stacked: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
    return stacked[:n_pairs], stacked[n_pairs : 2 * n_pairs]
