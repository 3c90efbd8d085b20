"""Fault tolerance of two ranks: bad losses, a full disk, unreadable data, signals, the deadline, node-local disks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import checked, run_ranks
from tiny_run import RANK_ITEMS, write_data
from unkillable_cells import CELLS, EVERY, STEPS

from training.checkpoints import checkpoint
from training.checkpoints.run_state import RunState

FINISHED = [None, None]

# The first test includes all launches of the fixture, on a machine that may be busy.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unkillable")
    data = write_data(folder / "data", RANK_ITEMS)
    program = [str(Path(__file__).with_name("unkillable_cells.py")), str(data), str(folder)]
    results = run_ranks(program, world_size=2, timeout=800)
    checked(results)
    (folder / "log").write_text(results[0].stderr)
    return folder


def raised(cells: Path, name: str) -> list[list[str] | None]:
    found: list[list[str] | None] = json.loads((cells / f"{name}.json").read_text())
    return found


def events(cells: Path, name: str) -> list[dict[str, Any]]:
    lines = (cells / name / "record.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] in ("start", "metrics")]


def fingerprints(cells: Path, name: str) -> list[float]:
    """Fingerprints of the data of all steps, in the order in which they ran."""
    return [e["values"]["data/step_fingerprint"] for e in events(cells, name) if e["kind"] == "metrics"]


def losses(cells: Path, name: str) -> dict[int, Any]:
    return {e["step"]: e["values"]["train/loss"] for e in events(cells, name) if e["kind"] == "metrics"}


def saved(cells: Path, name: str) -> list[int]:
    folder = checkpoint.checkpoint_root(cells / name)
    assert not list(folder.glob(".incomplete*")), "no incomplete checkpoint is left"
    paths = sorted(folder.glob("step-*"))
    assert not [path for path in paths if checkpoint.defect(path, checkpoint.ALL_CONTENT)]
    return [int(path.name.removeprefix("step-")) for path in paths]


def test_an_undisturbed_run_ends_with_a_checkpoint_of_its_last_step(cells: Path) -> None:
    assert raised(cells, "undisturbed") == FINISHED
    assert saved(cells, "undisturbed") == [STEPS - EVERY, STEPS]
    assert sorted(losses(cells, "undisturbed")) == list(range(1, STEPS + 1))


def test_writing_in_the_background_gives_the_same_checkpoint(cells: Path) -> None:
    """Byte for byte: the copies are taken before training continues."""
    files = [
        checkpoint.files_of(checkpoint.checkpoint_path(cells / each, STEPS)) for each in ("undisturbed", "foreground")
    ]
    assert files[0] is not None
    assert files[1] is not None
    states = [{name: each for name, each in found.items() if name.startswith("zero/")} for found in files]
    assert len(states[0]) == 4
    assert states[0] == states[1]


def test_a_skipped_update_loses_only_the_samples_of_its_step(cells: Path) -> None:
    assert raised(cells, "skip") == FINISHED
    assert fingerprints(cells, "skip") == fingerprints(cells, "undisturbed")
    here, there = losses(cells, "skip"), losses(cells, "undisturbed")
    assert here.pop(5) == "NaN"
    assert [here[step] for step in range(1, 5)] == [there[step] for step in range(1, 5)]
    assert here[6] != there[6], "an update is missing"
    assert all(0 < here[step] < 10 for step in range(6, STEPS + 1))
    skipped = next(e["values"] for e in events(cells, "skip") if e["kind"] == "metrics" and e["step"] == 5)
    assert {value for name, value in skipped.items() if name.startswith("train/loss")} == {"NaN"}
    (listed,) = (cells / "skip").glob("not-finite-step-5.json")
    assert list(json.loads(listed.read_text())["sample_ids"]) == ["1"]


def test_a_rollback_skips_the_data_since_the_checkpoint(cells: Path) -> None:
    """Step 5 fails, 4 steps were saved: the data of steps 4 and 5 are left out, and no step is missing."""
    assert raised(cells, "roll back") == FINISHED
    before, data = fingerprints(cells, "undisturbed"), fingerprints(cells, "roll back")
    assert data[:5] == before[:5]
    assert data[5 : 5 + 6] == before[6:12]
    assert len(data) == 5 + 8
    starts = [event["resumed_step"] for event in events(cells, "roll back") if event["kind"] == "start"]
    assert starts == [None, 4]
    here, there = losses(cells, "roll back"), losses(cells, "undisturbed")
    assert all(here[step] == there[step] for step in range(1, 5))
    assert RunState.read(checkpoint.checkpoint_path(cells / "roll back", STEPS)).data_offset == 2


def test_the_data_offsets_of_two_rollbacks_add_up(cells: Path) -> None:
    """Data step 7 fails as step 5 of the second attempt, which resumed with the data of step 6 as its step 4."""
    assert raised(cells, "roll back twice") == FINISHED
    before, data = fingerprints(cells, "undisturbed"), fingerprints(cells, "roll back twice")
    assert data == [*before[:5], before[6], *before[8:], *data[10:]]
    assert len(set(data)) == len(data)
    state = RunState.read(checkpoint.checkpoint_path(cells / "roll back twice", STEPS))
    assert (state.data_offset, state.guard["events"]) == (4, 2)


def test_a_rollback_without_a_checkpoint_is_an_error(cells: Path) -> None:
    for each in raised(cells, "roll back from nowhere"):
        assert each == ["NonFiniteStep", "step 2: there is no checkpoint to roll back to; set checkpoint.every lower"]


def test_the_run_stops_when_max_events_is_used_up(cells: Path) -> None:
    for each in raised(cells, "used up"):
        assert each is not None
        assert each[0] == "NonFiniteStep"
        assert each[1].startswith(
            "step 7: loss is not finite, and guard.max_events=1 were used up; samples of rank 1: "
        )


def test_a_loss_spike_is_skipped_or_stops_the_run(cells: Path) -> None:
    assert raised(cells, "spike skipped") == FINISHED
    here, there = losses(cells, "spike skipped"), losses(cells, "undisturbed")
    assert here[10] == pytest.approx(50 * there[10])
    assert here[11] != there[11]
    assert here[11] < 2 * there[11]
    for each in raised(cells, "spike stops"):
        assert each is not None
        assert "step 10: loss " in each[1]
        assert "times the median of the last 8 steps" in each[1]
    assert sorted(losses(cells, "spike stops")) == list(range(1, 10))


def test_a_full_disk_on_one_rank_costs_one_checkpoint(cells: Path) -> None:
    assert raised(cells, "disk full once") == FINISHED
    assert saved(cells, "disk full once") == [STEPS - EVERY, STEPS]
    assert losses(cells, "disk full once") == losses(cells, "undisturbed")
    log = (cells / "log").read_text()
    assert "checkpoint of step 4: not saved: rank 1 on " in log
    assert "No space left on device" in log


def test_a_disk_that_stays_full_stops_every_rank(cells: Path) -> None:
    for each in raised(cells, "disk full"):
        assert each is not None
        assert each[0] == "CheckpointFailed"
        assert each[1].startswith("checkpoint of step 8: not saved: rank 1 on ")
    assert saved(cells, "disk full") == [2], "the earlier complete checkpoint is kept"


def test_a_run_whose_last_step_cannot_be_saved_fails(cells: Path) -> None:
    assert [each and each[0] for each in raised(cells, "disk full at the end")] == ["CheckpointFailed"] * 2
    assert saved(cells, "disk full at the end") == []


@pytest.mark.parametrize(("name", "step", "reason"), [("TERM", 5, "SIGTERM"), ("USR1 twice", 7, "SIGUSR1")])
def test_a_signal_to_one_rank_saves_and_stops_all_at_the_same_step(
    cells: Path, name: str, step: int, reason: str
) -> None:
    text = f"stopped by {reason} after {step} of {STEPS} steps; all of it is saved"
    assert raised(cells, name) == [["StoppedOnRequest", text]] * 2
    assert saved(cells, name) == [step]
    assert sorted(losses(cells, name)) == list(range(1, step + 1))


def test_unreadable_data_on_one_rank_end_all_ranks_after_the_last_good_step_is_saved(cells: Path) -> None:
    """While the checkpoint of step 4 was being written and after step 5, rank 1 failed to read its share of step 6."""
    text = "sw.jsonl:7: the file has changed since the run began; start again"
    assert raised(cells, "unreadable") == [["DataError", text]] * 2
    assert saved(cells, "unreadable") == [4, 5]
    assert losses(cells, "unreadable") == {s: loss for s, loss in losses(cells, "undisturbed").items() if s <= 5}
    assert [each and each[0] for each in raised(cells, "unreadable at once")] == ["DataError"] * 2
    assert saved(cells, "unreadable at once") == [], "no step was finished"


def test_one_bad_row_too_many_ends_all_ranks_after_the_last_good_step_is_saved(cells: Path) -> None:
    for each in raised(cells, "bad row"):
        assert each is not None
        assert each[0] == "DataError"
        assert each[1].startswith("sw.jsonl:7: the tokenizer writes ' ' for '\u2581' (1 unusable row")
    assert saved(cells, "bad row") == [5]
    state = RunState.read(checkpoint.checkpoint_path(cells / "bad row", 5))
    assert state.totals["bad_rows"] == [], "the next start reads that step, and counts it"


def test_a_non_finite_step_does_not_discard_a_checkpoint_being_written(cells: Path) -> None:
    assert [each and each[0] for each in raised(cells, "not finite")] == ["NonFiniteStep"] * 2
    assert saved(cells, "not finite") == [2, 4]


def test_a_run_stops_before_the_deadline(cells: Path) -> None:
    for each in raised(cells, "deadline near"):
        assert each is not None
        assert each[1].startswith("stopped by the end of the allocation after ")
    assert raised(cells, "deadline far") == FINISHED
    assert saved(cells, "deadline far") == [STEPS]


def test_a_run_resumes_from_node_local_disks_with_the_same_ranks_and_nodes(cells: Path) -> None:
    report = json.loads((cells / "local disks.json").read_text())
    root, before_last = cells / "local disks" / "checkpoints", f"step-{STEPS - EVERY:08d}"
    assert report["shared"] == str(root / f"step-{STEPS:08d}"), "the last one is in the run folder, for the export"
    homes = [cells / f"disk-{rank}" / "run" / "checkpoints" for rank in (0, 1)]
    assert report["own"] == [str(home / before_last) for home in homes]
    for rank, home in enumerate(homes):
        files = checkpoint.files_of(home / f"step-{STEPS - 2 * EVERY:08d}") or {}
        assert {name for name in files if name.startswith("zero/")} == {
            f"zero/zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt" for what in ("model", "optim")
        }
        assert {"state.json", "reference.safetensors", "model_config/config.json"} <= files.keys()
    assert report["damaged"] == str(homes[0] / f"step-{STEPS - 2 * EVERY:08d}"), (
        "a shard that is damaged on one disk rules out the checkpoint on all"
    )
    expected = {str(step): loss for step, loss in losses(cells, "undisturbed").items() if step > STEPS - 2 * EVERY}
    assert report["losses"] == expected
    assert "rank 0 has no shard of it on its node" in report["swapped"]


def test_every_cell_is_tested() -> None:
    text = Path(__file__).read_text()
    assert [name for name in CELLS if f'"{name}"' not in text] == []
