"""X-Mixup's consistency loss between the two sides of a pair (docs/methods.md, section 2.2).

In: last hidden states and logits of a stacked batch, targets first, then their sources. Out: one number a pair.
Next: `training/objectives/encoders.py` adds their mean to the task losses.

Shapes: R rows (n targets, then n sources, in paired batches), T tokens, H hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from modeling.layers import without_autocast


def content_mask(input_ids_RT: Tensor, attention_mask_RT: Tensor, special_ids: Iterable[int]) -> Tensor:
    """(R, T) bool: valid tokens other than the given special ones (start, separators, end)."""
    special = torch.tensor(sorted(special_ids), dtype=input_ids_RT.dtype, device=input_ids_RT.device)
    return (attention_mask_RT != 0) & ~torch.isin(input_ids_RT, special)


def representations(hidden_RTH: Tensor, content_RT: Tensor | None = None) -> Tensor:
    """(R, H) fp32: each row's first token or, given `content_RT` (bool), the mean over its content tokens.

    The first is for classification, the mean for tagging and question answering. A row without content, as in
    an idle batch, gives zeros.
    """
    if content_RT is None:
        return hidden_RTH[:, 0].float()
    weights = content_RT.float()
    with without_autocast(hidden_RTH.device):
        sums = (weights.unsqueeze(1) @ hidden_RTH.float()).squeeze(1)
    return sums / weights.sum(dim=1, keepdim=True).clamp(min=1)


def consistency(representations_RH: Tensor, n_pairs: int, logits_RC: Tensor | None = None) -> Tensor:
    """(n,) fp32: how far the two sides of each pair are from each other.

    The mean over H of the squared difference of the representations. With `logits_RC`, for classification, also
    KL(source || target) of the two predictions, summed over classes, in nats. Gradients reach both sides.
    """
    target, source = _sides(representations_RH.float(), n_pairs)
    distance = (target - source).square().mean(dim=1)
    if logits_RC is None:
        return distance
    target_log, source_log = _sides(logits_RC.float().log_softmax(dim=1), n_pairs)
    return distance + (source_log.exp() * (source_log - target_log)).sum(dim=1)


def _sides(stacked: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
    return stacked[:n_pairs], stacked[n_pairs : 2 * n_pairs]
