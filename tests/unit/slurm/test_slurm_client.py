"""Parsing of output of Slurm's programs, old and new: job numbers, queues, accounting, the controller; no output."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from slurm import client
from slurm.client import JobId, JobState
from slurm.errors import SlurmError


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", fake.search_path)
    return fake


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("12\n", JobId("12")),
        ("12;fast\n", JobId("12", "fast")),
        ("Submitted batch job 12\n", JobId("12")),
        ("Submitted batch job 12 on cluster fast-1\n", JobId("12", "fast-1")),
        ("Submitted batch job 12.\n", JobId("12")),
        ("sbatch: Your account ends in 3 days\n\n12\n", JobId("12")),
        ("Welcome to partition 7\nSubmitted batch job 12\nUse squeue 99\n", JobId("12")),
    ],
)
def test_the_job_number_is_found_in_sbatchs_output(output: str, expected: JobId) -> None:
    assert client.job_id(output) == expected


@pytest.mark.parametrize("output", ["", "thank you\n", "12\n13\n", "job 12 queued\n"])
def test_no_or_two_job_numbers_are_an_error_with_the_output(output: str) -> None:
    with pytest.raises(SlurmError, match=r"sbatch printed no job number, but .* check with squeue") as refused:
        client.job_id(output)
    assert "\n" not in str(refused.value)


def test_a_refused_job_has_slurms_reason_in_one_line(slurm: FakeSlurm) -> None:
    reasons = ("invalid partition specified: x", "Batch job submission failed: Invalid partition name specified")
    slurm.set_output("sbatch", "", "".join(f"sbatch: error: {reason}\n" for reason in reasons), 1)
    with pytest.raises(SlurmError) as refused:
        client.submit("script.sh")
    assert str(refused.value) == f"sbatch refused the job: {'; '.join(reasons)}"


def test_a_missing_sbatch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=r"^sbatch: not found on PATH; is this a login node of a Slurm cluster"):
        client.submit("script.sh")


def test_a_job_submitted_within_a_job_does_not_inherit_its_variables(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.path / "sbatch").write_text("#!/bin/sh\nenv > " + str(slurm.folder / "seen") + "\necho 12\n")
    for name in (
        "SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_NO_REQUEUE", "SBATCH_EXPORT", "SBATCH_ERROR", "SBATCH_INPUT",
        "CROSSLIFT_DEADLINE", "SRUN_DEBUG", "SALLOC_TIMELIMIT", "PMI_RANK", "PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK",
        "RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID",
    ):  # fmt: skip
        monkeypatch.setenv(name, "7")
    for name in ("SLURM_CONF", "SBATCH_RESERVATION", "HF_TOKEN"):
        monkeypatch.setenv(name, "8")
    client.submit("script.sh")
    seen = dict(line.partition("=")[::2] for line in (slurm.folder / "seen").read_text().splitlines())
    assert "7" not in seen.values()
    assert {name for name, value in seen.items() if value == "8"} == {"SLURM_CONF", "SBATCH_RESERVATION", "HF_TOKEN"}


def test_states_of_queued_jobs(slurm: FakeSlurm) -> None:
    slurm.set_output("squeue", "12_0|RUNNING|None|1:02|n[1-2]\n12_1|PENDING|JobArrayTaskLimit|0:00|\n")
    assert (
        client.queued([JobId("12"), JobId("13", "fast")])
        == [
            JobState("12_0", "RUNNING", None, "1:02", "n[1-2]"),
            JobState("12_1", "PENDING", "JobArrayTaskLimit", "0:00", None),
        ]
        * 2
    )
    calls = slurm.calls("squeue")
    assert [word for word in calls[0] if word.startswith("--jobs")] == ["--jobs=12"]
    assert "--clusters=fast" in calls[1]


def test_an_unknown_job_is_not_queued_but_an_unreachable_controller_is_an_error(slurm: FakeSlurm) -> None:
    slurm.set_output("squeue", "", "slurm_load_jobs error: Invalid job id specified\n", 1)
    assert client.queued([JobId("12")]) == []
    slurm.set_output("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", 1)
    with pytest.raises(SlurmError, match=r"^squeue: .*Unable to contact slurm controller"):
        client.queued([JobId("12")])


def test_a_program_that_hangs_is_named(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm.path / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(client, "TIMEOUT_S", 0.2)
    with pytest.raises(SlurmError, match=r"^squeue: no answer in 0 s; is Slurm's controller down"):
        client.queued([JobId("12")])


def test_states_of_ended_jobs_from_accounting(slurm: FakeSlurm) -> None:
    slurm.set_output("sacct", "12_0|COMPLETED|00:01:02|n[1-2]|0:0|1\n12_1|CANCELLED by 1000|00:00:09|n2|0:15|0\n")
    assert client.past(JobId("12")) == [
        JobState("12_0", "COMPLETED", None, "00:01:02", "n[1-2]", 1, "0:0"),
        JobState("12_1", "CANCELLED", None, "00:00:09", "n2", 0, "0:15"),
    ]
    assert slurm.calls("scontrol") == []


def test_older_accounting_has_no_restarts(slurm: FakeSlurm) -> None:
    (slurm.path / "sacct").write_text(
        "#!/bin/sh\n"
        'case "$*" in *Restarts*) echo "sacct: error: Invalid field requested: \\"Restarts\\"" >&2; exit 1;; esac\n'
        'echo "12|TIMEOUT|00:10:00|n1|0:0"\n'
    )
    assert client.past(JobId("12")) == [JobState("12", "TIMEOUT", None, "00:10:00", "n1", None, "0:0")]


OLD = """JobId=12 JobName=a JobState=FAILED Reason=x
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   Priority=1 Nice=0 Account=(null) QOS=(null)
   JobState=COMPLETED Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:01:02 TimeLimit=00:30:00 TimeMin=N/A
   NodeList=n[1-2]
   Command=/a b/Requeue=9 Restarts=9 ExitCode=9:9/train.sh
   StdOut=/a b/train-12.out
"""
NEW = OLD.replace("JobId=12 ", "JobId=14 ArrayJobId=12 ArrayTaskId=1 ").replace("=n[1-2]", "=(null)")


def test_states_of_ended_jobs_from_the_controller_without_accounting(slurm: FakeSlurm) -> None:
    """The job's name and folder are the user's; they must not be parsed as fields."""
    slurm.set_output("scontrol", OLD + "\n" + NEW)
    assert client.past(JobId("12")) == [
        JobState("12", "COMPLETED", None, "00:01:02", "n[1-2]", 2, "0:0"),
        JobState("12_1", "COMPLETED", None, "00:01:02", None, 2, "0:0"),
    ]
    assert client.output_file(JobId("12")) == "/a b/train-12.out"


def test_a_purged_job_has_no_states_and_no_output_file(slurm: FakeSlurm) -> None:
    slurm.set_output("scontrol", "", "slurm_load_jobs error: Invalid job id specified\n", 1)
    assert client.past(JobId("12")) == []
    assert client.output_file(JobId("12")) is None
    (slurm.path / "sacct").unlink()
    assert client.past(JobId("12")) == []


def test_cancelling_an_ended_job_is_no_error(slurm: FakeSlurm) -> None:
    client.cancel([JobId("12"), JobId("13")])
    assert slurm.calls("scancel") == [["12", "13"]]
    for reason in ("Invalid job id specified", "Job/step already completing or completed"):
        slurm.set_output("scancel", "", f"scancel: error: Kill job error on job id 12: {reason}\n", 1)
        client.cancel([JobId("12")])
    slurm.set_output("scancel", "", "scancel: error: Kill job error on job id 12: Access/permission denied\n", 1)
    with pytest.raises(SlurmError, match=r"^scancel: Kill job error on job id 12: Access/permission denied"):
        client.cancel([JobId("12")])
