"""module_calls.py: models whose modules depend on the tokens are refused on several ranks, and looped layers always."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.mixtral import modeling_mixtral

from modeling.errors import ModelError
from modeling.layers import LAYERS_KEY
from modeling.module_calls import check_module_calls


class ExpertList(nn.ModuleList):
    """Experts as transformers 4 had them: one module each, of which only those with tokens are called."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_local_experts))

    def forward(self, hidden_NH: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_NH)
        for number in chosen_NK.unique().tolist():
            rows, places = torch.where(chosen_NK == number)
            out = out.index_add(0, rows, self[number](hidden_NH[rows]) * weights_NK[rows, places, None])
        return out


class ListBlock(modeling_mixtral.MixtralSparseMoeBlock):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.experts = ExpertList(config)


def mixtral(layers: int = 2) -> PreTrainedConfig:
    return AutoConfig.for_model("mixtral", num_hidden_layers=layers)


def test_a_list_of_experts_is_refused_on_several_ranks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    check_module_calls(mixtral(), "causal-lm", ranks=2)
    monkeypatch.setattr(modeling_mixtral, "MixtralSparseMoeBlock", ListBlock)
    check_module_calls(mixtral(), "causal-lm", ranks=1)
    with pytest.raises(
        ModelError, match=r"^MixtralForCausalLM: .* \(here model\.layers\.0\.mlp\.experts\.\d+"
    ) as caught:
        check_module_calls(mixtral(), "causal-lm", ranks=2)
    assert "\n" not in str(caught.value)


def test_experts_after_dense_layers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in DeepSeek, whose first layers are dense: the tiny model has all layers."""
    built: list[int] = []

    def dense_at_first(config: PreTrainedConfig) -> nn.Module:
        built.append(len(built))
        return nn.Linear(config.hidden_size, config.hidden_size) if len(built) <= 5 else ListBlock(config)

    monkeypatch.setattr(modeling_mixtral, "MixtralSparseMoeBlock", dense_at_first)
    with pytest.raises(ModelError, match=r"here model\.layers\.5\.mlp\.experts\.\d+, there"):
        check_module_calls(mixtral(7), "causal-lm", ranks=2)


def test_one_expert_a_token_whose_number_of_calls_varies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An activation that runs once for each expert with tokens; single tokens call it equally often."""

    def loop(experts: Any, hidden_NH: Tensor, chosen_NK: Tensor, _: Tensor) -> Tensor:
        return sum((experts.act_fn(hidden_NH) for _ in chosen_NK.unique()), torch.zeros_like(hidden_NH))

    monkeypatch.setattr(modeling_mixtral.MixtralExperts, "forward", loop)
    with pytest.raises(ModelError, match=r"mlp\.experts\.act_fn"):
        check_module_calls(mixtral(), "causal-lm", ranks=2)


def test_layers_that_run_in_a_loop_are_refused_on_one_rank_too() -> None:
    config = AutoConfig.for_model("hrm_text", **{LAYERS_KEY: "L_module.layers"})
    with pytest.raises(ModelError, match=r"HrmTextForCausalLM: model\.L_module\.layers\.0 runs \d times in a forward"):
        check_module_calls(config, "causal-lm", ranks=1)


def test_a_class_that_does_not_run_is_not_checked_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    with caplog.at_level("INFO"):
        check_module_calls(AutoConfig.for_model("bamba"), "causal-lm", ranks=2)
    assert "module calls are not checked: a tiny bamba did not run: " in caplog.text
    assert torch.equal(before, torch.get_rng_state())
