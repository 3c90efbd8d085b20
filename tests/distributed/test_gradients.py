"""Gradients of one global batch do not depend on how it is split over ranks and micro-batches (decision 4)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import checked, run_ranks
from safetensors.torch import load_file
from tiny_run import write_data

WORKER = str(Path(__file__).with_name("gradient_cells.py"))
WORLD_SIZES = (1, 2, 4)
MICRO_BATCHES = (1, 2, 4)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients of every cell: one launch a world size runs them all."""
    folder = tmp_path_factory.mktemp("gradients")
    data = write_data(folder / "data")
    for world_size in WORLD_SIZES:
        output = folder / str(world_size)
        output.mkdir()
        checked(run_ranks([WORKER, str(data), str(folder / f"work-{world_size}"), str(output)], world_size))
    return folder


def flat(cells: Path, objective: str, world_size: int, micro_batches: int) -> torch.Tensor:
    gradients = load_file(cells / str(world_size) / f"{objective}-{micro_batches}.safetensors")
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("objective", ["sft", "shifcon"])
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_are_those_of_the_whole_batch(
    cells: Path, objective: str, world_size: int, micro_batches: int
) -> None:
    whole = flat(cells, objective, 1, 1)
    split = flat(cells, objective, world_size, micro_batches)
    assert whole.norm() > 1e-3
    assert (split - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_splits_see_the_same_step(cells: Path, world_size: int) -> None:
    facts = [json.loads((cells / str(world_size) / f"shifcon-{n}.json").read_text()) for n in MICRO_BATCHES]
    assert facts[0]["sets"] >= 16
    assert {(each["pairs"], each["label_tokens"]) for each in facts} == {(facts[0]["pairs"], facts[0]["label_tokens"])}


def test_the_contrastive_loss_has_a_part_in_it(cells: Path) -> None:
    sft, shifcon = flat(cells, "sft", 1, 1), flat(cells, "shifcon", 1, 1)
    assert (sft - shifcon).norm() / sft.norm() > 1e-2


def test_the_engine_reports_that_gradients_norm(cells: Path) -> None:
    facts = json.loads((cells / "2" / "shifcon-2.json").read_text())
    assert facts["norm"] == pytest.approx(float(flat(cells, "shifcon", 1, 1).norm()), rel=1e-4)
