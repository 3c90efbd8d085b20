"""SIGKILL during training, then `--resume auto`: the run continues exactly as the undisturbed run does.

With ShifCon, `crosslift train` itself is killed and started again; the other runs are its ranks without the launcher.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SOURCE, checked, environment, kill_ranks_when, run_ranks
from safetensors.torch import load_file
from tiny_run import RANK_ITEMS, XMIXUP, rank_values, write_config, write_data, write_task_data

from benchmarks.disturbed_run import compare, starts
from training.checkpoints import checkpoint

SAME = (
    "train/loss", "train/loss/", "train/contrastive", "train/grad_norm", "train/learning_rate", "data/step_fingerprint",
    "data/overlong", "data/slot_share", "data/label_share", "shift/", "train/target", "train/source",
    "train/consistency", "train/mixup_ratio",
)  # fmt: skip
STEPS, KILLED_AFTER = 10, 3
SHIFCON: dict[str, Any] = {
    "max_steps": STEPS,
    "model.init.attention_dropout": 0.1,  # random states must be restored exactly, too
    "objective.refresh_every": 5,  # not due at the resumed step: vectors must be loaded
}
XMIXUP_RUN: dict[str, Any] = {
    **XMIXUP,
    "max_steps": STEPS,
    "model.init.hidden_dropout_prob": 0.1,
    "model.init.attention_probs_dropout_prob": 0.1,
}


def train(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "crosslift.py", "train", str(config), "--nproc", "2", *arguments]


def run(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(), cwd=SOURCE, capture_output=True, text=True, timeout=timeout)


def rank_program(config: Path) -> list[str]:
    """The program of a rank that `crosslift train` starts."""
    return ["-m", "training", str(config), "--resume", "auto"]


def metrics(output_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics by step; of a step that ran twice, the later ones."""
    found: dict[int, dict[str, float]] = {}
    for line in (output_dir / "record.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "metrics":
            found[event["step"]] = {name: v for name, v in event["values"].items() if name.startswith(SAME)}
    return found


def ranks_below(process: int) -> list[int]:
    """Process ids of the ranks that a launcher started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    return [int(pid) for pid, parent, args in rows if int(parent) == process and "-m training" in args]


def to_be_killed(output_dir: Path) -> bool:
    """Whether enough steps are recorded and a checkpoint is complete.

    Checkpoints are written in the background: one may be incomplete when its step is recorded.
    """
    recorded = (output_dir / "record.jsonl").exists() and max(metrics(output_dir), default=0) >= KILLED_AFTER
    return recorded and next(checkpoint.complete(output_dir), None) is not None


def kill_a_rank_of(command: list[str], output_dir: Path) -> int:
    """Start a run and SIGKILL rank 1 during training; returns the launcher's exit status."""
    process = subprocess.Popen(command, env=environment(), cwd=SOURCE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not to_be_killed(output_dir):
        assert time.monotonic() < deadline, "the run was not due to be killed in time"
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.05)
    os.kill(ranks_below(process.pid)[-1], signal.SIGKILL)
    return process.wait(timeout=120)


def undisturbed_and_killed(folder: Path, data: Path, changes: dict[str, Any], launcher: bool) -> dict[str, Path]:
    """The same run undisturbed, and killed and resumed: with `launcher` as a command, otherwise as ranks only."""
    found = {name: folder / name for name in ("undisturbed", "killed")}
    # Slow enough to be killed during training: checkpoints at 2, 4, 6, .. and many steps.
    undisturbed, killed = (
        write_config(folder / f"{name}.yaml", rank_values(data, output, **changes)) for name, output in found.items()
    )
    checked(run_ranks(rank_program(undisturbed), 2))
    if launcher:
        assert kill_a_rank_of(train(killed), found["killed"]) != 0
    else:
        kill_ranks_when(lambda: to_be_killed(found["killed"]), rank_program(killed), 2, folder / "killed-ranks")
    newest = next(checkpoint.complete(found["killed"]), None)
    assert newest is not None
    assert 2 <= int(newest.name.removeprefix("step-")) < STEPS
    if launcher:
        finished = run(train(killed, "--resume", "auto"))
        assert finished.returncode == 0, finished.stderr[-3000:]
    else:
        checked(run_ranks(rank_program(killed), 2))
    return found


@pytest.fixture(scope="module")
def shifcon(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("resume")
    return undisturbed_and_killed(folder, write_data(folder / "data", RANK_ITEMS), SHIFCON, launcher=True)


@pytest.fixture(scope="module")
def xmixup(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("resume-xmixup")
    return undisturbed_and_killed(folder, write_task_data(folder / "data", RANK_ITEMS), XMIXUP_RUN, launcher=False)


@pytest.fixture(params=["shifcon", "xmixup"])
def runs(request: pytest.FixtureRequest) -> dict[str, Path]:
    found: dict[str, Path] = request.getfixturevalue(request.param)
    return found


def resumed_step(output_dir: Path) -> int:
    """The step from which the second start resumed."""
    events = [json.loads(line) for line in (output_dir / "record.jsonl").read_text().splitlines()]
    first, second = (event["resumed_step"] for event in events if event["kind"] == "start")
    assert first is None
    return int(second)


def test_the_killed_run_started_again_from_a_checkpoint(runs: dict[str, Path]) -> None:
    assert resumed_step(runs["killed"]) >= 2


def test_samples_losses_schedule_and_method_continue_exactly(runs: dict[str, Path]) -> None:
    one, other = metrics(runs["undisturbed"]), metrics(runs["killed"])
    assert sorted(one) == sorted(other) == list(range(1, STEPS + 1))
    for step, values in one.items():
        assert values == other[step], f"step {step}"
    assert len({values["data/step_fingerprint"] for values in one.values()}) == STEPS


def test_the_compared_metrics_include_a_refresh_of_the_vectors(shifcon: dict[str, Path]) -> None:
    assert "shift/norm/sw" in metrics(shifcon["undisturbed"])[6]


def test_the_compared_metrics_include_the_ratio_and_both_kinds_of_sources(xmixup: dict[str, Path]) -> None:
    steps = metrics(xmixup["killed"])
    assert all(0 < values["train/mixup_ratio"] < 0.5 for values in steps.values())
    after = [steps[step]["train/source"] for step in range(resumed_step(xmixup["killed"]) + 1, STEPS + 1)]
    assert max(after) > 0  # gold sources have labels
    assert min(after) == 0  # back-translations have none


@pytest.mark.parametrize(
    ("objective", "file"),
    [
        ("shifcon", "model.safetensors"),
        ("shifcon", "language_vectors.safetensors"),
        ("xmixup", "model.safetensors"),
        ("xmixup", "xmixup.safetensors"),
    ],
)
def test_the_final_weights_and_the_methods_own_file_are_bit_equal(
    objective: str, file: str, request: pytest.FixtureRequest
) -> None:
    runs: dict[str, Path] = request.getfixturevalue(objective)
    one, other = (load_file(folder / "model" / file) for folder in runs.values())
    assert one.keys() == other.keys()
    for tensor in one:
        assert torch.equal(one[tensor], other[tensor]), tensor
    if file == "xmixup.safetensors":
        assert (float(one["w"]), float(one["b"])) != (1.0, 0.0)  # trained


def test_the_fault_benchmark_accepts_this_run_and_notices_lost_samples_and_changed_losses(
    shifcon: dict[str, Path],
) -> None:
    (undisturbed,), (killed, resumed) = (starts(shifcon[name]) for name in ("undisturbed", "killed"))
    assert compare(killed, undisturbed.metrics, before=0).passed
    assert compare(resumed, undisturbed.metrics, before=killed.last).passed
    skipped = replace(resumed, metrics={step: each for step, each in resumed.metrics.items() if step != STEPS - 1})
    assert not compare(skipped, undisturbed.metrics, before=killed.last).samples
    assert not compare(resumed, undisturbed.metrics, before=resumed.resumed - 1).samples
    last = resumed.metrics[STEPS]
    for changed, kept in (("train/loss", "samples"), ("data/step_fingerprint", "losses")):
        other = {**last, changed: math.nextafter(last[changed], math.inf)}
        found = compare(replace(resumed, metrics={**resumed.metrics, STEPS: other}), undisturbed.metrics, killed.last)
        assert not found.passed
        assert getattr(found, kept)


def test_only_the_newest_checkpoints_are_kept(shifcon: dict[str, Path]) -> None:
    kept = sorted(path.name for path in (shifcon["killed"] / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000010"]


def test_a_damaged_checkpoint_is_skipped_and_changes_are_refused(shifcon: dict[str, Path], tmp_path: Path) -> None:
    output = shifcon["undisturbed"]
    damaged = checkpoint.checkpoint_path(output, STEPS)
    shard = next(damaged.glob("zero/*optim_states.pt"))
    content = shard.read_bytes()
    middle = len(content) // 2
    shard.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])  # same size
    tokenizer = output / "tokenizer" / "tokenizer_config.json"
    settings = tokenizer.read_text()
    tokenizer.write_text(json.dumps({**json.loads(settings), "chat_template": "{{ messages }}"}))
    try:
        changed = rank_values(output.parent / "data", output, **SHIFCON, seed=4)
        refused = run_ranks(rank_program(write_config(tmp_path / "changed.yaml", changed)), 2)
        assert [each.returncode for each in refused] == [2, 2]
        stderr = refused[0].stderr
        assert f"{damaged} is passed over: zero/{shard.name} is damaged" in stderr
        assert "config seed: was 3, now 4" in stderr
        assert "data tokenizer: has changed" in stderr
        assert "step-00000008" in stderr
    finally:
        shard.write_bytes(content)
        tokenizer.write_text(settings)


def test_a_finished_run_is_not_trained_again(shifcon: dict[str, Path]) -> None:
    before = (shifcon["killed"] / "record.jsonl").read_bytes()
    again = run_ranks(rank_program(shifcon["killed"].with_suffix(".yaml")), 2)
    checked(again)
    assert "finished already" in again[0].stderr
    assert (shifcon["killed"] / "record.jsonl").read_bytes() == before
