"""Kill -9 in mid-run, then `--resume auto`: everything goes on exactly as in the undisturbed run (decisions 1, 9)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import SOURCE, environment
from safetensors.torch import load_file
from tiny_run import RANK_ITEMS, rank_values, write_config, write_data

from training import checkpoint

SAME = (
    "train/loss", "train/loss/", "train/contrastive", "train/grad_norm", "train/learning_rate", "data/step_fingerprint",
    "data/overlong", "shift/",
)  # fmt: skip

CHANGES = {
    "max_steps": 14,
    "model.init.attention_dropout": 0.1,  # random states have to go on exactly, too
    "objective.refresh_every": 5,  # never due where the run resumes: vectors have to be loaded
}


def train(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "crosslift.py", "train", str(config), "--nproc", "2", *arguments]


def run(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(), cwd=SOURCE, capture_output=True, text=True, timeout=timeout)


def metrics(output_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics by step; of a step that was done twice, the later ones."""
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


def kill_a_rank_after(command: list[str], output_dir: Path, step: int) -> int:
    """Start a run, kill -9 rank 1 once `step` steps are recorded; the launcher's exit status."""
    process = subprocess.Popen(command, env=environment(), cwd=SOURCE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    record = output_dir / "record.jsonl"
    while not (record.exists() and max(metrics(output_dir), default=0) >= step):
        assert time.monotonic() < deadline, "the run never got there"
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.05)
    os.kill(ranks_below(process.pid)[-1], signal.SIGKILL)
    return process.wait(timeout=120)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run undisturbed, and killed after step 7 and resumed."""
    folder = tmp_path_factory.mktemp("resume")
    data = write_data(folder / "data", RANK_ITEMS)
    found = {}
    for name in ("undisturbed", "killed"):
        output = folder / name
        # Slow enough to be killed in mid-run: checkpoints at 2, 4, 6, .. and many steps.
        config = write_config(folder / f"{name}.yaml", rank_values(data, output, **CHANGES))
        if name == "killed":
            assert kill_a_rank_after(train(config), output, 7) != 0
            assert 6 <= int(checkpoint.latest(output).name.removeprefix("step-")) < 14
        finished = run(train(config, "--resume", "auto"))
        assert finished.returncode == 0, finished.stderr[-3000:]
        found[name] = output
    return found


def test_the_killed_run_started_again_from_a_checkpoint(runs: dict[str, Path]) -> None:
    events = [json.loads(line) for line in (runs["killed"] / "record.jsonl").read_text().splitlines()]
    starts = [event["resumed_step"] for event in events if event["kind"] == "start"]
    assert starts[0] is None
    assert starts[1] >= 6


def test_samples_losses_schedule_and_vectors_go_on_exactly(runs: dict[str, Path]) -> None:
    one, other = metrics(runs["undisturbed"]), metrics(runs["killed"])
    assert sorted(one) == sorted(other) == list(range(1, 15))
    for step, values in one.items():
        assert values == other[step], f"step {step}"
    assert len({values["data/step_fingerprint"] for values in one.values()}) == 14
    assert "shift/norm/sw" in one[6]  # the refresh after five steps is among what is compared


def test_the_last_weights_and_vectors_are_bit_equal(runs: dict[str, Path]) -> None:
    for name in ("model.safetensors", "language_vectors.safetensors"):
        one, other = (load_file(folder / "model" / name) for folder in runs.values())
        assert one.keys() == other.keys()
        for tensor in one:
            assert torch.equal(one[tensor], other[tensor]), (name, tensor)


def test_only_the_newest_checkpoints_are_kept(runs: dict[str, Path]) -> None:
    kept = sorted(path.name for path in (runs["killed"] / "checkpoints").iterdir())
    assert kept == ["step-00000012", "step-00000014"]


def test_a_torn_checkpoint_is_passed_over_and_changes_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    output = runs["undisturbed"]
    torn = checkpoint.checkpoint_path(output, 14)
    victim = next(torn.glob("zero/*optim_states.pt"))
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    try:
        changed = rank_values(output.parent / "data", output, **CHANGES, seed=4)
        refused = run(train(write_config(tmp_path / "changed.yaml", changed)))
        assert refused.returncode == 2
        assert f"{torn} is passed over: zero/{victim.name} has" in refused.stderr
        assert "config seed: was 3, now 4" in refused.stderr
        assert "step-00000012" in refused.stderr
    finally:
        victim.write_bytes(content)


def test_a_finished_run_is_not_run_again(runs: dict[str, Path]) -> None:
    before = (runs["killed"] / "record.jsonl").read_bytes()
    again = run(train(runs["killed"].with_suffix(".yaml")))
    assert again.returncode == 0
    assert "finished already" in again.stderr
    assert (runs["killed"] / "record.jsonl").read_bytes() == before
