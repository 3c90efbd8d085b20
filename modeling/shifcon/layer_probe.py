"""What a model's layers say about languages: distances between their subspaces, and how well translations are found.

Each language is compared with the dominant one at every layer, in the stream without shift (docs/methods.md, section
1.4). Languages are measured one after the other, so that memory holds two of them, whatever their number; for a wide
model, some layers in each pass. Sentences are in G groups by their item; what each measure would be without one group
gives its standard error (jackknife).

In a pretrained model a few dimensions have a variance that is orders of magnitude larger than the others'. Every
dimension is therefore divided by its standard deviation over the dominant language's tokens or sentences, so that no
few dimensions decide a measure. The Riemannian distance does not depend on it, but what is added to the variances does.

Shapes: N + 1 layers (states h[0] to h[N]), G groups, R replicates (all sentences, then without each group: G + 1), B
rows, T tokens, S sentences, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.cka import CrossCovariance
from modeling.layers import backbone, decoder_layers, hidden_size, membership, state_hook
from modeling.shifcon.normalisation import with_floor
from modeling.shifcon.subspace import (
    Riemannian,
    TokenMoments,
    angles,
    principal_directions,
    riemannian,
    with_ridge,
)

N_GROUPS = 8
DIRECTIONS = 16  # principal directions whose angles are reported
MEMORY = 8 << 30  # bytes for the moments of two languages
MOST_SENTENCES = 512  # of a language, kept for what needs pairs of sentences
SHOWN = 32  # of a language, whose states are returned
MEASURES = {
    "riemannian": "distance between the covariances of tokens, per dimension: D / sqrt(H)",
    "mean_distance": "distance between the means of tokens, root mean square over standardised dimensions",
    "sum": "riemannian + mean_distance",
    "principal_angle": f"mean angle between {DIRECTIONS} largest principal directions, radians, standardised states",
    "cka": "debiased linear CKA of the means of translated sentences, standardised states",
    "retrieval": "share of sentences whose translation is the most similar one, both ways, standardised states",
}


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """Sentences of one language, as a forward pass reads them."""

    inputs: Mapping[str, Any]  # arguments of the forward pass of the model without its LM head
    segment_ids: Tensor  # (B, T) int64 in range(S); -1 at padding
    content: Tensor  # (B, T) bool, the tokens that are measured
    items: Sequence[int]  # (S,) of each sentence; translations have the same


@dataclass(slots=True)
class LanguageStates:
    """Measured states of one language."""

    moments: TokenMoments  # at the layers measured, here n
    pooled: list[Tensor] = field(default_factory=list)  # of each sentence (n, H) fp32 on the CPU, its content's mean
    items: list[int] = field(default_factory=list)  # of each sentence in `pooled`
    directions: dict[int, Tensor] = field(default_factory=dict)  # of the dominant language, kept for the others


@dataclass(frozen=True, slots=True)
class LanguageMeans:
    """A language's tokens at every layer, unshifted."""

    tokens: int
    mean: Tensor  # (N + 1, H) fp64, on the CPU
    length: Tensor  # (N + 1,) fp64, mean length of a state
    text_mean: Tensor  # (N + 1, H) fp32, mean over sentences of the mean over their tokens
    text_deviation: Tensor  # (N + 1, H) fp32, its standard deviation over sentences
    texts: Tensor  # (S, N + 1, H) fp32, the mean over the tokens of some sentences, SHOWN at most
    items: list[int]  # (S,) of these sentences


@dataclass(frozen=True, slots=True)
class ProbedLanguages:
    """The result of `probe_languages`, by language."""

    measures: Mapping[str, LayerMeasures]  # without the dominant language
    means: Mapping[str, LanguageMeans]


def probe_languages(
    model: nn.Module,
    languages: Sequence[str],
    batches: Callable[[str], Iterable[ProbeBatch]],
    over_ranks: Callable[[LanguageStates], LanguageStates] = lambda states: states,
    memory: int = MEMORY,
) -> ProbedLanguages:
    """Compares every language with the first, the dominant one. Called on all ranks.

    Args:
        model: in evaluation mode, without shift.
        languages: those without sentences are left out.
        batches: a language's sentences, of this rank; called once for each pass.
        over_ranks: what all ranks together have measured.
        memory: bytes for the moments of two languages. Where those of all layers need more, each pass over the
            sentences measures some layers.
    """
    parts: list[dict[str, LayerMeasures]] = []
    means: dict[str, list[LanguageMeans]] = {}
    for layers in layer_passes(len(decoder_layers(model)) + 1, hidden_size(model), memory):
        dominant: LanguageStates | None = None
        parts.append({})
        for language in languages:
            states = over_ranks(measure_language(model, batches(language), layers))
            if not states.items:
                continue
            if dominant is None:
                dominant = states
            else:
                parts[-1][language] = compare(dominant, states)
            means.setdefault(language, []).append(_means(states, len(layers)))
    measures = {language: LayerMeasures.joined([part[language] for part in parts]) for language in parts[0]}
    return ProbedLanguages(measures, {language: _all_layers(each) for language, each in means.items()})


def layer_passes(n_states: int, hidden: int, memory: int, n_groups: int = N_GROUPS) -> list[range]:
    """The layers of each pass, so that the moments of two languages need at most `memory` bytes, or one layer's."""
    at_once = max(memory // (2 * n_groups * hidden**2 * 8), 1)
    return [range(start, min(start + at_once, n_states)) for start in range(0, n_states, at_once)]


def _means(states: LanguageStates, n_layers: int) -> LanguageMeans:
    whole = [states.moments.statistics(layer) for layer in range(n_layers)]
    mean, length = torch.stack([each.mean for each in whole]), torch.stack([each.length for each in whole])
    pooled_SNH = torch.stack(states.pooled)
    spread = slice(None, None, -(-len(states.items) // SHOWN))  # batches are sorted by length
    return LanguageMeans(
        whole[0].tokens, mean.cpu(), length.cpu(), pooled_SNH.mean(dim=0), pooled_SNH.std(dim=0),
        pooled_SNH[spread].clone(),  # a view would keep the states of all sentences in memory
        states.items[spread],
    )  # fmt: skip


def _all_layers(parts: Sequence[LanguageMeans]) -> LanguageMeans:
    """A language's means at all layers, from those of consecutive ones."""
    by_layer = ("mean", "length", "text_mean", "text_deviation")
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in by_layer}
    return replace(parts[0], **joined, texts=torch.cat([part.texts for part in parts], dim=1))


def measure_language(
    model: nn.Module, batches: Iterable[ProbeBatch], layers: Sequence[int], n_groups: int = N_GROUPS
) -> LanguageStates:
    """Runs a language's sentences through the model, one forward pass for each batch.

    Args:
        model: in evaluation mode, without shift.
        layers: the l of each `h[l]` that is measured.
    """
    found: LanguageStates | None = None
    states: dict[int, Tensor] = {}
    hooks = [state_hook(model, layer, _keeper(states, place)) for place, layer in enumerate(layers)]
    try:
        for batch in batches:
            with torch.inference_mode():
                backbone(model)(**batch.inputs)  # without the LM head
            if found is None:
                found = LanguageStates(TokenMoments(n_groups, len(layers), hidden_size(model), states[0].device))
            _add(found, batch, states)
            states.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return found or LanguageStates(TokenMoments(n_groups, len(layers), hidden_size(model)))


def _keeper(states: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
    def keep(hidden_BTH: Tensor) -> None:
        states[layer] = hidden_BTH.detach()

    return keep


def _add(found: LanguageStates, batch: ProbeBatch, states: Mapping[int, Tensor]) -> None:
    items = torch.tensor(batch.items, dtype=torch.int64)
    n_groups = len(found.moments.tokens)
    device = states[0].device
    segments = batch.segment_ids.masked_fill(~batch.content, -1).to(device)
    known = segments.flatten() >= 0
    groups = (items.to(device) % n_groups)[segments.flatten()[known]]
    members_SN = membership(segments, len(items))
    sizes_S = members_SN.sum(dim=1, keepdim=True).clamp(min=1)
    pooled = []
    for layer, hidden_BTH in sorted(states.items()):
        flat_MH = hidden_BTH.flatten(0, 1)
        found.moments.add(layer, flat_MH[known], groups)
        pooled.append((members_SN.float() @ flat_MH.float() / sizes_S).cpu())
    room = MOST_SENTENCES - len(found.items)
    found.pooled += list(torch.stack(pooled, dim=1)[: max(room, 0)])
    found.items += batch.items[: max(room, 0)]


@dataclass(frozen=True, slots=True)
class LayerMeasures:
    """One language against the dominant one. `values[measure]`: (R, N + 1) fp64; NaN where it is undefined."""

    tokens: int
    sentences: int
    pairs: int  # sentences whose translation was measured too
    with_few_tokens: bool  # no more tokens than dimensions in one of the two languages
    values: Mapping[str, Tensor]

    @classmethod
    def joined(cls, parts: Sequence[LayerMeasures]) -> LayerMeasures:
        """The measures of all layers, from those of consecutive ones."""
        values = {name: torch.cat([part.values[name] for part in parts], dim=1) for name in MEASURES}
        return replace(parts[0], values=values)


def compare(dominant: LanguageStates, other: LanguageStates) -> LayerMeasures:
    """The measures of `MEASURES` at the layers measured."""
    n_layers, hidden = dominant.moments.centre.shape
    n_replicates = len(dominant.moments.tokens) + 1
    values = {
        name: torch.full((n_replicates, n_layers), torch.nan, dtype=torch.float64)
        for name in ("riemannian", "mean_distance", "principal_angle")
    }
    few = min(int(each.moments.tokens.sum()) for each in (dominant, other)) <= hidden
    for layer in range(n_layers):
        (mean_RH, deviation_RH), (other_mean_RH, _) = (each.moments.means(layer) for each in (dominant, other))
        divisor_RH = _divisor(deviation_RH)
        values["mean_distance"][:, layer] = ((mean_RH - other_mean_RH) / divisor_RH).square().mean(dim=1).sqrt().cpu()
        scales_HH = divisor_RH[0].outer(divisor_RH[0])
        a, b = (each.moments.statistics(layer).covariance / scales_HH for each in (dominant, other))
        if layer not in dominant.directions:
            dominant.directions[layer] = principal_directions(a, DIRECTIONS)
        found = angles(dominant.directions[layer], principal_directions(b, DIRECTIONS))
        values["principal_angle"][:, layer] = found.mean()
        if float(a.diagonal().sum()) > 0 and float(b.diagonal().sum()) > 0:  # undefined for one token's states
            distance = riemannian(with_ridge(a, few), with_ridge(b, few))
            replicates_R = _riemannian_replicates(distance, dominant.moments, other.moments, layer, scales_HH, few)
            values["riemannian"][:, layer] = replicates_R / hidden**0.5
    values["sum"] = values["riemannian"] + values["mean_distance"]
    values |= _paired_measures(dominant, other, n_replicates)
    n_pairs = len(set(dominant.items) & set(other.items))
    return LayerMeasures(int(other.moments.tokens.sum()), len(other.items), n_pairs, few, values)


def _divisor(deviation: Tensor) -> Tensor:
    """(..., H): standard deviations with their floor; 1 where all of them are 0."""
    found = with_floor(deviation)
    return torch.where(found > 0, found, 1.0)


def _riemannian_replicates(
    found: Riemannian, dominant: TokenMoments, other: TokenMoments, layer: int, scales_HH: Tensor, few: bool
) -> Tensor:
    """(R,): the distance of all sentences, and to first order in the covariances' change those without each group.

    One eigenvalue problem serves all replicates.
    """
    changes_R = torch.zeros(len(dominant.tokens) + 1, dtype=torch.float64)
    for moments, derivative_HH in ((dominant, found.by_a), (other, found.by_b)):
        weighted_R = moments.weighted_covariances(layer, with_ridge(derivative_HH, few) / scales_HH).cpu()
        changes_R += weighted_R - weighted_R[0]
    return found.distance + changes_R


def _paired_measures(dominant: LanguageStates, other: LanguageStates, n_replicates: int) -> dict[str, Tensor]:
    """CKA and retrieval of the sentences that both languages have; NaN if they share fewer than four."""
    place = {item: number for number, item in enumerate(dominant.items)}
    pairs = [(place[item], number) for number, item in enumerate(other.items) if item in place]
    n_layers = len(dominant.moments.centre)
    undefined = torch.full((n_replicates, n_layers), torch.nan, dtype=torch.float64)
    if len(pairs) < 4:
        return {"cka": undefined, "retrieval": undefined.clone()}
    one_PNH = torch.stack([dominant.pooled[number] for number, _ in pairs]).double()
    two_PNH = torch.stack([other.pooled[number] for _, number in pairs]).double()
    groups = torch.tensor([dominant.items[number] for number, _ in pairs]) % (n_replicates - 1)
    cka, found = undefined, undefined.clone()
    for layer in range(n_layers):
        deviation = with_floor(one_PNH[:, layer].std(dim=0))
        one, two = one_PNH[:, layer] / deviation, two_PNH[:, layer] / deviation
        both = CrossCovariance(one.shape[1], two.shape[1])
        both.add(one, two)
        cka[:, layer] = both.linear_cka(debiased=True)
        hits_P = retrieved(one, two)
        found[0, layer] = hits_P.mean()
        for group in range(n_replicates - 1):
            kept = hits_P[groups != group]
            found[group + 1, layer] = kept.mean() if len(kept) else torch.nan
    return {"cka": cka, "retrieval": found}


def retrieved(one_PH: Tensor, two_PH: Tensor) -> Tensor:
    """(P,) 0, 0.5 or 1: in how many of two directions row i of one side is the most similar to row i of the other.

    Both sides are centred, and divided by the deviations of the first, as for the contrastive loss.
    """
    deviation = with_floor(one_PH.std(dim=0))
    sides = [F.normalize((side - side.mean(dim=0)) / deviation, dim=1) for side in (one_PH, two_PH)]
    cosines_PP = sides[0] @ sides[1].T
    own = torch.arange(len(cosines_PP), device=cosines_PP.device)
    hits = (cosines_PP.argmax(dim=0) == own).double() + (cosines_PP.argmax(dim=1) == own).double()
    return hits / 2


def jackknife_error(replicates: Tensor) -> Tensor:
    """Standard error of an estimate from its values without each of G groups; (G, ...) -> (...)."""
    n = len(replicates)
    return ((n - 1) / n * (replicates - replicates.mean(dim=0)).square().sum(dim=0)).sqrt()
