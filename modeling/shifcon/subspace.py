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

    def statistics(self, layer: int, without: int | None = None) -> TokenStatistics:
        """The statistics at layer number `layer`, of all sentences or without those of a group."""
        kept = self._kept_RG[0 if without is None else without + 1].bool()
        number = self.tokens[kept].sum().clamp(min=1)
        off_H = self.sums[kept, layer].sum(dim=0) / number
        covariance = self.products[kept, layer].sum(dim=0) / number - torch.outer(off_H, off_H)
        length = self.lengths[kept, layer].sum() / number
        return TokenStatistics(int(number), self.centre[layer] + off_H, covariance, length)

    def means(self, layer: int) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of states, (G + 1, H) each: of all sentences, then without each group."""
        number_R1 = self._numbers_R[:, None]
        off_RH = self._kept_RG @ self.sums[:, layer] / number_R1
        squares_RH = self._kept_RG @ self.products[:, layer].diagonal(dim1=1, dim2=2) / number_R1
        return self.centre[layer] + off_RH, (squares_RH - off_RH.square()).clamp(min=0).sqrt()

    def weighted_covariances(self, layer: int, weight_HH: Tensor) -> Tensor:
        """(G + 1,): the sum over all entries of a matrix times the covariance, of all sentences, then without a group.

        One product of matrices a group is summed, and no covariance is computed.
        """
        of_groups_G = torch.stack([(weight_HH * group_HH).sum() for group_HH in self.products[:, layer]])
        off_RH = self._kept_RG @ self.sums[:, layer] / self._numbers_R[:, None]
        return self._kept_RG @ of_groups_G / self._numbers_R - ((off_RH @ weight_HH) * off_RH).sum(dim=1)

    @property
    def _kept_RG(self) -> Tensor:
        """(G + 1, G) 1 at the groups of each replicate: all, then all but one."""
        everything = torch.ones(1, len(self.tokens), dtype=torch.float64, device=self.tokens.device)
        return torch.cat([everything, 1 - torch.eye(len(self.tokens), dtype=torch.float64, device=self.tokens.device)])

    @property
    def _numbers_R(self) -> Tensor:
        """(G + 1,) tokens of each replicate, at least 1."""
        return (self._kept_RG @ self.tokens).clamp(min=1)


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Of one language at one layer."""

    tokens: int
    mean: Tensor  # (H,)
    covariance: Tensor  # (H, H), divided by the number of tokens
    length: Tensor  # 0-d, mean length of a state


def with_ridge(matrix_HH: Tensor, few: bool) -> Tensor:
    """A covariance whose smallest eigenvalue is above 0: a share of the mean variance is added to every variance.

    The same function takes a derivative by such a covariance to that by the one without the addition.

    Args:
        few: there are no more tokens than dimensions, so that the covariance is singular.
    """
    ridge = (RIDGE_OF_FEW if few else RIDGE) * matrix_HH.diagonal().mean()
    return matrix_HH + ridge * torch.eye(len(matrix_HH), dtype=matrix_HH.dtype, device=matrix_HH.device)


@dataclass(frozen=True, slots=True)
class Riemannian:
    """The distance of two positive definite matrices and its derivatives by each of them."""

    distance: float
    by_a: Tensor  # (H, H)
    by_b: Tensor  # (H, H)


def riemannian(a_HH: Tensor, b_HH: Tensor) -> Riemannian:
    """The affine-invariant distance between two positive definite matrices, from one eigenvalue problem.

    With `b x_i = lambda_i a x_i` and `x_i' a x_j = (i = j)`, the derivative of an eigenvalue is
    `d lambda_i = x_i' (db - lambda_i da) x_i`. The derivatives of equal matrices' distance, which has none, are zeros.

    Raises:
        torch.linalg.LinAlgError: `a_HH` is not positive definite.
    """
    lower = torch.linalg.cholesky(a_HH)
    half = torch.linalg.solve_triangular(lower, b_HH, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    values, directions = torch.linalg.eigh((whitened + whitened.mT) / 2)
    vectors = torch.linalg.solve_triangular(lower.mT, directions, upper=True)
    logs = values.log()
    distance = logs.norm()
    shares = logs / distance if distance > 0 else torch.zeros_like(logs)
    return Riemannian(float(distance), -(vectors * shares) @ vectors.mT, (vectors * (shares / values)) @ vectors.mT)


def principal_directions(covariance_HH: Tensor, k: int) -> Tensor:
    """(H, k): the directions of the k largest variances."""
    # All eigenvectors: SciPy computes some of them alone, and took 28 times as long (H = 640).
    return torch.linalg.eigh(covariance_HH)[1][:, -k:]


def angles(one_Hk: Tensor, other_Hk: Tensor) -> Tensor:
    """(k,) radians, ascending: angles between the spaces of two orthonormal bases.

    Computed from cosines by the singular values of the product of the bases (Björck and Golub 1973).
    """
    return torch.linalg.svdvals(one_Hk.mT @ other_Hk).clamp(max=1).acos()
