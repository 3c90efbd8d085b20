"""CKA equals its definition by Gram matrices, in one batch or several; centroid distances equal those of loops."""

from __future__ import annotations

import math

import pytest
import torch
from covariance import centroid_distance, linear_cka
from torch import Tensor

from modeling import cka
from modeling.cka import CrossCovariance
from modeling.errors import ModelError


def states(n: int, width: int, seed: int) -> Tensor:
    """States with a mean far from 0 and directions of different variance, as in models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / torch.arange(1, width + 1)
    return torch.randn(n, width, generator=generator) @ mixing + 5 * torch.randn(width, generator=generator)


def pair(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sides that depend on each other, of widths 7 and 5."""
    x = states(n, 7, seed)
    return x, x[:, :5].square() + states(n, 5, seed + 1)


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)).double())[0]


def gram_cka(x: Tensor, y: Tensor) -> float:
    """Kornblith et al. 2019, equations 3 to 5 as written: HSIC of N x N kernels, centred by H."""
    n = len(x)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(a: Tensor, b: Tensor) -> float:
        kernels = [[[float(one @ other) for other in side] for one in side] for side in (a, b)]
        k, l = (torch.tensor(kernel, dtype=torch.float64) for kernel in kernels)  # noqa: E741
        return float(torch.trace(k @ centring @ l @ centring)) / (n - 1) ** 2

    x, y = x.double(), y.double()
    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def gram_cka_debiased(x: Tensor, y: Tensor) -> float:
    """The same with the unbiased HSIC: kernels whose diagonals are 0, and Song's two corrections."""
    n = len(x)

    def hsic(a: Tensor, b: Tensor) -> float:
        k, l = ((side.double() @ side.double().T).fill_diagonal_(0) for side in (a, b))  # noqa: E741
        both = sum(float(k[i, j] * l[j, i]) for i in range(n) for j in range(n))
        apart = float(k.sum() * l.sum()) / ((n - 1) * (n - 2))
        mixed = sum(float(k[i].sum() * l[i].sum()) for i in range(n)) * 2 / (n - 2)
        return (both + apart - mixed) / (n * (n - 3))

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize("n", [5, 12, 60])
def test_cka_equals_that_of_gram_matrices(n: int) -> None:
    x, y = pair(n)
    assert linear_cka(x, y).dtype == torch.float64
    assert float(linear_cka(x, y)) == pytest.approx(gram_cka(x, y), rel=1e-9)
    assert float(linear_cka(x, y, debiased=True)) == pytest.approx(gram_cka_debiased(x, y), rel=1e-9)


def test_cka_is_invariant_to_rotation_and_scaling_only() -> None:
    x, y = (side.double() for side in pair())
    plain, debiased = float(linear_cka(x, y)), float(linear_cka(x, y, debiased=True))
    moved = 3.7 * x @ rotation(7) + 11
    assert float(linear_cka(moved, y)) == pytest.approx(plain, rel=1e-10)
    assert float(linear_cka(moved, y, debiased=True)) == pytest.approx(debiased, rel=1e-9)
    assert float(linear_cka(y, x)) == pytest.approx(plain, rel=1e-12)
    for same in (x, moved):
        assert float(linear_cka(x, same)) == pytest.approx(1, rel=1e-12)
        assert float(linear_cka(x, same, debiased=True)) == pytest.approx(1, rel=1e-10)
    stretched = x * torch.tensor([1, 1, 1, 1, 1, 1, 30.0])  # CKA is not invariant to invertible maps
    assert float(linear_cka(x, stretched)) < 0.9


@pytest.mark.parametrize("size", [1, 7, 60])
def test_batches_give_the_result_of_all_rows_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = states(60, 7, 0).double()
    y = x.square() + states(60, 7, 1)
    whole = CrossCovariance(7, 7)
    whole.add(x, y)
    monkeypatch.setattr(cka, "CHUNK_ROWS", 4)
    summed = CrossCovariance(7, 7)
    for start in range(0, len(x), size):
        summed.add(x[start : start + size], y[start : start + size])
    summed.add(x[:0], y[:0])  # an empty batch changes nothing
    assert summed.n == 60
    for debiased in (False, True):
        assert float(summed.linear_cka(debiased)) == pytest.approx(float(whole.linear_cka(debiased)), rel=1e-10)
    for one, other in zip(summed.centroid_distance(), whole.centroid_distance(), strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-10)


def test_a_mean_much_longer_than_the_variation_loses_no_digits() -> None:
    x, y = (side.double() for side in pair())
    far = CrossCovariance(7, 5)
    for start in range(0, 60, 8):
        far.add(x[start : start + 8] + 1e6, y[start : start + 8] - 1e6)
    assert float(far.linear_cka()) == pytest.approx(float(linear_cka(x, y)), rel=1e-7)
    assert float(far.linear_cka(debiased=True)) == pytest.approx(float(linear_cka(x, y, debiased=True)), rel=1e-6)


def test_few_rows_bias_plain_cka_but_not_debiased_cka() -> None:
    generator = torch.Generator().manual_seed(3)
    found = [[torch.randn(100, 200, generator=generator) for _ in range(2)] for _ in range(20)]
    plain = [float(linear_cka(x, y)) for x, y in found]
    debiased = [float(linear_cka(x, y, debiased=True)) for x, y in found]
    assert sum(plain) / 20 == pytest.approx(200 / 300, abs=0.02)  # although the sides are unrelated
    assert abs(sum(debiased) / 20) < 0.01


def test_cka_is_nan_if_a_side_has_no_variance() -> None:
    x, _ = pair()
    constant = states(1, 5, 4).expand(60, 5)
    noisy = constant * (1 + 1e-7 * torch.randn(60, 5, generator=torch.Generator().manual_seed(1)))
    for still in (constant, noisy, torch.zeros(60, 5)):
        assert math.isnan(float(linear_cka(x, still)))
        assert math.isnan(float(linear_cka(still, x, debiased=True)))
    assert math.isnan(float(linear_cka(x[:1], x[:1])))
    assert math.isnan(float(linear_cka(x[:3], x[:3], debiased=True)))
    assert float(linear_cka(x[:2], x[:2])) == pytest.approx(1)
    assert math.isnan(float(CrossCovariance(3, 3).linear_cka()))


def test_centroid_distance_equals_loops() -> None:
    x, y = states(11, 6, 0).tolist(), states(11, 6, 1).tolist()
    mean_x = [sum(row[i] for row in x) / 11 for i in range(6)]
    mean_y = [sum(row[i] for row in y) / 11 for i in range(6)]
    length = sum(math.hypot(*row) for row in x + y) / 22
    product = sum(a * b for a, b in zip(mean_x, mean_y, strict=True))
    found = centroid_distance(torch.tensor(x), torch.tensor(y))
    assert float(found.relative) == pytest.approx(math.dist(mean_x, mean_y) / length, rel=1e-6)
    assert float(found.cosine) == pytest.approx(1 - product / math.hypot(*mean_x) / math.hypot(*mean_y), rel=1e-6)
    scaled = centroid_distance(40 * torch.tensor(x), 40 * torch.tensor(y))
    assert float(scaled.relative) == pytest.approx(float(found.relative), rel=1e-6)
    same = centroid_distance(torch.tensor(x), torch.tensor(x[::-1]))
    assert float(same.relative) == pytest.approx(0, abs=1e-7)
    assert float(same.cosine) == pytest.approx(0, abs=1e-12)


def test_sides_of_different_shapes_are_refused() -> None:
    x, y = pair()
    with pytest.raises(ModelError, match=r"states of \(60, 7\) and \(59, 5\): both sides need the same number of rows"):
        linear_cka(x, y[1:])
    with pytest.raises(ModelError, match="the widths 7 and 7"):
        CrossCovariance(7, 7).add(x, y)
    with pytest.raises(ModelError, match="no distance between states of widths 7 and 5"):
        centroid_distance(x, y)
