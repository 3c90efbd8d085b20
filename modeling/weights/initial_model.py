"""A from-scratch model, written once as a Hugging Face directory that `loading.py` opens like any other.

In: the keys of a `config.json`, an architecture, a tokenizer, a seed. Out: a directory with config, weights and
tokenizer.
Next: `loading.py` builds and fills the model from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from modeling.architectures import Architecture, auto_class, model_class
from modeling.errors import ModelError
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
    """Write a randomly initialised model with its tokenizer as a Hugging Face directory, once.

    Done in plain PyTorch on the CPU, because a model built inside ZeRO-3's context skips Hugging Face's own
    initialisation. `config`: the keys of a `config.json` (at least `model_type`), or such a file. Vocabulary
    size and special ids come from the tokenizer; a larger `vocab_size` may be given. Weights depend on
    `config`, `architecture`, the tokenizer and `seed` alone. An `output` that holds the same model already is
    left as it is. Without `weights` only the config and the tokenizer are written, for who looks at the model's shape.
    Raises ModelError on unknown keys, on a type without that architecture, and when `output` holds another model.
    """
    model_config = _initial_config(config, tokenizer)
    model_class(model_config, architecture)
    if not weights:
        model_config.architectures = [model_class(model_config, architecture).__name__]
        model_config.save_pretrained(output)
        tokenizer.save_pretrained(output)
        return output
    described = json.loads(model_config.to_json_string())
    del described["transformers_version"]  # a newer release may go on with the model
    vocabulary = hashlib.blake2b(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
    made_from = {"config": described, "vocabulary": vocabulary, "seed": seed}
    if architecture != "causal-lm":  # which directories of before this choice do not name
        made_from["architecture"] = architecture

    def write(directory: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto_class(architecture).from_config(model_config, dtype=model_config.dtype or torch.float32)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return written_once(output, made_from, write)


def written_once(output: Path, made_from: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """`output` as `write(directory)` makes it, with a stamp of what it was made from; left alone if it is there.

    Written under a temporary name and renamed. Raises ModelError when `output` was made from something else.
    """
    stamp = json.dumps(made_from, sort_keys=True)
    stamp_file = output / "initial_model.json"
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        temporary = output.with_name(f".{output.name}.{os.getpid()}")
        write(temporary)
        (temporary / stamp_file.name).write_text(stamp, encoding="utf-8")
        try:
            temporary.rename(output)
        except OSError:  # another process was first; what it wrote is checked below like any other
            shutil.rmtree(temporary)
    if not stamp_file.is_file() or stamp_file.read_text(encoding="utf-8") != stamp:
        raise ModelError(
            f"{output}: holds another model than this config and seed give; remove it or name another place"
        )
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
        raise ModelError(f"model_type: {model_type!r} is not a type that transformers knows{hint}")
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
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
