"""Adapters: what is trained, what is frozen, and that merging gives the weights of the model that was trained."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForTokenClassification,
)

from modeling.errors import ModelError
from modeling.lora import add_adapters, completed, is_adapter_weight, merged

RANK, ALPHA = 3, 12
IDS = torch.arange(5, 21)[None]


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, attention_bias=True,
        )
    ).eval()  # fmt: skip


def adapted(targets: list[str] | None = None, seed: int = 0) -> PreTrainedModel:
    model = llama()
    add_adapters(model, RANK, ALPHA, 0.0, targets, seed)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def disturb(model: PreTrainedModel) -> None:
    """What training does to adapters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_adapter_weight(name):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def test_the_outputs_are_the_models_own_at_first() -> None:
    assert torch.equal(logits(adapted()), logits(llama()))


def test_every_linear_layer_of_the_blocks_is_adapted_and_nothing_else_trained() -> None:
    model = adapted()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
    assert trained == {
        f"model.layers.{block}.{layer}.lora_{side}.default.weight"
        for block in (0, 1)
        for layer in layers
        for side in "AB"
    }
    chosen = {name for name, parameter in adapted(["q_proj"]).named_parameters() if parameter.requires_grad}
    assert chosen == {name for name in trained if ".q_proj." in name}


def test_a_tasks_head_is_trained_and_a_language_models_is_not() -> None:
    config = XLMRobertaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    heads_of = {
        XLMRobertaForTokenClassification: {"classifier.weight", "classifier.bias"},
        XLMRobertaForMaskedLM: set(),
    }
    for made, heads in heads_of.items():
        model = made(config)
        add_adapters(model, RANK, ALPHA, 0.0, ["query", "value"], seed=0)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name for name in trained if not is_adapter_weight(name)} == heads


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_merged_weights_compute_what_the_adapters_do(targets: list[str] | None) -> None:
    model = adapted(targets)
    disturb(model)
    weights = list(model.state_dict().items())
    random.Random(0).shuffle(weights)
    plain = llama()
    before = logits(plain)
    plain.load_state_dict(dict(merged(weights, ALPHA / RANK)))  # strict: the names are a plain model's
    assert (logits(model) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_what_was_trained_and_the_base_make_the_whole_adapted_model(targets: list[str] | None) -> None:
    model = adapted(targets)
    disturb(model)
    norm = model.model.norm.weight  # trained beside the adapters, as a task's head is
    norm.requires_grad_(True).data += 1
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = dict(completed(trained, llama().named_parameters()))
    expected = dict(model.named_parameters())
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in whole)


def test_every_rank_draws_the_same_and_the_runs_own_numbers_go_on() -> None:
    one = llama()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    add_adapters(one, RANK, ALPHA, 0.0, None, seed=7)
    assert torch.equal(torch.rand(1), expected)
    for (name, parameter), other in zip(one.named_parameters(), adapted(seed=7).parameters(), strict=True):
        assert torch.equal(parameter, other), name
    other = dict(adapted(seed=8).named_parameters())
    assert any(not torch.equal(parameter, other[name]) for name, parameter in one.named_parameters())


def test_mistakes_are_named() -> None:
    with pytest.raises(ModelError, match=r"^model\.lora\.targets: no linear layer 'query' .* there are down_proj, "):
        adapted(["q_proj", "query"])
    weights = [item for item in adapted().state_dict().items() if "layers.1.mlp.up_proj.lora_A" not in item[0]]
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj: an adapter or its layer is missing"):
        list(merged(weights, 1.0))
