"""Packed, padded and single samples have equal logits, losses and gradients; models that cannot pack are detected.

The packed form is the one of every training, probe and held-out forward pass: no attention mask, position ids
that restart, no cache.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeling.layout import choose_layout
from modeling.lm_head.label_head import LabelHead, token_losses

VOCABULARY = 64
LENGTHS = (11, 4, 17, 1, 8, 6)
ROWS = ((0, 1, 3), (2,), (4, 5))  # three packed rows; the shorter ones end in padding
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "gpt_neox": {},
}


def tiny(model_type: str, attention: str, checkpointing: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
        **MODELS[model_type],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def one_by_one(model: PreTrainedModel) -> list[Tensor]:
    return [model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples()]


def packed_batch() -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Rows of one width; a row's padding is a separate segment. Also the place of each sample."""
    texts = samples()
    width = max(sum(LENGTHS[i] for i in row) for row in ROWS)
    ids, positions = torch.zeros(len(ROWS), width, dtype=torch.int64), torch.zeros(len(ROWS), width).long()
    places = [(0, 0)] * len(LENGTHS)
    for r, row in enumerate(ROWS):
        start = 0
        for i in row:
            places[i] = (r, start)
            ids[r, start : start + LENGTHS[i]] = texts[i]
            positions[r, start : start + LENGTHS[i]] = torch.arange(LENGTHS[i])
            start += LENGTHS[i]
        positions[r, start:] = torch.arange(width - start)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": None, "use_cache": False}, places


def padded_batch() -> tuple[dict[str, Any], list[tuple[int, int]]]:
    ids = torch.nn.utils.rnn.pad_sequence(samples(), batch_first=True)
    mask = torch.tensor([[1] * length + [0] * (ids.shape[1] - length) for length in LENGTHS])
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}, [(i, 0) for i in range(len(LENGTHS))]


def labels(width: int, places: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Flat positions that predict a next token of the same sample, and those tokens."""
    positions = [
        row * width + start + t for (row, start), length in zip(places, LENGTHS, strict=True) for t in range(length - 1)
    ]
    return torch.tensor(positions), torch.cat([text[1:] for text in samples()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", MODELS)
def test_packed_equals_padded_equals_one_by_one(model_type: str, attention: str, checkpointing: bool) -> None:
    model = tiny(model_type, attention, checkpointing)
    assert choose_layout(model.config, attention).layout == "packed"
    single = one_by_one(model)
    label_ids = torch.cat([text[1:] for text in samples()])
    expected = token_losses(torch.cat([logits[:-1] for logits in single]), label_ids)
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    head = LabelHead(model)
    for batch, places in (packed_batch(), padded_batch()):
        with torch.no_grad():
            logits = model(**batch).logits
        for i, (row, start) in enumerate(places):
            torch.testing.assert_close(logits[row, start : start + LENGTHS[i]], single[i], rtol=1e-4, atol=1e-4)
        model.zero_grad()
        positions, next_ids = labels(logits.shape[1], places)
        with head.select(positions):
            chosen = model(**batch).logits[0]
        losses = token_losses(chosen, next_ids)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
        losses.sum().backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert float((parameter.grad - gradient).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_windows_take_effect_within_samples(attention: str) -> None:
    """Otherwise the test above would show nothing: the window limits which tokens of a sample affect a logit."""
    model = tiny("mistral", attention, False)
    long = samples()[2]
    logits = model(input_ids=long[None], use_cache=False).logits[0]
    changed = long.clone()
    changed[0] = (long[0] + 1) % VOCABULARY
    other = model(input_ids=changed[None], use_cache=False).logits[0]
    reach = 3 * (5 - 1)  # three layers, each five wide
    assert not torch.allclose(logits[reach], other[reach], atol=1e-3)
    assert torch.equal(logits[reach + 1 :], other[reach + 1 :])


def test_bloom_is_padded_because_packing_gives_wrong_logits() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert choose_layout(config, "eager").layout == "padded"
    single = one_by_one(model)
    (packed, packed_places), (padded, _) = packed_batch(), padded_batch()
    with torch.no_grad():
        right, wrong = model(**padded).logits, model(**packed).logits
    for i, expected in enumerate(single):
        torch.testing.assert_close(right[i, : LENGTHS[i]], expected, rtol=1e-4, atol=1e-4)
    row, start = packed_places[1]  # the second of its row
    assert not torch.allclose(wrong[row, start : start + LENGTHS[1]], single[1], atol=0.1)
