"""`check` reports how evenly the ranks are occupied, and warns of unbalanced ranks and of sets of a single pair."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steps import load_on_ranks
from tiny_run import run_values, write_data

from training.assembly import assemble_data
from training.check import check_run, plan_lines
from training.config import RunConfig
from training.run_file import validate
from training.run_folder.prepare import prepare


def lines_of(config: RunConfig, ranks: int) -> tuple[dict[str, float], list[str]]:
    """The figures of the balance line, and the warnings."""
    lines = list(check_run(config, nodes=2 if ranks > 4 else 1, gpus_per_node=0, nproc_per_node=min(ranks, 8)))
    (line,) = [line for line in lines if line.startswith(f"on {ranks} ranks, over the first ")]
    names = ("steps", "micro_batches", "ratio", "efficiency", "idle")
    pattern = (
        r"first (\d+) steps: ([\d.]+) micro-batches a rank and step; largest over mean cost of a rank ([\d.]+); packing"
        r" efficiency (\d+)% \(no padding is 100%\); idle micro-batches (\d+)%"
    )
    found = re.search(pattern, line)
    assert found is not None
    return dict(zip(names, map(float, found.groups()), strict=True)), [each for each in lines if "warning" in each]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_balance_is_that_of_the_micro_batches(tmp_path: Path, ranks: int, layout: str) -> None:
    """Counted in the tensors of all ranks."""
    changes: dict[str, Any] = {"data.layout": layout, "data.micro_batch_tokens": 512, "max_steps": 5}
    config = validate(run_values(write_data(tmp_path / "data"), tmp_path / "run", **changes), "test")
    shown, _ = lines_of(config, ranks)
    data = assemble_data(config, prepare(config))
    grids, costs, real = [], [], 0
    for step in range(5):
        for batches in zip(*(share.micro_batches for share in load_on_ranks(data.loader, ranks, step)), strict=True):
            tokens = [batch.input_ids.numel() * bool(batch.samples) for batch in batches]
            labels = [sum(sample.n_labels for sample in batch.samples) for batch in batches]
            grids.append(tokens)
            costs.append(np.array(tokens) + data.packer.grid.label_cost * np.array(labels))
            real += sum(len(sample) for batch in batches for sample in batch.samples)
    assert shown["steps"] == 5
    assert shown["micro_batches"] == pytest.approx(len(grids) / 5, abs=0.05)
    ratio = sum(cost.max() for cost in costs) / sum(cost.mean() for cost in costs)
    assert shown["ratio"] == pytest.approx(ratio, abs=0.0051)
    assert shown["efficiency"] == pytest.approx(100 * real / np.sum(grids), abs=0.51)
    assert shown["idle"] == pytest.approx(100 * np.mean([not each for grid in grids for each in grid]), abs=0.51)


def test_more_ranks_than_samples_give_a_warning_with_what_to_change(tmp_path: Path) -> None:
    config = validate(run_values(write_data(tmp_path / "data"), tmp_path / "run", max_steps=3), "test")
    assert config.data.slots_per_step == 8
    few, warnings = lines_of(config, 2)
    assert few["ratio"] < 1.25
    assert not [line for line in warnings if "the ranks wait" in line]
    many, warnings = lines_of(config, 16)
    assert many["ratio"] > 1.25
    assert many["idle"] > 0
    (warning,) = [line for line in warnings if "the ranks wait" in line]
    share = 100 * (1 - 1 / many["ratio"])
    assert re.match(rf"warning: the ranks wait {share:.0f}% of the time for the one with the most tokens; ", warning)
    assert warning.endswith("raise data.slots_per_step (8, 0.5 a rank) or take fewer ranks")


@pytest.mark.parametrize(("pairing", "slots", "warned"), [("reuse", 8, True), ("fill", 8, False), ("reuse", 64, False)])
def test_contrast_sets_of_a_single_pair_give_a_warning(tmp_path: Path, pairing: str, slots: int, warned: bool) -> None:
    """A uniform mixture of many languages has one dominant slot in a step of eight, so one pair, whose loss is 0."""
    changes = {
        "data.mixture": {"strategy": "explicit", "weights": {"en": 1, "de": 3, "sw": 2, "zh": 2}, "pairing": pairing}
    }
    changes |= {"data.slots_per_step": slots, "data.micro_batch_tokens": 4096, "max_steps": 4}
    config = validate(run_values(write_data(tmp_path / "data"), tmp_path / "run", **changes), "test")
    _, warnings = lines_of(config, 1)
    found = [line for line in warnings if "single pair" in line]
    assert found == (
        [
            "warning: 4 of 4 contrast sets of the first 4 steps have a single pair, whose contrastive loss is 0: "
            "nothing is learned from them; raise data.slots_per_step, or set data.mixture.pairing=fill"
        ]
        if warned
        else []
    )


def test_the_plan_of_several_nodes_is_that_of_a_run_on_them(tmp_path: Path) -> None:
    config = validate(
        run_values(write_data(tmp_path / "data"), tmp_path / "run", **{"data.slots_per_step": 40}), "test"
    )
    data = assemble_data(config, prepare(config))
    shares = load_on_ranks(data.loader, 4, 1, per_node=2)
    read = [
        sorted(sample.id for sample in share.micro_batches[number].samples)
        for number in range(len(shares[0].micro_batches))
        for share in shares
    ]
    planned = [sorted(line["ids"]) for line in plan_lines(config, range(1, 2), 4, 2)]
    assert planned == read
    assert planned != [sorted(line["ids"]) for line in plan_lines(config, range(1, 2), 4)]
