"""What a model cannot do is said before its weights are read, by `check` and by `train` alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import XMIXUP, run_values, write_data, write_task_data
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from training.assembly import check_model
from training.check import check_run
from training.errors import ConfigError
from training.run_file import validate


def config_of(data: Path, tmp_path: Path, **changes: Any) -> Any:
    return validate(run_values(data, tmp_path / "run", **changes), "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"data.sequence_length": 128}, None),  # RoBERTa's positions begin at 2
        (
            {"data.sequence_length": 129},
            r"^data\.sequence_length: 129 tokens, but the model has positions for 128; set",
        ),
        ({"objective": {**XMIXUP["objective"], "layer": 3}}, r"^objective\.layer: 3, but the model has layers 0 to 2"),
    ],
)
def test_an_encoder(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    data = write_task_data(tmp_path / "data")
    config = config_of(
        data, tmp_path, **{**XMIXUP, "tokenizer.train": {"vocab_size": 120, "style": "encoder"}, **changes}
    )
    settings = dict(config.model.init)
    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(AutoConfig.for_model(**settings, pad_token_id=1))
    if message is None:
        check_model(config, model)
        return
    with pytest.raises(ConfigError, match=message):
        check_model(config, model)
    with pytest.raises(ConfigError, match=message):
        list(check_run(config))


def test_a_decoder_without_a_table_of_positions_reads_on(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    config = config_of(data, tmp_path, **{"data.sequence_length": 384})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.model.init))
    check_model(config, model)
    beyond = config.model_copy(update={"objective": config.objective.model_copy(update={"layers": (1, 3)})})
    with pytest.raises(ConfigError, match=r"^objective\.layers: \[1, 3\], but the model has 2 layers"):
        check_model(beyond, model)
