"""Checks before any rank starts, for `check`, `train`, `prefetch` and `submit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from training.checks.inputs import missing_inputs
from training.config import DataConfig, ModelConfig, RunConfig
from training.errors import ConfigError
from training.objectives.base import ObjectiveConfig
from training.run_folder.prepare import Prepared
from training.tracking.config import tracking_target
from training.tracking.mlflow_store import missing_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def check_start(config: RunConfig) -> None:
    """Checks the run file, the environment, and whether the paths that they name exist.

    Raises:
        ConfigError: a line for every mistake of one kind: missing inputs, raw DeepSpeed settings, tracking.
    """
    if missing := list(missing_inputs(config.model_dump())):
        raise ConfigError("\n".join(missing))
    if config.deepspeed:  # otherwise all settings are crosslift's own
        from training.engine.engine import deepspeed_settings

        deepspeed_settings(config, 1)
    if not config.tracking.enabled:
        return
    target = tracking_target(config.tracking, config.output_dir)
    if not target.is_default and target.uri and (folder := missing_folder(target.uri)) is not None:
        origin = "tracking.uri" if config.tracking.uri is not None else target.uri_source
        raise ConfigError(f"{origin}: {target.uri}: there is no folder {folder}; make it, or name another place")


def check_model_files(config: RunConfig) -> None:
    """Checks that a run's model and tokenizer can be opened and fit each other, without reading weights.

    Raises:
        ModelError, ConfigError: a line for each kind of mistake.
    """
    from modeling.architectures import ARCHITECTURE_OF
    from modeling.loading import resolve_directory
    from modeling.tasks.encoders import TOKENIZER_FILES
    from modeling.weights.untrusted import read_tokenizer
    from modeling.weights.weight_check import check_directory

    embeddings, task, trained = None, config.data.task, config.tokenizer.train
    if config.model.path is not None:
        labels = None if task is None else task.labels
        model = check_directory(resolve_directory(config.model.path), ARCHITECTURE_OF[config.data.kind], labels)
        check_model(config.data, config.objective, model)
        embeddings = model.config.get_text_config().vocab_size
    if trained is None:
        path = config.tokenizer.path or config.model.path
        assert path is not None  # the config model requires one
        folder = Path(path)
        if folder.is_dir() and not any(file for name in TOKENIZER_FILES for file in folder.glob(name)):
            raise ConfigError(f"{folder}: holds no tokenizer; copy its files, or name its folder in tokenizer.path")
        check_vocabulary(read_tokenizer(path), path, embeddings)
    elif embeddings is not None and trained.vocab_size > embeddings:
        raise ConfigError(
            f"tokenizer.train.vocab_size: {trained.vocab_size}, but the model embeds only {embeddings} tokens; "
            "lower it, or leave out tokenizer.train for the model's own tokenizer"
        )


def check_starting_model(model: ModelConfig, data: DataConfig, objective: ObjectiveConfig, prepared: Prepared) -> None:
    """`check_model` for a model that the run initialises itself. Raises ConfigError."""
    if model.path is not None:
        return
    import torch

    from modeling.architectures import ARCHITECTURE_OF, auto_class
    from modeling.loading import load_config

    head = ARCHITECTURE_OF[data.kind]
    with torch.device("meta"):
        built: nn.Module = auto_class(head).from_config(load_config(Path(prepared.model_dir), head))
    check_model(data, objective, built)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, origin: str, embeddings: int | None) -> None:
    """Checks that each token has an embedding; `embeddings` is their number. Raises ConfigError."""
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if embeddings is not None and tokens > embeddings:
        raise ConfigError(
            f"tokenizer {origin}: {tokens} tokens, but the model embeds only {embeddings}; "
            "take the model's own tokenizer, or resize the model's embeddings once, offline, and save it"
        )


def check_model(data: DataConfig, objective: ObjectiveConfig, model: nn.Module) -> None:
    """Checks that the model accepts the longest sample and has the objective's layers. Needs no weights.

    Raises:
        ConfigError: `data.sequence_length` exceeds the model's learned position embeddings, or a layer is missing.
    """
    from modeling.layers import decoder_layers, position_limit, position_table

    if mistakes := list(objective.model_mistakes(len(decoder_layers(model)))):
        raise ConfigError("\n".join(mistakes))
    limit = position_limit(model)
    if limit is not None and position_table(model) is not None and data.sequence_length > limit:
        raise ConfigError(
            f"data.sequence_length: {data.sequence_length} tokens, but the model has positions for {limit}; "
            f"set data.sequence_length={limit} or less"
        )
