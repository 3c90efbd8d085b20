"""Pooled content states, and ShifCon's multilingual contrastive loss (arXiv 2410.19453).

`ContentPooling` averages the hidden states of each sample's own words at chosen layers; it serves any objective that
compares samples. `contrastive_losses` is a symmetric InfoNCE over contrast sets of translation pairs
(docs/methods.md, section 1.3).

Shapes: B rows, T tokens, H hidden, S segments (samples), K pooled layers; M samples in C contrast sets of P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.errors import ModelError
from modeling.layers import hidden_size, membership, state_hook, without_autocast


class ContentPooling:
    """Hooks that average the content states of each segment at chosen layers during the model's forward pass.

    Install it after the model's `LanguageShift` to pool shifted states: hooks at the same layer run in the order of
    their installation.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int]) -> None:
        """Installs the hooks.

        Args:
            layers: numbers `l` of the states `h[l]` to pool (`modeling.layers`), such as `range(toward, back)` for a
                layer area or `[l]` for one layer.

        Raises:
            ModelError: `layers` is empty, or a layer does not exist.
        """
        self.layers = tuple(sorted(set(layers)))
        if not self.layers:
            raise ModelError("content pooling: no layers to pool at; name at least one")
        self._members_SN: Tensor | None = None  # fp32, of B*T tokens
        self._sizes_S1 = torch.ones(0, 1)
        self._pooled: list[Tensor] = []
        self._handles = [state_hook(model, layer, self._pool) for layer in self.layers]
        self.hidden_size = hidden_size(model)

    @contextmanager
    def batch(self, segment_ids: Tensor, content: Tensor, n_segments: int) -> Iterator[list[Tensor]]:
        """Pools the one forward pass that runs inside.

        Args:
            segment_ids: (B, T) int64 in range(n_segments); -1 at padding.
            content: (B, T) bool, the tokens that are averaged.
            n_segments: S. A segment without content, as in an idle micro-batch, pools to zeros.

        Yields:
            A list that the forward pass fills with K tensors (S, H) in fp32, in ascending order of layers.

        Raises:
            ModelError: a second forward pass runs inside.
        """
        members = membership(segment_ids.masked_fill(~content, -1), n_segments)
        self._sizes_S1 = members.sum(dim=1, keepdim=True).clamp(min=1)
        self._members_SN = members.float()
        self._pooled = []
        try:
            yield self._pooled
        finally:
            self._members_SN = None

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _pool(self, hidden_BTH: Tensor) -> None:
        if self._members_SN is None:
            return
        if len(self._pooled) == len(self._handles):
            raise ModelError("a second forward pass inside one content-pooling batch: open a batch for each")
        with without_autocast(hidden_BTH.device):
            self._pooled.append(self._members_SN @ hidden_BTH.flatten(0, 1).float() / self._sizes_S1)


def pair_cosines(members_KMH: Tensor, pairs: Tensor) -> Tensor:
    """(K, C, P, P): cosines between each pair's dominant side (rows) and the other side of each pair (columns).

    Args:
        members_KMH: (K, M, H) pooled states of the sets' samples, normalised or not.
        pairs: (C, P, 2) int64, the members (dominant, other) of each pair.
    """
    with without_autocast(members_KMH.device):
        dominant_KCPH, other_KCPH = F.normalize(members_KMH.float(), dim=-1)[:, pairs].unbind(dim=3)
        return dominant_KCPH @ other_KCPH.mT


def contrastive_losses(cosines_KCPP: Tensor, excluded: Tensor, scale: float) -> Tensor:
    """Symmetric InfoNCE of translation pairs, summed over the pairs of each set and averaged over layers.

    Args:
        cosines_KCPP: `pair_cosines`.
        excluded: (C, P, P) bool, combinations of a pair's dominant side with another's other side that are no
            negatives. A pair of which all others are excluded has a loss of 0.
        scale: factor of the cosines.

    Returns:
        (C,). Each pair's loss is the mean of the two directions' cross entropies.
    """
    logits_KCPP = (scale * cosines_KCPP).masked_fill(excluded, -torch.inf)
    both_KCP = logits_KCPP.logsumexp(dim=3) + logits_KCPP.logsumexp(dim=2)
    return (both_KCP / 2 - logits_KCPP.diagonal(dim1=2, dim2=3)).sum(dim=2).mean(dim=0)


class Retrieval(NamedTuple):
    """How many of each set's pairs are found among their candidates. Pairs with one candidate are not counted."""

    found: Tensor  # (C,) fp32
    by_chance: Tensor  # (C,) fp32, the expected number for similarities that tell nothing
    pairs: Tensor  # (C,) fp32, the number counted


def retrieval(cosines_KCPP: Tensor, excluded: Tensor) -> Retrieval:
    """Whether a pair's other side is most similar to its own dominant side, by the mean cosine over the layers.

    Args:
        cosines_KCPP, excluded: as for `contrastive_losses`.
    """
    mean_CPP = cosines_KCPP.detach().mean(dim=0).masked_fill(excluded, -torch.inf)
    candidates_CP = (~excluded).sum(dim=1)  # dominant sides for each other side
    counted_CP = candidates_CP > 1
    own_CP, itself = mean_CPP.diagonal(dim1=1, dim2=2), torch.eye(mean_CPP.shape[2], device=mean_CPP.device).bool()
    found_CP = (mean_CPP.masked_fill(itself, -torch.inf) < own_CP[:, None]).all(dim=1) & counted_CP
    by_chance_CP = counted_CP / candidates_CP
    return Retrieval(found_CP.float().sum(dim=1), by_chance_CP.sum(dim=1), counted_CP.float().sum(dim=1))
