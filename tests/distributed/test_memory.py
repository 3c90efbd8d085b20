"""Estimates of `training.engine.memory` against the engine's memory: real ranks, all ZeRO stages, fp32 and bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cells import CELLS, values
from ranks import checked, run_ranks
from tiny_run import RANK_ITEMS, write_data
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory_estimate import NAMES
from training.engine.memory import Activations, MemoryEstimate, Ranks, memory_estimate
from training.run_file import validate

NOTHING = Activations((), 0, 0, 0, 0, counted=True)
WHOLE_UNTIL_REDUCED = (
    "stage 1 fp32",
    "stage 1 bf16",
    "stage 2 fp32",
)  # gradients are whole until they are reduced and sharded
HELD = {**NAMES, "bucket": ("bucket for reducing gradients",), "small": ("small weights, whole",)}


@pytest.fixture(scope="module", params=[1, 2])
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cpu_adam: None
) -> tuple[int, Path, Any]:
    ranks, folder = request.param, tmp_path_factory.mktemp("memory")
    data = write_data(folder / "data", RANK_ITEMS)
    program = Path(__file__).with_name("memory_cells.py")
    checked(run_ranks([str(program), str(data), str(folder / "work"), str(folder)], ranks))
    return ranks, data, json.loads((folder / f"{ranks}.json").read_text())


def estimate(data: Path, cell: str, ranks: int) -> MemoryEstimate:
    config = validate(values(data, data / "never-written", cell), "test")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config.model.init or {}, vocab_size=config.tokenizer.train.vocab_size)  # type: ignore[union-attr]
        )
    return memory_estimate(config, model, NOTHING, Ranks(ranks, ranks))


@pytest.mark.parametrize("cell", CELLS)
def test_the_estimate_of_each_part_equals_the_engines_memory(measured: Any, cell: str) -> None:
    ranks, data, by_cell = measured
    held, found = by_cell[cell], estimate(data, cell, ranks)
    everywhere = {part.name: part.gpu + part.host + part.nvme for part in found.parts}
    for what, names in HELD.items():
        if what == "small" and ranks == 1:
            continue  # the shards of a single rank are views of the whole weights
        expected = sum(everywhere.get(name, 0) for name in names)
        if what == "gradients" and cell in WHOLE_UNTIL_REDUCED:
            assert held[what] <= expected
        else:
            assert held.get(what, 0) == pytest.approx(expected, rel=0.005, abs=16), what


@pytest.mark.parametrize("cell", CELLS)
def test_the_estimate_includes_all_large_tensors(measured: Any, cell: str) -> None:
    """Float tensors of the process after a backward pass, except the few that do not grow with the model."""
    ranks, data, by_cell = measured
    found = estimate(data, cell, ranks)
    transient = ("gradients being reduced", "gathered weights", "weights while they are loaded")
    later = ("in the update", "while a checkpoint is written")
    expected = sum(
        part.gpu + part.host for part in found.parts if part.name not in transient and part.when not in later
    )
    small = 8_000
    assert by_cell[cell]["all"] <= expected + small
    if cell not in WHOLE_UNTIL_REDUCED or ranks == 1:
        assert by_cell[cell]["all"] >= 0.9 * expected


@pytest.mark.parametrize("cell", [cell for cell in CELLS if "offload" not in cell])
def test_the_update_makes_no_larger_tensors_than_estimated(measured: Any, cell: str) -> None:
    """Under ZeRO-3 only the norm's: gradients are not copied, and AdamW works in place."""
    ranks, data, by_cell = measured
    parts = {part.name: part.gpu for part in estimate(data, cell, ranks).parts}
    copied = parts.get("gradients and their copy", 0) // 2
    assert by_cell[cell]["update"] <= max(parts["gradient of a weight in fp64, for its norm"], copied)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if "stage 3" in cell])
def test_gathered_weights_stay_below_the_bound(measured: Any, cell: str) -> None:
    ranks, data, by_cell = measured
    if ranks == 1:
        pytest.skip("one rank gathers nothing")
    (bound,) = [part.gpu for part in estimate(data, cell, ranks).parts if part.name == "gathered weights"]
    item = 2 if "bf16" in cell else 4
    assert 0.2 * bound <= by_cell[cell]["gathered"] * item <= bound
