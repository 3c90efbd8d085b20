"""A baked checkpoint has the logits of the shifted model, in plain transformers; other models are refused with why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling.errors import ModelError
from modeling.export_info import EXPORT_FILE, FORMAT, VECTORS_FILE, ExportInfo
from modeling.shifcon.bake import bake
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.shift import LanguageShift
from modeling.weights.weight_files import directory_hash

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BAKED = ("llama", "qwen2", "mistral", "granite", "smollm3", "nemotron", "helium", "arcee", "seed_oss", "starcoder2",
         "gpt_neox", "bloom", "phi", "gpt2")  # fmt: skip
REFUSED = {
    "gemma2": "has no biases in its last projections",
    "olmo2": "has no biases in its last projections",
    "qwen3": "has no biases in its last projections",
    "cohere": "has no biases in its last projections",
    "mixtral": "0 last projections and not one",
}
MORE: dict[str, dict[str, Any]] = {
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 2.0},
    "mistral": {"sliding_window": None},
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64},
    "mixtral": {"num_local_experts": 2},
}
NOT_GIVEN = {
    "gpt2": {"num_key_value_heads", "head_dim", "intermediate_size"},
    "bloom": {"head_dim", "num_key_value_heads"},
}


def export(folder: Path, name: str, area: tuple[int, int] = (1, 3), **info: Any) -> tuple[Path, LanguageVectors]:
    """A ShifCon export of a tiny model with random weights and vectors."""
    torch.manual_seed(1)
    sizes = {key: value for key, value in SIZES.items() if key not in NOT_GIVEN.get(name, ())} | MORE.get(name, {})
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    description = ExportInfo("shifcon", ("en", "sw", "xx"), "en", shifted=True)
    values = {**vars_of(replace(description, **info)), "format": FORMAT}
    (folder / EXPORT_FILE).write_text(json.dumps(values))
    mean = torch.randn(3, 2, 16)
    vectors = LanguageVectors(
        ("en", "sw", "xx"),
        "en",
        area,
        area,
        mean,
        torch.ones(3, 2),
        torch.tensor([9, 9, 0]),
        "",
        directory_hash(folder),
        0.7,
    )
    vectors.save(folder / VECTORS_FILE)
    return folder, vectors


def vars_of(info: ExportInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in ExportInfo.__dataclass_fields__}


def logits(folder: Path, vectors: LanguageVectors | None = None) -> torch.Tensor:
    """Of a sequence of tokens by plain transformers; with vectors, shifted as Swahili."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        if vectors is None:
            return model(tokens).logits
        shift = LanguageShift(model, *vectors.area)
        shift.set_vectors(vectors)
        with shift.batch(torch.ones_like(tokens)):
            return model(tokens).logits


@pytest.mark.parametrize("area", [(1, 3), (0, 2), (2, 4)])
@pytest.mark.parametrize("name", BAKED)
def test_the_baked_model_has_the_shifted_logits(tmp_path: Path, name: str, area: tuple[int, int]) -> None:
    folder, vectors = export(tmp_path / "export", name, area)
    difference = bake(folder, "sw", tmp_path / "baked")
    expected, found = logits(folder, vectors), logits(tmp_path / "baked")
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-4 * largest
    assert difference < 1e-4
    assert float((logits(folder) - expected).abs().max()) > 1e-2 * largest, "the shift changes the logits"
    info = ExportInfo.read(tmp_path / "baked")
    assert (info.shifted, info.response_language) == (False, "sw")
    assert not (tmp_path / "baked" / VECTORS_FILE).exists()


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    folder, _ = export(tmp_path / "export", name)
    with pytest.raises(ModelError, match=REFUSED[name]):
        bake(folder, "sw", tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_a_sliding_window_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is longer than the compared tokens, so their logits do not show it."""
    monkeypatch.setitem(MORE, name, {"sliding_window": 40, **({"use_sliding_window": True} if name == "qwen2" else {})})
    folder, _ = export(tmp_path / "export", name)
    with pytest.raises(ModelError, match=rf"a {name} with a sliding window \(40\) cannot be written as Llama"):
        bake(folder, "sw", tmp_path / "baked")


def test_a_layer_that_changes_its_projection_is_refused_by_its_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if Granite's factor were unknown."""
    folder, _ = export(tmp_path / "export", "granite")
    monkeypatch.setattr("modeling.shifcon.bake._add_to_output", wrong_factor)
    with pytest.raises(ModelError, match=r"logits would differ by \d"):
        bake(folder, "sw", tmp_path / "baked")


def wrong_factor(model: Any, layer: int, shift: torch.Tensor) -> None:
    from modeling.shifcon.bake import _projection

    with torch.no_grad():
        _projection(model, layer).bias += shift


@pytest.mark.parametrize(
    ("language", "info", "message"),
    [
        ("en", {}, "'en' is the dominant language"),
        ("xx", {}, "'xx' has no language vector; there are sw"),
        ("fr", {}, "'fr' has no language vector; there are sw"),
        ("sw", {"shift_first_token": False}, "without a shift of the first token"),
        ("sw", {"response_language": "en"}, "answers in 'en', but a bias shifts answers to 'sw' too"),
    ],
)
def test_what_a_bias_cannot_do_is_refused(tmp_path: Path, language: str, info: dict[str, Any], message: str) -> None:
    folder, _ = export(tmp_path / "export", "llama", **info)
    with pytest.raises(ModelError, match=message):
        bake(folder, language, tmp_path / "baked")


def test_vectors_of_other_weights_and_missing_ones_are_refused(tmp_path: Path) -> None:
    folder, vectors = export(tmp_path / "export", "llama")
    replace(vectors, model_hash="another").save(folder / VECTORS_FILE)
    with pytest.raises(ModelError, match="belongs to the weights"):
        bake(folder, "sw", tmp_path / "baked")
    (folder / VECTORS_FILE).unlink()
    with pytest.raises(ModelError, match="missing, and a ShifCon model does not run without it"):
        bake(folder, "sw", tmp_path / "baked")
    plain, _ = export(tmp_path / "sft", "llama", objective="sft", shifted=False)
    with pytest.raises(ModelError, match="not trained with the shift"):
        bake(plain, "sw", tmp_path / "baked")
