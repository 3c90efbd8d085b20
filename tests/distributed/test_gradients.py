"""Gradients of one global batch do not depend on how it is split over ranks and micro-batches (decision 4)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import checked, run_ranks
from safetensors.torch import load_file
from tiny_run import RANK_ITEMS, write_data

WORKER = str(Path(__file__).with_name("gradient_cells.py"))
WORLD_SIZES = (1, 2, 4)
MICRO_BATCHES = (1, 2, 4)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients of every cell: one launch a world size runs them all."""
    folder = tmp_path_factory.mktemp("gradients")
    data = write_data(folder / "data", RANK_ITEMS)
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


def after(cells: Path, stage: int, update: str, what: str) -> torch.Tensor:
    """Gradients or parameters of an update under a ZeRO stage, at 2 ranks with 2 micro-batches each, as one vector."""
    tensors = load_file(cells / "2" / f"stage-{stage}-{update}-{what}.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("update", ["first", "second"])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_zero_stage_has_the_same_gradients_and_updates(cells: Path, stage: int, update: str) -> None:
    for what in ("gradients", "parameters"):
        one, other = after(cells, 3, update, what), after(cells, stage, update, what)
        assert (one - other).norm() / one.norm() < 1e-5, what
    moved = after(cells, 3, "second", "parameters") - after(cells, 3, "first", "parameters")
    assert moved.norm() / one.norm() > 1e-2, "the updates are real"


def test_the_stages_start_from_the_gradients_of_the_whole_batch(cells: Path) -> None:
    whole = flat(cells, "shifcon", 1, 1)
    assert (after(cells, 3, "first", "gradients") - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_update_after_loading_is_the_update_without_a_stop(cells: Path, stage: int) -> None:
    for what in ("gradients", "parameters"):
        assert torch.equal(after(cells, stage, "second", what), after(cells, stage, "second-after-load", what)), what
