"""Runs on quantised weights: keys that do not fit, machines that cannot train them, and what `check` says of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rounded_weights import RoundedWeights
from tiny_run import PreparedRun, write_config

from modeling.quantisation.linear import FORMATS
from modeling.quantisation.nf4 import NF4
from training import distributed, fit, start
from training.check import check_run
from training.errors import ConfigError
from training.run_file import validate

LORA = {"rank": 2, "alpha": 4}
LIBRARY = "model.quantise: nf4 needs bitsandbytes, which is not installed: pip install 'crosslift[qlora]'; without "
GPU = "model.quantise: nf4 needs an NVIDIA GPU, and none is visible here; without "


@pytest.fixture
def values(prepared_run: PreparedRun, tiny_run: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """A run file that trains adapters to quantised weights of the tiny run's model."""
    made = tiny_run(tmp_path / "run")
    made["model"] = {"path": prepared_run.prepared.model_dir, "lora": {**LORA}, "quantise": "nf4"}
    made["tokenizer"] = {"path": prepared_run.prepared.tokenizer_dir}
    return made


def mistake(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        validate(values, "run.yaml")
    return str(raised.value)


def test_quantised_weights_need_adapters_and_a_known_format(values: dict[str, Any]) -> None:
    del values["model"]["lora"]
    assert mistake(values) == (
        "run.yaml: model: 'quantise' holds frozen weights in 4 bits: it needs 'lora', which trains adapters to them"
    )
    values["model"] |= {"lora": LORA, "quantise": "fp4"}
    assert re.fullmatch(r"run.yaml: model.quantise: .*'nf4'.*", mistake(values))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_all_reduce_for_fetch_params", True),
        ("zero_quantized_weights", True),
        ("zero_quantized_nontrainable_weights", True),
        ("offload_param", {"device": "nvme", "nvme_path": "/tmp"}),
    ],
)
def test_settings_for_weights_of_one_format_are_refused_with_quantised_ones(
    values: dict[str, Any], key: str, value: Any
) -> None:
    values["deepspeed"]["zero_optimization"][key] = value
    assert f"'deepspeed.zero_optimization.{key}" in mistake(values)
    assert "handles weights of one number format, but 'model.quantise'" in mistake(values)
    del values["model"]["quantise"]
    validate(values, "run.yaml")


def test_all_linear_is_every_layer_and_other_texts_are_refused(values: dict[str, Any]) -> None:
    values["model"]["lora"]["targets"] = "all-linear"
    lora = validate(values, "run.yaml").model.lora
    assert lora is not None
    assert lora.targets is None
    values["model"]["lora"]["targets"] = "q_proj"
    assert "write all-linear, or a list of names: [q_proj]" in mistake(values)


def set_machine(monkeypatch: pytest.MonkeyPatch, installed: bool, gpus: int) -> str | None:
    """Simulates a machine; returns the start of the line with which it is refused."""
    monkeypatch.setattr(distributed, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(
        "modeling.quantisation.nf4.importlib.util.find_spec", lambda name: object() if installed else None
    )
    return None if installed and gpus else LIBRARY if not installed else GPU


class Began(Exception):
    """The run was not refused."""


def begin(*_: Any, **__: Any) -> NoReturn:
    raise Began


@pytest.mark.parametrize(("installed", "gpus"), [(False, 0), (False, 1), (True, 0), (True, 1)])
def test_a_machine_without_the_library_or_a_gpu_is_refused_before_anything_is_written(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool, gpus: int
) -> None:
    expected = set_machine(monkeypatch, installed, gpus)
    file = write_config(tmp_path / "run.yaml", values)
    monkeypatch.setattr(start, "check_model_files", begin)
    monkeypatch.setattr(fit, "process_group", begin)
    for train in (lambda: start.train(file), lambda: fit.fit(validate(values, "run.yaml"))):
        with pytest.raises(Began if expected is None else ConfigError) as raised:
            train()
        assert expected is None or str(raised.value).startswith(expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lacking", [True, False])
def test_check_counts_weights_not_bytes_and_warns_where_this_machine_cannot_train(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, lacking: bool
) -> None:
    """A cluster's login node has no GPU, so it is not refused there."""
    monkeypatch.setitem(FORMATS, "nf4", NF4() if lacking else RoundedWeights())
    monkeypatch.setattr(RoundedWeights, "packed_bytes", lambda _, shape: 1000 * shape[0] * shape[1])  # of no data
    lines = list(check_run(validate(values, "run.yaml"), gpus_per_node=2))
    (described,) = [line for line in lines if line.startswith("model: ")]
    assert described.endswith(", linear layers of blocks in nf4")
    del values["model"]["quantise"]
    (plain,) = [line for line in check_run(validate(values, "run.yaml"), gpus_per_node=2) if line.startswith("model: ")]
    assert described.removesuffix(", linear layers of blocks in nf4") == plain
    assert any(line.startswith("warning: model.quantise: nf4 needs") for line in lines) == lacking
    assert lines[-1] == "ready to train"
