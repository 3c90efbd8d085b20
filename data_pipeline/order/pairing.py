"""How samples meet their translations: what an objective asks for, and the partner of a sample in a step.

Two forms: contrast sets, in which the samples of translations of one item stand beside each other (docs/methods.md,
section 1.3; `plan.py` makes them), and partners, where every sample comes together with its text in the dominant
language (section 2.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.order.mixture import Pairing
from data_pipeline.records import stable_hash


@dataclass(frozen=True, slots=True)
class PairingRule:
    """What an objective needs of the plan.

    Attributes:
        set_size: pairs of a contrast set; None: the plan makes no sets.
        with_partner: every sample comes with a partner: its translation, back-translation, or itself.
        gold_schedule: k of the scheduled sampling of partners (docs/methods.md, section 2.3); None: always gold.
        needed: data without any pair are refused.
    """

    set_size: int | None = None
    with_partner: bool = False
    gold_schedule: float | None = None
    needed: bool = False


class TranslatedIndex(Protocol):
    """What partners are chosen from. `index.DataIndex` is one."""

    @property
    def has_back(self) -> npt.NDArray[np.bool_]: ...
    def translation(self, row: int, language: int) -> int:
        """The row of the same item and split in that language, or -1."""
        ...


@dataclass(frozen=True, slots=True)
class Partner:
    """The text that a sample is read together with.

    Attributes:
        kind: a translation is the text of `row`; the others are derived from the sample's own row.
        language: of the text.
        gold_step: whether the step's partners are gold text where there is some.
    """

    kind: Literal["translation", "back-translation", "itself"]
    row: int
    language: int
    gold_step: bool


@dataclass(frozen=True, slots=True)
class Partners:
    """Chooses partners; a pure function of (seed, step, row).

    Gold text is chosen with a probability that falls from step to step, else the back-translation, which is what
    testing will bring (X-Mixup, arXiv 2205.04182, section 3.3).
    """

    index: TranslatedIndex
    dominant: int  # the language of the partners
    schedule: float | None  # the k of `gold_probability`; None: always gold
    seed: int

    def gold(self, step: int) -> bool:
        """Whether the partners of a step are gold text: drawn once a step, the same on every rank."""
        if self.schedule is None:
            return True
        return stable_hash(self.seed, "source", step) / 2**63 < gold_probability(step, self.schedule)

    def of(self, row: int, language: int, step: int) -> Partner:
        """The text that the step wants, else the other one, else the sample itself."""
        gold_step = self.gold(step)
        gold_row = self.index.translation(row, self.dominant) if language != self.dominant else -1
        has_back = bool(self.index.has_back[row])
        if gold_row >= 0 and (gold_step or not has_back):
            return Partner("translation", gold_row, self.dominant, gold_step)
        if has_back:
            return Partner("back-translation", row, self.dominant, gold_step)
        return Partner("itself", row, language, gold_step)


def gold_probability(step: int, k: float) -> float:
    """How probable gold partners are at a step, `k / (k + exp(step / k))` (X-Mixup, section 3.3)."""
    exponent = step / k - math.log(k)
    return 1 / (1 + math.exp(exponent)) if exponent < 700 else 0.0


@dataclass(frozen=True, slots=True)
class PlannedPairing:
    """How a planner pairs: in contrast sets where `set_size` is given, with partners where `partners` are."""

    dominant: int  # an index into the declared languages, in the mixture or not
    mode: Pairing = "none"
    set_size: int | None = None
    partners: Partners | None = None
