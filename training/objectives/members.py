"""The states that an objective compares: the samples of contrast sets, wherever they were computed.

Shapes: K pooled layers, S segments of this rank's micro-batch, M members of its sets, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.batching.batch import ContrastSets
from training.distributed import exchange_rows


def gather_members(pooled: Sequence[Tensor], sets: ContrastSets) -> Tensor:
    """(K, M, H): this rank's members of its sets, then those of other ranks, in the order of `ContrastSets`.

    Called on all ranks between the forward and the backward pass. Only own members have gradients: every rank computes
    the whole loss of each set in which it has a sample, and the sum over ranks is the gradient of all sets.

    Args:
        pooled: K tensors (S, H).
    """
    own_MKH = torch.stack(list(pooled), dim=1)[sets.own]
    return exchange_rows(own_MKH, sets.sent, sets.sent_to, sets.received_from).transpose(0, 1)
