"""Adapters: what is trained, what is frozen, the adapter directory, and the merged weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
)

from modeling.adapters import adapted_model, add_adapters, save_adapter
from modeling.architectures import Architecture
from modeling.errors import ModelError
from training.config import LoraSettings

RANK, ALPHA = 3, 12
IDS = torch.arange(5, 21)[None]
VARIANTS: list[dict[str, Any]] = [
    {"targets": "all-linear"}, {"targets": ["q_proj", "down_proj"]}, {"use_dora": True}, {"use_rslora": True},
    {"use_dora": True, "use_rslora": True},
]  # fmt: skip


def options(**changes: Any) -> LoraSettings:
    return LoraSettings.model_validate({"rank": RANK, "alpha": ALPHA, **changes})


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, attention_bias=True,
        )
    )  # fmt: skip
    return model.eval().to(dtype)


def encoder(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig if model_class is BertForSequenceClassification else XLMRobertaConfig
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    return model_class(config(**sizes, num_hidden_layers=1, num_attention_heads=2)).eval()


def adapted(targets: list[str] | str | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    model = llama()
    add_adapters(model, options(targets=targets, **changes), seed)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained_names(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Change every trainable weight, as a run would; returns them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("changes", VARIANTS)
def test_new_adapters_do_not_change_the_outputs(changes: dict[str, Any]) -> None:
    assert torch.equal(logits(adapted(**changes)), logits(llama()))


def test_every_linear_layer_of_the_blocks_is_adapted_and_nothing_else_trained() -> None:
    layers = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
    expected = {
        f"model.layers.{block}.{layer}.lora_{side}.default.weight"
        for block in (0, 1)
        for layer in layers
        for side in "AB"
    }
    assert trained_names(adapted()) == expected
    assert trained_names(adapted(["q_proj"])) == {name for name in expected if ".q_proj." in name}


def test_dora_also_trains_a_magnitude_for_each_output() -> None:
    model = adapted(["k_proj"], use_dora=True)
    magnitudes = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_magnitude" in name}
    assert trained_names(model) - trained_names(adapted(["k_proj"])) == magnitudes.keys()
    assert len(magnitudes) == 2
    for block, magnitude in enumerate(magnitudes.values()):
        torch.testing.assert_close(magnitude, llama().model.layers[block].self_attn.k_proj.weight.norm(dim=1))


def test_a_task_head_is_trained_and_an_lm_head_is_not() -> None:
    heads_of = {
        XLMRobertaForTokenClassification: {"classifier.weight", "classifier.bias"},
        XLMRobertaForMaskedLM: set(),
    }
    for model_class, heads in heads_of.items():
        model = encoder(model_class)
        add_adapters(model, options(targets=["query", "value"]), seed=0)
        assert {name for name in trained_names(model) if "lora_" not in name} == heads


@pytest.mark.parametrize("changes", VARIANTS)
def test_merged_weights_compute_what_the_adapters_do(changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    weights = train(model)
    merged = adapted_model(llama(), "causal-lm", options(**changes), weights).merge_and_unload()
    plain = llama()
    plain.load_state_dict(merged.state_dict())  # strict: the names are those of a plain model
    assert (logits(model) - logits(llama())).abs().max() > 0.1
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
def test_merged_weights_are_those_of_the_papers_formulas(changes: dict[str, Any]) -> None:
    """LoRA: W + s BA. DoRA: the same, each output's row scaled to its magnitude. s is alpha / r, or alpha / sqrt(r)."""
    weights = train(adapted(**changes))
    merged = adapted_model(llama(), "causal-lm", options(**changes), weights).merge_and_unload().state_dict()
    scale = ALPHA / (math.sqrt(RANK) if changes.get("use_rslora") else RANK)
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    targets = options(**changes).targets or every
    for name, base in llama().state_dict().items():
        layer, expected = name.removesuffix(".weight"), base.clone()
        if name.endswith(".weight") and layer.rpartition(".")[2] in targets:
            up, down = (weights[f"{layer}.lora_{side}.default.weight"] for side in "BA")
            for output, row in enumerate(expected):
                for inner in range(RANK):
                    row += scale * up[output, inner] * down[inner]
                if changes.get("use_dora"):
                    length = math.sqrt(sum(float(value) ** 2 for value in row))
                    row *= weights[f"{layer}.lora_magnitude_vector.default.weight"][output] / length
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-5)


def test_a_bf16_model_is_merged_in_fp32_and_rounded_once() -> None:
    weights = train(adapted())
    merged = adapted_model(llama(torch.bfloat16), "causal-lm", options(), weights).merge_and_unload().state_dict()
    for name, base in llama(torch.bfloat16).state_dict().items():
        layer = name.removesuffix(".weight")
        if (down := weights.get(f"{layer}.lora_A.default.weight")) is not None:
            base = (base.float() + ALPHA / RANK * (weights[f"{layer}.lora_B.default.weight"] @ down)).bfloat16()
        assert torch.equal(merged[name], base), name


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_adapter_directory_opens_in_peft_and_gives_the_same_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    weights = train(adapted(**changes))
    model = adapted_model(llama(), "causal-lm", options(**changes), weights)
    save_adapter(model, tmp_path / "adapter", "some/base", "1f2e")
    reopened = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    assert torch.equal(logits(reopened), logits(model))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == len(weights)
    assert all(weight.dtype == torch.float32 for weight in stored.values())
    config: Any = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.base_model_name_or_path, config.task_type, config.r) == ("some/base", "CAUSAL_LM", RANK)
    assert json.loads((tmp_path / "adapter" / "base_model.json").read_text()) == {"name": "some/base", "hash": "1f2e"}


@pytest.mark.parametrize(
    ("model_class", "architecture"),
    [
        (XLMRobertaForTokenClassification, "token-classification"),
        (XLMRobertaForSequenceClassification, "sequence-classification"),
        (BertForSequenceClassification, "sequence-classification"),  # its head reads a pooler, which is trained too
        (XLMRobertaForMaskedLM, "masked-lm"),
    ],
)
def test_the_adapter_directory_of_an_encoder_holds_its_trained_head(
    tmp_path: Path, model_class: type[PreTrainedModel], architecture: Architecture
) -> None:
    model, lora = encoder(model_class), options(targets=["query", "value"])
    add_adapters(model, lora, seed=0)
    weights = train(model)
    opened = adapted_model(encoder(model_class), architecture, lora, weights)
    save_adapter(opened, tmp_path / "adapter", "some/base", "1f2e")
    reopened = PeftModel.from_pretrained(encoder(model_class), str(tmp_path / "adapter"))
    assert torch.equal(logits(reopened), logits(model))
    merged = opened.merge_and_unload()
    assert merged.state_dict().keys() == encoder(model_class).state_dict().keys()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_initial_adapters_depend_on_the_seed_only_and_the_global_rng_is_unchanged() -> None:
    one = llama()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    add_adapters(one, options(), seed=7)
    assert torch.equal(torch.rand(1), expected)
    for (name, parameter), other in zip(one.named_parameters(), adapted(seed=7).parameters(), strict=True):
        assert torch.equal(parameter, other), name
    other = dict(adapted(seed=8).named_parameters())
    assert any(not torch.equal(parameter, other[name]) for name, parameter in one.named_parameters())


def test_unknown_targets_and_missing_or_unexpected_adapter_weights_are_named() -> None:
    with pytest.raises(ModelError, match=r"^model\.lora\.targets: no linear layer 'query' .* there are down_proj, "):
        adapted(["q_proj", "query"])
    weights = train(adapted())
    incomplete = {name: weight for name, weight in weights.items() if "layers.1.mlp.up_proj.lora_A" not in name}
    with pytest.raises(ModelError, match=r"weights of adapters are missing: .*layers\.1\.mlp\.up_proj\.lora_A"):
        adapted_model(llama(), "causal-lm", options(), incomplete)
    with pytest.raises(ModelError, match=r"weights that the model does not have: .*layers\.0\.mlp\.up_proj\.lora_A"):
        adapted_model(llama(), "causal-lm", options(targets=["q_proj"]), weights)
