"""Matches stored tensors to the weights of a model, and reports every mismatch in one line per kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modeling.errors import ModelError
from modeling.quantisation.linear import dense_state, packed_layers
from modeling.transformers_internals import obsolete_weights, renamed_weights
from modeling.weights.weight_files import StoredTensor

# stored by old releases, computed by new ones
OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
FLOATS = ("F64", "F32", "F16", "BF16")


def named(names: Iterable[str], limit: int = 5) -> str:
    """The first names in sorted order, and the number of others."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" (and {len(ordered) - limit} more)" if len(ordered) > limit else "")


@dataclass(slots=True)
class WeightMatch:
    """The stored tensor of each parameter and buffer, by `id`, and the mismatches by kind."""

    sources: dict[int, StoredTensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # names in the model
    unexpected: list[str] = field(default_factory=list)  # stored names
    wrong: list[str] = field(default_factory=list)  # "name (F32 [3] stored, [4] wanted) in FILE"
    quantised: list[str] = field(default_factory=list)  # stored in a format that training cannot read
    untied: list[str] = field(default_factory=list)  # "a and b in FILE"
    converted: list[str] = field(default_factory=list)  # stored names, in a layout that needs conversion

    def refuse(self, model: PreTrainedModel, directory: Path) -> None:
        """Raises ModelError, one line per kind of mismatch, if there is any."""
        if lines := list(self._lines(model, directory)):
            raise ModelError("\n".join(lines))

    def _lines(self, model: PreTrainedModel, directory: Path) -> Iterable[str]:
        owner, config = type(model).__name__, model.config
        if self.converted:
            yield (
                f"{directory}: {self.converted[0]} is stored in a layout that needs conversion; convert once with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW, save_original_format=False)"
            )
            return
        if len(self.missing) > len(self.sources) and len(self.unexpected) > len(self.sources):
            yield (
                f"{directory}: the weights there are not a {owner}'s: {len(self.unexpected)} have other names, such as "
                f"{self.unexpected[0]}, and {len(self.missing)} are missing; is model_type {config.model_type!r} of "
                "config.json wrong?"
            )
            return
        for pair in self.untied:
            yield f"{directory}: {pair} differ, but config.json ties them; set tie_word_embeddings to false there"
        fits = "config.json must be the one of these weights"
        only_head = set(self.missing) <= set(_output_weights(model))
        whole = "set tie_word_embeddings to true in config.json" if only_head else "copy the whole model again"
        remedies = (
            ("missing", self.missing, whole),
            ("unexpected", self.unexpected, fits),
            ("wrongly shaped", self.wrong, fits),
            ("wrongly typed", self.quantised, "they are quantised; take the model's unquantised release"),
        )
        for problem, names, remedy in remedies:
            if names:
                yield f"{directory}: {len(names)} {problem} weights for {owner}: {named(names)}; {remedy}"


def _output_weights(model: PreTrainedModel) -> list[str]:
    """Names of the head's matrix, which many models tie to the embeddings."""
    head = model.get_output_embeddings()
    return [name for name, parameter in model.named_parameters() if head is not None and parameter is head.weight]


def match_weights(
    model: PreTrainedModel,
    stored: dict[str, StoredTensor],
    *,
    may_miss: Callable[[str], bool] = lambda name: False,
    may_hold: Iterable[str] = (),
) -> WeightMatch:
    """Matches stored tensors to a model's names as `from_pretrained` renames them.

    Args:
        model: with weights, sharded or not, or on the meta device.
        stored: what `stored_tensors` gives.
        may_miss: whether a name of the model need not be stored, such as that of a new head.
        may_hold: patterns of stored names that need no place in the model.
    """
    state = dense_state(model)  # tied weights appear under each of their names, as one object
    packed = packed_layers(model)
    match = WeightMatch()
    found = _renamed(model, stored, state, match, (*may_hold, *OLD_BUFFERS))
    for name, tensor in found.items():
        target = state[name]
        shape = tuple(getattr(target, "ds_shape", target.shape))  # ZeRO-3 keeps the shape of the whole weight there
        shape = packed[name].shape if name in packed else shape
        is_float = target.is_floating_point() or name in packed
        if shape != tensor.shape or (is_float and tensor.dtype not in FLOATS):
            stored_as = f"{tensor.dtype} {list(tensor.shape)} stored, {list(shape)} wanted"
            quantised = shape == tensor.shape or tensor.dtype not in FLOATS
            (match.quantised if quantised else match.wrong).append(f"{name} ({stored_as}) in {tensor.file.name}")
        twin = match.sources.setdefault(id(target), tensor)
        if twin is not tensor and twin.sample() != tensor.sample():
            match.untied.append(f"{twin.key} and {tensor.key}")
    match.missing = [name for name, target in state.items() if id(target) not in match.sources and not may_miss(name)]
    return match


def _renamed(
    model: PreTrainedModel,
    stored: dict[str, StoredTensor],
    state: dict[str, Any],
    match: WeightMatch,
    may_hold: Iterable[str],
) -> dict[str, StoredTensor]:
    """Stored tensors by the model's names; those without a place, or in need of conversion, are added to `match`."""
    old = [*obsolete_weights(model), *may_hold]
    found: dict[str, StoredTensor] = {}
    for key, name, needs_conversion in renamed_weights(model, stored, state):
        if needs_conversion:
            match.converted.append(key)
        elif name in state and name not in found:
            found[name] = stored[key]
        elif not any(re.search(pattern, name) for pattern in old):
            match.unexpected.append(key)
    return found
