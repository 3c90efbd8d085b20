"""Gradients of one global batch do not depend on how it is split over ranks and micro-batches.

Losses are sums divided by counts of the whole step (docs/methods.md, section 4).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import checked, run_ranks
from safetensors.torch import load_file
from tiny_run import RANK_ITEMS, write_data, write_parallel, write_task_data

WORKER = str(Path(__file__).with_name("gradient_cells.py"))
WORLD_SIZES = (1, 2, 4)
MICRO_BATCHES = (1, 2, 4)
SHIFCON = ("shifcon", "shifcon-scattered", "shifcon-bad")
CELLS = ("sft", *SHIFCON, "shifcon-corpus", "xmixup", "xmixup-back")

# The first test includes all launches of the fixture, on a machine that may be busy.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients of every cell (`gradient_cells.py`): one launch per world size; the first one prepares the data."""
    folder = tmp_path_factory.mktemp("gradients")
    data = write_data(folder / "data", RANK_ITEMS)
    write_task_data(data / "tasks", RANK_ITEMS)
    write_parallel(data)
    for world_size in WORLD_SIZES:
        output = folder / str(world_size)
        output.mkdir()
        checked(run_ranks([WORKER, str(data), str(folder / "work"), str(output)], world_size))
    return folder


def flat(cells: Path, cell: str, world_size: int, micro_batches: int, only: str = "") -> torch.Tensor:
    """The gradients as one vector; `only` of parameters with that in their names."""
    gradients = load_file(cells / str(world_size) / f"{cell}-{micro_batches}.safetensors")
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients) if only in name])


def facts(cells: Path, cell: str, world_size: int, micro_batches: int) -> dict[str, Any]:
    return json.loads((cells / str(world_size) / f"{cell}-{micro_batches}.json").read_text())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_are_those_of_the_whole_batch(cells: Path, cell: str, world_size: int, micro_batches: int) -> None:
    whole = flat(cells, cell, 1, 1)
    split = flat(cells, cell, world_size, micro_batches)
    assert whole.norm() > 1e-3
    assert (split - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("cell", ["shifcon", "shifcon-scattered", "shifcon-corpus"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_are_those_of_a_plain_loop_over_the_pairs(cells: Path, cell: str, world_size: int) -> None:
    """In one process, without sets in tensors and without an exchange."""
    objective = cell.removesuffix("-scattered")
    plain = flat(cells, f"{objective}-plain", 1, 1)
    for micro_batches in MICRO_BATCHES:
        split = flat(cells, cell, world_size, micro_batches)
        assert (split - plain).norm() / plain.norm() < 1e-5
        assert facts(cells, cell, world_size, micro_batches)["terms"] == pytest.approx(
            facts(cells, f"{objective}-plain", 1, 1)["terms"], rel=1e-5
        )


def test_pairs_of_a_parallel_corpus_are_in_sets_of_their_own_beside_those_of_the_slots(cells: Path) -> None:
    without, corpus = facts(cells, "shifcon", 4, 2), facts(cells, "shifcon-corpus", 4, 2)
    assert corpus["sets"] == without["sets"] + 20 // 2
    assert corpus["pairs"] == without["pairs"] + 20
    assert corpus["label_tokens"] == without["label_tokens"]


@pytest.mark.parametrize("cell", ["xmixup", "xmixup-back"])
def test_gradients_of_the_mixing_ratio_are_those_of_the_whole_batch(cells: Path, cell: str) -> None:
    whole = flat(cells, cell, 1, 1, only="mixup_ratio")
    assert len(whole) == 2
    assert whole.abs().min() > 1e-4
    for world_size in WORLD_SIZES:
        for micro_batches in MICRO_BATCHES:
            split = flat(cells, cell, world_size, micro_batches, only="mixup_ratio")
            torch.testing.assert_close(split, whole, rtol=1e-4, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_all_splits_have_the_same_counts(cells: Path, cell: str) -> None:
    found = [facts(cells, cell, n_ranks, n) for n_ranks in WORLD_SIZES for n in MICRO_BATCHES]
    assert found[0]["sets"] >= (16 if cell.startswith("shifcon") else 0)
    varying = {"norm": 0, "idle": 0, "exchanged": 0, "terms": 0}
    for each in found:
        assert {**each, **varying} == {**found[0], **varying}


@pytest.mark.parametrize("cell", CELLS)
def test_all_splits_report_the_same_sum_of_each_term(cells: Path, cell: str) -> None:
    """A contrast set that lies on several ranks is reported by one of them."""
    terms = [facts(cells, cell, n_ranks, n)["terms"] for n_ranks in WORLD_SIZES for n in MICRO_BATCHES]
    for each in terms:
        assert each == pytest.approx(terms[0], rel=1e-5)
    n_positive = 1 if cell in ("sft", "xmixup-back") else 2  # back-translations have no source loss here
    assert min(terms[0][:n_positive]) > 0


def test_contrast_sets_lie_on_several_ranks_and_some_micro_batches_are_idle(cells: Path) -> None:
    for cell in SHIFCON:
        for n in MICRO_BATCHES:
            assert facts(cells, cell, 1, n)["exchanged"] == 0
            assert all(facts(cells, cell, n_ranks, n)["exchanged"] > 20 for n_ranks in (2, 4))
    assert facts(cells, "shifcon-scattered", 4, 4)["idle"] == facts(cells, "shifcon-scattered", 2, 4)["idle"] == 2


def test_a_bad_row_removes_its_pair_and_no_other(cells: Path) -> None:
    """Whichever ranks the two sides of the pair are on."""
    whole, bad = facts(cells, "shifcon", 4, 2), facts(cells, "shifcon-bad", 4, 2)
    assert bad["pairs"] == whole["pairs"] - 1
    assert 0 < whole["label_tokens"] - bad["label_tokens"] < 100


def test_only_gold_sources_have_labels(cells: Path) -> None:
    gold, back = facts(cells, "xmixup", 1, 1), facts(cells, "xmixup-back", 1, 1)
    assert gold["source_labels"] > 100
    assert back["source_labels"] == 0
    assert gold["pairs"] == back["pairs"] == 48


def test_the_contrastive_loss_contributes_to_the_gradients(cells: Path) -> None:
    sft, shifcon = flat(cells, "sft", 1, 1), flat(cells, "shifcon", 1, 1)
    assert (sft - shifcon).norm() / sft.norm() > 1e-2


@pytest.mark.parametrize("cell", ["shifcon", "xmixup"])
def test_the_engine_reports_the_norm_of_these_gradients(cells: Path, cell: str) -> None:
    assert facts(cells, cell, 2, 2)["norm"] == pytest.approx(float(flat(cells, cell, 1, 1).norm()), rel=1e-4)


def after(cells: Path, objective: str, stage: int, update: str, what: str) -> torch.Tensor:
    """Gradients or parameters of an update under a ZeRO stage, at 2 ranks with 2 micro-batches each, as one vector.

    Without the biases of keys, which change all scores of a query by the same amount: their gradient is 0 up to
    rounding, which Adam turns into a full step.
    """
    tensors = load_file(cells / "2" / f"{objective}-stage-{stage}-{update}-{what}.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors) if not name.endswith("key.bias")])


@pytest.mark.parametrize("update", ["first", "second"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("objective", ["shifcon", "xmixup"])
def test_every_zero_stage_has_the_same_gradients_and_updates(
    cells: Path, objective: str, stage: int, update: str
) -> None:
    for what in ("gradients", "parameters"):
        one, other = after(cells, objective, 3, update, what), after(cells, objective, stage, update, what)
        assert (one - other).norm() / one.norm() < 1e-5, what
    moved = after(cells, objective, 3, "second", "parameters") - after(cells, objective, 3, "first", "parameters")
    assert moved.norm() / one.norm() > 1e-2, "the updates change the parameters"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("objective", ["shifcon", "xmixup"])
def test_the_first_gradients_of_every_stage_are_those_of_the_whole_batch(
    cells: Path, objective: str, stage: int
) -> None:
    whole = load_file(cells / "1" / f"{objective}-1.safetensors")
    first = load_file(cells / "2" / f"{objective}-stage-{stage}-first-gradients.safetensors")
    assert first.keys() == whole.keys()
    distance = sum(float((first[name] - whole[name]).double().square().sum()) for name in whole) ** 0.5
    assert distance / flat(cells, objective, 1, 1).norm() < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("objective", ["shifcon", "xmixup"])
def test_an_update_after_loading_equals_the_uninterrupted_update(cells: Path, objective: str, stage: int) -> None:
    """Dropped gradients of another batch in between have no effect."""
    for what in ("gradients", "parameters"):
        one = load_file(cells / "2" / f"{objective}-stage-{stage}-second-{what}.safetensors")
        other = load_file(cells / "2" / f"{objective}-stage-{stage}-second-after-load-{what}.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), what


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_losses_in_chunks_have_the_gradients_of_whole_logits(cells: Path, head: str, stage: int) -> None:
    """At 2 ranks; logits are capped, and the head has the embedding's weight or its own."""
    one, other = (load_file(cells / "2" / f"{head}-stage-{stage}-{name}.safetensors") for name in ("chunked", "whole"))
    assert one.keys() == other.keys()
    assert ("lm_head.weight" in one) == (head == "untied")
    torch.testing.assert_close(one.pop("losses"), other.pop("losses"), rtol=1e-6, atol=0)
    norm = sum(float(each.double().square().sum()) for each in other.values()) ** 0.5
    distance = sum(float((one[name] - other[name]).double().square().sum()) for name in other) ** 0.5
    assert norm > 1e-3
    assert distance / norm < 1e-6
