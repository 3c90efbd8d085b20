"""Chooses ShifCon's layer area from what the layers say about languages (docs/methods.md, section 1.4).

The area is a contiguous run of about 30 % of the layers. Two rules are computed: the run with the lowest mean distance
between the subspaces of the other languages and that of the dominant one, and the run with the highest mean retrieval
of translations. Retrieval decides where there are translations: it is what the contrastive loss needs to see, and
distances between covariances follow how much the states of a layer vary in the smallest dimensions.

Shapes: N + 1 layers, R replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.errors import ModelError
from modeling.shifcon.layer_probe import LayerMeasures

SHARE = 0.3  # of the layers, in an area
MOST_OVERLAP = 0.5  # of a runner-up with the area and with other runners-up
# measure: 1 if an area has high values, -1 if it has low ones; in order of preference
RULES = {"retrieval": 1, "sum": -1, "riemannian": -1}
Area = tuple[int, int]


@dataclass(frozen=True, slots=True)
class AreaChoice:
    """The chosen area [toward, back) and how it was found."""

    area: Area
    rule: str  # the measure of RULES that decided
    by_rule: Mapping[str, Area]  # what each defined measure alone would choose
    runners_up: tuple[Area, ...]  # the next best by the rule, in order
    agreement: float  # share of the jackknife's replicates (without a group of sentences) that choose the same area


def mean_curves(measures: Mapping[str, LayerMeasures], name: str) -> Tensor:
    """(R, N + 1): a measure's mean over the languages in which it is defined; NaN where it is in none."""
    return torch.stack([each.values[name] for each in measures.values()]).nanmean(dim=0)


def candidates(n_layers: int) -> list[Area]:
    """All areas of the right length, without the states that enter layer 0 (the embeddings) or leave the last layer."""
    length = max(round(SHARE * n_layers), 1)
    return [(toward, toward + length) for toward in range(min(1, n_layers - length), n_layers - length + 1)]


def choose_area(measures: Mapping[str, LayerMeasures], n_runners_up: int = 2) -> AreaChoice:
    """The layer area of a model.

    Args:
        measures: by language, of the other languages.

    Raises:
        ModelError: there is no other language, or no measure is defined at every layer.
    """
    if not measures:
        raise ModelError("the layer area is chosen by comparing languages: there must be one besides the dominant one")
    curves = {name: sign * mean_curves(measures, name) for name, sign in RULES.items()}
    defined = {name: curve for name, curve in curves.items() if curve[0].isfinite().all()}
    if not defined:
        raise ModelError("no layer area can be chosen: the states of a language do not vary at some layer")
    rule, curve = next(iter(defined.items()))
    areas = candidates(curve.shape[1] - 1)
    chosen, *rest = _in_order(curve[0], areas)
    runners_up: list[Area] = []
    for area in rest:
        if all(_overlap(area, other) <= MOST_OVERLAP for other in (chosen, *runners_up)):
            runners_up.append(area)
    votes = [_in_order(replicate, areas)[0] == chosen for replicate in curve[1:] if replicate.isfinite().all()]
    return AreaChoice(
        chosen, rule, {name: _in_order(each[0], areas)[0] for name, each in defined.items()},
        tuple(runners_up[:n_runners_up]), sum(votes) / max(len(votes), 1),
    )  # fmt: skip


def _in_order(curve: Tensor, areas: Sequence[Area]) -> list[Area]:
    """Areas by their mean value, the highest first; the lower one of two equal ones."""
    means = torch.stack([curve[toward:back].mean() for toward, back in areas])
    return [areas[number] for number in torch.argsort(-means, stable=True).tolist()]


def _overlap(one: Area, other: Area) -> float:
    """Shared layers as a share of an area's length."""
    shared = min(one[1], other[1]) - max(one[0], other[0])
    return max(shared, 0) / (one[1] - one[0])
