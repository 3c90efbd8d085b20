"""Checks a model directory before a run: config, files and weights, by their headers alone."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedModel

from modeling.architectures import Architecture, auto_class
from modeling.errors import ModelError
from modeling.loading import load_config
from modeling.tasks.encoders import PRETRAINING_WEIGHTS, encoder_config, in_head
from modeling.weights.weight_files import one_line, other_weights, refuse_stub, stored_tensors
from modeling.weights.weight_match import match_weights

TEXT_FILES = ("config.json", "generation_config.json", "tokenizer*", "*.model", "vocab.*", "merges.txt")


def check_directory(
    directory: Path, architecture: Architecture, labels: Sequence[str] | None = None
) -> PreTrainedModel:
    """Checks that a model's files are whole and that its weights fit its config. No weight is read.

    Args:
        directory: of the model.
        architecture: the head that it is opened with.
        labels: of an encoder's task, whose head may be missing; None: every weight must be stored.

    Returns:
        The model on the meta device.

    Raises:
        ModelError: one line per kind of mistake, with the file or directory, and what would be right.
    """
    for pattern in TEXT_FILES:
        for file in sorted(directory.glob(pattern)):
            refuse_stub(file)
    _check_config(directory)
    config = load_config(directory, architecture) if labels is None else encoder_config(directory, architecture)
    for name in config.architectures or ():
        known = getattr(transformers, name, None)
        if known is not None and known.config_class is not None and not isinstance(config, known.config_class):
            raise ModelError(
                f"{directory / 'config.json'}: model_type {config.model_type!r} is not that of a {name}, which "
                f"'architectures' names; it must be {known.config_class.model_type!r}"
            )
    if labels:
        config.num_labels = len(labels)
    stored = stored_tensors(directory)
    for file in sorted({tensor.file for tensor in stored.values()}):
        try:
            with safe_open(file, framework="pt"):
                pass  # opening checks that offsets fit shapes
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a readable safetensors file ({one_line(error)}); copy it again") from error
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(architecture).from_config(config)
    model.tie_weights()
    if labels is None:
        match_weights(model, stored).refuse(model, directory)
        return model
    # a masked language model's head is pretrained; a random one is useless
    new: Any = (lambda name: False) if architecture == "masked-lm" else (lambda name: in_head(model, name))
    match_weights(model, stored, may_miss=new, may_hold=PRETRAINING_WEIGHTS).refuse(model, directory)
    return model


def _check_config(directory: Path) -> None:
    """Refuses a wrong `config.json` in one line; transformers' own messages are long."""
    file = directory / "config.json"
    if not file.is_file():
        if (directory / "adapter_config.json").is_file():
            raise ModelError(f"{directory}: {other_weights(directory)}")
        raise ModelError(f"{file}: missing; copy it from the model's release")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        model_type, custom_code = values.get("model_type"), "auto_map" in values
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: not a model's config in JSON ({one_line(error)})") from error
    if model_type not in CONFIG_MAPPING and not custom_code:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), 1) if model_type else []
        hint = f"; did you mean {near[0]!r}?" if near else "; write the model's own"
        raise ModelError(f"{file}: model_type is {model_type!r}, which is not a model type of transformers{hint}")
