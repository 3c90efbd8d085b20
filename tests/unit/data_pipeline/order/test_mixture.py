"""mixture.py: the weights of each strategy, and counts within one of their share at every slot."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.order.mixture import MixtureConfig, Quotas, language_weights
from data_pipeline.records import DataError

ROWS = {"en": 8000, "de": 1000, "sw": 1}


def codes(n: int) -> list[str]:
    return [f"l{i}" for i in range(n)]


def quotas(weights: list[float], period: int) -> Quotas:
    return Quotas(dict(zip(codes(len(weights)), weights, strict=True)), codes(len(weights)), period)


def test_weights_of_each_strategy() -> None:
    assert language_weights(MixtureConfig(), ROWS) == pytest.approx(
        {"en": 8000 / 9001, "de": 1000 / 9001, "sw": 1 / 9001}
    )
    cube_root = language_weights(MixtureConfig(strategy="temperature", temperature=3.0), ROWS)
    assert cube_root == pytest.approx({"en": 20 / 31, "de": 10 / 31, "sw": 1 / 31})
    uniform = language_weights(MixtureConfig(strategy="uniform"), ROWS)
    assert uniform == pytest.approx(dict.fromkeys(ROWS, 1 / 3))
    explicit = MixtureConfig(strategy="explicit", weights={"sw": 3.0, "de": 1.0, "en": 0.0})
    assert language_weights(explicit, ROWS) == {"de": 0.25, "sw": 0.75}


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    weights = language_weights(MixtureConfig(strategy="temperature", temperature=temperature), ROWS)
    assert list(weights) == list(ROWS)
    assert sum(weights.values()) == pytest.approx(1)
    assert Quotas(weights, list(ROWS), 100).counts.min() >= 1


@pytest.mark.parametrize(
    "options",
    [
        {"weights": {"en": 1.0}},
        {"strategy": "explicit"},
        {"strategy": "explicit", "weights": {"en": -1.0, "de": 2.0}},
        {"strategy": "explicit", "weights": {"en": float("nan")}},
        {"strategy": "explicit", "weights": {"en": 0.0}},
        {"strategy": "explicit", "weights": {}},
        {"temperature": 0.0},
        {"period": 0},
        {"pairings": "reuse"},
    ],
)
def test_invalid_configs_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MixtureConfig.model_validate(options)


def test_weights_must_fit_the_data() -> None:
    with pytest.raises(DataError, match=r"data\.mixture\.weights\.fr: not a declared language"):
        language_weights(MixtureConfig(strategy="explicit", weights={"fr": 1.0}), ROWS)
    for config in (MixtureConfig(), MixtureConfig(strategy="uniform")):
        with pytest.raises(DataError, match="'sw' has no training rows"):
            language_weights(config, {**ROWS, "sw": 0})


def test_more_languages_than_the_period_has_slots_are_refused() -> None:
    assert Quotas(dict.fromkeys(codes(5), 1.0), codes(5), 5).counts.tolist() == [1] * 5
    with pytest.raises(DataError, match="period is 4, too short for 5 languages; give at least 5"):
        Quotas(dict.fromkeys(codes(5), 1.0), codes(5), 4)


@pytest.mark.parametrize(
    ("weights", "period", "counts"),
    [
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        ([7.0, 3.0], 65536, [45875, 19661]),
        ([1.0, 1.0, 1.0], 10, [4, 3, 3]),
        ([1e9, 1.0, 0.0], 10, [8, 1, 1]),
        ([1.0], 7, [7]),
        ([0.95, 0.1, 0.1], 10, [8, 1, 1]),
    ],
)
def test_counts_of_a_period(weights: list[float], period: int, counts: list[int]) -> None:
    assert quotas(weights, period).counts.tolist() == counts


def random_weights(n: int, draw: np.random.Generator) -> list[float]:
    kinds = [draw.random(n), draw.pareto(0.5, n), np.ones(n), 10.0 ** draw.uniform(-9, 0, n)]
    return kinds[draw.integers(len(kinds))].tolist()


@pytest.mark.parametrize("seed", range(60))
def test_every_count_is_within_one_of_its_share_at_every_slot(seed: int) -> None:
    """|count_i(k) - k n_i / P| < 1 for every k, in integers; so no count is ever negative or out of order."""
    draw = np.random.default_rng(seed)
    n = int(draw.integers(2, 40)) if seed < 50 else int(draw.integers(200, 1001))
    period = n + int(draw.integers(0, 3000))
    built = quotas(random_weights(n, draw), period)
    assert built.counts.sum() == period
    assert built.counts.min() >= 1
    languages, _ = built.between(0, period)
    done = np.zeros(n, np.int64)
    for slot, language in enumerate(languages.tolist(), start=1):
        done[language] += 1
        assert (np.abs(done * period - slot * built.counts) < period).all()
    assert (done == built.counts).all()


def test_a_thousand_languages_build_fast_and_keep_their_share() -> None:
    weights = random_weights(1000, np.random.default_rng(3))
    start = time.process_time()
    built = quotas(weights, 65536)
    assert time.process_time() - start < 5
    for slot in range(0, 65537, 771):
        assert (np.abs(built.counts_before(slot) * 65536 - slot * built.counts) < 65536).all()


def test_cursors_count_earlier_slots_across_periods() -> None:
    built = quotas([0.6, 0.3, 0.1], 17)
    seen = [0, 0, 0]
    for slot in range(60):
        assert built.counts_before(slot).tolist() == seen
        (language,), (cursor,) = (array.tolist() for array in built.between(slot, slot + 1))
        assert cursor == seen[language]
        seen[language] += 1


def test_seeking_takes_constant_time() -> None:
    built = quotas([0.6, 0.3, 0.1], 65536)
    far = 10**9 * 65536 + 123
    start = time.process_time()
    languages, cursors = built.between(far, far + 512)
    assert time.process_time() - start < 0.1
    near_languages, near_cursors = built.between(123, 123 + 512)
    assert (languages == near_languages).all()
    assert (cursors == near_cursors + 10**9 * built.counts[languages]).all()


def test_a_declared_language_without_weight_has_no_slot() -> None:
    built = Quotas({"de": 0.5, "sw": 0.5}, ["en", "de", "sw"], 8)
    assert built.counts.tolist() == [0, 4, 4]
    assert set(built.between(0, 16)[0].tolist()) == {1, 2}


def test_short_steps_combine_all_pairs_of_languages() -> None:
    """Eight equal languages in steps of four: with ties by index, 0-3 and 4-7 would never share a step."""
    built = quotas([1.0] * 8, 65536)
    steps = [frozenset(built.between(4 * t, 4 * t + 4)[0].tolist()) for t in range(2000)]
    together = {(a, b) for step in steps for a in step for b in step}
    assert len(together) == 64
