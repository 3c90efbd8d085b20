"""Metrics of the steps since the last logged one. Their sums stay on the device and are read together.

A read is one all-reduce and one transfer; between two reads, no step waits for the device. What is logged is the mean
over these steps (of a loss term: its sum divided by the sum of its denominators), so that every label counts, also of
languages that are rare. Values by language may be logged by fewer steps than others, and cover all steps since then.

Shapes: R rows, L languages, M loss terms, C = 2 + 2 L + M columns: gradient norm, and `StepSums.vector()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.loader import FINGERPRINT_RANGE, Step
from training.distributed import all_sum, rank
from training.loop.step_sums import Floats, StepSums, mean_loss, split_sums
from training.objectives.scaling import denominator

MAX_ROWS = 100  # steps on the device; a read is due when there are so many
LANGUAGES_A_LINE = 100  # with more languages, not every logged line has their values
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step whose sums were read; equal on all ranks."""

    slots: Integers  # (loader.OUTCOMES, L)
    labels: Integers  # (L,) number of labels
    loss: float  # mean per label; NaN if the loss of a micro-batch is not finite


@dataclass(slots=True)
class _Waiting:
    """What the host knows of a step whose sums are still on the device."""

    step: int  # from 1
    read: Step  # without its micro-batches
    skipped: bool = False


@dataclass(slots=True)
class _Sums:
    """Sums over the steps that were read, over all ranks."""

    losses: Floats  # (L,) of steps whose loss is finite, as for `labels` and `terms`
    labels: Floats  # (L,)
    terms: Floats  # (M,)
    seen: Integers  # (L,) labels of all steps
    tokens: Integers  # (L,)
    counts: dict[str, int] = field(default_factory=dict)  # denominators of steps whose loss is finite
    denominators: dict[str, str] = field(default_factory=dict)  # term: name of its denominator
    norm: float = 0.0  # gradient norms of applied updates
    steps: int = 0
    finite: int = 0  # steps whose loss is finite
    applied: int = 0  # updates
    overlong: int = 0
    dropped_pairs: int = 0
    fingerprint: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds of waiting for data

    @classmethod
    def zeros(cls, n_languages: int, n_terms: int) -> _Sums:
        floats, integers = np.zeros(n_languages), np.zeros(n_languages, np.int64)
        return cls(floats, floats.copy(), np.zeros(n_terms), integers, integers.copy())

    def add(self, step: _Waiting, norm: float) -> None:
        self.steps += 1
        if not step.skipped:
            self.applied += 1
            self.norm += norm
        self.tokens = self.tokens + step.read.tokens
        self.overlong += step.read.overlong
        self.dropped_pairs += step.read.dropped_pairs
        self.fingerprint = (self.fingerprint + step.read.fingerprint) % FINGERPRINT_RANGE

    def add_losses(self, step: _Waiting, losses: Floats, labels: Floats, terms: Floats) -> None:
        self.finite += 1
        self.losses, self.labels, self.terms = self.losses + losses, self.labels + labels, self.terms + terms
        for name, count in step.read.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def state(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            before = getattr(self, name)
            setattr(self, name, np.array(value, before.dtype) if isinstance(before, np.ndarray) else value)


class MetricWindow:
    """The steps since the last logged one; used alike on all ranks."""

    def __init__(self, languages: Sequence[str], n_terms: int, log_every: int, device: torch.device) -> None:
        self.languages = tuple(languages)
        self._n_terms = n_terms
        self._device = device
        columns = 2 + 2 * len(languages) + n_terms
        # The row follows from the step's number, since the order of summation over ranks may depend on the place: sums
        # are the same to the last digit after a resume.
        self._rows = torch.zeros(min(log_every, MAX_ROWS), columns, dtype=torch.float64, device=device)
        self._waiting: list[_Waiting] = []
        self._sums = self._zeros()
        self._by_language = self._zeros()  # since the values by language were logged

    @property
    def begun(self) -> bool:
        """Whether there are steps since the last logged one."""
        return bool(self._sums.steps or self._waiting)

    @property
    def full(self) -> bool:
        """Whether a read is due, because the device holds no more steps."""
        return len(self._waiting) == len(self._rows)

    def add(self, step: int, sums: StepSums, batch: Step) -> None:
        """Adds step `step` (from 1), whose update is still to come."""
        self._waiting.append(_Waiting(step, replace(batch, micro_batches=())))
        self._sums.denominators = dict(sums.denominators)
        self._row(step)[1:] = sums.vector()

    def applied(self, norm: Tensor) -> None:
        """The last step's update was applied; its gradient norm is equal on all ranks."""
        if rank() == 0:
            self._row(self._waiting[-1].step)[0] = norm

    def skipped(self) -> None:
        """The last step has no update."""
        self._waiting[-1].skipped = True

    def add_seconds(self, step: float = 0.0, waiting: float = 0.0) -> None:
        """Adds the duration of a step, or of waiting for its data."""
        self._sums.seconds += step
        self._sums.waited += waiting

    def read(self) -> list[FinishedStep]:
        """Reads the steps that are still on the device, and waits for it. Called on all ranks.

        Raises:
            RuntimeError: an update was applied though its loss or gradient norm is not finite.
        """
        if not self._waiting:
            return []
        rows = all_sum(self._rows, self._device)
        waiting, self._waiting = self._waiting, []
        return [self._finish(each, rows[each.step % len(rows)]) for each in waiting]

    def take(self, by_language: bool) -> dict[str, float]:
        """The metrics of the steps that were read; a new window begins."""
        metrics = self.metrics(by_language)
        self._sums = self._zeros()
        if by_language:
            self._by_language = self._zeros()
        return metrics

    def metrics(self, by_language: bool) -> dict[str, float]:
        """Means over the steps that were read. Steps whose loss is not finite are left out; NaN if there are no others.

        `guard/skipped` is the number of skipped updates; `data/overlong` and `data/dropped_pairs` are sums.
        """
        sums = self._sums
        metrics = {"train/loss": mean_loss(sums.losses, sums.labels) if sums.finite else math.nan}
        for (name, count), value in zip(sums.denominators.items(), sums.terms.tolist(), strict=True):
            if name != "sft":  # it is train/loss
                metrics[f"train/{name}"] = value / denominator(sums.counts, count) if sums.finite else math.nan
        metrics |= {
            "data/step_fingerprint": float(sums.fingerprint), "data/overlong": float(sums.overlong),
            "data/dropped_pairs": float(sums.dropped_pairs), "data/wait_seconds": sums.waited / sums.steps,
        }  # fmt: skip
        if sums.applied:
            metrics["train/grad_norm"] = sums.norm / sums.applied
        if skipped := sums.steps - sums.applied:
            metrics["guard/skipped"] = float(skipped)
        rate = float(sums.tokens.sum()) / sums.seconds if sums.seconds else 0.0
        metrics |= {"train/step_seconds": sums.seconds / sums.steps, "train/tokens_per_second": rate}
        return metrics | (self._metrics_by_language() if by_language else {})

    def _metrics_by_language(self) -> dict[str, float]:
        sums = self._by_language
        seen = np.flatnonzero(sums.seen)
        with np.errstate(invalid="ignore"):  # 0 / 0: all labels of the language are in steps that are left out
            means = (sums.losses[seen] / sums.labels[seen]).tolist()
        shares = (sums.tokens / max(int(sums.tokens.sum()), 1)).tolist()
        return {
            **{f"train/loss/{self.languages[n]}": mean for n, mean in zip(seen.tolist(), means, strict=True)},
            **{f"train/token_share/{name}": share for name, share in zip(self.languages, shares, strict=True)},
        }

    def state(self) -> dict[str, Any]:
        """The steps that were read but not logged, as plain JSON data: a resumed run logs them with those after it."""
        kept = {"all": self._sums, "by_language": self._by_language}
        return {name: sums.state() for name, sums in kept.items() if sums.steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the state of a checkpoint; an empty one, or one of other languages, begins a new window."""
        self._waiting = []
        self._sums, self._by_language = self._zeros(), self._zeros()
        for name, sums in (("all", self._sums), ("by_language", self._by_language)):
            if len(state.get(name, {}).get("losses", ())) == len(self.languages):
                sums.restore(state[name])

    def _zeros(self) -> _Sums:
        return _Sums.zeros(len(self.languages), self._n_terms)

    def _row(self, step: int) -> Tensor:
        return self._rows[step % len(self._rows)]

    def _finish(self, step: _Waiting, row: Tensor) -> FinishedStep:
        """Adds a step, whose row is summed over ranks."""
        norm, *sums_of_step = row.tolist()
        bad, losses, labels, terms = split_sums(sums_of_step, len(self.languages))
        if not step.skipped and (bad or not math.isfinite(norm)):
            found = "its loss is not finite" if bad else f"the gradient norm is {norm}"
            raise RuntimeError(f"step {step.step}: DeepSpeed applied an update, but {found}")
        for sums in (self._sums, self._by_language):
            sums.add(step, norm)
            sums.seen = sums.seen + step.read.labels
            if not bad:  # otherwise the sums lack the samples of some micro-batches
                sums.add_losses(step, losses, labels, terms)
        loss = math.nan if bad else mean_loss(losses, labels)
        return FinishedStep(step.read.slots, step.read.labels, loss)
