"""What the contrastive loss compares: pooled states, centred by language and divided by a standard deviation.

In a pretrained model, a few dimensions with a very large mean and variance decide every cosine, so that translations
and other pairs are equally similar. The pooled state `u` of a sample in a language is therefore normalised by moments
over the sentences of the probe set, at each layer and in each dimension (docs/methods.md, section 1.3):

    u' = (u - mean of u over its language) / standard deviation of u over the dominant language

The moments are constants in the loss. Both sides of a pair are divided by the same numbers, and a constant that is
added to all states of a language, as the shift adds it, drops out.

A parallel corpus is another population than the training samples: its texts are normalised by moments of their own.

Shapes: S sentences (samples), L languages, G populations (the languages, or twice as many with those of a parallel
corpus behind them), K pooled layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from modeling.errors import ModelError
from modeling.layers import membership, without_autocast
from modeling.weights.checked_file import CheckedFormat

SMALLEST_DEVIATION = 0.01  # relative to the median over the dimensions of a layer
Normalise: TypeAlias = Literal["standardised", "centred", "none"]

_FORMAT = CheckedFormat(
    "crosslift pooled moments 2", ("mean", "deviation", "sentences"), "moments of pooled states", "estimate them again"
)


class PooledMoments:
    """Means and sums of squared deviations of pooled states by population, in fp64, batch by batch.

    Batches, and then ranks, are merged by the formulas of Chan, Golub and LeVeque (1983), so that no digits are lost
    where a mean is much larger than the deviations from it.

    Attributes:
        sentences: (G,) their number.
        mean: (G, K, H).
        squares: (G, K, H) sums of squared deviations from the mean.
    """

    def __init__(self, n_populations: int, n_layers: int, hidden_size: int) -> None:
        self.sentences = torch.zeros(n_populations, dtype=torch.float64)
        self.mean = torch.zeros(n_populations, n_layers, hidden_size, dtype=torch.float64)
        self.squares = torch.zeros_like(self.mean)

    def add(self, pooled: Sequence[Tensor], populations: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            pooled: K tensors (S, H).
            populations: (S,) int64; samples of -1 are left out.
        """
        states_SKH = torch.stack([each.detach() for each in pooled], dim=1).double().cpu()
        members_GS = membership(populations.cpu(), len(self.sentences)).double()
        sentences = members_GS.sum(dim=1)
        mean = torch.einsum("gs,skh->gkh", members_GS, states_SKH) / _column(sentences).clamp(min=1)
        from_mean = (states_SKH - mean[populations.cpu()]).square()
        self._merge(sentences, mean, torch.einsum("gs,skh->gkh", members_GS, from_mean))

    def _merge(self, sentences: Tensor, mean: Tensor, squares: Tensor) -> None:
        total = self.sentences + sentences
        share, apart = _column(sentences / total.clamp(min=1)), mean - self.mean
        self.squares += squares + apart.square() * share * _column(self.sentences)
        self.mean += apart * share
        self.sentences = total

    def over_ranks(self, all_sum: Callable[[Tensor], Tensor]) -> PooledMoments:
        """The moments of all ranks together.

        Args:
            all_sum: element-wise sum over ranks.
        """
        merged = PooledMoments(*self.mean.shape)
        merged.sentences = all_sum(self.sentences)
        merged.mean = all_sum(self.sums()) / _column(merged.sentences).clamp(min=1)
        apart = (self.mean - merged.mean).square() * _column(self.sentences)
        merged.squares = all_sum(self.squares + apart)
        return merged

    def sums(self) -> Tensor:
        """(G, K, H) fp64."""
        return self.mean * _column(self.sentences)

    def variance(self) -> Tensor:
        """(G, K, H) of a sentence's state; NaN for a population with fewer than two sentences."""
        return torch.where(_column(self.sentences) > 1, self.squares / _column(self.sentences - 1), torch.nan)


@dataclass(frozen=True, eq=False)
class Normalisation:
    """Moments of pooled states, and their application."""

    languages: tuple[str, ...]
    layers: tuple[int, ...]  # the l of each pooled h[l]
    mean: Tensor  # (G, K, H) fp32
    deviation: Tensor  # (G, K, H) fp32, of the dominant language's texts of the same kind; ones without division
    sentences: Tensor  # (G,) int64

    @classmethod
    def of(
        cls, moments: PooledMoments, languages: Sequence[str], dominant: str, layers: Sequence[int], kind: Normalise
    ) -> Normalisation:
        """From the moments of a probe set.

        Raises:
            ModelError: the states of the dominant language do not vary.
        """
        number = len(languages)
        floored = with_floor(moments.variance()[languages.index(dominant) :: number].sqrt())
        if not (floored > 0).all():
            raise ModelError(f"contrastive.normalise: the pooled states of {dominant!r} do not vary")
        scale = (floored if kind == "standardised" else torch.ones_like(floored)).float()
        return cls(
            tuple(languages), tuple(layers), moments.mean.float(), scale.repeat_interleave(number, dim=0),
            moments.sentences.to(torch.int64),
        )  # fmt: skip

    def apply(self, pooled: Sequence[Tensor], populations: Tensor) -> list[Tensor]:
        """The normalised states, K tensors (S, H) fp32.

        Args:
            pooled: K tensors (S, H), on the device of the moments.
            populations: (S,) int64; states of -1 are divided, but not centred.
        """
        mean_GKH = torch.cat([self.mean, torch.zeros_like(self.mean[:1])])
        with without_autocast(populations.device):
            return [
                (state_SH - mean_GKH[populations, layer]) / self.deviation[populations, layer]
                for layer, state_SH in enumerate(pooled)
            ]

    def to(self, device: torch.device) -> Normalisation:
        """The same on a device: moved once, so that no micro-batch waits for a copy."""
        moved = {name: getattr(self, name).to(device) for name in _FORMAT.tensors}
        return replace(self, **moved)

    def save(self, path: Path) -> None:
        """Writes one safetensors file in place."""
        about = {"languages": self.languages, "layers": self.layers}
        _FORMAT.save(path, about, {name: getattr(self, name).cpu() for name in _FORMAT.tensors})

    @classmethod
    def load(cls, path: Path) -> Normalisation:
        """Reads what `save` wrote.

        Raises:
            ModelError: the file is missing, damaged or not what was saved.
        """
        about, tensors = _FORMAT.load(path)
        values: dict[str, Any] = {**{name: tuple(value) for name, value in about.items()}, **tensors}
        return cls(**values)


def with_floor(deviation: Tensor) -> Tensor:
    """(..., H): deviations of at least SMALLEST_DEVIATION of their median over the dimensions."""
    return deviation.maximum(SMALLEST_DEVIATION * deviation.median(dim=-1, keepdim=True).values)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]
