"""A run saved on two ranks resumes on one and on four: the same samples, and losses equal up to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import checked, run_ranks
from tiny_run import RANK_ITEMS, write_data, write_task_data
from world_size_cells import CELLS, OTHERS, SAVED, SAVING_RANKS, STEPS

# Relative; ten times the largest difference measured on any machine. A loss is summed in fp64 from equal forward
# passes; a norm is the root of an fp32 sum of squares over all parameters, two of whose last digits (1.2e-7 each)
# depend on the processor. bf16 rounds its sums.
TOLERANCE = {
    "fp32": {"train/loss": 2e-7, "train/grad_norm": 2e-6},
    "bf16": {"train/loss": 5e-3, "train/grad_norm": 5e-3},
}

# The first test includes all launches of the fixture, on a machine that may be busy.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world-size")
    write_data(folder / "data", RANK_ITEMS)
    write_task_data(folder / "data" / "tasks", RANK_ITEMS)
    for ranks in (SAVING_RANKS, 1, 4):
        checked(
            run_ranks([str(Path(__file__).with_name("world_size_cells.py")), str(folder / "data"), str(folder)], ranks)
        )
    return folder


def metrics(cells: Path, name: str, ranks: int) -> dict[int, dict[str, float]]:
    return {int(step): values for step, values in json.loads((cells / f"{name}-{ranks}.json").read_text()).items()}


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for name in CELLS for ranks in OTHERS[name]])
def test_other_world_sizes_have_the_same_samples_and_losses(cells: Path, name: str, ranks: int) -> None:
    here, there = metrics(cells, name, SAVING_RANKS), metrics(cells, name, ranks)
    assert sorted(there) == list(range(SAVED, STEPS))
    tolerance = TOLERANCE["bf16" if "bf16" in name else "fp32"]
    for step, values in there.items():
        assert values["data/step_fingerprint"] == here[step]["data/step_fingerprint"]
        for key, relative in tolerance.items():
            assert values[key] == pytest.approx(here[step][key], rel=relative), (step, key)


@pytest.mark.parametrize("name", CELLS)
def test_the_weights_change_in_the_compared_steps(cells: Path, name: str) -> None:
    """Otherwise equal losses would not show that the state was loaded."""
    losses = [values["train/loss"] for _, values in sorted(metrics(cells, name, SAVING_RANKS).items())]
    assert abs(losses[-1] - losses[SAVED]) > 1e-2


def test_the_vectors_are_refreshed_in_the_compared_steps(cells: Path) -> None:
    assert "shift/norm/sw" in metrics(cells, "shifcon-3", 4)[4]


# Each waits where the device has nothing left to do: DeepSpeed for the gradients' norm (in bf16 under ZeRO-1 and 2 also
# for a look at each gradient), transformers for a mask at the start of a forward pass, right after DeepSpeed has waited
# for the last backward pass. AdamW counts its steps on the CPU, and `cpu_sum` is the CPU's.
READERS = (
    "deepspeed/runtime/utils.py is_invalid_grad_norm", "deepspeed/runtime/zero/stage_1_and_2.py has_overflow",
    "deepspeed/runtime/zero/stage_1_and_2.py _optimizer_step", "deepspeed/runtime/zero/stage3.py step_with_gradscaler",
    "transformers/masking_utils.py ", "training/distributed.py cpu_sum",
)  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_a_step_that_does_not_log_waits_for_the_device_only_where_deepspeed_does(cells: Path, name: str) -> None:
    reads = json.loads((cells / f"{name}-reads.json").read_text())
    assert any("is_invalid_grad_norm" in each for each in reads), "nothing is seen"
    assert [each for each in reads if not any(reader in each for reader in READERS)] == []
