"""The layer stack is found in any model and wrapper; hooks run exactly at h[l], once per forward pass."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from modeling.errors import ModelError
from modeling.layers import decoder_layers, hidden_size, membership, state_hook
from modeling.loading import load_pretrained

DECODERS = ["llama", "qwen3", "mistral", "gpt_neox", "bloom", "gpt2", "opt", "gemma2", "mixtral", "olmo2"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    extra = {"num_key_value_heads": 1, "head_dim": 8} if name not in ("gpt_neox", "bloom", "gpt2", "opt") else {}
    extra |= {"word_embed_proj_dim": 16, "ffn_dim": 32} if name == "opt" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **extra)).eval()


@pytest.mark.parametrize("name", DECODERS)
def test_hooks_get_the_hidden_states_that_transformers_reports(name: str) -> None:
    model = tiny(name)
    assert len(decoder_layers(model)) == 4
    assert hidden_size(model) == 16
    seen: dict[int, Tensor] = {}
    for layer in range(5):
        state_hook(model, layer, lambda hidden, layer=layer: seen.update({layer: hidden}))
    outputs = model(torch.arange(1, 11).view(2, 5), output_hidden_states=True)
    for layer in range(4):
        assert torch.equal(seen[layer], outputs.hidden_states[layer])
    assert seen[4].shape == (2, 5, 16)
    assert not torch.equal(seen[4], outputs.hidden_states[4])  # that one is after the final norm


@pytest.mark.parametrize("name", DECODERS)
def test_the_return_value_of_a_hook_replaces_the_state(name: str) -> None:
    model = tiny(name)
    ids = torch.arange(1, 11).view(2, 5)
    plain = model(ids).logits
    for layer in range(5):
        handle = state_hook(model, layer, lambda hidden: hidden * 0 + 1)
        changed = model(ids).logits
        handle.remove()
        assert not torch.allclose(changed, plain)
    # After the last layer nothing but the norm and the head follow: equal states, equal logits.
    assert torch.allclose(changed, changed[:1, :1].expand_as(changed))
    assert torch.equal(model(ids).logits, plain)


def test_hooks_at_one_place_run_in_order_of_installation() -> None:
    model = tiny("llama")
    seen: list[Tensor] = []
    for layer in (1, 4):
        state_hook(model, layer, lambda hidden: hidden * 0 + 3)
        state_hook(model, layer, lambda hidden: seen.append(hidden))
    model(torch.arange(1, 6)[None])
    assert [bool((hidden == 3).all()) for hidden in seen] == [True, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_hooks_run_once_under_gradient_checkpointing(reentrant: bool) -> None:
    model = tiny("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls: list[int] = []
    for layer in (0, 2, 4):
        state_hook(model, layer, lambda hidden, layer=layer: calls.append(layer))
    model(torch.arange(1, 6)[None], use_cache=False).logits.sum().backward()
    assert calls == [0, 2, 4]


def test_keyword_hidden_states_are_replaced_too() -> None:
    model = tiny("llama")
    state_hook(model, 0, lambda hidden: hidden + 1)
    layer = decoder_layers(model)[0]
    layer.forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    assert torch.equal(layer(hidden_states=torch.zeros(1, 2, 16)), torch.ones(1, 2, 16))


def test_layers_are_found_through_wrappers() -> None:
    model = tiny("llama")
    layers = decoder_layers(model)
    assert decoder_layers(nn.Sequential(nn.Linear(2, 2), model)) is layers
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert decoder_layers(adapted) is layers
    assert decoder_layers(model.model) is layers


def test_lists_of_equal_length_inside_a_layer_are_not_the_layers() -> None:
    model = tiny("llama")
    layers = decoder_layers(model)
    layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in layers)
    assert decoder_layers(model) is layers
    model.model.twins = nn.ModuleList(nn.Linear(2, 2) for _ in layers)
    with pytest.raises(ModelError, match=r"expected one list of 4 layers .* found layers, twins"):
        decoder_layers(model)


def test_the_config_names_the_layers_where_they_are_not_found(tmp_path: Path) -> None:
    """As in LongCat-Flash, which counts two attentions in a layer; a copy of the model keeps the key."""
    model = tiny("llama")
    layers = decoder_layers(model)
    model.config.num_hidden_layers = 8
    expected = (
        r"LlamaModel: expected one list of 8 layers \(num_hidden_layers\), found none; set 'crosslift_layers' in the "
        r"model's config\.json to one of the lists of modules in LlamaModel: 'layers' \(of 4\)$"
    )
    with pytest.raises(ModelError, match=expected):
        decoder_layers(model)
    model.config.crosslift_layers = "layers"
    for wrapped in (model, model.model, nn.Sequential(model)):
        assert decoder_layers(wrapped) is layers
    model.config.num_hidden_layers = 4
    model.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, torch.float32, "sdpa", "cpu").config.crosslift_layers == "layers"
    model.config.crosslift_layers = "model.layers"
    with pytest.raises(ModelError, match=r"crosslift_layers: 'model\.layers' is not one of .* 'layers' \(of 4\)"):
        decoder_layers(model)


def test_layers_are_found_beside_a_head_that_is_named_as_a_decoder() -> None:
    config = AutoConfig.for_model("modernbert-decoder", **{**SIZES, "global_attn_every_n_layers": 2})
    assert len(decoder_layers(AutoModelForCausalLM.from_config(config))) == 4


def test_layers_of_an_encoder_are_found() -> None:
    assert len(decoder_layers(AutoModel.from_config(AutoConfig.for_model("xlm-roberta", **SIZES)))) == 4


def test_errors_name_the_class_and_what_was_expected() -> None:
    with pytest.raises(ModelError, match="Linear contains no Hugging Face model"):
        decoder_layers(nn.Linear(2, 2))
    model = tiny("llama")
    with pytest.raises(ModelError, match=r"layer 5 does not exist: LlamaForCausalLM has states 0\.\.4"):
        state_hook(model, 5, lambda hidden: hidden)
    with pytest.raises(ModelError, match="layer -1 does not exist"):
        state_hook(model, -1, lambda hidden: hidden)
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"LlamaModel: expected one list of 7 layers .* found none"):
        decoder_layers(model)
    dropping = tiny("opt")
    dropping.config.layerdrop = 0.1
    with pytest.raises(ModelError, match="set layerdrop to 0"):
        state_hook(dropping, 1, lambda hidden: hidden)
    assert ModelError.exit_status == 2


def test_membership_leaves_padding_out() -> None:
    ids = torch.tensor([[0, 2, -1], [2, 2, 0]])
    assert membership(ids, 4).int().tolist() == [
        [1, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
