"""Writes a model's weights as safetensors shards with an index, one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from modeling.errors import ModelError
from modeling.weights.weight_match import named

SHARD_BYTES = 5 * 10**9


def write_weights(
    weights: Iterable[tuple[str, Tensor]],
    planned: Mapping[str, Tensor],
    directory: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards and `model.safetensors.index.json`.

    A shard is written as soon as all its tensors have been received, so one shard is in memory if `weights` follows the
    order of `planned`.

    Args:
        weights: (name, tensor).
        planned: the same names with tensors of the same shapes and number formats, which may be on the meta device.
        directory: an existing folder.
        shard_bytes: most bytes of a shard that holds more than one tensor.

    Raises:
        ModelError: a weight is not in `planned`, or one of `planned` is missing.
    """
    split = split_torch_state_dict_into_shards(dict(planned), max_shard_size=shard_bytes)
    unwritten: dict[str, dict[str, Tensor]] = {file: {} for file in split.filename_to_tensors}
    for name, tensor in weights:
        if name not in planned:
            raise ModelError(f"{name}: the model has no weight of this name")
        file = split.tensor_to_filename[name]
        unwritten[file][name] = tensor
        if len(unwritten[file]) == len(split.filename_to_tensors[file]):
            save_file(unwritten.pop(file), directory / file, metadata={"format": "pt"})
    if unwritten:
        absent = (set(split.filename_to_tensors[file]) - shard.keys() for file, shard in unwritten.items())
        raise ModelError(f"weights to write are missing: {named(set().union(*absent))}")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
