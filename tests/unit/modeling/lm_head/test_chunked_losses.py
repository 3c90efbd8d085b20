"""Losses in chunks, and all gradients, equal those from whole logits; logits of all positions never exist at once.

The reference runs the whole model on all positions and calls `cross_entropy` once, for each label.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PreTrainedModel

from modeling.architectures import Architecture, auto_class
from modeling.lm_head import chunked_losses, head_check
from modeling.lm_head.chunked_losses import LogitChange
from modeling.lm_head.head_check import build_label_head
from modeling.lm_head.label_head import LabelHead, LabelLosses

VOCABULARY = 50
MODELS: dict[str, tuple[dict[str, Any], LogitChange]] = {
    "llama": ({"tie_word_embeddings": False}, LogitChange()),
    "qwen3": ({"tie_word_embeddings": True, "head_dim": 8, "num_key_value_heads": 2}, LogitChange()),
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 2.0}, LogitChange(cap=2.0)),
    "cohere2": ({"logit_scale": 0.25}, LogitChange(scale=0.25)),
    "granite": ({"logits_scaling": 3.0, "tie_word_embeddings": False}, LogitChange(scale=1 / 3)),
    "phi": ({}, LogitChange()),  # its head has a bias
    "xlm-roberta": ({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, LogitChange()),
}
POSITIONS = torch.tensor([1, 4, 5, 6, 9, 13, 14])
LABELS = torch.tensor([3, 49, 0, 7, 7, 21, 3])
WEIGHTS = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0])
FACTOR = 0.37  # of the sum, as a step's denominator and the number of ranks give it


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions a chunk."""
    monkeypatch.setattr(chunked_losses, "CHUNK_ELEMENTS", 2 * VOCABULARY)
    monkeypatch.setattr(chunked_losses, "CHUNK_POSITIONS", 3)


def tiny(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "pad_token_id": 0, "initializer_range": 0.2, **MODELS[model_type][0],
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    return auto_class(architecture(model_type)).from_config(config, dtype=dtype).train()


def architecture(model_type: str) -> Architecture:
    return "masked-lm" if model_type == "xlm-roberta" else "causal-lm"


def forward(model: PreTrainedModel) -> Callable[[], Any]:
    ids = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    return lambda: model(input_ids=ids)


def whole(model: PreTrainedModel) -> tuple[Tensor, list[Tensor]]:
    """Weighted losses from the logits of all positions, and the gradients of FACTOR times their sum."""
    logits = forward(model)().logits.flatten(0, 1)[POSITIONS].float()
    losses = torch.stack([F.cross_entropy(row, label) for row, label in zip(logits, LABELS, strict=True)]) * WEIGHTS
    return losses.detach(), gradients(model, losses.sum())


def in_chunks(model: PreTrainedModel, change: LogitChange) -> tuple[LabelLosses, list[Tensor]]:
    head = LabelHead(model, change)
    losses = head.losses(forward(model), POSITIONS, LABELS, WEIGHTS)
    head.remove()
    return losses, gradients(model, losses.sum)


def gradients(model: PreTrainedModel, total: Tensor) -> list[Tensor]:
    model.zero_grad()
    (FACTOR * total).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    assert len(one) == len(other)
    pairs = zip(one, other, strict=True)
    apart = sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5
    return apart / sum(float(b.double().square().sum()) for b in other) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_losses_and_gradients_equal_those_of_whole_logits(model_type: str, checkpointing: bool) -> None:
    model = tiny(model_type)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, expected_gradients = whole(model)
    losses, found = in_chunks(model, MODELS[model_type][1])
    torch.testing.assert_close(losses.each, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses.sum.detach(), expected.sum(), rtol=1e-6, atol=0)
    assert distance(found, expected_gradients) < 1e-6
    for one, other in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert forward(model)().logits.shape == (2, 8, VOCABULARY)  # unchanged afterwards


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_frozen_head_gets_no_gradient_and_the_rest_the_same(model_type: str) -> None:
    model = tiny(model_type)
    model.get_output_embeddings().weight.requires_grad_(False)
    expected, expected_gradients = whole(model)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.shape) or each, lambda each: each):
        losses, found = in_chunks(model, MODELS[model_type][1])
    assert (len(POSITIONS), 32) in saved
    assert (VOCABULARY, 32) not in saved
    torch.testing.assert_close(losses.each, expected, rtol=1e-6, atol=1e-6)
    assert len(found) == sum(each.requires_grad for each in model.parameters())
    assert distance(found, expected_gradients) < 1e-6


def test_a_model_frozen_up_to_its_head_trains_the_head() -> None:
    model = tiny("llama")
    model.model.requires_grad_(False)
    _, expected = whole(model)
    _, found = in_chunks(model, LogitChange())
    assert [each.shape for each in found] == [(VOCABULARY, 32)]
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("model_type", MODELS)
def test_losses_without_gradients_are_the_same(model_type: str) -> None:
    model = tiny(model_type)
    expected, _ = whole(model)
    head = LabelHead(model, MODELS[model_type][1])
    with torch.no_grad():
        losses = head.losses(forward(model), POSITIONS, LABELS, WEIGHTS)
    assert not losses.sum.requires_grad
    torch.testing.assert_close(losses.each, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses.sum, expected.sum(), rtol=1e-6, atol=0)


class Widest(TorchDispatchMode):
    """The most elements of a tensor with V columns that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape[-1:] == (VOCABULARY,) and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("model_type", MODELS)
def test_no_more_logits_exist_than_those_of_a_chunk(model_type: str, grad: bool) -> None:
    model = tiny(model_type)
    calls: list[int] = []
    head = LabelHead(model, MODELS[model_type][1])
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(grad), Widest() as made:
        losses = head.losses(forward(model), POSITIONS, LABELS, WEIGHTS)
        if grad:
            losses.sum.backward()
    assert made.elements == 3 * VOCABULARY
    assert calls == [1], "under ZeRO-3 each call gathers the weight"


@pytest.mark.parametrize("n", [0, 1])
def test_a_micro_batch_without_labels_has_gradients_of_zero(n: int) -> None:
    """n = 1: the placeholder of an idle micro-batch, whose weight is 0."""
    model = tiny("qwen3")
    losses = LabelHead(model, LogitChange()).losses(forward(model), POSITIONS[:n], LABELS[:n], torch.zeros(n))
    assert losses.each.tolist() == [0.0] * n
    found = gradients(model, losses.sum)
    assert len(found) == len(list(model.parameters()))
    assert not any(each.any() for each in found)


def test_a_second_backward_pass_of_the_same_losses_is_an_error() -> None:
    """Its gradients would be those of the first, multiplied again."""
    model = tiny("llama")
    total = LabelHead(model, LogitChange()).losses(forward(model), POSITIONS, LABELS, WEIGHTS).sum
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_sum_over_chunks_in_bf16_loses_no_more_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp64; 171 chunks of 3 positions, then one chunk."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 32, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, 32, generator=generator) * 0.3).bfloat16().requires_grad_()
    bias = torch.randn(VOCABULARY, generator=generator).bfloat16().requires_grad_()
    ids = torch.randint(VOCABULARY, (512,), generator=generator)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    expected = torch.autograd.grad(F.cross_entropy(logits, ids, reduction="sum") / 512, exact)
    errors = []
    for positions in (3, 512):
        monkeypatch.setattr(chunked_losses, "CHUNK_ELEMENTS", positions * VOCABULARY)
        total, _ = chunked_losses.chunked_losses(hidden, weight, bias, ids, torch.ones(512), LogitChange())
        found = torch.autograd.grad(total / 512, [hidden, weight, bias])
        assert [each.dtype for each in found] == [torch.bfloat16] * 3
        errors.append([distance([one], [other]) for one, other in zip(found, expected, strict=True)])
    for many, one in zip(*errors, strict=True):
        assert many < 1.05 * one < 0.01


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_whose_tiny_twin_agrees_takes_its_losses_in_chunks(model_type: str) -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = tiny(model_type, dtype=torch.bfloat16)
    torch.set_rng_state(state)
    head = build_label_head(model, architecture(model_type))
    assert head.change == MODELS[model_type][1]
    assert torch.equal(torch.get_rng_state(), state)


def without_chunks(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> str:
    """The line of the log that says why, after the losses were compared with those of whole logits."""
    expected, expected_gradients = whole(model)
    with caplog.at_level(logging.INFO, logger="modeling.lm_head"):
        head = build_label_head(model, "causal-lm")
    assert head.change is None
    losses = head.losses(forward(model), POSITIONS, LABELS, WEIGHTS)
    torch.testing.assert_close(losses.each, expected, rtol=1e-5, atol=1e-6)
    assert distance(gradients(model, losses.sum), expected_gradients) < 1e-5
    (line,) = caplog.messages
    assert line.startswith("losses are not taken in chunks, so the logits of all label positions are in memory: ")
    return line


@pytest.mark.parametrize(("model_type", "names"), [("gemma2", "CAPS"), ("cohere2", "FACTORS"), ("granite", "DIVISORS")])
def test_a_change_of_logits_that_is_not_known_is_found_on_the_tiny_model(
    model_type: str, names: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chunked_losses, names, ())
    model = tiny(model_type, **({"final_logit_softcapping": 30.0} if model_type == "gemma2" else {}))
    assert f"losses or gradients of a tiny {model_type} differ by" in without_chunks(model, caplog)


def test_a_head_with_an_adapter_is_not_chunked(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    assert "the output embedding is a Linear of peft" in without_chunks(model, caplog)


def test_a_class_of_its_own_is_not_chunked(caplog: pytest.LogCaptureFixture) -> None:
    class Own(type(tiny("llama"))):  # type: ignore[misc]
        """Code of its own, as of `trust_remote_code`."""

    model = tiny("llama")
    model.__class__ = Own
    assert "transformers makes a LlamaForCausalLM of its config, not a Own" in without_chunks(model, caplog)


def test_a_class_that_cannot_be_made_small_is_not_chunked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("head_dim varies")

    monkeypatch.setattr(head_check, "tiny_model", fail)
    assert "a tiny llama did not run: head_dim varies" in without_chunks(tiny("llama"), caplog)


def test_values_of_the_config_that_are_no_numbers_are_ignored() -> None:
    config = AutoConfig.for_model("mpt", logit_scale="inv_sqrt_d_model")
    assert LogitChange.of(config) == LogitChange()
