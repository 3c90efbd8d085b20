"""metric_window.py against sums over single labels, and exactness after a resume between two logged steps."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from data_pipeline import loader
from training.loop.metric_window import MAX_ROWS, MetricWindow
from training.loop.step_sums import StepSums
from training.objectives.base import LossTerm, LossTerms

LANGUAGES = ("en", "de", "sw", "zh")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    """One step: micro-batches of labels (language, loss), and the sum of another term with its denominator."""

    micro_batches: list[list[tuple[int, float]]]
    contrast: float
    pairs: int
    tokens: list[int]
    norm: float
    fingerprint: int

    def sums(self) -> StepSums:
        sums = StepSums.zeros(len(LANGUAGES), 2, CPU)
        for labels in self.micro_batches:
            losses = torch.tensor([loss for _, loss in labels])
            terms = {
                "sft": LossTerm(losses.sum(), "label_tokens", 1.0),
                "contrastive": LossTerm(torch.tensor(self.contrast / len(self.micro_batches)), "pairs", 0.5),
            }
            languages = torch.tensor([language for language, _ in labels])
            sums.add(LossTerms(losses, torch.ones(len(labels)), languages, terms), losses.sum())
        return sums

    def batch(self, step: int) -> loader.Step:
        languages = [language for labels in self.micro_batches for language, _ in labels]
        labels = np.bincount(languages, minlength=len(LANGUAGES))
        return loader.Step(
            step=step, micro_batches=(), counts={"label_tokens": len(languages), "pairs": self.pairs},
            tokens=np.array(self.tokens), labels=labels, slots=loader.no_slots(len(LANGUAGES)), bad_rows=(), unusable=0,
            overlong=2, fingerprint=self.fingerprint, dropped_pairs=1,
        )  # fmt: skip


def drawn(number: int, languages: range = range(3)) -> Step:
    rng = random.Random(number)
    labels = [[(rng.choice(languages), rng.uniform(1, 9)) for _ in range(rng.randint(1, 5))] for _ in range(2)]
    tokens = [rng.randint(0, 99) for _ in LANGUAGES]
    return Step(
        labels, rng.random(), rng.randint(1, 4), tokens, rng.uniform(0, 2), rng.randrange(loader.FINGERPRINT_RANGE)
    )


def window(log_every: int) -> MetricWindow:
    return MetricWindow(LANGUAGES, 2, log_every, CPU)


def feed(made: MetricWindow, number: int, step: Step) -> None:
    made.add(number, step.sums(), step.batch(number))
    made.applied(torch.tensor(step.norm, dtype=torch.float64))
    made.add_seconds(step=0.5, waiting=0.25)


def slow(steps: list[Step]) -> dict[str, float]:
    """The same metrics, label by label."""
    labels = [label for step in steps for micro_batch in step.micro_batches for label in micro_batch]
    tokens = [sum(step.tokens[n] for step in steps) for n in range(len(LANGUAGES))]
    found = {
        "train/loss": sum(loss for _, loss in labels) / len(labels),
        "train/contrastive": sum(step.contrast for step in steps) / sum(step.pairs for step in steps),
        "train/grad_norm": sum(step.norm for step in steps) / len(steps),
        "train/step_seconds": 0.5,
        "train/tokens_per_second": sum(tokens) / (0.5 * len(steps)),
        "data/wait_seconds": 0.25,
        "data/overlong": 2.0 * len(steps),
        "data/dropped_pairs": 1.0 * len(steps),
        "data/step_fingerprint": float(sum(step.fingerprint for step in steps) % loader.FINGERPRINT_RANGE),
    }
    for number, language in enumerate(LANGUAGES):
        found[f"train/token_share/{language}"] = tokens[number] / sum(tokens)
        if own := [loss for of, loss in labels if of == number]:
            found[f"train/loss/{language}"] = sum(own) / len(own)
    return found


@pytest.mark.parametrize("log_every", [1, 3, 7])
def test_logged_metrics_are_means_over_every_label_since_the_last_logged_step(log_every: int) -> None:
    made, steps, numbers = window(log_every), [drawn(number) for number in range(21)], iter(range(1, 22))
    for first in range(0, 21, log_every):
        here = steps[first : first + log_every]
        for step in here:
            feed(made, next(numbers), step)
        finished = made.read()
        assert [each.labels.sum() for each in finished] == [sum(map(len, step.micro_batches)) for step in here]
        assert made.take(by_language=True) == pytest.approx(slow(here), rel=1e-6)
    assert not made.begun


def test_a_language_without_labels_in_one_step_is_reported_by_those_of_the_others() -> None:
    made, rare = window(2), Step([[(3, 6.0)]], 0.1, 1, [1, 1, 1, 1], 1.0, 5)
    for number, step in enumerate((rare, drawn(1)), 1):
        feed(made, number, step)
    made.read()
    assert made.take(by_language=True)["train/loss/zh"] == 6.0


def test_a_window_resumed_after_any_of_its_steps_gives_the_same_numbers_to_the_last_digit() -> None:
    def logged(stopped_after: int | None) -> dict[str, float]:
        made = window(7)
        for number in range(1, 8):
            feed(made, number, drawn(number))
            if number == stopped_after:
                made.read()
                state = json.loads(json.dumps(made.state()))
                made = window(7)
                feed(made, 99, drawn(99))  # of a branch that is abandoned
                made.restore(state)
        made.read()
        return made.take(by_language=True)

    expected = logged(None)
    assert [logged(step) == expected for step in range(1, 8)] == [True] * 7


def test_nothing_is_kept_after_a_logged_step() -> None:
    made = window(2)
    feed(made, 1, drawn(1))
    made.read()
    made.take(by_language=True)
    assert made.state() == {}
    feed(made, 2, drawn(2))
    made.restore({})
    assert not made.begun


def test_a_step_whose_loss_is_not_finite_is_left_out_of_the_means() -> None:
    made, good, bad = window(2), drawn(1), Step([[(0, 1.0)], [(3, math.inf)]], 0.3, 2, [5] * 4, math.nan, 5)
    feed(made, 1, good)
    made.add(2, bad.sums(), bad.batch(2))
    made.skipped()
    first, second = made.read()
    assert math.isfinite(first.loss)
    assert math.isnan(second.loss)
    metrics, expected = made.take(by_language=True), slow([good])
    for name in ("train/loss", "train/loss/en", "train/contrastive", "train/grad_norm"):
        assert metrics[name] == pytest.approx(expected[name]), name
    assert math.isnan(metrics["train/loss/zh"]), "its only label is in the other step"
    assert metrics["guard/skipped"] == 1


@pytest.mark.parametrize(("loss", "norm", "named"), [(math.inf, 1.0, "its loss"), (1.0, math.inf, "the gradient norm")])
def test_an_applied_update_that_is_not_finite_is_an_error_at_the_next_read(
    loss: float, norm: float, named: str
) -> None:
    made = window(2)
    feed(made, 1, Step([[(0, loss)]], 0.3, 2, [5] * 4, norm, 5))
    with pytest.raises(RuntimeError, match=f"^step 1: DeepSpeed applied an update, but {named} is"):
        made.read()


def test_a_read_is_due_when_the_device_holds_no_more_steps() -> None:
    made = window(10**6)
    due: Iterator[bool] = iter([False] * (MAX_ROWS - 1) + [True])
    for number in range(1, MAX_ROWS + 1):
        feed(made, number, drawn(number))
        assert made.full == next(due)
    made.read()
    feed(made, MAX_ROWS + 1, drawn(MAX_ROWS + 1))
    made.read()
    steps = [drawn(number) for number in range(1, MAX_ROWS + 2)]
    assert made.take(by_language=True) == pytest.approx(slow(steps), rel=1e-6)


def test_values_by_language_cover_all_steps_since_they_were_logged() -> None:
    made, steps = window(2), [drawn(number) for number in range(1, 13)]
    for number, step in enumerate(steps, 1):
        feed(made, number, step)
        if number % 2 == 0:
            made.read()
            logged = made.take(by_language=number % 6 == 0)
            assert logged["train/loss"] == pytest.approx(slow(steps[number - 2 : number])["train/loss"])
            of_all = {
                name: v for name, v in slow(steps[max(number - 6, 0) : number]).items() if name.endswith(LANGUAGES)
            }
            expected = of_all if number % 6 == 0 else {}
            assert {name: v for name, v in logged.items() if name.endswith(LANGUAGES)} == pytest.approx(expected)
