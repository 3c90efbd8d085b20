"""Distances between the subspaces of two languages at a layer: means and covariances of token states.

The distance between covariances is the affine-invariant Riemannian one between positive definite matrices (Bonnabel
and Sepulchre 2009, arXiv 0807.4462; between languages, Chang et al. 2022, arXiv 2205.10964):

    D(A, B) = sqrt( sum over i of log(lambda_i)^2 ),   lambda_i: eigenvalues of K_A^-1 K_B

(docs/methods.md, section 1.4.) All sums and results are fp64.

Shapes: N layers, G groups of sentences, M tokens, H hidden, k principal directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20  # fp64 numbers of a chunk of states: 8 MiB
RIDGE = 1e-6  # of the mean variance, added to every variance: fp64 rounding, and states that repeat (embeddings)
RIDGE_OF_FEW = 1e-3  # where a language has no more tokens than the states have dimensions


class TokenMoments:
    """Counts, sums and products of one language's token states at N layers, in G groups of its sentences.

    Sums are taken about the mean of the first batch, so that no digits are lost where a mean is much larger than the
    deviations from it. The groups are for a jackknife: what a result would be without some of the sentences.

    Attributes:
        tokens: (G,).
        lengths: (G, N) summed lengths of states.
        sums: (G, N, H) about the centre.
        products: (G, N, H, H) about the centre.
        centre: (N, H).
    """

    def __init__(self, n_groups: int, n_layers: int, hidden_size: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens, self.lengths = zeros(n_groups), zeros(n_groups, n_layers)
        self.sums, self.centre = zeros(n_groups, n_layers, hidden_size), zeros(n_layers, hidden_size)
        self.products = zeros(n_groups, n_layers, hidden_size, hidden_size)

    def add(self, layer: int, states_MH: Tensor, groups: Tensor) -> None:
        """Adds the states of one forward pass at layer number `layer` of the N.

        Args:
            groups: (M,) int64 in range(G), each token's group.
        """
        if not len(states_MH):
            return
        if layer == 0:
            self.tokens += torch.bincount(groups, minlength=len(self.tokens))
        if not self.centre[layer].any():
            self.centre[layer] = states_MH.double().mean(dim=0)
        rows = max(CHUNK_ELEMENTS // states_MH.shape[1], 1)
        for states, of in zip(states_MH.split(rows), groups.split(rows), strict=True):
            exact = states.double()
            self.lengths[:, layer].index_add_(0, of, exact.norm(dim=1))
            exact -= self.centre[layer]
            self.sums[:, layer].index_add_(0, of, exact)
            for group in of.unique().tolist():
                chosen = exact[of == group]
                self.products[group, layer].addmm_(chosen.T, chosen)

    def over_ranks(self, all_sum: Callable[[Tensor], Tensor]) -> TokenMoments:
        """The moments of all ranks together.

        Args:
            all_sum: element-wise sum over ranks.
        """
        n_groups, n_layers, hidden_size = self.sums.shape
        merged = TokenMoments(n_groups, n_layers, hidden_size, self.sums.device)
        merged.tokens, merged.lengths = all_sum(self.tokens), all_sum(self.lengths)
        sums = all_sum(self.sums + self.tokens[:, None, None] * self.centre)
        merged.centre = sums.sum(dim=0) / merged.tokens.sum().clamp(min=1)
        merged.sums = sums - merged.tokens[:, None, None] * merged.centre
        for layer in range(n_layers):  # one layer at a time: the products are the largest
            moved = self.centre[layer] - merged.centre[layer]
            crossed_GHH = self.sums[:, layer, :, None] * moved
            own = self.tokens[:, None, None] * torch.outer(moved, moved)
            merged.products[:, layer] = all_sum(self.products[:, layer] + crossed_GHH + crossed_GHH.mT + own)
        return merged

    def replicates(self, layer: int) -> list[TokenStatistics]:
        """The statistics at layer number `layer` of all sentences, then those without each group, G + 1 in all."""
        kept = ~torch.eye(len(self.tokens), dtype=torch.bool, device=self.tokens.device)
        return [self._statistics(layer, each) for each in (torch.ones_like(kept[0]), *kept)]

    def _statistics(self, layer: int, kept_G: Tensor) -> TokenStatistics:
        number = self.tokens[kept_G].sum().clamp(min=1)
        off_H = self.sums[kept_G, layer].sum(dim=0) / number
        covariance = self.products[kept_G, layer].sum(dim=0) / number - torch.outer(off_H, off_H)
        length = self.lengths[kept_G, layer].sum() / number
        return TokenStatistics(int(number), self.centre[layer] + off_H, covariance, length)


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Of one language at one layer."""

    tokens: int
    mean: Tensor  # (H,)
    covariance: Tensor  # (H, H), divided by the number of tokens
    length: Tensor  # 0-d, mean length of a state


def with_ridge(covariance_HH: Tensor, few: bool) -> Tensor:
    """A covariance whose smallest eigenvalue is above 0: a share of the mean variance is added to every variance.

    Args:
        few: there are no more tokens than dimensions, so that the covariance is singular.
    """
    ridge = RIDGE_OF_FEW if few else RIDGE
    return covariance_HH + ridge * covariance_HH.diagonal().mean() * torch.eye(
        len(covariance_HH), dtype=covariance_HH.dtype, device=covariance_HH.device
    )


def riemannian_distance(a_HH: Tensor, b_HH: Tensor) -> Tensor:
    """0-d: the affine-invariant distance between two positive definite matrices; differentiable.

    Raises:
        torch.linalg.LinAlgError: `a_HH` is not positive definite.
    """
    lower = torch.linalg.cholesky(a_HH)
    half = torch.linalg.solve_triangular(lower, b_HH, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    return torch.linalg.eigvalsh((whitened + whitened.mT) / 2).log().norm()


def principal_angles(a_HH: Tensor, b_HH: Tensor, k: int) -> Tensor:
    """(k,) radians, ascending, on the CPU: angles between the spaces of the k largest principal directions.

    Computed from cosines by the singular values of the product of the bases (Björck and Golub 1973).
    """
    last = len(a_HH) - 1
    bases = [  # SciPy computes these eigenvectors alone
        torch.from_numpy(scipy.linalg.eigh(each.cpu().numpy(), subset_by_index=[last - k + 1, last])[1])
        for each in (a_HH, b_HH)
    ]
    return torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(max=1).acos()
