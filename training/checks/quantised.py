"""What training on quantised weights (`model.quantise`) needs: DeepSpeed settings, libraries, a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError

if TYPE_CHECKING:
    from training.config import ModelConfig

# Options of ZeRO-3 that convert or buffer all weights in one number format; packed weights are bytes beside floats.
_ONE_FORMAT = ("use_all_reduce_for_fetch_params", "zero_quantized_weights", "zero_quantized_nontrainable_weights")


def unfit_for_packed(raw: Mapping[str, Any]) -> Iterator[str]:
    """Lines for raw DeepSpeed settings that packed weights do not work with."""
    zero = raw.get("zero_optimization") or {}
    offload = zero.get("offload_param") or {}
    found = [name for name in _ONE_FORMAT if zero.get(name)]
    found += ["offload_param.device"] if offload.get("device") == "nvme" else []
    for name in found:
        yield (
            f"'deepspeed.zero_optimization.{name}' handles weights of one number format, but 'model.quantise' makes "
            "some of bytes; leave one of the two out"
        )


def missing_for_quantised(model: ModelConfig) -> str | None:
    """What a run with `model.quantise` lacks on this machine, and what to do; None: nothing."""
    if model.quantise is None:
        return None
    from modeling.quantisation.linear import FORMATS
    from training.distributed import visible_gpus

    number_format = FORMATS[model.quantise]
    lacking = number_format.missing()
    if lacking is None and number_format.needs_gpu and not visible_gpus():
        lacking = "an NVIDIA GPU, and none is visible here"
    if lacking is None:
        return None
    return (
        f"model.quantise: {model.quantise} needs {lacking}; without model.quantise the adapters train on whole weights"
    )


def refuse_quantised_here(model: ModelConfig) -> None:
    """Raises ConfigError if a run with `model.quantise` cannot train on this machine."""
    if (lacking := missing_for_quantised(model)) is not None:
        raise ConfigError(lacking)
