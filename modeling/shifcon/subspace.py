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

    def without(self, group: int | None) -> TokenStatistics:
        """The statistics of all sentences but those of a group; None: of all."""
        kept = torch.ones_like(self.tokens)
        if group is not None:
            kept[group] = 0
        number = (kept @ self.tokens).clamp(min=1)
        off_NH = torch.einsum("g,gnh->nh", kept, self.sums) / number
        products_NHH = torch.einsum("g,gnhj->nhj", kept, self.products) / number
        covariance = products_NHH - off_NH[:, :, None] * off_NH[:, None, :]
        return TokenStatistics(int(number), self.centre + off_NH, covariance, kept @ self.lengths / number)


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Of one language at N layers."""

    tokens: int
    mean: Tensor  # (N, H)
    covariance: Tensor  # (N, H, H), divided by the number of tokens
    length: Tensor  # (N,) mean length of a state


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
    """(k,) radians, ascending: the angles between the spaces of the k largest principal directions of two covariances.

    Computed from cosines by the singular values of the product of the bases (Björck and Golub 1973).
    """
    bases = [torch.linalg.eigh(each).eigenvectors[:, -k:] for each in (a_HH, b_HH)]
    return torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(max=1).acos()
