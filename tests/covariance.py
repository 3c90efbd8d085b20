"""Linear CKA and centroid distance of two sets of states in memory, for tests."""

from __future__ import annotations

from torch import Tensor

from modeling.cka import CentroidDistance, CrossCovariance


def summed(x_NX: Tensor, y_NY: Tensor) -> CrossCovariance:
    covariance = CrossCovariance(x_NX.shape[-1], y_NY.shape[-1], x_NX.device)
    covariance.add(x_NX, y_NY)
    return covariance


def linear_cka(x_NX: Tensor, y_NY: Tensor, debiased: bool = False) -> Tensor:
    return summed(x_NX, y_NY).linear_cka(debiased)


def centroid_distance(x_NX: Tensor, y_NX: Tensor) -> CentroidDistance:
    return summed(x_NX, y_NX).centroid_distance()
