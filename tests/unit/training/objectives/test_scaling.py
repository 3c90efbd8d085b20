"""scaling.py: shares of a step's loss add up to one global mean; the learning rate is a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.config import ScheduleConfig
from training.objectives.base import LossTerm
from training.objectives.scaling import learning_rate, step_loss_share

STEPS = 200
PEAK = 3e-3


def both(token_sum: Tensor, pair_sum: Tensor, a: float = 1.0, b: float = 1.0) -> dict[str, LossTerm]:
    return {"sft": LossTerm(token_sum, "label_tokens", a), "contrastive": LossTerm(pair_sum, "pairs", b)}


def random_split(generator: np.random.Generator, n: int, parts: int) -> list[np.ndarray]:
    """`n` items assigned at random to `parts` micro-batches, some of which may be empty."""
    owner = generator.integers(parts, size=n)
    return [np.flatnonzero(owner == part) for part in range(parts)]


@pytest.mark.parametrize("seed", range(20))
def test_any_split_gives_the_loss_and_gradient_of_one_global_mean(seed: int) -> None:
    """Toy losses of one parameter vector; pairs are split independently of tokens."""
    generator = np.random.default_rng(seed)
    tokens, pairs = int(generator.integers(1, 60)), int(generator.integers(1, 20))
    inputs = torch.from_numpy(generator.normal(size=(tokens, 5)))
    similarities = torch.from_numpy(generator.normal(size=(pairs, 5)))
    a, b = generator.uniform(0, 3, size=2)

    def terms(weights: Tensor, token: np.ndarray, pair: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.exp(inputs[token] @ weights).sum(), torch.sin(similarities[pair] @ weights).sum()

    whole = torch.full((5,), 0.1, dtype=torch.float64, requires_grad=True)
    token_sum, pair_sum = terms(whole, np.arange(tokens), np.arange(pairs))
    expected = a * token_sum / tokens + b * pair_sum / pairs
    expected.backward()

    parts = int(generator.integers(1, 9))
    split = torch.full((5,), 0.1, dtype=torch.float64, requires_grad=True)
    counts = {"label_tokens": tokens, "pairs": pairs}
    total = 0.0
    for token, pair in zip(random_split(generator, tokens, parts), random_split(generator, pairs, parts), strict=True):
        share = step_loss_share(both(*terms(split, token, pair), a, b), counts)
        share.backward()
        total += share.item()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert split.grad is not None
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-10, atol=1e-12)


def test_tokens_have_the_same_weight_whatever_the_size_of_their_micro_batch() -> None:
    parts = [LossTerm(torch.tensor(n * loss), "label_tokens", 1.0) for n, loss in ((1, 4.0), (9, 2.0))]
    shares = [step_loss_share({"sft": part}, {"label_tokens": 10}) for part in parts]
    assert sum(share.item() for share in shares) == pytest.approx((4 + 9 * 2) / 10)


def test_a_step_without_labels_or_pairs_has_loss_zero_and_a_gradient() -> None:
    weights = torch.ones(3, requires_grad=True)
    zero = (weights * 0).sum()
    share = step_loss_share(both(zero, zero), {"label_tokens": 0, "pairs": 0})
    share.backward()
    assert share.item() == 0
    assert weights.grad is not None
    assert not weights.grad.any()


def rates(**schedule: Any) -> list[float]:
    return [learning_rate(step, STEPS, PEAK, ScheduleConfig(**schedule)) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warmup_rises_linearly_to_the_peak(name: str) -> None:
    final = {} if name == "constant" else {"final_ratio": 0.2}  # a constant schedule has no final ratio
    found = rates(name=name, warmup_ratio=0.1, **final)
    assert found[:20] == pytest.approx([PEAK * step / 20 for step in range(1, 21)])
    assert max(found) == found[19] == pytest.approx(PEAK)
    assert found[20] == pytest.approx(PEAK), "the decay begins at the peak"
    assert found[0] > 0, "the first step has a learning rate above 0"


def test_constant_stays_at_the_peak() -> None:
    assert set(rates(name="constant", warmup_ratio=0.05)[10:]) == {PEAK}


def test_linear_decays_linearly_towards_the_final_ratio() -> None:
    found = rates(name="linear", warmup_ratio=0.1, final_ratio=0.2)[20:]
    differences = np.diff([*found, 0.2 * PEAK])  # the final ratio is reached one step after the last
    assert differences == pytest.approx(np.full(180, -0.8 * PEAK / 180))


def test_cosine_decays_along_half_a_period_towards_the_final_ratio() -> None:
    found = rates(name="cosine", warmup_ratio=0.1, final_ratio=0.2)[20:]
    expected = [PEAK * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 180)) / 2) for step in range(180)]
    assert found == pytest.approx(expected)
    assert found[90] == pytest.approx(0.6 * PEAK), "half way between peak and end"
    assert np.all(np.diff(found) < 0)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_last_step_has_a_small_learning_rate_above_zero(name: str) -> None:
    found = rates(name=name, warmup_ratio=0.0)
    assert found[0] == PEAK
    assert 0 < found[-1] < PEAK / 100


@pytest.mark.parametrize("max_steps", [1, 2, 7])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.5, 0.99])
def test_the_shortest_runs_have_valid_learning_rates(max_steps: int, name: Any, warmup_ratio: float) -> None:
    schedule = ScheduleConfig(name=name, warmup_ratio=warmup_ratio)
    found = [learning_rate(step, max_steps, PEAK, schedule) for step in range(max_steps)]
    assert all(0 < rate <= PEAK for rate in found)


def test_the_learning_rate_depends_only_on_the_step() -> None:
    """So a run resumes at any step with the same learning rates, without saved state."""
    forwards: Callable[[int], float] = lambda step: learning_rate(step, STEPS, PEAK, ScheduleConfig())  # noqa: E731
    assert [forwards(step) for step in reversed(range(STEPS))] == rates()[::-1]
