"""The parts of transformers that are not its public API, all in one place, each with the reason.

They can change with any minor version, so pyproject.toml allows only those minor versions that the tests were run with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, modeling_flash_attention_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

__all__ = [
    "clear_attention", "no_init_weights", "obsolete_weights", "read_positions_once", "renamed_weights",
    "supports_attention",
]  # fmt: skip

# `no_init_weights`: `build_model` makes modules whose weights are all loaded afterwards. Without it, every rank would
# draw random numbers for the whole model, tensor by tensor.


def supports_attention(model_class: type[PreTrainedModel] | Any, name: str) -> bool:
    """Whether a model class runs `sdpa` or `flash_attention_2`; transformers has no public API for it."""
    return bool({"sdpa": model_class._supports_sdpa, "flash_attention_2": model_class._supports_flash_attn}[name])


def clear_attention(config: PreTrainedConfig) -> None:
    """Removes the attention that a config.json names: transformers would fetch and run a kernel from the hub."""
    config._attn_implementation = None


def read_positions_once() -> None:
    """Has flash-attn's packed path read a batch's positions once; transformers reads them, so waits, in every layer."""
    flash = modeling_flash_attention_utils
    flash._is_packed_sequence = _once(flash._is_packed_sequence, bool)
    flash.prepare_fa_kwargs_from_position_ids = _once(flash.prepare_fa_kwargs_from_position_ids, _with_lengths)


def _with_lengths(found: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """The same with the longest sequence as a number: flash-attn would read the tensor in every layer."""
    starts, (longest, _) = found
    return starts, (int(longest),) * 2


def _once(function: Callable[..., Any], convert: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function of position ids that keeps the converted result of the last tensor, as long as that is unchanged."""
    if hasattr(function, "__wrapped__"):
        return function
    last: list[Any] = [lambda: None, None, None]  # reference to the tensor, its version and the other arguments, result

    @wraps(function)
    def kept(position_ids: Tensor | None, *others: Any) -> Any:
        if position_ids is None:
            return function(position_ids, *others)
        key = (position_ids._version, others)
        if last[0]() is not position_ids or last[1] != key:
            last[:] = weakref.ref(position_ids), key, convert(function(position_ids, *others))
        return last[2]

    return kept


def obsolete_weights(model: PreTrainedModel) -> list[str]:
    """Patterns of stored names that older versions of the model's class wrote and its `from_pretrained` ignores."""
    return list(model._keys_to_ignore_on_load_unexpected or ())


def renamed_weights(
    model: PreTrainedModel, keys: Iterable[str], state: dict[str, Any]
) -> Iterable[tuple[str, str, bool]]:
    """(key, name in the model, whether the stored layout must be converted), as `from_pretrained` maps stored keys.

    The model is filled tensor by tensor under ZeRO-3, which `from_pretrained` does only with its own engine set-up.

    Args:
        keys: names of stored tensors.
        state: the model's state dict.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, converter = key, None
        yield key, name, converter is not None
