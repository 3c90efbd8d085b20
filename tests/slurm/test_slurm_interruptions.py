"""A run that nothing kills: one run on a real two-node cluster, ended in every way in which a cluster ends jobs.

Whatever happened, the record must be that of the run which nothing disturbed (`reference`): each step there, in
order, and where one was done again after a hard end, with the same values to the last digit. Each test finds the run
training and leaves it training, so that one job's life is that of many; only the last ends it.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cluster import TwoNodeCluster
from slurm_runs import STEPS, SlurmRun, crosslift, reference_values

CLOSE = 2e-3  # losses after a change of the number of ranks: fp32 sums in another order, over many steps


@pytest.fixture(scope="module")
def life(cluster: TwoNodeCluster, reference: SlurmRun, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    folder = tmp_path_factory.mktemp("life")
    run = SlurmRun(cluster, folder, reference_values(folder))
    run.submit("--time", "30")
    run.train_until(2)
    return run


def same_so_far(life: SlurmRun, reference: SlurmRun) -> None:
    """No step was lost; none came out otherwise, however often it was done."""
    done, expected = life.repeated(), reference.repeated()
    assert sorted(done) == list(range(1, life.last_step() + 1))
    for step, times in done.items():
        for values in times:
            assert values == expected[step][0], f"step {step}"


def lost_steps(life: SlurmRun, before: int) -> int:
    """How many steps of before the newest start it had to do again."""
    resumed = life.starts()[-1]
    assert resumed is not None
    return before - resumed


def test_asked_to_stop_it_saves_and_requeues_itself(life: SlurmRun, reference: SlurmRun) -> None:
    restarts = int(life.cluster.job(life.job)["Restarts"])
    life.cluster.slurm("scancel", "--signal=TERM", life.job)
    life.wait_for_requeue(restarts + 1)
    before = life.last_step()
    assert f"job {life.job} stopped after a checkpoint and is requeued ({restarts + 1} of at most 20)" in life.log()
    life.goes_on()
    assert lost_steps(life, before) == 0
    same_so_far(life, reference)


def test_requeued_by_an_administrator_it_saves_first(life: SlurmRun, reference: SlurmRun) -> None:
    restarts = int(life.cluster.job(life.job)["Restarts"])
    life.cluster.slurm("scontrol", "requeue", life.job)
    life.wait_for_requeue(restarts + 1)  # by Slurm alone, not once more by the script
    before = life.last_step()
    life.goes_on()
    assert lost_steps(life, before) == 0
    assert int(life.cluster.job(life.job)["Restarts"]) == restarts + 1
    same_so_far(life, reference)


def test_a_node_that_is_set_down(life: SlurmRun, reference: SlurmRun) -> None:
    restarts = int(life.cluster.job(life.job)["Restarts"])
    life.cluster.slurm("scontrol", "update", "NodeName=n2", "State=down", "Reason=test")
    try:
        life.wait_for_requeue(restarts + 1)
        before = life.last_step()
    finally:
        life.cluster.slurm("scontrol", "update", "NodeName=n2", "State=resume", check=False)  # it may be back
    life.goes_on()
    assert 0 <= lost_steps(life, before) <= 2  # a checkpoint every other step
    same_so_far(life, reference)


def test_a_node_that_dies(life: SlurmRun, reference: SlurmRun) -> None:
    restarts = int(life.cluster.job(life.job)["Restarts"])
    life.cluster.kill_node("n2")
    try:
        life.wait_for_requeue(restarts + 1)
        before = life.last_step()
    finally:
        life.cluster.start_node("n2")
    life.goes_on()
    assert 0 <= lost_steps(life, before) <= 3
    same_so_far(life, reference)


def test_cancelled_it_stays_cancelled(life: SlurmRun, reference: SlurmRun) -> None:
    refused = crosslift("submit", life.config, "--gpus-per-node", 0, folder=life.folder, check=False)
    assert refused.returncode == 2
    assert f"job {life.job} of this run is running" in refused.stderr
    assert crosslift("cancel", life.output, folder=life.folder).stdout == f"cancelled: job {life.job}\n"
    life.wait_for_state("CANCELLED")
    assert "it does not requeue itself" in life.log()
    same_so_far(life, reference)


def test_it_goes_on_on_one_node_and_again_on_two(life: SlurmRun, reference: SlurmRun) -> None:
    before = life.last_step()
    assert life.cluster.state(life.job) == "CANCELLED"
    life.submit(nodes=1)
    life.train_until(before + 2)
    assert lost_steps(life, before) == 0
    assert "on 1 ranks" in life.log()
    crosslift("cancel", life.job, folder=life.folder)
    life.wait_for_state("CANCELLED")
    before = life.last_step()
    life.submit(nodes=2)
    life.wait_for_state("COMPLETED", "FAILED")
    assert life.cluster.state(life.job) == "COMPLETED", life.said()
    assert lost_steps(life, before) == 0
    done, expected = life.repeated(), reference.repeated()
    assert sorted(done) == list(range(1, STEPS + 1))
    for step, times in done.items():
        for values in times:
            assert values["data/step_fingerprint"] == expected[step][0]["data/step_fingerprint"], f"step {step}"
            assert values["train/loss"] == pytest.approx(expected[step][0]["train/loss"], rel=CLOSE), f"step {step}"


def test_the_time_limit_is_met_with_a_checkpoint(cluster: TwoNodeCluster, reference: SlurmRun, tmp_path: Path) -> None:
    """Slurm looks every 30 s and warns early: the signal comes 30 to 60 s after this job's start."""
    (tmp_path / "slurm.yaml").write_text("grace_seconds: 60\n")
    run = SlurmRun(cluster, tmp_path, reference_values(tmp_path, max_steps=10_000))
    run.submit("--time", "2")
    run.train_until(1)
    deadline = deadline_of(cluster)
    end = time.mktime(time.strptime(cluster.job(run.job)["EndTime"], "%Y-%m-%dT%H:%M:%S"))
    assert deadline == {int(end)}
    run.wait_for_requeue(1)
    assert "stopped by SIGUSR1" in run.log()
    crosslift("cancel", run.output, folder=run.folder)
    steps = run.repeated()
    assert sorted(steps) == list(range(1, run.last_step() + 1))
    newest = sorted((run.output / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{run.last_step():08d}"
    assert (newest / "COMPLETE").is_file()


def deadline_of(cluster: TwoNodeCluster) -> set[int]:
    """CROSSLIFT_DEADLINE of the ranks on both nodes."""
    found = set()
    for node in ("n1", "n2"):
        ranks = 0
        for process in cluster.processes(node):
            try:
                environment = dict(
                    line.partition("=")[::2]
                    for line in Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0")
                )
            except OSError:
                continue
            if "RANK" in environment:
                ranks += 1
                found.add(int(environment["CROSSLIFT_DEADLINE"]))
        assert ranks, f"no rank on {node}"
    return found
