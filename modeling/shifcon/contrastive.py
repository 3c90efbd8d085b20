"""Pooled content states, and ShifCon's multilingual contrastive loss (arXiv 2410.19453).

`ContentPooling` averages the hidden states of each sample's own words at chosen layers; it serves any objective that
compares samples. `contrastive_loss` is a symmetric InfoNCE over contrast sets of translation pairs
(docs/methods.md, section 1.3).

Shapes: B rows, T tokens, H hidden, S segments (samples), K pooled layers, P translation pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.errors import ModelError
from modeling.layers import membership, state_hook, without_autocast


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


def contrastive_loss(
    pooled: Sequence[Tensor], pairs: Tensor, sets: Tensor, groups: Tensor, content: Tensor, scale: float
) -> Tensor:
    """Symmetric InfoNCE of translation pairs, summed over pairs and averaged over layers.

    Without pairs the loss is a zero that still depends on every pooled state, so all ranks have the same graph.

    Args:
        pooled: K tensors (S, H).
        pairs: (P, 2) int64, the segments (dominant, other) of each pair.
        sets: (P,) contrast set of each pair; its candidates come from its own set only.
        groups: (P,) item of each pair; another pair of the same item is never a negative.
        content: (P, 2) hashes of the two texts; another pair that shares a text is never a negative.
        scale: factor of the cosine similarities.

    Returns:
        A scalar. Each pair's loss is the mean of the two directions' cross entropies.
    """
    states_KSH = torch.stack(list(pooled))
    if len(pairs) == 0:
        return states_KSH.sum() * 0.0
    with without_autocast(states_KSH.device):
        dominant_KPH, other_KPH = F.normalize(states_KSH.float(), dim=-1)[:, pairs].unbind(dim=2)
        logits_KPP = scale * dominant_KPH @ other_KPH.mT
    shared_text = (content[:, None, :, None] == content[None, :, None, :]).flatten(2).any(dim=2)
    excluded = (groups[:, None] == groups) | shared_text | (sets[:, None] != sets)
    excluded.fill_diagonal_(False)  # the pair itself is the positive
    logits_KPP = logits_KPP.masked_fill(excluded, -torch.inf)
    both = logits_KPP.logsumexp(dim=2) + logits_KPP.logsumexp(dim=1)
    return (both / 2 - logits_KPP.diagonal(dim1=1, dim2=2)).sum() / len(pooled)
