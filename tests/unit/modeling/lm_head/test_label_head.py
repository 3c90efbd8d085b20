"""Selected positions get the same logits and gradients as in a full forward pass; chunked losses are exact."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from modeling.errors import ModelError
from modeling.lm_head import label_head
from modeling.lm_head.label_head import LabelHead, token_losses

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "gpt_neox": {},
    "bloom": {"n_head": 4},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere2": {"logit_scale": 0.25},
}
POSITIONS = torch.tensor([1, 4, 5, 6, 9, 13])


def tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if model_type not in ("gpt_neox", "bloom"):
        sizes |= {"num_key_value_heads": 2}
    config = AutoConfig.for_model(
        model_type, **{**sizes, "intermediate_size": 48, "pad_token_id": 0, "initializer_range": 0.2, **changes}
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_chosen_logits_and_gradients_equal_those_of_all_positions(model_type: str, checkpointing: bool) -> None:
    model = tiny(model_type, **MODELS[model_type]).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(len(POSITIONS)) + 3

    whole = model(ids, use_cache=False).logits.flatten(0, 1)[POSITIONS]
    F.cross_entropy(whole, labels, reduction="sum").backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    head = LabelHead(model)
    with head.select(POSITIONS):
        chosen = model(ids, use_cache=False).logits
    token_losses(chosen[0], labels).sum().backward()
    assert chosen.shape == (1, len(POSITIONS), 50)
    torch.testing.assert_close(chosen[0], whole, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)

    assert model(ids, use_cache=False).logits.shape == (2, 8, 50)  # unchanged outside `select`
    head.remove()


def test_a_batch_without_labels_runs_and_has_gradients() -> None:
    model = tiny("llama")
    with LabelHead(model).select(torch.empty(0, dtype=torch.int64)):
        logits = model(torch.ones(1, 4, dtype=torch.int64), use_cache=False).logits
    assert logits.shape == (1, 0, 50)
    token_losses(logits[0], torch.empty(0, dtype=torch.int64)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_head_that_is_absent_or_never_called_is_an_error() -> None:
    with pytest.raises(ModelError, match="LlamaModel has no output embedding"):
        LabelHead(AutoModel.from_config(tiny("llama").config))
    head = LabelHead(tiny("llama"))
    with pytest.raises(ModelError, match="no forward pass"), head.select(POSITIONS):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_losses_equal_whole_ones(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(23, 11, generator=generator) * 4).to(dtype).requires_grad_()
    labels = torch.randint(11, (23,), generator=generator)
    weights = torch.rand(23, generator=generator)
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    largest: list[int] = []
    original = label_head._losses
    monkeypatch.setattr(label_head, "_losses", lambda x, y: largest.append(x.numel()) or original(x, y))
    monkeypatch.setattr(label_head, "CHUNK_ELEMENTS", 5 * 11)
    losses = token_losses(logits, labels)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)
    assert torch.equal(gradient, expected_gradient)
    assert max(largest) == 5 * 11
    assert len(largest) == 10  # five chunks, each recomputed in the backward pass
