"""Encoders for the tasks of XTREME: a pretrained encoder with a task head.

`write_task_start` writes one as a Hugging Face directory, which training opens like any model; `load_task_model` opens
one for evaluation.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from modeling.architectures import ARCHITECTURE_OF, Architecture, auto_class
from modeling.errors import ModelError
from modeling.loading import (
    AttentionName,
    load_config,
    load_pretrained,
    quiet,
    refuse_not_finite,
    resolve_directory,
)
from modeling.weights.weight_files import stored_tensors
from modeling.weights.weight_match import OLD_BUFFERS, named
from modeling.xmixup.mixup import encoder_layers

TaskKind = Literal["classification", "tagging", "qa", "text"]
TASK_ARCHITECTURES = {kind: each for kind, each in ARCHITECTURE_OF.items() if kind != "chat"}
# weights of pretraining that a task does not use
PRETRAINING_WEIGHTS = (
    r"^(cls|lm_head|generator_predictions|generator_lm_head|discriminator_predictions)\.",
    r"(^|\.)pooler\.",
    *OLD_BUFFERS,
)
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja"
)  # fmt: skip


def write_task_start(
    directory_or_name: str | Path, kind: TaskKind, labels: Sequence[str], output: Path, seed: int
) -> Path:
    """Writes the pretrained encoder with a new task head, and its tokenizer files.

    It is made in plain PyTorch on the CPU, because a model built inside ZeRO-3's context skips initialisation. The
    encoder keeps every bit; the head depends on its shape and `seed` alone. A model that already has this task's
    head, with the same labels in the same order, keeps it.

    Args:
        directory_or_name: the pretrained encoder.
        kind: of the task.
        labels: the classes or tags in the order of their ids; empty for qa and text.
        output: the directory. Callers that need it whole or not at all write into a folder that they rename.
        seed: of the head.

    Returns:
        `output`.

    Raises:
        ModelError: a decoder, or an encoder whose layers X-Mixup cannot mix (with the reason); weights other than the
            head's are missing; or there are weights that the task model does not have, other than pretraining heads
            and a pooler. Nothing is written then.
    """
    directory, architecture = resolve_directory(directory_or_name), _architecture(kind, labels)
    config = encoder_config(directory, architecture)
    _with_head(directory, architecture, config, labels, seed).save_pretrained(output)
    _copy_tokenizer(directory, output)
    return output


def write_task_config(
    directory_or_name: str | Path, kind: TaskKind, labels: Sequence[str], output: Path, pretrained: bool
) -> Path:
    """Writes what `write_task_start` writes, without the weights: enough to build the model on the meta device.

    Args:
        directory_or_name: the pretrained encoder, or only its config.
        kind: of the task.
        labels: as for `write_task_start`.
        output: the directory.
        pretrained: there are weights, and they are checked against the task's.

    Raises:
        ModelError: as `write_task_start`.
    """
    directory, architecture = resolve_directory(directory_or_name), _architecture(kind, labels)
    config = encoder_config(directory, architecture)
    if pretrained:
        config = _with_head(directory, architecture, config, labels, 0, device="meta").config
    else:
        config.update(_label_names(labels))
    config.save_pretrained(output)
    _copy_tokenizer(directory, output)
    return output


def encoder_config(directory: Path, architecture: Architecture) -> PreTrainedConfig:
    """The config of an encoder, from its directory; no weight is read.

    Raises:
        ModelError: it is not an encoder that X-Mixup can mix.
    """
    config = load_config(directory, architecture)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False):
        raise ModelError(f"{directory}: a {config.model_type} model is a decoder; take an encoder, such as xlm-roberta")
    with torch.device("meta"):
        encoder_layers(auto_class(architecture).from_config(config))
    return config


def _copy_tokenizer(directory: Path, output: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for file in directory.glob(pattern):
            shutil.copy(file, output / file.name)


def load_task_model(
    directory: str | Path,
    kind: TaskKind,
    labels: Sequence[str],
    dtype: torch.dtype,
    attention: AttentionName,
    device: str | torch.device,
) -> PreTrainedModel:
    """`loading.load_pretrained` of a task model.

    Raises:
        ModelError: what `load_pretrained` raises, and a head of other labels.
    """
    directory = resolve_directory(directory)
    architecture = _architecture(kind, labels)
    _check_labels(directory, load_config(directory, architecture), labels)
    return load_pretrained(directory, dtype, attention, device, architecture)


def _architecture(kind: str, labels: Sequence[str]) -> Architecture:
    if kind not in TASK_ARCHITECTURES:
        raise ModelError(f"task kind {kind!r} is not one of {', '.join(TASK_ARCHITECTURES)}")
    wanted = kind in ("classification", "tagging")
    if wanted and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise ModelError(f"labels: a {kind} task needs two or more different ones, not {list(labels)}")
    if labels and not wanted:
        raise ModelError(f"labels: a {kind} task has none, not {list(labels)}")
    return TASK_ARCHITECTURES[kind]


def _stored_labels(config: PreTrainedConfig) -> list[str]:
    names: dict[Any, str] = dict(config.id2label or {})
    return [names[number] for number in sorted(names)]


def _check_labels(directory: Path, config: PreTrainedConfig, labels: Sequence[str]) -> None:
    if labels and _stored_labels(config) != list(labels):
        raise ModelError(
            f"{directory}: its head has the labels {', '.join(_stored_labels(config))}; the task's are "
            f"{', '.join(labels)}"
        )


def _label_names(labels: Sequence[str]) -> dict[str, Any]:
    """Keys of a model's config."""
    numbered = dict(enumerate(labels))
    return {"id2label": numbered, "label2id": {label: number for number, label in numbered.items()}} if labels else {}


def _with_head(
    directory: Path,
    architecture: Architecture,
    config: PreTrainedConfig,
    labels: Sequence[str],
    seed: int,
    device: str | None = None,
) -> PreTrainedModel:
    """The pretrained weights in a task model; head weights that are not stored are drawn from `seed`.

    On the device "meta" the model has shapes only.
    """
    stored_tensors(directory)  # checks that files are whole and safetensors
    with quiet(), torch.random.fork_rng(devices=[]):  # the head that transformers initialises is replaced below
        loaded: Any = auto_class(architecture).from_pretrained(
            directory, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True,
            use_safetensors=True, trust_remote_code=False, attn_implementation="eager", dtype="auto", device_map=device,
            **_label_names(labels),
        )  # fmt: skip
    model, report = loaded
    for name, parameter in model.named_parameters():
        if name not in report["missing_keys"]:
            refuse_not_finite(parameter.detach(), f"{directory}: {name}")
    mismatched = [str(entry[0]) for entry in report["mismatched_keys"]]
    if mismatched:
        raise ModelError(
            f"{directory}: {len(mismatched)} weights of another shape than the task's: {named(mismatched)}; take the "
            "pretrained encoder, or a model of the same labels"
        )
    _refuse(directory, "unexpected", (key for key in report["unexpected_keys"] if not _of_pretraining(key)))
    missing = set(report["missing_keys"])
    head = {name for name, _ in model.named_parameters() if in_head(model, name)}
    # a masked language model's head is pretrained; a random one is useless
    _refuse(directory, "missing", missing if architecture == "masked-lm" else missing - head)
    if all(".pooler." in name for name in missing):  # the head was stored
        _check_labels(directory, config, labels)
    _initialise(model, missing, seed)
    return model


def _refuse(directory: Path, problem: str, keys: Iterable[str]) -> None:
    if names := sorted(keys):
        raise ModelError(f"{directory}: {len(names)} {problem} weights: {named(names)}; take a pretrained encoder")


def _of_pretraining(key: str) -> bool:
    return any(re.search(pattern, key) for pattern in PRETRAINING_WEIGHTS)


def in_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter belongs to the head, as BERT's pooler does if the head reads it."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def _initialise(model: PreTrainedModel, missing: set[str], seed: int) -> None:
    """Draws missing weights as these models do: normal with `initializer_range`, biases 0.

    They are drawn in the order of their names from a separate generator, so the head depends on nothing else that was
    loaded.
    """
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    for name in sorted(missing):
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"{type(model).__name__}: {name} is missing, and a {type(module).__name__} is not initialised here"
            )
        with torch.no_grad():
            if last == "bias":
                module.bias.zero_()
            else:
                module.weight.copy_(torch.empty(module.weight.shape).normal_(std=std, generator=generator))
