"""Weights are written in the format of Hugging Face directories, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modeling.errors import ModelError
from modeling.loading import load_pretrained
from modeling.weights.weight_writing import write_weights

WEIGHTS = {f"layers.{number}.weight": torch.full((4, 4), float(number)) for number in range(5)}
PLANNED = {name: weight.to("meta") for name, weight in WEIGHTS.items()}


def test_weights_that_fit_into_one_file_are_written_to_one(tmp_path: Path) -> None:
    write_weights(WEIGHTS.items(), PLANNED, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: file.get_tensor(name)[0, 0].item() for name in file.keys()} == {  # noqa: SIM118
            name: weight[0, 0].item() for name, weight in WEIGHTS.items()
        }


def test_a_shard_is_written_before_the_next_begins(tmp_path: Path) -> None:
    files_written = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, weight in WEIGHTS.items():
            files_written.append(len(list(tmp_path.iterdir())))
            yield name, weight

    write_weights(weights(), PLANNED, tmp_path, shard_bytes=128)  # two tensors of 64 bytes
    assert files_written == [0, 0, 1, 1, 2]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    assert index["weight_map"] == {
        name: f"model-0000{number // 2 + 1}-of-00003.safetensors" for number, name in enumerate(WEIGHTS)
    }


def test_transformers_opens_the_shards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    write_weights(reversed(model.state_dict().items()), model.state_dict(), tmp_path, shard_bytes=2000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    opened = load_pretrained(tmp_path, torch.float32, "sdpa", "cpu")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), opened.parameters(), strict=True))


def test_weights_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights to write are missing: layers\.0\.weight, layers\.3\.weight$"):
        write_weights(((name, WEIGHTS[name]) for name in WEIGHTS if name[7] not in "03"), PLANNED, tmp_path)
    with pytest.raises(ModelError, match=r"^other: the model has no weight of this name"):
        write_weights([*WEIGHTS.items(), ("other", torch.zeros(1))], PLANNED, tmp_path)
