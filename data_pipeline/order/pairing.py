"""How samples are paired with translations: what an objective requires, and the partner of a sample in a step.

There are two forms. Contrast sets hold the samples of both translations of an item (docs/methods.md, section 1.3;
built by `plan.py`). A partner is the text of a sample in the dominant language, read together with the sample
(section 2.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data_pipeline.order.mixture import Pairing
from data_pipeline.records import stable_hash

if TYPE_CHECKING:
    from data_pipeline.sources.index import DataIndex


@dataclass(frozen=True, slots=True)
class PairingRule:
    """The pairing that an objective requires of the plan."""

    set_size: int | None = None  # pairs per contrast set; None: no sets
    with_partner: bool = False  # every sample has a partner: its translation, its back-translation, or itself
    # k of the scheduled sampling of partners (docs/methods.md, section 2.3); None: always gold
    gold_schedule: float | None = None
    needed: bool = False  # data without any pair are an error
    min_probe_samples: int = 0  # a language with fewer in the probe set is in no contrast set


@dataclass(frozen=True, slots=True)
class Partner:
    """The text that a sample is read together with."""

    # a translation is the text of `row`; the other kinds come from the sample's own row
    kind: Literal["translation", "back-translation", "itself"]
    row: int
    language: int
    gold_step: bool  # whether gold text is preferred in this step


@dataclass(frozen=True, slots=True)
class Partners:
    """Chooses partners as a pure function of (seed, step, row).

    Gold text is chosen with a probability that decreases over the steps, otherwise the back-translation, which is
    what the model reads at test time (X-Mixup, arXiv 2205.04182, section 3.3).
    """

    index: DataIndex
    dominant: int  # the language of the partners
    schedule: float | None  # k of `gold_probability`; None: always gold
    seed: int

    def gold(self, step: int) -> bool:
        """Whether gold text is preferred in a step: drawn once per step, equal on all ranks."""
        if self.schedule is None:
            return True
        return stable_hash(self.seed, "source", step) / 2**63 < gold_probability(step, self.schedule)

    def of(self, row: int, language: int, step: int) -> Partner:
        """The partner of a row: the kind of text drawn for the step if the row has it, else the other, else itself."""
        gold_step = self.gold(step)
        gold_row = self.index.translation(row, self.dominant) if language != self.dominant else -1
        has_back = bool(self.index.has_back[row])
        if gold_row >= 0 and (gold_step or not has_back):
            return Partner("translation", gold_row, self.dominant, gold_step)
        if has_back:
            return Partner("back-translation", row, self.dominant, gold_step)
        return Partner("itself", row, language, gold_step)


def gold_probability(step: int, k: float) -> float:
    """Probability of gold partners at a step, `k / (k + exp(step / k))` (X-Mixup, section 3.3)."""
    exponent = step / k - math.log(k)
    return 1 / (1 + math.exp(exponent)) if exponent < 700 else 0.0


@dataclass(frozen=True, slots=True)
class PlannedPairing:
    """The pairing of a planner: contrast sets if `set_size` is given, partners if `partners` is given."""

    dominant: int  # index into the declared languages; the language need not be in the mixture
    mode: Pairing = "none"
    set_size: int | None = None
    partners: Partners | None = None
    # languages whose translations are in no contrast set; those of the parallel corpus are numbered behind the others
    uncontrasted: frozenset[int] = frozenset()
