"""Jobs on a real two-node cluster: finished, followed by an evaluation, a sweep, refused, failed in every early way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import TwoNodeCluster
from slurm_runs import STEPS, SlurmRun, crosslift, reference_values
from tiny_run import write_config


def test_a_run_on_two_nodes_finishes(reference: SlurmRun) -> None:
    assert reference.cluster.state(reference.job) == "COMPLETED", reference.said()
    steps = reference.repeated()
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert all(len(values) == 1 for values in steps.values())
    assert reference.starts() == [None]
    assert (reference.output / "model" / "model.safetensors").is_file()
    log = reference.log()
    assert "on 2 ranks" in log
    for node in ("n1", "n2"):
        assert f"crosslift: node {node} (" in log


def test_the_nodes_find_each_other_by_the_route_between_them(reference: SlurmRun) -> None:
    """Both nodes are this machine: the route is the loop device."""
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
    assert [cluster.state(f"{job}_{number}") for number in range(2)] == ["COMPLETED"] * 2, run.said()
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
    assert len(fingerprints - {None}) == 4  # another seed is another order


def test_a_setup_line_that_fails_ends_the_job_and_what_waits_for_it(cluster: TwoNodeCluster, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path, reference_values(tmp_path))
    run.submit("--setup", "ls /not/there", "--then", "score mgsm --predictions {run} --labels {run}", nodes=1)
    run.wait_for_state("FAILED")
    assert cluster.job(run.job)["ExitCode"] == "2:0"
    assert "this line failed on " in run.log()
    assert run.log().splitlines()[-1].endswith(": ls /not/there")
    follower = str(run.jobs[1]["job"])
    cluster.wait_for_state(follower, "CANCELLED")
    assert not (run.output / "record.jsonl").exists()


def test_a_node_without_the_interpreter_names_itself(cluster: TwoNodeCluster, tmp_path: Path) -> None:
    (tmp_path / "slurm.yaml").write_text("python: /not/there/python\n")
    run = SlurmRun(cluster, tmp_path, reference_values(tmp_path))
    run.submit()
    run.wait_for_state("FAILED")
    assert cluster.job(run.job)["ExitCode"] == "2:0"
    for node in ("n1", "n2"):
        assert f"crosslift: node {node} (" in run.log()
    assert "/not/there/python: no such python" in run.log()


@pytest.mark.parametrize("option", [("--partition", "nosuch"), ("--nodes", "3")])
def test_what_slurm_refuses_leaves_nothing_behind(
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
