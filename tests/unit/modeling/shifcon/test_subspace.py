"""Distances between subspaces: against SciPy, their invariances, known answers, and moments batch by batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from modeling.shifcon.subspace import TokenMoments, angles, principal_directions, riemannian, with_ridge


def covariance(width: int, seed: int, rows: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.cov((torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing).T)


def by_scipy(a: Tensor, b: Tensor) -> float:
    """The norm of the matrix logarithm of A^-1/2 B A^-1/2."""
    root = scipy.linalg.inv(scipy.linalg.sqrtm(a.numpy()))
    return float(np.linalg.norm(scipy.linalg.logm(root @ b.numpy() @ root)))


@pytest.mark.parametrize("seed", range(4))
def test_the_distance_is_that_of_scipys_matrix_logarithm(seed: int) -> None:
    a, b = covariance(6, seed), covariance(6, seed + 50)
    assert float(riemannian(a, b).distance) == pytest.approx(by_scipy(a, b), rel=1e-9)
    assert float(riemannian(a, b).distance) == pytest.approx(float(riemannian(b, a).distance), rel=1e-9)
    assert float(riemannian(a, a).distance) == pytest.approx(0, abs=1e-9)


def test_the_distance_is_the_same_in_other_coordinates_and_known_for_diagonal_matrices() -> None:
    a, b = covariance(5, 1), covariance(5, 2)
    change = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved = riemannian(change @ a @ change.T, change @ b @ change.T)
    assert moved.distance == pytest.approx(riemannian(a, b).distance, rel=1e-8)
    one = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    other = torch.diag(torch.tensor([math.e, 2 * math.e**2, 4.0], dtype=torch.float64))
    assert float(riemannian(one, other).distance) == pytest.approx(math.sqrt(1 + 4))


def test_derivatives_of_the_distance_are_those_of_finite_differences() -> None:
    a, b = covariance(5, 1), covariance(5, 2)
    found = riemannian(a, b)
    change = covariance(5, 3) * 1e-6
    for by, moved in ((found.by_a, (change, 0)), (found.by_b, (0, change))):
        up, down = (riemannian(a + sign * moved[0], b + sign * moved[1]).distance for sign in (1, -1))
        assert (up - down) / 2 == pytest.approx(float((by * change).sum()), rel=1e-5)
    assert not riemannian(a, a).by_a.isnan().any()


def test_angles_between_principal_directions() -> None:
    """The two largest directions of one side lie in the plane of axes 0 and 1, of the other at 30 degrees to axis 1."""
    angle = math.radians(30)
    turned = torch.eye(5, dtype=torch.float64)
    turned[1, 1] = turned[2, 2] = math.cos(angle)
    turned[1, 2], turned[2, 1] = -math.sin(angle), math.sin(angle)
    one = torch.diag(torch.tensor([9.0, 5.0, 0.3, 0.2, 0.1], dtype=torch.float64))
    found = angles(*(principal_directions(each, 2) for each in (one, turned @ one @ turned.T)))
    torch.testing.assert_close(found, torch.tensor([0.0, angle], dtype=torch.float64), rtol=1e-6, atol=1e-6)


def states(number: int, seed: int, layers: int = 2, width: int = 5) -> tuple[list[Tensor], Tensor]:
    """States of fp32 far from 0, at each layer, and the group of each token."""
    generator = torch.Generator().manual_seed(seed)
    found = [1000 + torch.randn(number, width, generator=generator) * (layer + 1) for layer in range(layers)]
    return found, torch.randint(0, 3, (number,), generator=generator)


def added(parts: list[tuple[list[Tensor], Tensor]]) -> TokenMoments:
    moments = TokenMoments(3, 2, 5)
    for each, groups in parts:
        for layer, of_layer in enumerate(each):
            moments.add(layer, of_layer, groups)
    return moments


@pytest.mark.parametrize("without", [None, 0, 2])
def test_moments_are_those_of_all_tokens_without_the_group(without: int | None) -> None:
    parts = [states(number, seed) for seed, number in enumerate((1, 40, 0, 17))]
    moments = added(parts)
    groups = torch.cat([each for _, each in parts])
    for layer in range(2):
        kept = torch.cat([each[layer] for each, _ in parts])[groups != (-1 if without is None else without)].double()
        found = moments.statistics(layer, without)
        number = 0 if without is None else without + 1
        means, deviations = (each[number] for each in moments.means(layer))
        torch.testing.assert_close(means, found.mean)
        torch.testing.assert_close(deviations, found.covariance.diagonal().sqrt(), rtol=1e-9, atol=0)
        weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        weighted = moments.weighted_covariances(layer, weight)[number]
        assert float(weighted) == pytest.approx(float((weight * found.covariance).sum()), rel=1e-9)
        assert found.tokens == len(kept)
        torch.testing.assert_close(found.mean, kept.mean(dim=0), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.covariance, torch.cov(kept.T, correction=0), rtol=1e-7, atol=1e-9)
        assert float(found.length) == pytest.approx(float(kept.norm(dim=1).mean()), rel=1e-12)


def test_large_batches_are_added_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = added([states(50, 3)]).statistics(1)
    monkeypatch.setattr("modeling.shifcon.subspace.CHUNK_ELEMENTS", 5 * 7)
    chunked = added([states(50, 3)]).statistics(1)
    torch.testing.assert_close(chunked.covariance, whole.covariance, rtol=1e-9, atol=1e-12)


def test_moments_over_ranks_are_those_of_all_tokens() -> None:
    """Ranks with centres of their own, one of them without tokens."""
    parts = [[states(30, 1)], [states(9, 2), states(4, 5)], []]
    ranks = [added(each) for each in parts]
    whole = added([each for of_rank in parts for each in of_rank])
    # All ranks call `over_ranks` in step; here they are generators of what they would sum.
    recorded = _in_step(ranks)
    for name in ("tokens", "mean", "covariance", "length"):
        one, other = (getattr(each.statistics(1, without=1), name) for each in (recorded, whole))
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-7, atol=1e-9)


def _in_step(ranks: list[TokenMoments]) -> TokenMoments:
    """The result of `over_ranks` on the first of the ranks, which run as threads."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    barrier, given = threading.Barrier(len(ranks), timeout=20), {}

    def run(rank: int) -> TokenMoments:
        def all_sum(value: Tensor) -> Tensor:
            given[rank] = value
            barrier.wait()
            total = torch.stack([given[each] for each in range(len(ranks))]).sum(dim=0)
            barrier.wait()
            return total

        return ranks[rank].over_ranks(all_sum)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return next(iter(list(pool.map(run, range(len(ranks))))))


@pytest.mark.parametrize("few", [True, False])
def test_a_singular_covariance_has_a_distance_with_its_ridge(few: bool) -> None:
    singular = torch.outer(torch.arange(4.0, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64))
    ridged = with_ridge(singular, few)
    assert float(torch.linalg.eigvalsh(ridged)[0]) == pytest.approx((1e-3 if few else 1e-6) * 14 / 4, rel=1e-3)
    assert math.isfinite(riemannian(ridged, with_ridge(covariance(4, 0), few)).distance)
