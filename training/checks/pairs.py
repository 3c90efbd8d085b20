"""Checks of translation pairs before a run: refuses data without any if the objective needs them, warns, shows some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from data_pipeline.order.pairing import PairingRule
from data_pipeline.order.pairs import Shared, repeated_ids, shared_items, unlike_texts, why_unpaired
from data_pipeline.order.plan import Planner, StepPlan
from data_pipeline.records import DataError, Split
from data_pipeline.sources.index import DataIndex
from training.config import DataConfig
from training.objectives.base import ObjectiveConfig

COUNTED_STEPS, COUNTED_SLOTS = 64, 2_048  # limits of what the number of pairs per step is counted on
MOST_SINGLE = 0.01  # share of contrast sets with a single pair above which a run warns
SHOWN = 2
TEXT = 200  # characters shown of a text


def refuse_unpaired(data: DataConfig, objective: ObjectiveConfig, index: DataIndex) -> None:
    """Raises DataError if the objective learns from pairs and no language has any (of a corpus: `ParallelPairs`)."""
    rule, dominant = objective.pairing(), index.languages.index(data.dominant)
    if not rule.needed or data.pairs is not None:
        return
    found = _unpaired(rule, index, dominant)
    if len(found) < len(index.languages) - 1 or (not found and _has_back(index, dominant)):
        return
    counts = ", ".join(f"{index.languages[each]} {shared.shared} of {shared.items:,}" for each, shared in found.items())
    why = (
        f"items shared with {data.dominant!r}: {counts}; {why_unpaired(index, next(iter(found)), dominant)}"
        if found
        else f"{data.dominant!r} is the only language"
    )
    raise DataError(f"objective {objective.name!r} learns from pairs of translations, and there are none: {why}")


def pair_warnings(data: DataConfig, objective: ObjectiveConfig, index: DataIndex) -> Iterator[str]:
    """Languages without pairs, ids that repeat, and pairs whose texts look unrelated."""
    rule, dominant = objective.pairing(), index.languages.index(data.dominant)
    if not rule.needed:
        return
    if data.mixture.pairing == "none" and data.pairs is not None:
        return
    found = _unpaired(rule, index, dominant)
    for language, shared in found.items():
        if len(index.rows(language, Split.PARALLEL)):
            continue
        yield (
            f"language {index.languages[language]!r} has no pairs: none of its {shared.items:,} items is in"
            f" {data.dominant!r} too; {why_unpaired(index, language, dominant)}"
        )
    yield from repeated_ids(index)
    for language, code in enumerate(index.languages):
        if language != dominant and language not in found and (why := unlike_texts(index, language, dominant)):
            yield (
                f"the pairs of {code!r} and {data.dominant!r} do not look like translations: {why}; are"
                " their ids numbers that begin anew in every file?"
            )


def set_warnings(data: DataConfig, objective: ObjectiveConfig, max_steps: int, planner: Planner) -> Iterator[str]:
    """Contrast sets of a single pair, which has no negatives."""
    n_steps = min(max_steps, COUNTED_STEPS) if objective.pairing().needed else 0
    sizes = [len(pairs) for step in range(n_steps) for pairs in planner.step(step).sets]
    if (single := sizes.count(1)) > MOST_SINGLE * len(sizes):
        fill = "" if data.mixture.pairing == "fill" else ", or set data.mixture.pairing=fill"
        yield (
            f"{single} of {len(sizes)} contrast sets of the first {n_steps} steps have a single pair, whose "
            f"contrastive loss is 0: nothing is learned from them; raise data.slots_per_step{fill}"
        )


def _unpaired(rule: PairingRule, index: DataIndex, dominant: int) -> dict[int, Shared]:
    """Languages that have neither an item in common with the dominant one nor, for X-Mixup, back-translations."""
    return {
        language: shared
        for language, shared in shared_items(index, dominant).items()
        if not shared.shared and not (rule.with_partner and _has_back(index, language))
    }


def _has_back(index: DataIndex, language: int) -> bool:
    return bool(index.has_back[index.rows(language)].any())


def show_pairs(
    data: DataConfig, objective: ObjectiveConfig, max_steps: int, index: DataIndex, planner: Planner
) -> Iterator[str]:
    """Number of pairs per step and language over the first steps, and two pairs as text; two more of a corpus."""
    rule, dominant = objective.pairing(), index.languages.index(data.dominant)
    if not rule.needed:
        return
    n_steps = min(max_steps, COUNTED_STEPS, max(COUNTED_SLOTS // data.slots_per_step, 1))
    planned = [pair for step in range(n_steps) for pair in _planned(rule, index, dominant, planner.step(step))]
    counts = Counter(index.languages[index.language[other]] for _, other in planned)
    each = (f"{code} {counts[code] / n_steps:.1f}" for code in index.languages if code != data.dominant)
    yield f"pairs a step with {data.dominant!r}, over the first {n_steps} steps: {', '.join(each)}"
    for split in (Split.TRAIN, Split.PARALLEL):
        own = [pair for pair in planned if index.split[pair[1]] == split]
        first_of_language = {int(index.language[pair[1]]): pair for pair in reversed(own)}
        for first, other in list(dict.fromkeys([*first_of_language.values(), *own]))[:SHOWN]:
            yield from _shown(index, first, other)


def _planned(rule: PairingRule, index: DataIndex, dominant: int, plan: StepPlan) -> Iterator[tuple[int, int]]:
    """(row in the dominant language, other row) of every pair; for a back-translation, twice the row that has it."""
    if not rule.with_partner:
        for pairs in plan.sets:
            yield from zip(*plan.rows[pairs].T.tolist(), strict=True)
        return
    for slot in plan.slots:
        if slot.partner is None or slot.language == dominant or slot.partner.kind == "itself":
            continue
        gold = index.translation(slot.row, dominant)
        yield (gold if gold >= 0 else slot.row), slot.row


def _shown(index: DataIndex, first: int, other: int) -> Iterator[str]:
    one, two = index.record(first), index.record(other)
    of_corpus = "the parallel corpus, " if index.split[other] == Split.PARALLEL else ""
    yield f"--- a pair of {of_corpus}item {two.group!r}"
    if first == other and one.back is not None:
        yield f"back-translation  {one.origin}  {one.id!r}: {_short(' '.join(one.back.texts))}"
    else:
        yield f"{one.language}  {one.origin}  {one.id!r}: {_short(one.user_text)}"
    yield f"{two.language}  {two.origin}  {two.id!r}: {_short(two.user_text)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT else f"{line[:TEXT]}..."
