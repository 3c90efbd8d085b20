"""Adapters on two ranks: to quantised weights as to whole ones of the same values, under ZeRO-1 and -3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cells import CELLS, EXPORTED, LORA
from peft import PeftModel
from ranks import checked, run_ranks
from rounded_weights import RoundedWeights
from tiny_run import write_data

from modeling.errors import ModelError
from modeling.export_info import ExportInfo
from modeling.generation import ShiftedGenerator
from modeling.loading import load_pretrained
from modeling.quantisation.linear import FORMATS, round_weights

WORKER = str(Path(__file__).with_name("adapter_cells.py"))


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    checked(run_ranks([WORKER, str(write_data(folder / "data")), str(folder)], 2))
    return folder


def report(cells: Path, cell: str) -> Any:
    return json.loads((cells / f"{cell}.json").read_text())


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.startswith("quantised")])
def test_losses_on_quantised_weights_are_those_on_whole_weights_of_the_same_values(cells: Path, cell: str) -> None:
    found = report(cells, cell)
    expected = report(cells, "rounded-dora" if cell.endswith("dora") else "rounded")
    assert (found["quantised"], expected["quantised"]) == (14, 0)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert report(cells, "rounded")["losses"][1] != pytest.approx(report(cells, "rounded-dora")["losses"][1], rel=1e-3)


def test_frozen_weights_do_not_change_and_a_resumed_run_repeats_its_steps(cells: Path) -> None:
    assert all(report(cells, cell)["frozen_unchanged"] for cell in CELLS)
    found = report(cells, EXPORTED)
    assert found["resumed"] == found["losses"][1:]


def test_the_export_merges_into_the_values_of_the_quantised_weights(cells: Path, monkeypatch: Any) -> None:
    """Its own check has compared its logits with the run's. peft gives the same, with adapters on those values."""
    monkeypatch.setitem(FORMATS, "nf4", RoundedWeights())
    model = cells / "model"
    assert ExportInfo.read(model).check_failed is False
    described = json.loads((model / "adapter" / "base_model.json").read_text())
    assert described["quantised"] == "nf4"
    base = load_pretrained(described["name"], torch.float32, "eager", "cpu")
    merged, ids = load_pretrained(model, torch.float32, "eager", "cpu"), torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, on_whole_weights = merged(ids).logits, base(ids).logits
        round_weights(base, "nf4")
        adapted = PeftModel.from_pretrained(base, str(model / "adapter")).eval()
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(on_whole_weights, expected, atol=1e-2)
    assert adapted.peft_config["default"].r == LORA["rank"]


def test_adapters_are_beside_the_vectors_and_not_opened_without_them(cells: Path, tmp_path: Path) -> None:
    model = cells / "model"
    assert (model / "language_vectors.safetensors").is_file()
    assert ShiftedGenerator.from_directory(model).vectors is not None
    with pytest.raises(ModelError, match=f"adapters without .* language vectors .* give the export .*: {model}$"):
        ShiftedGenerator.from_directory(model / "adapter")
    (model / "adapter").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"adapters without .* give the export .* such as RUN/model$"):
        ShiftedGenerator.from_directory(tmp_path / "moved")
    (tmp_path / "moved").rename(model / "adapter")
