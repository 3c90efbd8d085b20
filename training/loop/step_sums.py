"""Per-step loss and count accumulators, and the metrics computed from them.

Shapes: N label positions, L languages, M loss terms.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.objectives.base import LossTerms
from training.objectives.scaling import StepTotals


@dataclass(slots=True)
class StepSums:
    """Sums over this rank's micro-batches of one step, on the device until the end of the step."""

    losses: Tensor  # (L,) fp64, sum of label losses
    labels: Tensor  # (L,) fp64, number of labels
    terms: Tensor  # (M,) fp64, sum of each term
    denominators: dict[str, str] = field(default_factory=dict)  # term: name of its denominator
    shares: list[Tensor] = field(default_factory=list)  # loss share of each micro-batch

    @classmethod
    def zeros(cls, n_languages: int, n_terms: int, device: torch.device) -> StepSums:
        zeros = torch.zeros(2 * n_languages + n_terms, dtype=torch.float64, device=device)
        return cls(*zeros.split([n_languages, n_languages, n_terms]))

    def add(self, terms: LossTerms, share: Tensor) -> None:
        """Adds the loss terms of one micro-batch."""
        self.losses.index_add_(0, terms.label_languages, terms.label_losses.detach().double())
        self.labels.index_add_(0, terms.label_languages, terms.label_weights.double())
        self.terms += torch.stack([term.sum.detach().double() for term in terms.terms.values()])
        self.denominators = {name: term.denominator for name, term in terms.terms.items()}
        self.shares.append(share.detach().float())

    def bad_micro_batches(self) -> list[int]:
        """Indices of the micro-batches whose loss is not finite."""
        return (~torch.isfinite(torch.stack(self.shares))).nonzero().flatten().tolist()

    def vector(self) -> Tensor:
        """All sums, (2 L + M,), for the reduction over ranks."""
        return torch.cat([self.losses, self.labels, self.terms])

    def label_counts(self, reduced: Tensor) -> npt.NDArray[np.int64]:
        """Number of labels over all ranks, (L,), from the reduced `vector()`."""
        return reduced[len(self.losses) : len(self.losses) + len(self.labels)].long().cpu().numpy()

    def metrics(self, reduced: Tensor, totals: StepTotals, languages: Sequence[str]) -> dict[str, float]:
        """Means over all ranks from the reduced `vector()`: loss per label, in total and by language; each loss term.

        A term is divided by its own denominator.
        """
        losses, labels, terms = reduced.split([len(languages), len(languages), len(self.terms)])
        metrics = {"train/loss": float(losses.sum() / labels.sum().clamp(min=1))}
        for (name, count), value in zip(self.denominators.items(), terms.tolist(), strict=True):
            if name != "sft":  # it is train/loss
                metrics[f"train/{name}"] = value / totals.denominator(count)
        for number, language in enumerate(languages):
            if labels[number]:
                metrics[f"train/loss/{language}"] = float(losses[number] / labels[number])
        return metrics


@dataclass(frozen=True, slots=True)
class StepRead:
    """What all ranks together read for a step."""

    tokens: Tensor  # (L,) fp64, processed tokens by language
    slots: npt.NDArray[np.int64]  # (loader.OUTCOMES, L), outcomes of the step's slots
    overlong: int  # slots left empty by samples longer than data.sequence_length
    fingerprint: int  # identifies the set of samples, independent of their distribution over ranks
    dropped_pairs: int  # translations not paired because both texts are identical

    def metrics(self, languages: Sequence[str]) -> dict[str, float]:
        """Token shares of the languages, counts, and the fingerprint of the step's data."""
        total = self.tokens.sum().clamp(min=1)
        shares = {f"train/token_share/{name}": float(self.tokens[n] / total) for n, name in enumerate(languages)}
        counts = {"data/overlong": float(self.overlong), "data/dropped_pairs": float(self.dropped_pairs)}
        return {"data/step_fingerprint": float(self.fingerprint), **counts, **shares}


def memory() -> Mapping[str, float]:
    """Peak memory of this rank so far, GiB."""
    metrics = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        metrics["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics
