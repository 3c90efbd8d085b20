"""Quantised linear layers: which are made, what they compute and keep, how they are filled, and adapters to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rounded_weights import RoundedWeights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling.adapters import adapted_model, add_adapters
from modeling.errors import ModelError
from modeling.loading import build_model, load_pretrained, load_weights
from modeling.quantisation.linear import (
    FORMATS,
    QuantisedLinear,
    dense_elements,
    packed_layers,
    quantised_blocks,
    round_weights,
)
from modeling.quantisation.nf4 import NF4
from training.config import LoraSettings, ModelConfig

IDS = torch.arange(5, 21)[None]
FORMAT = RoundedWeights()
VARIANTS: dict[str, dict[str, bool]] = {
    "lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True},
    "both": {"use_dora": True, "use_rslora": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "nf4", FORMAT)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases in its attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def filled(directory: Path, dtype: torch.dtype = torch.float32, quantise: str | None = "nf4") -> PreTrainedModel:
    """The model as a run builds and fills it on one rank without ZeRO-3."""
    model = build_model(directory, attention="eager", dtype=dtype, gradient_checkpointing=False, quantise=quantise)

    @torch.no_grad()
    def write(parameter: nn.Parameter, read: Any) -> None:
        parameter.data.copy_(read())

    load_weights(model, directory, write, is_reader=True)
    return model


def rounded_base(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = load_pretrained(directory, dtype, "eager", "cpu")
    round_weights(model, "nf4")
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_linear_layers_of_blocks_are_quantised_and_nothing_else(directory: Path) -> None:
    model = filled(directory)
    layers = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
    assert packed_layers(model).keys() == {f"model.layers.{n}.{each}.weight" for n in (0, 1) for each in layers}
    assert type(model.get_output_embeddings()) is nn.Linear
    assert not any(packed_layers(filled(directory, quantise=None)))
    assert {p.dtype for p in filled(directory, torch.bfloat16).parameters()} == {torch.bfloat16, torch.uint8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_weights_are_quantised_as_they_are_read(directory: Path, dtype: torch.dtype) -> None:
    model, base = filled(directory, dtype), load_pretrained(directory, dtype, "eager", "cpu")
    for name, stored in base.state_dict().items():
        if (layer := packed_layers(model).get(name)) is None:
            assert torch.equal(model.state_dict()[name], stored)
        else:
            expected = FORMAT.unpack(FORMAT.pack(stored), layer.shape, dtype)
            assert torch.equal(layer.weight, expected)
            assert 0.01 < (expected - stored).norm() / stored.norm() < 0.2
    assert torch.equal(logits(model), logits(rounded_base(directory, dtype)))
    assert not torch.allclose(logits(model), logits(base), atol=1e-3)


def test_weights_that_do_not_fit_are_named_as_in_the_file(directory: Path, tmp_path: Path) -> None:
    wider = load_pretrained(directory, torch.float32, "eager", "cpu")
    state = {name: weight for name, weight in wider.state_dict().items() if "1.mlp.up_proj" not in name}
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(16, 8)
    wider.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError) as raised:
        filled(tmp_path)
    assert "1 missing weights for LlamaForCausalLM: model.layers.1.mlp.up_proj.weight" in str(raised.value)
    assert "q_proj.weight (F32 [16, 8] stored, [16, 16] wanted)" in str(raised.value)


def test_the_product_and_its_gradient_are_those_of_the_weight_which_is_not_kept(directory: Path) -> None:
    layer = packed_layers(filled(directory))["model.layers.0.self_attn.q_proj.weight"]
    states = torch.randn(3, 5, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda each: each):
        output = layer(states)
    assert kept == []
    output.square().sum().backward()
    plain = states.detach().clone().requires_grad_(True)
    expected = plain @ layer.weight.T + layer.bias
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(states.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_train_alone_on_quantised_weights_as_on_rounded_ones(
    directory: Path, variant: str, dtype: torch.dtype
) -> None:
    lora = LoraSettings.model_validate({"rank": 3, "alpha": 12, "targets": "all-linear", **VARIANTS[variant]})
    losses: dict[str, list[float]] = {}
    for name, model in (("quantised", filled(directory, dtype)), ("rounded", rounded_base(directory, dtype).train())):
        add_adapters(model, lora, seed=0)
        trained = {key: each for key, each in model.named_parameters() if each.requires_grad}
        assert all("lora_" in key and each.dtype == dtype for key, each in trained.items())
        before = {key: each.detach().clone() for key, each in model.named_parameters()}
        optimizer = torch.optim.SGD(trained.values(), lr=0.5)
        losses[name] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        moved = {key for key, each in model.named_parameters() if not torch.equal(each, before[key])}
        assert moved == trained.keys()
        if name == "quantised":
            weights = {key: each.detach().float() for key, each in trained.items()}
            merged = adapted_model(rounded_base(directory, dtype), "causal-lm", lora, weights).merge_and_unload()
            close = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
            assert (logits(merged) - logits(model)).abs().max() < close * logits(model).abs().max()
    assert losses["quantised"] == pytest.approx(losses["rounded"], rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert losses["quantised"][2] < losses["quantised"][0]


def test_quantised_models_are_made_on_the_meta_device_without_the_library(directory: Path) -> None:
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, "nf4", NF4())
        config = LlamaConfig.from_pretrained(directory)

        def make() -> Any:
            return AutoModelForCausalLM.from_config(config)

        with quantised_blocks(make, "nf4", torch.bfloat16):
            model = make()
        plain = make()
        add_adapters(model, LoraSettings(rank=2, alpha=2, use_dora=True), seed=0)
    added = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert dense_elements(model) - added == sum(each.numel() for each in plain.parameters())
    layers = packed_layers(model).values()
    assert len(layers) == 14
    assert {layer.weight.device.type for layer in layers} == {"meta"}


def test_the_formats_of_run_files_are_those_that_exist() -> None:
    (literal, _) = get_args(ModelConfig.model_fields["quantise"].annotation)
    assert set(get_args(literal)) == FORMATS.keys()


def test_nf4_takes_4_13_bits_a_weight() -> None:
    shape = (4096, 14336)
    assert 8 * NF4().packed_bytes(shape) / (4096 * 14336) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 64), (33, 65), (300, 511), (5, 7)])
def test_nf4_weights_are_those_of_bitsandbytes_own_layer(shape: tuple[int, int], dtype: torch.dtype) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = QuantisedLinear(nn.Linear(shape[1], shape[0], bias=False), NF4(), dtype)
    layer.packed.data.copy_(layer.pack(weight))
    own = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    assert torch.equal(layer.weight, bitsandbytes.functional.dequantize_4bit(own.data, own.quant_state))
