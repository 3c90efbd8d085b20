"""Jobs on a real two-node cluster with real training: how they finish, fail, and resume after interruptions.

In the second half one run is interrupted in every way in which a cluster ends jobs. Its record must equal that of an
uninterrupted run (`reference`): every step is there, in order, and a step that was repeated after a kill has the same
values to the last digit. The run is training before and after each test; the last one ends it. The tests depend on
their order.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from cluster import TwoNodeCluster
from slurm_runs import STEPS, SlurmRun, crosslift, reference_values
from tiny_run import write_config


def test_a_run_on_two_nodes_finishes(reference: SlurmRun) -> None:
    assert reference.cluster.state(reference.job) == "COMPLETED", reference.diagnostics()
    steps = reference.repeated()
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert all(len(values) == 1 for values in steps.values())
    assert reference.starts() == [None]
    assert (reference.output / "model" / "model.safetensors").is_file()
    log = reference.log()
    assert "on 2 ranks" in log
    for node in ("n1", "n2"):
        assert f"crosslift: node {node} (" in log


def test_the_network_interface_is_that_of_the_route_between_the_nodes(reference: SlurmRun) -> None:
    """Both nodes are this machine: the interface is the loopback device."""
    assert reference.log().count("NCCL_SOCKET_IFNAME=lo, GLOO_SOCKET_IFNAME=lo") == 2


def test_the_job_runs_frozen_source_and_config(reference: SlurmRun) -> None:
    submission = reference.output / "slurm" / reference.jobs[0]["submission"]
    files = {path.relative_to(submission).parts[0] for path in submission.rglob("*")}
    assert files == {"code", "config.yaml", "train.sh", "then-1.sh", f"train-{reference.job}.out",
                     f"then-1-{reference.jobs[1]['job']}.out"}  # fmt: skip
    kinds = {path.suffix for path in (submission / "code").rglob("*") if path.is_file()}
    assert kinds <= {".py", ".yaml", ".json", ".pyc"}


def test_the_evaluation_ran_after_the_training(reference: SlurmRun) -> None:
    first, second = (reference.cluster.job(job["job"]) for job in reference.jobs)
    assert second["JobState"] == "COMPLETED", Path(reference.jobs[1]["output"]).read_text()
    assert second["StartTime"] >= first["EndTime"]
    results = json.loads((reference.output / "mgsm" / "results.json").read_text())
    assert len(results["languages"]) == 1


def test_status_and_logs_of_a_finished_run(reference: SlurmRun) -> None:
    status = json.loads(crosslift("status", reference.output, "--json", folder=reference.folder).stdout)
    assert status["progress"] == f"step {STEPS} of {STEPS}"
    assert [(job["job"], job["state"]) for job in status["jobs"]] == [
        (job["job"], "COMPLETED") for job in reference.jobs
    ]
    by_number = json.loads(crosslift("status", reference.job, "--json", folder=reference.folder).stdout)
    assert [job["job"] for job in by_number["jobs"]] == [reference.job]
    assert crosslift("logs", reference.output, folder=reference.folder).stdout == reference.log()


def test_a_dry_run_writes_and_queues_nothing(cluster: TwoNodeCluster, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", reference_values(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    queue = cluster.slurm("squeue", "--noheader")
    done = crosslift("submit", config, "--nodes", 2, "--gpus-per-node", 0, "--dry-run", folder=tmp_path)
    assert "#SBATCH --nodes=2" in done.stdout
    assert "# sbatch --parsable " in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert cluster.slurm("squeue", "--noheader") == queue


def test_a_sweep_is_an_array_with_a_folder_for_each_run(cluster: TwoNodeCluster, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path, reference_values(tmp_path, max_steps=2))
    job = run.submit("--array", "seed=1,2", "--array-limit", 2, nodes=1)
    for number in range(2):
        cluster.wait_for_state(f"{job}_{number}", "COMPLETED", "FAILED", seconds=240)
    assert [cluster.state(f"{job}_{number}") for number in range(2)] == ["COMPLETED"] * 2, run.diagnostics()
    fingerprints = set()
    for number, seed in enumerate((1, 2)):
        folder = run.output / f"{number}-seed={seed}"
        lines = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
        assert next(line for line in lines if line["kind"] == "params")["values"]["seed"] == str(seed)
        metrics = [line for line in lines if line["kind"] == "metrics"]
        assert {line["step"] for line in metrics} == {1, 2}
        fingerprints |= {line["values"].get("data/step_fingerprint") for line in metrics}
        status = json.loads(crosslift("status", folder, "--json", folder=tmp_path).stdout)
        assert [(each["job"], each["state"]) for each in status["jobs"]] == [(f"{job}_{number}", "COMPLETED")]
    assert len(fingerprints - {None}) == 4  # another seed gives another order


def test_a_failing_setup_line_ends_the_job_and_those_that_wait_for_it(cluster: TwoNodeCluster, tmp_path: Path) -> None:
    """In a folder whose name Slurm and bash must not interpret."""
    folder = tmp_path / 'it\'s "a" $(touch canary) `touch canary`; -x ü %j #x'
    run = SlurmRun(cluster, folder, reference_values(folder))
    run.submit("--setup", "ls /not/there", "--then", "score mgsm --predictions {run} --labels {run}", nodes=1)
    run.wait_for_state("FAILED")
    assert cluster.job(run.job)["ExitCode"] == "2:0"
    assert run.log().splitlines()[-1].endswith(": ls /not/there")
    cluster.wait_for_state(str(run.jobs[1]["job"]), "CANCELLED")
    assert not (run.output / "record.jsonl").exists()
    assert not list(tmp_path.rglob("canary"))


def test_a_node_without_the_interpreter_is_named(cluster: TwoNodeCluster, tmp_path: Path) -> None:
    (tmp_path / "slurm.yaml").write_text("python: /not/there/python\n")
    run = SlurmRun(cluster, tmp_path, reference_values(tmp_path))
    run.submit()
    run.wait_for_state("FAILED")
    assert cluster.job(run.job)["ExitCode"] == "2:0"
    for node in ("n1", "n2"):
        assert f"crosslift: node {node} (" in run.log()
    assert "/not/there/python: no such python" in run.log()


@pytest.mark.parametrize("option", [("--partition", "nosuch"), ("--nodes", "3")])
def test_a_job_refused_by_slurm_leaves_nothing_behind(
    cluster: TwoNodeCluster, tmp_path: Path, option: tuple[str, ...]
) -> None:
    config = write_config(tmp_path / "run.yaml", reference_values(tmp_path))
    done = crosslift(
        "submit", config, "--gpus-per-node", 0, "--then", "score mgsm", *option, folder=tmp_path, check=False
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("crosslift: sbatch refused the job: ")
    assert [path.name for path in (tmp_path / "run" / "slurm").iterdir()] == [".lock"]
    assert cluster.slurm("squeue", "--noheader", "--format=%j") == ""


# --- one run, interrupted in every way


CLOSE = 2e-3  # losses after a change of the number of ranks: fp32 sums in another order, over many steps


@pytest.fixture(scope="module")
def run(cluster: TwoNodeCluster, reference: SlurmRun, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    """The run that the following tests interrupt."""
    folder = tmp_path_factory.mktemp("interrupted")
    run = SlurmRun(cluster, folder, reference_values(folder))
    run.submit("--time", "30")
    run.train_until(2)
    return run


def assert_same_steps(run: SlurmRun, reference: SlurmRun) -> None:
    """Assert that no step is missing and that repeated steps have the same values."""
    done, expected = run.repeated(), reference.repeated()
    assert sorted(done) == list(range(1, run.last_step() + 1))
    for step, times in done.items():
        for values in times:
            assert values == expected[step][0], f"step {step}"


def lost_steps(run: SlurmRun, before: int) -> int:
    """Number of steps that the newest start had to repeat."""
    resumed = run.starts()[-1]
    assert resumed is not None
    return before - resumed


def test_after_a_stop_signal_the_job_saves_and_requeues_itself(run: SlurmRun, reference: SlurmRun) -> None:
    restarts = int(run.cluster.job(run.job)["Restarts"])
    run.cluster.slurm("scancel", "--signal=TERM", run.job)
    run.wait_for_requeue(restarts + 1)
    before = run.last_step()
    assert f"job {run.job} stopped on request and is requeued ({restarts + 1} of at most 20)" in run.log()
    run.resume()
    assert lost_steps(run, before) == 0
    assert_same_steps(run, reference)


def test_a_job_requeued_by_an_administrator_saves_first(run: SlurmRun, reference: SlurmRun) -> None:
    restarts = int(run.cluster.job(run.job)["Restarts"])
    run.cluster.slurm("scontrol", "requeue", run.job)
    run.wait_for_requeue(restarts + 1)  # by Slurm only, not again by the script
    before = run.last_step()
    run.resume()
    assert lost_steps(run, before) == 0
    assert int(run.cluster.job(run.job)["Restarts"]) == restarts + 1
    assert_same_steps(run, reference)


def test_a_job_continues_after_a_node_is_set_down(run: SlurmRun, reference: SlurmRun) -> None:
    restarts = int(run.cluster.job(run.job)["Restarts"])
    run.cluster.slurm("scontrol", "update", "NodeName=n2", "State=down", "Reason=test")
    try:
        run.wait_for_requeue(restarts + 1)
        before = run.last_step()
    finally:
        run.cluster.slurm("scontrol", "update", "NodeName=n2", "State=resume", check=False)  # it may be up again
    run.resume()
    assert 0 <= lost_steps(run, before) <= 2  # a checkpoint every other step
    assert_same_steps(run, reference)


def test_a_job_continues_after_a_node_dies(run: SlurmRun, reference: SlurmRun) -> None:
    restarts = int(run.cluster.job(run.job)["Restarts"])
    run.cluster.kill_node("n2")
    try:
        run.wait_for_requeue(restarts + 1)
        before = run.last_step()
    finally:
        run.cluster.start_node("n2")
    run.resume()
    assert 0 <= lost_steps(run, before) <= 3
    assert_same_steps(run, reference)


def test_a_cancelled_job_saves_and_stays_cancelled(run: SlurmRun, reference: SlurmRun) -> None:
    refused = crosslift("submit", run.config, "--gpus-per-node", 0, folder=run.folder, check=False)
    assert refused.returncode == 2
    assert f"job {run.job} of this run is running" in refused.stderr
    before = run.last_step()
    assert f"job {run.job} saves a checkpoint" in crosslift("cancel", run.output, folder=run.folder).stdout
    run.wait_for_state("CANCELLED")
    assert run.cluster.job(run.job)["ExitCode"] == "75:0"  # the script's own exit status, not that of Slurm's SIGKILL
    assert "it does not requeue itself" in run.log()
    assert run.last_step() >= before
    assert (run.output / "checkpoints" / f"step-{run.last_step():08d}" / "COMPLETE").is_file()
    assert_same_steps(run, reference)


def test_a_run_resumes_on_one_node_and_again_on_two(run: SlurmRun, reference: SlurmRun) -> None:
    """On one node although it was submitted for two: the pending job is given another number of nodes."""
    before = run.last_step()
    assert run.cluster.state(run.job) == "CANCELLED"
    site = run.folder / "slurm.yaml"
    site.write_text("sbatch: {hold: true}\n")
    run.submit(nodes=2)
    site.unlink()
    run.cluster.slurm("scontrol", "update", f"JobId={run.job}", "NumTasks=1", "NumNodes=1-1")
    run.cluster.slurm("scontrol", "release", run.job)
    run.train_until(before + 2)
    assert lost_steps(run, before) == 0
    assert "on 1 ranks" in run.log()
    crosslift("cancel", run.job, folder=run.folder)
    run.wait_for_state("CANCELLED")
    before = run.last_step()
    run.submit(nodes=2)
    run.wait_for_state("COMPLETED", "FAILED")
    assert run.cluster.state(run.job) == "COMPLETED", run.diagnostics()
    assert lost_steps(run, before) == 0
    done, expected = run.repeated(), reference.repeated()
    assert sorted(done) == list(range(1, STEPS + 1))
    for step, times in done.items():
        for values in times:
            assert values["data/step_fingerprint"] == expected[step][0]["data/step_fingerprint"], f"step {step}"
            assert values["train/loss"] == pytest.approx(expected[step][0]["train/loss"], rel=CLOSE), f"step {step}"


def test_a_checkpoint_is_written_before_the_time_limit(
    cluster: TwoNodeCluster, reference: SlurmRun, tmp_path: Path
) -> None:
    """The limit is reduced during training; the ranks' deadline is far away, so Slurm's signal stops them."""
    (tmp_path / "slurm.yaml").write_text("grace_seconds: 240\n")
    run = SlurmRun(cluster, tmp_path, reference_values(tmp_path, max_steps=10_000))
    run.submit("--time", "60")
    run.train_until(1)
    end = time.mktime(time.strptime(cluster.job(run.job)["EndTime"], "%Y-%m-%dT%H:%M:%S"))
    assert deadlines(cluster) == {int(end)}
    started = time.mktime(time.strptime(cluster.job(run.job)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    limit = int((time.time() - started) // 60) + 4  # minutes: less than the grace is left, and Slurm's half minute
    cluster.slurm("scontrol", "update", f"JobId={run.job}", f"TimeLimit={limit}")
    run.wait_for_requeue(1)
    assert "stopped by SIGUSR1 after " in run.log()
    crosslift("cancel", run.output, folder=run.folder)
    steps, expected = run.repeated(), reference.repeated()
    assert sorted(steps) == list(range(1, run.last_step() + 1))
    assert all(len(times) == 1 for times in steps.values())
    newest = sorted((run.output / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{run.last_step():08d}"
    assert (newest / "COMPLETE").is_file()
    for step in steps.keys() & expected.keys():  # the learning rate depends on max_steps, which differs
        assert steps[step][0]["data/step_fingerprint"] == expected[step][0]["data/step_fingerprint"]


def deadlines(cluster: TwoNodeCluster) -> set[int]:
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
