"""The start-up check finds out which model classes keep packed samples apart."""

import time

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoConfig, PreTrainedConfig

from modeling import layout
from modeling.layout import choose_layout, packing_difference, tiny_config, tiny_model

KNOWN = {
    "llama": "packed",
    "qwen3": "packed",
    "mistral": "packed",
    "gpt_neox": "packed",
    "gemma3_text": "packed",
    "qwen3_moe": "packed",
    "bloom": "padded",
    "opt": "padded",
    "mpt": "padded",
    # Its mask uses position ids since 5.24. The choice is measured, so it depends on the installed version.
    "falcon": "packed" if version.parse(transformers.__version__) >= version.parse("5.24") else "padded",
}


def full_size(model_type: str) -> PreTrainedConfig:
    """Sizes of a released model, for which the check must be fast too."""
    extra = {"sliding_window": 4096} if model_type == "mistral" else {}
    return AutoConfig.for_model(model_type, **extra)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", KNOWN)
def test_layout_of_known_model_classes(model_type: str, attention: str) -> None:
    before, start = torch.get_rng_state(), time.process_time()
    choice = choose_layout(full_size(model_type), attention)
    assert choice.layout == KNOWN[model_type], choice.reason
    assert time.process_time() - start < 10
    assert torch.equal(before, torch.get_rng_state())
    if choice.layout == "packed":
        assert choice.max_difference is not None
        assert choice.max_difference < 1e-5
    elif choice.max_difference is not None:
        assert choice.max_difference > 0.1  # far from the limit


def test_attention_between_packed_samples_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    config = full_size("llama")
    model = tiny_model(config, "sdpa")
    original = type(model).forward

    def leaking(self: torch.nn.Module, **kwargs: object) -> object:
        return original(self, **{**kwargs, "use_cache": True})  # transformers then does not separate packed samples

    monkeypatch.setattr(type(model), "forward", leaking)
    assert packing_difference(model) > 0.1
    assert choose_layout(config, "sdpa").layout == "padded"


def test_sliding_windows_take_effect_in_the_tiny_model() -> None:
    config = full_size("mistral")
    windowed = tiny_model(config, "eager")
    assert windowed.config.sliding_window == layout.WINDOW < max(layout.SAMPLE_LENGTHS)
    config.sliding_window = None
    unlimited = tiny_model(config, "eager")
    assert unlimited.config.sliding_window is None
    ids = torch.arange(12)[None]
    assert not torch.allclose(windowed(ids).logits, unlimited(ids).logits, atol=1e-2)


def test_the_tiny_model_has_one_layer_of_each_kind() -> None:
    config = full_size("gemma3_text")
    assert len(config.layer_types) == config.num_hidden_layers == 26
    tiny = tiny_config(config)
    assert tiny.layer_types == ["sliding_attention", "full_attention"]
    assert (tiny.head_dim, tiny.rope_parameters) == (config.head_dim, config.rope_parameters)
    assert tiny_config(full_size("llama")).num_hidden_layers == 2
    assert config.num_hidden_layers == 26  # the run's own config is unchanged


def test_a_class_that_fails_runs_padded_and_the_log_gives_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        choice = choose_layout(full_size("mamba2"), "sdpa")
    assert (choice.layout, choice.max_difference) == ("padded", None)
    assert "mamba2 did not run packed" in caplog.text
