"""Writes a randomly initialised model with its tokenizer as a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from modeling.architectures import Architecture, auto_class, model_class
from modeling.errors import ModelError
from modeling.layers import LAYERS_KEY
from modeling.weights.weight_files import one_line

LEGACY_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # become part of rope_parameters


def write_initial_model(
    config: Mapping[str, Any] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    seed: int,
    architecture: Architecture = "causal-lm",
    weights: bool = True,
) -> Path:
    """Writes a randomly initialised model with its tokenizer as a Hugging Face directory.

    It is made in plain PyTorch on the CPU, because a model built inside ZeRO-3's context skips Hugging Face's own
    initialisation. The weights depend on `config`, `architecture`, the tokenizer and `seed` alone.

    Args:
        config: the keys of a `config.json` (at least `model_type`), or such a file. Vocabulary size and special ids
            come from the tokenizer; a larger `vocab_size` may be given.
        tokenizer: is saved with the model.
        output: the directory. Callers that need it whole or not at all write into a folder that they rename.
        seed: of the weights.
        architecture: the head.
        weights: False writes only the config and the tokenizer: enough to build the model on the meta device.

    Returns:
        `output`.

    Raises:
        ModelError: an unknown key, or a model type without that architecture. Nothing is written then.
    """
    model_config = _initial_config(config, tokenizer)
    if weights:
        model_class(model_config, architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto_class(architecture).from_config(model_config, dtype=model_config.dtype or torch.float32)
        model.save_pretrained(output, save_original_format=False)  # experts as they are trained, not one by one
    else:
        model_config.architectures = [model_class(model_config, architecture).__name__]
        model_config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def _initial_config(config: Mapping[str, Any] | str | Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    if not isinstance(config, Mapping):
        try:
            config = dict(json.loads(Path(config).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ModelError(f"{config}: not a readable model config in JSON ({one_line(error)})") from error
    keys = dict(config)
    model_type = keys.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), 1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ModelError(f"model_type: {model_type!r} is not a model type of transformers{hint}")
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | {*config_class.attribute_map, LAYERS_KEY}
    if "rope_parameters" in known:
        known |= set(LEGACY_ROPE_KEYS)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1, cutoff=0.0)
            raise ModelError(f"{key}: not a key of {config_class.__name__}; the nearest is {near[0]!r}")
    if keys.setdefault("vocab_size", len(tokenizer)) < len(tokenizer):
        raise ModelError(
            f"vocab_size: {keys['vocab_size']} is below the tokenizer's {len(tokenizer)} tokens; leave it out"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        keys[name] = getattr(tokenizer, name)
    try:
        return config_class(**keys)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"{config_class.__name__}: {one_line(error)}") from error
