"""Per-step loss and count accumulators.

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

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class StepSums:
    """Sums over this rank's micro-batches of one step, on the device until a step logs."""

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
        reported = [term.sum if term.reported is None else term.reported for term in terms.terms.values()]
        self.terms += torch.stack([each.detach().double() for each in reported])
        self.denominators = {name: term.denominator for name, term in terms.terms.items()}
        self.shares.append(share.detach().float())

    def bad_micro_batches(self) -> list[int]:
        """Indices of the micro-batches whose loss is not finite; waits for the device."""
        return (~self._finite()).nonzero().flatten().tolist()

    def vector(self) -> Tensor:
        """Number of micro-batches whose loss is not finite, and all sums, (1 + 2 L + M,), to be summed over ranks."""
        bad = (~self._finite()).sum(dtype=torch.float64)[None]
        return torch.cat([bad, self.losses, self.labels, self.terms])

    def _finite(self) -> Tensor:
        return torch.isfinite(torch.stack(self.shares))


def split_sums(vector: Sequence[float], n_languages: int) -> tuple[bool, Floats, Floats, Floats]:
    """Of the sum of `StepSums.vector()` over ranks: whether a loss is not finite, then losses, labels and terms."""
    n_bad, *rest = vector
    losses, labels, terms = np.split(np.array(rest), [n_languages, 2 * n_languages])
    return n_bad > 0 or not np.isfinite(losses).all(), losses, labels, terms


def mean_loss(losses: Floats, labels: Floats) -> float:
    """Loss per label, from sums by language."""
    return float(torch.from_numpy(losses).sum() / torch.from_numpy(labels).sum().clamp(min=1))


def memory() -> Mapping[str, float]:
    """Peak memory of this rank so far, GiB."""
    metrics = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        metrics["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics
