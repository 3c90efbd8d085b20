"""The batch script: its text, and its behaviour when bash runs it with a fake Slurm."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from waiting import wait_for

from slurm.render import FIRST_PORT, PORTS, render, sbatch_quoted
from slurm.spec import Container, Element, JobSettings, JobSpec
from training.tracking.run_record import RunRecord

JOB = 12


def make_spec(folder: Path, arguments: tuple[str, ...] = ("config.yaml",), **changes: Any) -> JobSpec:
    settings = changes.pop("settings", None) or JobSettings(gpus_per_node=0, nproc_per_node=2, nodes=2)
    values: dict[str, Any] = {
        "name": "a run", "kind": "train", "stem": "train", "settings": settings, "folder": folder, "code": folder,
        "chdir": folder, "python": sys.executable, "elements": (Element(run_dir=folder, arguments=arguments),),
    }  # fmt: skip
    return JobSpec(**{**values, **changes})


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_options_of_a_run(tmp_path: Path) -> None:
    settings = JobSettings(
        nodes=4, gpus_per_node=8, cpus_per_task=64, mem="500G", time="1-00:00:00", partition="gpu", account="us",
        qos="high", sbatch={"constraint": "a100", "exclusive": True, "nice": 5, "contiguous": False},
    )  # fmt: skip
    assert options(render(make_spec(tmp_path, settings=settings, after=("7", "8_1")))) == [
        '--job-name="a run"', "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=64",
        "--mem=500G", "--time=1-00:00:00", "--partition=gpu", "--account=us", "--qos=high",
        "--dependency=afterok:7,afterok:8_1", "--kill-on-invalid-dep=yes", f"--chdir={tmp_path}",
        f"--output={tmp_path}/train-%j.out", "--open-mode=append", "--requeue", "--signal=USR1@300",
        "--constraint=a100", "--exclusive", "--nice=5",
    ]  # fmt: skip


def test_cpu_ranks_request_no_gpus(tmp_path: Path) -> None:
    script = render(make_spec(tmp_path))
    assert "--gpus" not in script
    assert '--nodes="$nodes" --nproc=2' in script


def test_gpus_and_cores_are_also_options_of_srun(tmp_path: Path) -> None:
    """Since Slurm 22.05 a step does not inherit the job's --cpus-per-task."""
    script = render(make_spec(tmp_path, settings=JobSettings(nodes=2, gpus_per_node=4, cpus_per_task=16)))
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert line == (
        'srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --export=ALL '
        "--cpus-per-task=16 --gpus-per-node=4 \\"
    )
    assert "--nproc=4" in script


def test_typed_gpus_are_options_of_sbatch_and_srun_and_a_command_gets_one(tmp_path: Path) -> None:
    settings = JobSettings(nodes=2, gpus_per_node="a100:4")
    script = render(make_spec(tmp_path, settings=settings))
    assert "--gpus-per-node=a100:4" in options(script)
    (step,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert "--gpus-per-node=a100:4" in step
    assert "--nproc=4" in script
    assert "--gpus-per-node=a100:1" in options(render(make_spec(tmp_path, settings=settings, kind="command")))


@pytest.mark.parametrize("time", ["0", "0:00", "UNLIMITED", "infinite"])
def test_without_a_time_limit_the_signal_has_the_default_grace_period(tmp_path: Path, time: str) -> None:
    chosen = options(render(make_spec(tmp_path, settings=JobSettings(gpus_per_node=0, time=time))))
    assert f"--time={time}" in chosen
    assert "--signal=USR1@300" in chosen


def test_the_options_of_an_array(tmp_path: Path) -> None:
    elements = tuple(Element(run_dir=tmp_path / name, arguments=(f"{name}.yaml",)) for name in ("a", "b b"))
    script = render(make_spec(tmp_path, elements=elements, array=True, array_limit=1))
    assert "--array=0-1%1" in options(script)
    assert f"--output={tmp_path}/train-%A_%a.out" in options(script)
    assert f"1) run='{tmp_path}/b b'; readable=(); arguments=('b b.yaml') ;;" in script


def test_a_command_has_one_node_and_is_not_requeued(tmp_path: Path) -> None:
    settings = JobSettings(nodes=4, gpus_per_node=8)
    script = render(make_spec(tmp_path, ("eval", "a b"), kind="command", settings=settings))
    assert {"--nodes=1", "--gpus-per-node=1"} <= set(options(script))
    assert not {"--requeue", "--signal=USR1@300"} & set(options(script))
    assert "scontrol" not in script


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        (
            Container(image="/a b.sif", mounts=("/data:/data",)),
            ["apptainer", "exec", "--nv", "--bind", "RUN:RUN", "--bind", "/data:/data", "/a b.sif"],
        ),
        (
            Container(image="docker://x", command=("srun",)),
            ["--container-image=docker://x", "--container-mounts=RUN:RUN"],
        ),
    ],
)
def test_node_py_runs_in_the_container(tmp_path: Path, container: Container, expected: list[str]) -> None:
    script = render(make_spec(tmp_path, settings=JobSettings(gpus_per_node=0, container=container)))
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    words = shlex.split(line.removesuffix("\\"))
    assert words[-len(expected) :] == [word.replace("RUN", str(tmp_path)) for word in expected]


HOSTILE = 'it\'s "a" $(touch canary) `touch canary`; touch canary & ü %j #x'


@pytest.mark.parametrize("kind", ["train", "command"])
@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("text", [HOSTILE, "-rf", "'\n touch canary\n#", "a\\b", "$HOME", "!x", "{a,b}", "~", "*"])
def test_any_value_gives_a_valid_script(tmp_path: Path, text: str, kind: Any, array: bool) -> None:
    """Only arguments may contain line breaks."""
    plain = text if text.isprintable() and "\\" not in text else "plain"
    settings = JobSettings(gpus_per_node=0, partition=plain, setup=("true",), environment={"VALUE": text})
    element = Element(run_dir=tmp_path / plain, arguments=("eval", text))
    script = render(make_spec(tmp_path, name=plain, settings=settings, kind=kind, array=array,
                              elements=(element,)))  # fmt: skip
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert all(line.startswith("#") for line in script.splitlines()[: 1 + len(options(script)) + 1])


def test_values_are_quoted_as_sbatch_reads_them() -> None:
    assert sbatch_quoted("a-b_c.d/e%j=f@4,5:6+7") == "a-b_c.d/e%j=f@4,5:6+7"
    assert sbatch_quoted('a "b" \\c $(d) #e') == '"a \\"b\\" \\\\c $(d) #e"'


def test_a_percent_sign_in_a_folder_name_is_not_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "100%j"
    assert f"--output={tmp_path}/100%%j/train-%j.out" in options(render(make_spec(folder)))


# --- run by bash


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


@pytest.fixture
def run_script(tmp_path: Path, slurm: FakeSlurm) -> Callable[..., subprocess.Popen[str]]:
    """Run the script of a spec as Slurm would."""

    def start(spec: JobSpec, **variables: str) -> subprocess.Popen[str]:
        spec.folder.mkdir(exist_ok=True, parents=True)
        spec.script.write_text(render(spec))
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "CROSSLIFT"))}
        place = {"PATH": slurm.search_path, "SLURM_JOB_ID": str(JOB), "SLURM_JOB_NODELIST": "n[1-2]",
                 "SLURM_JOB_NUM_NODES": str(spec.settings.nodes)}  # fmt: skip
        return subprocess.Popen(
            ["bash", str(spec.script)], env={**plain, **place, **variables}, cwd=spec.chdir, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


RunScript = Callable[..., subprocess.Popen[str]]


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def requeued(slurm: FakeSlurm) -> list[str]:
    """Job numbers passed to `scontrol requeue`."""
    return [call[1] for call in slurm.calls("scontrol") if call[0] == "requeue"]


def step_ends(slurm: FakeSlurm, status: int, outcome: str = "") -> None:
    slurm.set("srun", "status", str(status))
    slurm.set("srun", "outcome", outcome)


def test_a_successful_step_ends_the_job(tmp_path: Path, slurm: FakeSlurm, run_script: RunScript) -> None:
    step_ends(slurm, 0)
    assert end(run_script(make_spec(tmp_path / "s"))) == (0, "")
    assert requeued(slurm) == []


@pytest.mark.parametrize(
    ("array", "number"), [({}, "12"), ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}, "12_0")]
)
def test_a_job_stopped_after_a_checkpoint_requeues_itself(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript, array: dict[str, str], number: str
) -> None:
    """SLURM_JOB_ID of the last element is the array's number, with which all elements would be requeued."""
    step_ends(slurm, 0, "75")
    status, printed = end(run_script(make_spec(tmp_path / "s"), **array))
    assert (status, requeued(slurm)) == (75, [number])
    assert f"crosslift: job {number} stopped on request and is requeued (1 of at most 20)" in printed
    assert not list((tmp_path / "s").glob("outcome-*"))


def test_the_number_of_requeues_is_limited(tmp_path: Path, slurm: FakeSlurm, run_script: RunScript) -> None:
    step_ends(slurm, 0, "75")
    spec = make_spec(tmp_path / "s", settings=JobSettings(gpus_per_node=0, max_requeues=3))
    status, printed = end(run_script(spec, SLURM_RESTART_COUNT="3"))
    assert (status, requeued(slurm)) == (75, [])
    assert "all 3 requeues (max_requeues) are used; the same command resumes" in printed
    end(run_script(spec, SLURM_RESTART_COUNT="2"))
    assert requeued(slurm) == ["12"]


def record_step(spec: JobSpec, step: int) -> None:
    """Record a step's metrics as a run does."""
    record = RunRecord(spec.elements[0].run_dir)
    record.append("metrics", step=step, values={"train/loss": 1.0})
    record.close()


@pytest.mark.parametrize("lost_node", [False, True])
def test_after_three_starts_without_a_new_step_a_job_is_not_requeued(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript, lost_node: bool
) -> None:
    step_ends(slurm, *((1, "") if lost_node else (0, "75")))
    slurm.set("srun", "probe", str(int(lost_node)))
    spec = make_spec(tmp_path / "s")
    for restarts in (0, 1):
        end(run_script(spec, SLURM_RESTART_COUNT=str(restarts)))
    assert requeued(slurm) == ["12", "12"]
    status, printed = end(run_script(spec, SLURM_RESTART_COUNT="2"))
    assert (status, requeued(slurm)) == (1 if lost_node else 75, ["12", "12"])
    assert "2 requeues made no new step (still at 0), so it is not requeued" in printed


def test_a_new_step_resets_the_count_of_requeues_without_one(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript
) -> None:
    """A step is new if the run has never reached it; one repeated after a checkpoint is not."""
    spec = make_spec(tmp_path / "s")
    spec.folder.mkdir()
    record_step(spec, 9)
    step_ends(slurm, 0, "75")

    def start(new_step: int | None) -> str:
        slurm.set("srun", "waits", "yes")
        calls = len(slurm.calls("srun"))
        process = run_script(spec)
        wait_for(lambda: len(slurm.calls("srun")) > calls, seconds=30)
        if new_step is not None:
            record_step(spec, new_step)
        slurm.set("srun", "waits", "")
        return end(process)[1]

    for new_step in (None, None, 10, None, 9):
        assert "is requeued" in start(new_step)
    assert "still at 10), so it is not requeued" in start(10)


@pytest.mark.parametrize(("status", "again"), [(1, []), (2, []), (137, [])])
def test_a_failed_job_is_not_requeued(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript, status: int, again: list[str]
) -> None:
    step_ends(slurm, status)
    assert end(run_script(make_spec(tmp_path / "s")))[0] == status
    assert requeued(slurm) == again


@pytest.mark.parametrize(("status", "again"), [(1, ["12"]), (143, ["12"]), (4, ["12"]), (3, []), (2, []), (0, [])])
def test_a_job_that_lost_a_node_is_requeued(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript, status: int, again: list[str]
) -> None:
    step_ends(slurm, status)
    slurm.set("srun", "probe", "1")
    code, printed = end(run_script(make_spec(tmp_path / "s")))
    assert (code, requeued(slurm)) == (status, again)
    assert ("lost a node and is requeued" in printed) == bool(again)


def test_a_job_runs_on_the_number_of_nodes_that_it_was_given_while_pending(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript
) -> None:
    """`scontrol update NumTasks=1 NumNodes=1-1` of a pending job that was submitted for two."""
    step_ends(slurm, 1)
    end(run_script(make_spec(tmp_path / "s"), SLURM_JOB_NUM_NODES="1"))
    step, probe = slurm.calls("srun")
    assert step[:2] == probe[:2] == ["--nodes=1", "--ntasks=1"]
    assert [word for word in step if word.startswith("--nodes=")] == ["--nodes=1", "--nodes=1"]  # srun's, the program's


@pytest.mark.parametrize(("reason", "again"), [("None", []), ("TimeLimit", ["12"])])
def test_after_a_term_only_a_time_limit_is_requeued(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript, reason: str, again: list[str]
) -> None:
    """After scancel, or a requeue by Slurm itself, the script does nothing."""
    step_ends(slurm, 0, "75")
    slurm.set_output(
        "scontrol", f"JobId=12 JobName=x JobState=Y Reason=TimeLimit\n   JobState=COMPLETING Reason={reason} X=y\n"
    )
    slurm.set("srun", "waits", "yes")
    process = run_script(make_spec(tmp_path / "s"))
    wait_for(lambda: slurm.calls("srun"), seconds=30)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None, "the script did not survive the signal"
    slurm.set("srun", "waits", "")
    assert end(process)[0] == 75
    assert requeued(slurm) == again


def test_a_signal_to_the_script_is_forwarded_to_the_step(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript
) -> None:
    """Slurm signals the step itself; this is for `scancel --batch --signal=USR1` and sites that set `B:`."""
    step_ends(slurm, 0)
    slurm.set("srun", "waits", "yes")
    process = run_script(make_spec(tmp_path / "s"))
    wait_for(lambda: (slurm.folder / "srun.environment").exists(), seconds=30)
    process.send_signal(signal.SIGUSR1)
    assert end(process)[0] == 128 + signal.SIGUSR1  # the fake srun has no handler


SAVES = """#!/bin/bash
trap 'sleep 0.3; printf 75 > {outcome}; exit 0' USR1
trap 'echo killed; exit 143' TERM ALRM
touch {started}
for ((i = 0; i < 500; i++)); do sleep 0.02; done
"""


def test_a_cancelled_job_waits_for_its_checkpoint_and_does_not_requeue(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript
) -> None:
    """`crosslift cancel` sends ALRM to the script only. Slurm would show a job as failed that just ends with 75."""
    spec, started = make_spec(tmp_path / "s"), tmp_path / "started"
    (slurm.path / "srun").write_text(SAVES.format(outcome=spec.folder / f"outcome-{JOB}", started=started))
    process = run_script(spec)
    wait_for(started.exists, seconds=30)
    process.send_signal(signal.SIGALRM)
    status, printed = end(process)
    assert (status, printed) == (75, "crosslift: job 12 was ended by a user or by Slurm; it does not requeue itself\n")
    assert requeued(slurm) == []
    assert slurm.calls("scancel") == [["12"]]


@pytest.mark.parametrize(
    ("variables", "squeue", "expected"),
    [
        ({"SLURM_JOB_END_TIME": "1900000000"}, "1\n", "1900000000"),
        ({}, "1900000001\n", "1900000001"),
        ({}, "NONE\n", None),  # no time limit
        ({}, "", None),
    ],
)
def test_the_deadline_is_the_end_of_the_allocation(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript, variables: dict[str, str], squeue: str, expected: Any
) -> None:
    step_ends(slurm, 0)
    slurm.set_output("squeue", squeue)
    assert end(run_script(make_spec(tmp_path / "s"), **variables))[0] == 0
    assert slurm.environment().get("CROSSLIFT_DEADLINE") == expected


FOREIGN_VARIABLES = {
    "CROSSLIFT_DEADLINE": "1", "SRUN_DEBUG": "3", "SALLOC_PARTITION": "x", "PMI_RANK": "3", "PMIX_RANK": "3",
    "PMI2_SPAWNED": "1", "OMPI_COMM_WORLD_RANK": "3", "PRTE_MCA_x": "y", "RANK": "3", "WORLD_SIZE": "9",
    "LOCAL_RANK": "3", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip


def test_variables_of_another_job_or_launcher_do_not_reach_the_ranks(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript
) -> None:
    step_ends(slurm, 0)
    settings = JobSettings(gpus_per_node=0, setup=("export PMI_FANOUT=2",), environment={"OMPI_MCA_btl": "tcp"})
    spec = make_spec(tmp_path / "s", settings=settings)
    assert end(run_script(spec, **FOREIGN_VARIABLES, KEPT="yes", PMIX_GOOD="no"))[0] == 0
    found = slurm.environment()
    assert sorted(set(found) & {*FOREIGN_VARIABLES, "PMIX_GOOD"}) == []
    assert (found["KEPT"], found["PMI_FANOUT"], found["OMPI_MCA_btl"]) == ("yes", "2", "tcp")  # the site's own are kept


def test_a_port_in_use_is_skipped(tmp_path: Path, slurm: FakeSlurm, run_script: RunScript) -> None:
    step_ends(slurm, 0)
    slurm.set_output("scontrol", "first\nsecond\n")
    wanted = FIRST_PORT + JOB % PORTS
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", wanted))
        taken.listen()
        end(run_script(make_spec(tmp_path / "s")))
    (call,) = slurm.calls("srun")
    ports = [word for word in call if word.startswith("--port=")]
    assert ports == [f"--port={wanted + 1}"]
    assert "--host=first" in call


def test_setup_lines_come_first_and_one_that_fails_ends_the_job(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript
) -> None:
    step_ends(slurm, 0)
    settings = JobSettings(gpus_per_node=0, setup=("export A=1", "B=$A$UNSET"), environment={"A": "2"})
    assert end(run_script(make_spec(tmp_path / "s", settings=settings), UNSET=""))[0] == 0
    assert slurm.environment()["A"] == "2"
    failing = JobSettings(gpus_per_node=0, setup=("true", "cat /not/there", "touch canary"))
    status, printed = end(run_script(make_spec(tmp_path / "s", settings=failing)))
    assert status == 2
    assert printed.splitlines()[-1].endswith(": cat /not/there")
    assert len(slurm.calls("srun")) == 1
    assert not (tmp_path / "s" / "canary").exists()


@pytest.mark.parametrize("array", [False, True])
def test_hostile_values_are_passed_on_unchanged_and_not_executed(
    tmp_path: Path, slurm: FakeSlurm, run_script: RunScript, array: bool
) -> None:
    folder = tmp_path / HOSTILE
    elements = tuple(
        Element(run_dir=folder / name, arguments=("-rf", HOSTILE, "'\n$(touch canary)"), readable=(folder / HOSTILE,))
        for name in ("$(touch canary)", "`touch canary`")
    )
    settings = JobSettings(gpus_per_node=0, environment={"VALUE": HOSTILE + "\nü"}, partition=HOSTILE)
    spec = make_spec(folder, settings=settings, elements=elements, array=array, name=HOSTILE)
    step_ends(slurm, 0)
    chosen = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"} if array else {}
    assert end(run_script(spec, **chosen)) == (0, "")
    (call,) = slurm.calls("srun")
    element = elements[1 if array else 0]
    after = call[call.index("bash") :]
    assert after[4:7] == [sys.executable, "-u", f"{folder}/slurm/node.py"]
    words = after[7:]
    assert words[:4] == [
        f"--code={folder}",
        f"--run={element.run_dir}",
        f"--chdir={folder}",
        f"--outcome={folder}/outcome-12",
    ]
    assert words[words.index("--readable") :] == ["--readable", str(folder / HOSTILE), "--", *element.arguments]
    assert slurm.environment()["VALUE"] == HOSTILE + "\nü"
    assert not list(tmp_path.rglob("canary"))


def test_a_missing_interpreter_names_the_node(tmp_path: Path, slurm: FakeSlurm, run_script: RunScript) -> None:
    status, printed = end(run_script(make_spec(tmp_path / "s", python="/not/there"), SLURMD_NODENAME="n7"))
    assert status == 2
    assert printed == f"crosslift: node n7 ({socket.gethostname()}): /not/there: no such python\n"


def test_node_py_starts_the_launcher(tmp_path: Path, slurm: FakeSlurm, run_script: RunScript) -> None:
    """The script runs node.py, which runs a fake launcher that prints its arguments."""
    spec = make_spec(tmp_path / "s", (HOSTILE,), code=tmp_path / "code")
    (tmp_path / "code" / "training" / "launch").mkdir(parents=True)
    (tmp_path / "code" / "slurm").symlink_to(Path(__file__).resolve().parents[3] / "slurm")
    (tmp_path / "code" / "training" / "__init__.py").touch()
    (tmp_path / "code" / "training" / "launch" / "__init__.py").touch()
    (tmp_path / "code" / "training" / "launch" / "__main__.py").write_text(
        "import json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(75)\n"
    )
    slurm.set_output("scontrol", "localhost\n")
    status, printed = end(run_script(spec, SLURM_NODEID="0", SLURMD_NODENAME="n1"))
    words = json.loads(printed.splitlines()[1])
    assert words[:9] == [HOSTILE, "--nproc", "2", "--nodes", "2", "--node-rank", "0", "--rendezvous",
                         f"localhost:{FIRST_PORT + JOB}"]  # fmt: skip
    assert (status, requeued(slurm)) == (75, ["12"])
