"""The multilingual contrastive loss of ShifCon (arXiv 2410.19453, section 3.3), inside the one forward pass.

In: a forward pass whose tokens are marked with segments (samples) and content. Out: each segment's mean
content state at every layer of the area, after the shift, and the symmetric InfoNCE over the plan's contrast
sets. Next: the trainer's objectives, which add it to the language-model loss.

Shapes: B rows, T tokens, H hidden, S segments, K layers of the area, P translation pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from modeling.errors import ModelError
from modeling.layers import membership, state_hook


class ContentPooling:
    """Mean content state per segment at `h[toward] .. h[back-1]`. Make it AFTER the model's LanguageShift:
    hooks run in the order they were made, and the loss is taken on shifted states."""

    def __init__(self, model: nn.Module, toward: int, back: int) -> None:
        """Installs the hooks; raises ModelError for a layer that does not exist."""
        self.area = (toward, back)
        self._members_SN: Tensor | None = None  # fp32, of B*T tokens
        self._sizes_S1 = torch.ones(0, 1)
        self._pooled: list[Tensor] = []
        self._handles = [state_hook(model, layer, self._pool) for layer in range(toward, back)]

    @contextmanager
    def batch(self, segment_ids: Tensor, content: Tensor, n_segments: int) -> Iterator[list[Tensor]]:
        """Yields a list that ONE forward pass inside fills with (S, H) fp32, one per layer of the area.

        segment_ids: (B, T) int64 in range(n_segments), -1 padding. content: (B, T) bool. A segment
        without content, as in an idle micro-batch, pools to zeros.
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
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _pool(self, hidden_BTH: Tensor) -> None:
        if self._members_SN is None:
            return
        if len(self._pooled) == len(self._handles):
            raise ModelError("a second forward pass inside one content-pooling batch: open a batch for each")
        with maybe_autocast(hidden_BTH.device.type, enabled=False):
            self._pooled.append(self._members_SN @ hidden_BTH.flatten(0, 1).float() / self._sizes_S1)


def contrastive_loss(
    pooled: Sequence[Tensor], pairs: Tensor, sets: Tensor, groups: Tensor, content: Tensor, scale: float
) -> Tensor:
    """Symmetric InfoNCE of translation pairs, SUMMED over pairs and averaged over layers; a scalar.

    pooled: K of (S, H). pairs: (P, 2) int64 segments (dominant, other). sets: (P,) contrast set of each pair;
    candidates come from its own set only. groups: (P,) item of each pair, content: (P, 2) hashes of the two
    texts: another pair of the same item, or with a text in common, is never a negative. scale multiplies
    the cosine similarities. Each pair's loss is the mean of the two directions' cross-entropies.

    Without pairs it is a zero that still reaches every pooled state, so every rank has one graph.
    """
    states_KSH = torch.stack(list(pooled))
    if len(pairs) == 0:
        return states_KSH.sum() * 0.0
    with maybe_autocast(states_KSH.device.type, enabled=False):
        dominant_KPH, other_KPH = F.normalize(states_KSH.float(), dim=-1)[:, pairs].unbind(dim=2)
        logits_KPP = scale * dominant_KPH @ other_KPH.mT
    shared_text = (content[:, None, :, None] == content[None, :, None, :]).flatten(2).any(dim=2)
    no_negative = (groups[:, None] == groups) | shared_text | (sets[:, None] != sets)
    no_negative.fill_diagonal_(False)  # the pair itself is the positive
    logits_KPP = logits_KPP.masked_fill(no_negative, -torch.inf)
    both = logits_KPP.logsumexp(dim=2) + logits_KPP.logsumexp(dim=1)
    return (both / 2 - logits_KPP.diagonal(dim1=1, dim2=2)).sum() / len(pooled)
