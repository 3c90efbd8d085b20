"""`benchmarks/same_numbers`: what counts as equal, different or missing, and which values of a run are compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.same_numbers.__main__ import compare, main
from benchmarks.same_numbers.cases import PLANNED, _metrics, _tensors, tensors
from benchmarks.same_numbers.inputs import LANGUAGES, TASKS, labelled
from benchmarks.same_numbers.revision import SOURCE, SameNumbersError

LOSS = "step 3 train/loss"


def test_the_last_digit_is_a_difference() -> None:
    found = compare({LOSS: "0.30000000000000004", "a": "1"}, {LOSS: "0.3", "a": "1"})
    assert (found.same, found.different, found.missing, found.equal) == (1, [LOSS], [], False)


def test_missing_values_are_a_difference_and_new_ones_are_not() -> None:
    assert not compare({LOSS: "1", "a": "1"}, {LOSS: "1"}).equal
    found = compare({LOSS: "1"}, {LOSS: "1", "b": "2"})
    assert found.equal
    assert found.new == ["b"]


def test_only_named_values_may_differ_by_rounding() -> None:
    found = compare({LOSS: "1", "tensor w": "a"}, {LOSS: "1", "tensor w": "b"}, "tensor ")
    assert found.equal
    assert found.rounded == ["tensor w"]
    assert not compare({LOSS: "1", "tensor w": "a"}, {LOSS: "2", "tensor w": "b"}, "tensor ").equal


def write_record(run: Path, *steps: tuple[int, dict[str, object]]) -> Path:
    lines = [{"kind": "start"}, *({"kind": "metrics", "step": step, "values": values} for step, values in steps)]
    (run / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_metrics_exclude_times_and_memory_and_keep_the_last_of_a_repeated_step(tmp_path: Path) -> None:
    values = {"train/loss": 0.1, "train/step_seconds": 2.0, "memory/host_peak_gib": 1.0, "ranks/slowest": 1.0}
    run = write_record(tmp_path, (1, values), (2, {"train/loss": 0.5}), (2, {"train/loss": "NaN", "shift/norm/de": 2}))
    assert _metrics(run) == {"step 1 train/loss": "0.1", "step 2 train/loss": "'NaN'", "step 2 shift/norm/de": "2"}


def test_a_run_without_losses_is_an_error_not_an_equal_run(tmp_path: Path) -> None:
    with pytest.raises(SameNumbersError, match="holds no loss"):
        _metrics(write_record(tmp_path, (1, {"train/step_seconds": 2.0})))
    with pytest.raises(SameNumbersError, match="holds no tensor"):
        _tensors(tmp_path)


def test_one_bit_of_a_tensor_changes_its_hash(tmp_path: Path) -> None:
    save_file({"w": np.float32([0.0]), "v": np.float32([1.0])}, tmp_path / "model.safetensors")
    before = _tensors(tmp_path)
    assert [name for name, _ in tensors(tmp_path)] == ["model.safetensors:v", "model.safetensors:w"]
    save_file({"w": np.float32([-0.0]), "v": np.float32([1.0])}, tmp_path / "model.safetensors")
    assert compare(before, _tensors(tmp_path)).different == ["tensor model.safetensors:w"]


def test_every_run_file_is_planned() -> None:
    names = {file.name.removesuffix(".yaml") for file in (SOURCE / "configs").glob("*.yaml")}
    assert names == {*PLANNED, "xtreme", "slurm-site.example"}


@pytest.mark.parametrize("task", TASKS)
def test_answers_and_tags_fit_their_text(task: str) -> None:
    for language in LANGUAGES:
        for item in range(40):
            row = labelled(task, language, item)
            assert (language == "en") != any(name.startswith("back_") for name in row)
            if task == "xquad":
                for prefix in ("", "back_") if language != "en" else ("",):
                    (answer,) = row[f"{prefix}answers"]
                    assert row[f"{prefix}context"][answer["answer_start"] :].startswith(answer["text"])
            if task == "udpos":
                assert len(row["words"]) == len(row["tags"])


def test_an_unknown_revision_is_a_one_line_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["no-such-revision", "HEAD", "--work", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "same_numbers: 'no-such-revision': not a commit of this repository; see `git log`\n"
    )
    assert not list(tmp_path.rglob("crosslift.py"))
