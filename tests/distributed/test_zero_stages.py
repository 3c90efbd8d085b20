"""Every ZeRO stage in fp32 and bf16: updates are dropped and rolled back, runs are saved, resumed and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import optimizer_cells
import pytest
from ranks import checked, run_ranks
from tiny_run import RANK_ITEMS, write_data
from zero_cells import CELLS, FROM_ONE_RANK, INFINITE_GRADIENT, NAN_LOSS, SAVED, SHORT, SPIKE, STEPS, STOPPED

from training.checkpoints import checkpoint
from training.checkpoints.export import export_checkpoint

# The first test includes all launches of the fixture, on a machine that may be busy.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory, cpu_adam: None) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    data = write_data(folder / "data", RANK_ITEMS)
    program, output = [str(Path(__file__).with_name("zero_cells.py")), str(data), str(folder)], []
    for mode, ranks in (("short", 1), ("train", 2), ("resume", 2)):
        results = run_ranks([*program, mode], ranks)
        if mode == "train":
            assert [each.returncode for each in results] == [-9, -9], results[0].stderr[-3000:]
        else:
            checked(results)
        output += [each.stdout + each.stderr for each in results]
    (folder / "output").write_text("\n".join(output))
    return folder


def report(cells: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cells / f"{name}.json").read_text())
    return found


def losses(cells: Path, name: str) -> list[float]:
    return [float(each["train/loss"]) for each in report(cells, name)["metrics"].values()]


@pytest.mark.parametrize("cell", CELLS)
def test_a_dropped_update_changes_no_weights_or_moments(cells: Path, cell: str) -> None:
    """A NaN loss, an infinite gradient, a loss spike: weights and moments are unchanged on both ranks."""
    expected = [[step + 1, True] for step in (NAN_LOSS, INFINITE_GRADIENT, SPIKE)]
    assert report(cells, f"{cell}-train")["dropped"] == [expected, expected]
    assert report(cells, f"{cell}-train")["metrics"].keys() == {str(step) for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("cell", CELLS)
def test_a_killed_run_resumes_with_the_metrics_of_the_run_before_the_kill(cells: Path, cell: str) -> None:
    there, here = (report(cells, f"{cell}-{mode}")["metrics"] for mode in ("train", "resume"))
    assert list(here) == [str(step) for step in range(SAVED + 1, STEPS + 1)]
    assert here == {step: there[step] for step in here}


@pytest.mark.parametrize("cell", CELLS)
def test_the_finished_run_is_exported(cells: Path, cell: str, tmp_path: Path) -> None:
    """The export's own check compares its logits with the run's."""
    made = export_checkpoint(checkpoint.checkpoint_path(cells / cell, STEPS), tmp_path / "model")
    assert (made / "model.safetensors").is_file()


def test_a_run_of_one_rank_is_exported_and_resumed_on_two(cells: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint.checkpoint_path(cells / f"{FROM_ONE_RANK}-short", SHORT), tmp_path / "model")
    there, here = (report(cells, f"{FROM_ONE_RANK}-{mode}")["metrics"] for mode in ("short", "from-one-rank"))
    assert list(here) == [str(step) for step in range(SHORT + 1, STOPPED + 1)]
    for step, values in here.items():
        for name, value in values.items():
            assert float(value) == pytest.approx(float(there[step][name]), rel=5e-3), (step, name)


@pytest.mark.parametrize(("precision", "relative"), [("fp32", 1e-6), ("bf16", 1e-3)])
def test_stages_have_the_same_losses(cells: Path, precision: str, relative: float) -> None:
    expected = losses(cells, f"3-{precision}-train")
    assert expected[0] - expected[-1] > 1, "the updates change the parameters"
    for stage in (1, 2):
        found = losses(cells, f"{stage}-{precision}-train")
        assert found == pytest.approx(expected, rel=relative, nan_ok=True)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_accumulated_in_fp32(cells: Path, cell: str) -> None:
    """On one rank, without reduction: sums in bf16 would be exactly representable in bf16."""
    assert report(cells, f"{cell}-short")["fine"] > 0.3


@pytest.mark.parametrize("name", optimizer_cells.CELLS)
def test_each_optimizer_steps_as_plain_torch_on_the_whole_gradients(cells: Path, name: str) -> None:
    """On one rank and two: with weight decay on matrices only, clipping, and the schedule's learning rate."""
    one, two = (optimizer_report(cells, name, mode, ranks, name) for mode, ranks in (("short", 1), ("train", 2)))
    assert len(two["differences"]) == optimizer_cells.STEPS
    assert max(*one["differences"], *two["differences"]) < 1e-6
    assert two["losses"] == pytest.approx(one["losses"], rel=tolerance(name))
    assert two["losses"][0] - two["losses"][-1] > 0.02
    compiles = shutil.which("c++") and shutil.which("ninja")
    expected = {"adam": "Adam", "radam": "RAdam", "offloaded": "DeepSpeedCPUAdam" if compiles else "AdamW"}
    assert two["optimizer"] == expected.get(name, "AdamW")


@pytest.mark.parametrize("name", optimizer_cells.CELLS)
def test_each_optimizer_resumes_on_as_many_ranks_and_on_others(cells: Path, name: str) -> None:
    there, here = (optimizer_report(cells, name, mode, 2, name)["losses"] for mode in ("train", "resume"))
    assert here == there[optimizer_cells.SAVED :]
    there, here = (optimizer_report(cells, name, mode, 1, name)["losses"] for mode in ("short", "resume"))
    assert here == pytest.approx(there[optimizer_cells.SAVED :], rel=tolerance(name))


@pytest.mark.parametrize(("name", "other"), optimizer_cells.OTHER.items())
def test_each_implementation_of_adam_resumes_what_another_has_saved(cells: Path, name: str, other: str) -> None:
    """torch's, torch's fused, DeepSpeed's for CPUs: they keep their step counts in different ways."""
    there = optimizer_report(cells, name, "train", 2, name)["losses"][optimizer_cells.SAVED :]
    here = optimizer_report(cells, name, "resume", 2, other)
    assert here["losses"] == pytest.approx(there, rel=tolerance(name))
    assert here["optimizer"] == optimizer_report(cells, other, "train", 2, other)["optimizer"]


def tolerance(name: str) -> float:
    """Of the losses of an optimizer's cell: those in bf16 round more."""
    return 1e-3 if name.startswith("offloaded") else 1e-5


def optimizer_report(cells: Path, name: str, mode: str, ranks: int, implementation: str) -> dict[str, Any]:
    file = optimizer_cells.report_file(cells, name, f"{mode}-{ranks}-{implementation}")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("cell", CELLS)
def test_a_destroyed_engine_frees_the_state_of_its_optimizer(cells: Path, cell: str) -> None:
    for held, left in report(cells, f"{cell}-resume")["moments"]:
        assert held > 1
        assert left == 0


def test_deepspeed_prints_no_memory_lines(cells: Path) -> None:
    output = (cells / "output").read_text()
    assert "rolling back to the last checkpoint" in output, "the output of the ranks is captured"
    assert "bf16_ optimizer" not in output
    assert "Max_MA" not in output


@pytest.mark.parametrize("cell", CELLS)
def test_the_optimizer_is_the_zero_optimizer(cells: Path, cell: str) -> None:
    """Not BF16_Optimizer, which DeepSpeed uses for stage 1 in bf16: its checkpoints cannot be consolidated."""
    name = "DeepSpeedZeroOptimizer_Stage3" if cell.startswith("3") else "DeepSpeedZeroOptimizer"
    assert report(cells, f"{cell}-train")["optimizer"] == name
