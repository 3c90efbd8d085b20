"""Similarity of two languages' states: linear CKA of translations, and the distance between centroids.

Row i of one side belongs to row i of the other (sentences and their translations). Rows come batch by batch; all
results are fp64.

Shapes: N rows (pairs), X and Y the widths of the two sides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modeling.errors import ModelError

CHUNK_ROWS = 4096  # fp64 copies that exist at once
# Variation below this share of the mean squared length counts as rounding: repeated fp32 states vary by less.
NO_VARIATION = 1e-12


class CentroidDistance(NamedTuple):
    """0-d fp64 tensors. `relative` is a length without unit, `cosine` lies in 0..2."""

    relative: Tensor
    cosine: Tensor


class _Side(NamedTuple):
    """The mean relative to the centre (X,), and the sum of squared lengths about the centre (0-d)."""

    off: Tensor
    total: Tensor


class _Products:
    """Sums over rows of products of two sides, `a` (N, X) and `b` (N, Y), each taken about a fixed centre."""

    def __init__(self, width_a: int, width_b: int, device: torch.device | str) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.ab, self.lengths = zeros(width_a, width_b), zeros()  # sums of a_i b_i^T and |a_i|^2 |b_i|^2
        self.weighted_a, self.weighted_b = zeros(width_a), zeros(width_b)  # of |b_i|^2 a_i and |a_i|^2 b_i

    def add(self, a: Tensor, b: Tensor) -> None:
        squared_a, squared_b = a.square().sum(dim=1), b.square().sum(dim=1)
        self.ab.addmm_(a.T, b)
        self.lengths += squared_a @ squared_b
        self.weighted_a += squared_b @ a
        self.weighted_b += squared_a @ b

    def dependence(self, n: int, a: _Side, b: _Side, debiased: bool) -> Tensor:
        """HSIC with linear kernels, times a factor that CKA's ratio cancels (its own for each `debiased`)."""
        plain = (self.ab - n * torch.outer(a.off, b.off)).square().sum()
        if not debiased:
            return plain
        # The diagonals of the kernels, |x_i|^2, cause the bias. The rows of a centred kernel sum to 0, so all other
        # terms of the estimator reduce to sums of the diagonals and of their products.
        trace_a, trace_b = a.total - n * a.off @ a.off, b.total - n * b.off @ b.off
        return plain - n / (n - 2) * self._centred_lengths(n, a, b) + trace_a * trace_b / ((n - 1) * (n - 2))

    def _centred_lengths(self, n: int, a: _Side, b: _Side) -> Tensor:
        """0-d: the sum of |a_i|^2 |b_i|^2 about the means: that about the centres, multiplied out."""
        far_a, far_b = a.off @ a.off, b.off @ b.off
        crossed = 4 * (a.off @ self.ab @ b.off) - 2 * (self.weighted_b @ b.off + self.weighted_a @ a.off)
        return self.lengths + crossed + far_b * a.total + far_a * b.total - 3 * n * far_a * far_b


class CrossCovariance:
    """Means, covariances and cross-covariance of two sides, summed in fp64 batch by batch.

    Memory does not grow with the number of rows: 8 * (X^2 + X Y + Y^2) bytes. Sums are taken about the means of the
    first batch, so that states whose mean is much longer than their variation lose no digits.
    """

    def __init__(self, width_x: int, width_y: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self._xx, self._yy = _Products(width_x, width_x, device), _Products(width_y, width_y, device)
        self._xy = _Products(width_x, width_y, device)
        self._centre_x = torch.zeros(width_x, dtype=torch.float64, device=device)
        self._centre_y = torch.zeros(width_y, dtype=torch.float64, device=device)
        self._sum_x, self._sum_y = self._centre_x.clone(), self._centre_y.clone()  # about the centres
        self._norm = torch.zeros((), dtype=torch.float64, device=device)  # sum of (|x_i| + |y_i|) / 2

    def add(self, x_NX: Tensor, y_NY: Tensor) -> None:
        """Adds N pairs of rows of any number format.

        Raises:
            ModelError: the two sides differ in rows, or their widths are not those of the constructor.
        """
        widths = self._centre_x.shape[0], self._centre_y.shape[0]
        if x_NX.dim() != 2 or y_NY.dim() != 2 or len(x_NX) != len(y_NY) or (x_NX.shape[1], y_NY.shape[1]) != widths:
            raise ModelError(
                f"states of {tuple(x_NX.shape)} and {tuple(y_NY.shape)}: both sides need the same number of rows, "
                f"and the widths {widths[0]} and {widths[1]}"
            )
        for x, y in zip(x_NX.detach().split(CHUNK_ROWS), y_NY.detach().split(CHUNK_ROWS), strict=True):
            self._add(x.to(self._centre_x), y.to(self._centre_y))

    def _add(self, x: Tensor, y: Tensor) -> None:
        if not len(x):
            return
        if self.n == 0:
            self._centre_x, self._centre_y = x.mean(dim=0), y.mean(dim=0)
        self.n += len(x)
        self._norm += (x.norm(dim=1) + y.norm(dim=1)).sum() / 2
        a, b = x - self._centre_x, y - self._centre_y
        self._sum_x += a.sum(dim=0)
        self._sum_y += b.sum(dim=0)
        self._xx.add(a, a)
        self._yy.add(b, b)
        self._xy.add(a, b)

    def linear_cka(self, debiased: bool = False) -> Tensor:
        """0-d fp64: linear CKA (Kornblith et al. 2019, arXiv 1905.00414, section 3), in feature space.

        `|Y^T X|^2 / (|X^T X| |Y^T Y|)`, Frobenius norms, X and Y centred: 1 where one side is a rotation and
        isotropic scaling of the other. With few rows for the width it is biased upwards: independent isotropic
        states have about `width / (width + N)`, not 0.

        `debiased` takes the unbiased estimator of HSIC (Song et al. 2012, JMLR 13) in the same ratio: about 0 for
        independent states at any N, possibly negative. NaN where a side does not vary or N is below 2 (debiased: 4).
        """
        undefined = torch.full_like(self._norm, torch.nan)
        x = _Side(self._sum_x / self.n, self._xx.ab.trace())
        y = _Side(self._sum_y / self.n, self._yy.ab.trace())
        if (
            self.n < (4 if debiased else 2)
            or self._is_constant(x, self._centre_x)
            or self._is_constant(y, self._centre_y)
        ):
            return undefined
        of_x, of_y = self._xx.dependence(self.n, x, x, debiased), self._yy.dependence(self.n, y, y, debiased)
        if of_x <= 0 or of_y <= 0:  # the unbiased estimator may be negative for very few rows
            return undefined
        return self._xy.dependence(self.n, x, y, debiased) / (of_x * of_y).sqrt()

    def centroid_distance(self) -> CentroidDistance:
        """The distance between the means of the two sides; NaN without rows.

        Returns:
            relative: `|mean(x) - mean(y)|` as a share of the mean length of a state, `mean(|x_i| + |y_i|) / 2`, which
                makes layers and models with states of different size comparable.
            cosine: 1 - the cosine between the means.

        Raises:
            ModelError: the two sides differ in width.
        """
        if len(self._centre_x) != len(self._centre_y):
            raise ModelError(f"no distance between states of widths {len(self._centre_x)} and {len(self._centre_y)}")
        mean_x, mean_y = self._centre_x + self._sum_x / self.n, self._centre_y + self._sum_y / self.n
        relative = (mean_x - mean_y).norm() / (self._norm / self.n)
        return CentroidDistance(relative, 1 - (mean_x @ mean_y) / (mean_x.norm() * mean_y.norm()))

    def _is_constant(self, side: _Side, centre: Tensor) -> bool:
        distance = side.off @ side.off
        variation = side.total / self.n - distance
        return bool(variation <= NO_VARIATION * (variation + (centre + side.off).square().sum()))
