"""Activation memory counted on the meta device equals what autograd saves and bounds what a step allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import XMIXUP, run_values
from transformers import AutoConfig, PreTrainedConfig

from benchmarks.memory_estimate import DTYPES, blank_of, on_cpu, real_inputs, step_peak
from data_pipeline.batching.batch import BatchShape
from modeling.architectures import Architecture
from modeling.layers import decoder_layers
from modeling.lm_head import chunked_losses
from training.checks import activations
from training.checks.activations import SavedBytes
from training.config import RunConfig
from training.run_file import validate

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 600,
    "max_position_embeddings": 130, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
    "xlm-roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
SHAPE = BatchShape(rows=4, row_tokens=64, labels=90, segments=8, pairs=4)


def config_of(**changes: Any) -> RunConfig:
    return validate(run_values(Path("data"), Path("run"), **changes), "test")


def model_config(kind: str) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **SIZES, **MODELS[kind])


CASES: dict[str, tuple[str, Architecture, dict[str, Any]]] = {
    "llama, sft": ("llama", "causal-lm", {"objective": {"name": "sft"}}),
    "qwen3, sft": ("qwen3", "causal-lm", {"objective": {"name": "sft"}}),
    "llama, shifcon": ("llama", "causal-lm", {"objective.layers": [1, 3]}),
    "qwen3, lora": (
        "qwen3", "causal-lm",
        {"objective": {"name": "sft"}, "model": {"path": "m", "lora": {"rank": 4, "alpha": 8}}, "tokenizer": {}},
    ),
    "llama, dora": (
        "llama", "causal-lm",
        {
            "objective": {"name": "sft"}, "tokenizer": {},
            "model": {"path": "m", "lora": {"rank": 4, "alpha": 8, "use_dora": True}},
        },
    ),
    "xlm-roberta, xmixup": ("xlm-roberta", "token-classification", XMIXUP),
    "xlm-roberta, finetune": (
        "xlm-roberta", "token-classification", {**XMIXUP, "objective": {"name": "finetune"}}
    ),
    "xlm-roberta, mlm": (
        "xlm-roberta", "masked-lm",
        {
            **XMIXUP, "objective": {"name": "mlm"}, "data.task": {"kind": "text"},
            "data.sources": [{"name": "t", "files": "*.jsonl", "columns": {"language": "language", "text": "text"}}],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("attention", "precision"), [("sdpa", "fp32"), ("sdpa", "bf16"), ("eager", "fp32")])
@pytest.mark.parametrize("case", CASES)
def test_activations_counted_without_data_equal_what_autograd_saves(case: str, attention: Any, precision: str) -> None:
    kind, architecture, changes = CASES[case]
    config = config_of(**changes, precision=precision)
    counted = activations_of(config, kind, attention)
    with real_inputs(SHAPE, SIZES["vocab_size"]):
        model, forward = on_cpu(config, model_config(kind), architecture, attention, SHAPE)
        with SavedBytes(model, list(decoder_layers(model))) as saved:
            loss = forward()
    assert loss.requires_grad
    assert counted.counted
    assert counted.layers == pytest.approx(saved.inside, rel=0.01)
    assert counted.outside == pytest.approx(saved.outside, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [case for case in CASES if "ora" not in case])  # MemTracker supports no frozen weights
def test_the_estimated_peak_is_1_to_1_4_times_what_a_step_allocates(
    case: str, precision: str, checkpointing: bool
) -> None:
    kind, architecture, changes = CASES[case]
    config = config_of(**changes, precision=precision, gradient_checkpointing=checkpointing)
    estimate = activations_of(config, kind, "sdpa").peak(checkpointing)
    with real_inputs(SHAPE, SIZES["vocab_size"]):
        measured = step_peak(*on_cpu(config, model_config(kind), architecture, "sdpa", SHAPE))
    assert measured <= estimate <= 1.4 * measured


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["llama, sft", "qwen3, sft", "xlm-roberta, mlm"])
def test_the_estimate_follows_losses_in_chunks(
    case: str, precision: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this vocabulary a step allocates most while the head runs: less in chunks, though these add up in fp32."""
    kind, architecture, changes = CASES[case]
    config = config_of(**changes, precision=precision, gradient_checkpointing=checkpointing)
    sizes = {**SIZES, "vocab_size": 6000}
    large = AutoConfig.for_model(kind, **sizes, **MODELS[kind])
    peaks = []
    for positions in (SHAPE.labels, SHAPE.labels // 3):
        monkeypatch.setattr(chunked_losses, "CHUNK_ELEMENTS", positions * 6000)
        monkeypatch.setattr(chunked_losses, "CHUNK_POSITIONS", positions)
        counted = activations.count_activations(config, large, "sdpa", DTYPES[precision], SHAPE, blank_of(config))
        with real_inputs(SHAPE, 6000):
            model, forward = on_cpu(config, large, architecture, "sdpa", SHAPE)
            with SavedBytes(model, list(decoder_layers(model))) as saved:
                loss = forward()
            del loss
            measured = step_peak(model, forward, backward=False)
        assert counted.outside == pytest.approx(saved.outside, rel=0.01)
        item = 4 if precision == "fp32" or positions < SHAPE.labels else 2
        assert counted.fixed == item * 6000 * 128
        assert measured <= counted.peak(checkpointing) <= 1.4 * measured
        peaks.append(measured)
    assert peaks[1] < peaks[0]


def activations_of(config: RunConfig, kind: str, attention: Any) -> activations.Activations:
    dtype = DTYPES[config.precision]
    return activations.count_activations(config, model_config(kind), attention, dtype, SHAPE, blank_of(config))


@pytest.mark.parametrize("dora", [False, True])
def test_quantised_weights_are_not_kept_for_the_backward_pass(dora: bool) -> None:
    """So a micro-batch keeps what it does with whole weights; with DoRA, peft keeps no more of them either."""
    lora = {"rank": 4, "alpha": 8, "use_dora": dora}
    counts = [
        activations_of(config_of(objective={"name": "sft"}, model=model, tokenizer={}), "llama", "sdpa")
        for model in ({"path": "m", "lora": lora}, {"path": "m", "lora": lora, "quantise": "nf4"})
    ]
    assert counts[0] == counts[1]
    assert counts[1].counted


def test_with_checkpointing_only_layer_inputs_and_one_layer_are_kept() -> None:
    kept = activations.Activations(
        (100, 120, 110), outside=30, layer_input=7, layer_work=5, outside_work=9, counted=True
    )
    assert kept.peak(checkpointing=False) == 330 + 30 + 9
    assert kept.peak(checkpointing=True) == 3 * 7 + 120 + 5


def test_a_model_that_cannot_run_without_data_is_estimated_by_the_formula() -> None:
    """Falcon has its own attention class, which the counting attention cannot replace."""
    config = config_of(objective={"name": "sft"}, precision="bf16")
    falcon = AutoConfig.for_model("falcon", hidden_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=600)
    kept = activations.count_activations(config, falcon, "flash_attention_2", torch.bfloat16, SHAPE, blank_of(config))
    assert not kept.counted
    assert kept.layers == (34 * 4 * 64 * 128,) * 2  # 34 bytes a token and hidden unit
