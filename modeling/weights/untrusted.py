"""Reads configs and tokenizers of model directories without running code that these contain.

A model that needs custom code (`trust_remote_code`) is refused. Weights are read from safetensors only
(`weight_files.py`).
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from modeling.errors import ModelError
from modeling.transformers_internals import clear_attention
from modeling.weights.weight_files import one_line


def read_config(directory: Path) -> PreTrainedConfig:
    """The directory's config.

    Raises:
        ModelError: it is missing, of an unknown type, or needs custom code.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{directory}: {_explained(error)}") from error
    clear_attention(config)
    return config


def read_tokenizer(directory_or_name: str | Path, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub name.

    Raises:
        ModelError: there is none, or it needs custom code.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory_or_name, local_files_only=local_files_only, trust_remote_code=False
        )
    except Exception as error:  # each tokenizer class fails on a damaged file in its own way
        raise ModelError(f"{directory_or_name}: no usable tokenizer ({_explained(error)})") from error
    return tokenizer


def _explained(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "needs custom code, which is never run; use a model of a type that transformers has, or convert it"
    return one_line(error)
