"""submit, status, logs and cancel as a user runs them, with a fake Slurm and a fake check of the run file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from fake_slurm import FakeSlurm
from typer.testing import CliRunner

from slurm import jobs, submit
from slurm import request as requests
from slurm.commands import add_commands
from slurm.errors import SlurmError
from slurm.history import read_jobs, submission_lock
from slurm.jobs import find, log_file, read_log
from slurm.request import sweep_points
from slurm.submit import freeze_source
from training.tracking.run_record import RunRecord

NAME = 'it\'s "a" $(touch canary) `touch canary`; -x ü %j'


class Result:
    """The result of a command; a user error is its text."""

    def __init__(self, click: Any) -> None:
        refused = isinstance(click.exception, SlurmError)
        assert refused or click.exception is None or isinstance(click.exception, SystemExit), click.exception
        self.out: str = click.stdout
        self.error = str(click.exception) if refused else click.stderr
        self.status = 2 if refused else click.exit_code


Cli = Callable[..., Result]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", fake.search_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_TOKEN", "hf_hush")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "mlflow_hush")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return fake


class Checked:
    """Replaces `check_values`; keeps its arguments."""

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []
        self.environment: dict[str, str] = {}
        self.accept_changes = False
        self.error: Exception | None = None

    def __call__(self, values: dict[str, Any], settings: Any, accept_changes: bool) -> Iterator[str]:
        self.values.append(values)
        self.accept_changes = accept_changes
        self.environment = settings.environment
        yield f"checked for {settings.nodes} nodes"
        if self.error:
            raise self.error


@pytest.fixture
def checked() -> Checked:
    return Checked()


@pytest.fixture
def cli(slurm: FakeSlurm, checked: Checked, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`crosslift ARGUMENTS` with run files that are plain mappings."""

    def load(config: Path, overrides: Sequence[str]) -> dict[str, Any]:
        given = dict(each.partition("=")[::2] for each in overrides)
        return {**yaml.safe_load(config.read_text()), **given}

    monkeypatch.setattr(requests, "load_values", load)
    monkeypatch.setattr(requests, "check_values", checked)
    monkeypatch.setattr("training.checks.inputs.paths_read", lambda values: [Path("/data")])
    monkeypatch.setattr(submit, "git_state", lambda: {"commit": "c0ffee", "dirty": "false"})
    app = typer.Typer(pretty_exceptions_enable=False)
    add_commands(app)
    for name in ("eval", "score"):
        app.command(name)(lambda: None)
    return lambda *arguments: Result(CliRunner().invoke(app, [str(each) for each in arguments]))


def record_steps(run: Path, step: int, total: int) -> None:
    """Record progress as a run does."""
    record = RunRecord(run)
    record.append("params", values={"max_steps": str(total)})
    record.append("metrics", step=step, values={"train/loss": 1.0})
    record.close()


def run_file(name: str = "run", **values: Any) -> Path:
    config = Path(f"{len(list(Path().glob('*.yaml')))}.yaml")
    config.write_text(yaml.safe_dump({"output_dir": f"runs/{name}", "seed": 0, **values}))
    return config


def submitted(folder: Path) -> Path:
    """The only submission's folder."""
    (found,) = [path for path in (folder / "slurm").iterdir() if path.is_dir()]
    return found


def test_a_run_is_checked_frozen_submitted_and_recorded(cli: Cli, slurm: FakeSlurm, checked: Checked) -> None:
    result = cli("submit", run_file(text="ü\n'"), "seed=4", "--nodes", 2, "--gpus-per-node", 8, "--offline")
    assert result.status == 0, result.error
    run = Path("runs/run").absolute()
    folder = submitted(run)
    lines = result.out.splitlines()
    assert lines[0] == "checked for 2 nodes"
    assert lines[1:3] == [f"job 12: train {run}, 2 node(s) of 8 rank(s)", f"  log: {folder}/train-12.out"]
    assert lines[3] == f"  MLflow: crosslift ui {run}"
    (job,) = read_jobs(run)
    assert (job.job, job.what, job.output, job.submission) == ("12", "train", f"{folder}/train-12.out", folder.name)
    assert slurm.calls("sbatch") == [["--parsable", str(folder / "train.sh")]]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"output_dir": str(run), "seed": "4", "text": "ü\n'"}
    assert json.loads((folder / "code" / "git.json").read_text()) == {"commit": "c0ffee", "dirty": "false"}
    script = (folder / "train.sh").read_text()
    assert f"readable=(--readable {folder}/config.yaml --readable /data)" in script
    assert checked.values == [{"output_dir": str(run), "seed": "4", "text": "ü\n'"}]


@pytest.mark.parametrize("accepted", [False, True])
def test_accept_changes_applies_to_the_check_and_to_the_job(cli: Cli, checked: Checked, accepted: bool) -> None:
    options = ["--accept-changes"] if accepted else []
    assert cli("submit", run_file(), "--gpus-per-node", 0, *options).status == 0
    assert checked.accept_changes == accepted
    folder = submitted(Path("runs/run").absolute())
    words = " ".join([f"{folder}/config.yaml", *options])
    assert f"arguments=({words})" in (folder / "train.sh").read_text()


def test_profile_is_passed_on_to_the_job(cli: Cli) -> None:
    assert cli("submit", run_file(), "--gpus-per-node", 0, "--profile", 3).status == 0
    folder = submitted(Path("runs/run").absolute())
    assert f"arguments=({folder}/config.yaml --profile 3)" in (folder / "train.sh").read_text()


def test_offline_applies_to_the_job_and_to_its_check(cli: Cli, checked: Checked) -> None:
    Path("slurm.yaml").write_text("environment: {HF_HOME: /work/hf, HF_HUB_OFFLINE: '0'}\n")
    assert cli("submit", run_file(), "--gpus-per-node", 0, "--offline", "--then", "score x").status == 0
    for name in ("train", "then-1"):
        script = (submitted(Path("runs/run")) / f"{name}.sh").read_text()
        assert "export HF_HOME=/work/hf\nexport HF_HUB_OFFLINE=1\n" in script
    assert checked.environment == {"HF_HOME": "/work/hf", "HF_HUB_OFFLINE": "1"}


def test_secrets_are_not_written_to_files(cli: Cli) -> None:
    assert cli("submit", run_file(), "--gpus-per-node", 0).status == 0
    for file in Path("runs").rglob("*"):
        if file.is_file():
            assert b"_hush" not in file.read_bytes(), file


def test_only_source_files_are_frozen(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for room in ("training", "modeling", "data_pipeline", "evals", "slurm"):
        (source / room / "__pycache__").mkdir(parents=True)
        for name in ("__init__.py", "data.yaml", ".env", ".secret.py", "notes.txt", "model.safetensors", "key.pem",
                     "__pycache__/a.py"):  # fmt: skip
            (source / room / name).write_text("x")
        (source / room / ".git").mkdir()
        (source / room / ".git" / "a.py").write_text("x")
    (source / "crosslift.py").write_text("x")
    (source / ".env").write_text("TOKEN=1")
    (source / "slurm" / "link.py").symlink_to("/etc/passwd")
    assert freeze_source(tmp_path / "copy", {}, source) == 11
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert {name for name in copied if name.startswith("slurm")} == {"slurm/__init__.py", "slurm/data.yaml"}
    assert len(copied) == 11


def test_the_frozen_source_is_complete(cli: Cli) -> None:
    """It can be imported by itself: everything that setuptools would install is there."""
    cli("submit", run_file(), "--gpus-per-node", 0)
    code = submitted(Path("runs/run")) / "code"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    program = (
        "import pathlib, crosslift, training.config, slurm.submit, data_pipeline.toy_problems as toy\n"
        "print(crosslift.__file__, len(list(pathlib.Path(toy.__file__).parent.glob('phrasings/*.yaml'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=code, env={**environment, "PYTHONPATH": str(code.absolute())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    place, phrasings = done.stdout.rsplit(maxsplit=1)
    assert place == str(code.absolute() / "crosslift.py")
    assert int(phrasings) > 5


def test_a_hostile_name_of_the_run_folder_is_passed_on_and_not_executed(
    cli: Cli, slurm: FakeSlurm, tmp_path: Path
) -> None:
    """The fake sbatch runs the script, and srun runs node.py, which then reports that it cannot read the data."""
    slurm.set("sbatch", "runs_jobs", "yes")
    result = cli("submit", run_file(NAME), "--gpus-per-node", 0, "--setup", 'export A="$(printf 1)"')
    assert result.status == 0, result.error
    run = Path("runs", NAME).absolute()
    assert read_jobs(run)[0].output == str(submitted(run) / "train-12.out")
    (call,) = slurm.calls("srun")
    assert f"--run={run}" in call
    assert call[-1] == str(submitted(run) / "config.yaml")
    assert slurm.environment()["A"] == "1"
    assert "cannot read /data; it must be on a disk that all nodes share" in slurm.job_output()
    assert slurm.job_status() == 2
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize(("name", "message"), [("a\nb", "output_dir: .*holds '\\\\n'"), ("a\\b", "holds a backslash"),
                                              ("a\x1b[2J", "holds '\\\\x1b'")])  # fmt: skip
def test_folder_names_that_slurm_cannot_handle_are_refused(cli: Cli, slurm: FakeSlurm, name: str, message: str) -> None:
    result = cli("submit", run_file(name), "--gpus-per-node", 0)
    assert result.status == 2
    assert re.search(message, result.error)
    assert len(result.error.splitlines()) == 1
    assert slurm.calls("sbatch") == []
    assert not Path("runs").exists()


def test_a_queued_run_is_not_queued_again(cli: Cli, slurm: FakeSlurm, checked: Checked) -> None:
    config = run_file()
    assert cli("submit", config, "--gpus-per-node", 0).status == 0
    slurm.set_output("squeue", "12|PENDING|Priority|0:00|\n")
    result = cli("submit", config, "--gpus-per-node", 0)
    run = Path("runs/run").absolute()
    assert (result.status, result.error) == (
        2,
        f"{run}: job 12 of this run is pending; wait for it, end it with `crosslift cancel {run}`, or give another "
        "output_dir",
    )
    assert len(slurm.calls("sbatch")) == len(checked.values) == len(read_jobs(run)) == 1
    slurm.set_output("squeue", "")
    assert cli("submit", config, "--gpus-per-node", 0).status == 0


def test_two_concurrent_submissions_of_a_run_are_refused(cli: Cli, slurm: FakeSlurm) -> None:
    with submission_lock(Path("runs/run").absolute()):
        result = cli("submit", run_file(), "--gpus-per-node", 0)
    assert result.status == 2
    assert "another crosslift submit is submitting this run" in result.error
    assert slurm.calls("sbatch") == []


@pytest.mark.parametrize("failing", ["sbatch refuses", "no sbatch", "no number", "check"])
def test_a_failed_submission_leaves_nothing_behind(
    cli: Cli, slurm: FakeSlurm, checked: Checked, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if failing == "sbatch refuses":
        slurm.set_output("sbatch", "", "sbatch: error: Batch job submission failed: no\n", 1)
    elif failing == "no sbatch":
        (slurm.path / "sbatch").unlink()
        monkeypatch.setenv("PATH", str(slurm.path))  # without this machine's sbatch
    elif failing == "no number":
        slurm.set_output("sbatch", "hello\n")
    else:
        checked.error = SlurmError("data: does not exist")
    result = cli("submit", run_file(), "--gpus-per-node", 0)
    assert result.status == 2
    assert len(result.error.splitlines()) == 1
    assert [path.name for path in Path("runs").rglob("*") if path.is_file()] in ([".lock"], [])
    assert not [path for path in Path("runs").glob("run/slurm/*") if path.is_dir()]


def test_when_a_following_job_is_refused_the_first_is_cancelled(cli: Cli, slurm: FakeSlurm) -> None:
    (slurm.path / "sbatch").write_text(
        f"#!/bin/sh\nif [ -e {slurm.folder}/first ]; then echo 'sbatch: error: full' >&2; exit 1; fi\n"
        f"touch {slurm.folder}/first; echo 12\n"
    )
    result = cli("submit", run_file(), "--gpus-per-node", 0, "--then", "score mgsm")
    assert (result.status, result.error) == (2, "sbatch refused the job: full")
    assert slurm.calls("scancel") == [["12"]]
    assert read_jobs(Path("runs/run")) == []


def test_a_chain_waits_for_success_and_has_the_runs_folder_in_its_commands(cli: Cli, slurm: FakeSlurm) -> None:
    result = cli("submit", run_file("a b"), "--gpus-per-node", 8, "--after", "7", "--after", "8_1", "--then",
                 "crosslift eval {run}/model --output '{run}/out x'", "--then", "score mgsm")  # fmt: skip
    assert result.status == 0, result.error
    run = Path("runs/a b").absolute()
    scripts = [(submitted(run) / f"{name}.sh").read_text() for name in ("train", "then-1", "then-2")]
    assert "#SBATCH --dependency=afterok:7,afterok:8_1\n" in scripts[0]
    for before, script in zip((12, 13), scripts[1:], strict=True):  # each waits for the one before
        assert f"#SBATCH --dependency=afterok:{before}\n#SBATCH --kill-on-invalid-dep=yes\n" in script
    assert f"arguments=(eval '{run}/model' --output '{run}/out x')" in scripts[1]
    assert [job.what for job in read_jobs(run)] == ["train", f"eval '{run}/model' --output '{run}/out x'", "score mgsm"]


def test_following_commands_use_the_cluster_of_the_run(cli: Cli, slurm: FakeSlurm) -> None:
    """With several clusters (SBATCH_CLUSTERS) Slurm chooses one for the run; its number is not valid on another."""
    slurm.set_output("sbatch", "12;c1\n")
    assert cli("submit", run_file(), "--gpus-per-node", 0, "--then", "score x").status == 0
    first, second = slurm.calls("sbatch")
    assert "--clusters=c1" not in first
    assert second == ["--parsable", "--clusters=c1", str(submitted(Path("runs/run").absolute()) / "then-1.sh")]


def test_variables_of_sbatch_apply_where_the_script_sets_no_option(
    cli: Cli, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.path / "sbatch").write_text("#!/bin/sh\nenv > " + str(slurm.folder / "seen") + "\necho 12\n")
    for name in ("ACCOUNT", "PARTITION", "QOS", "TIMELIMIT", "CONSTRAINT"):
        monkeypatch.setenv(f"SBATCH_{name}", "theirs")
    Path("slurm.yaml").write_text("sbatch: {constraint: a100}\n")

    def given() -> set[str]:
        lines = (slurm.folder / "seen").read_text().splitlines()
        return {line.partition("=")[0] for line in lines if line.startswith("SBATCH_")}

    assert cli("submit", run_file(), "--gpus-per-node", 0, "--account", "us", "--time", "60").status == 0
    assert given() == {"SBATCH_PARTITION", "SBATCH_QOS"}


def test_a_sweep_is_a_job_array_with_a_folder_per_run(cli: Cli, slurm: FakeSlurm, checked: Checked) -> None:
    result = cli("submit", run_file(), "--gpus-per-node", 0, "--array", "seed=1,2", "--array", "x=$(touch canary)",
                 "--then", "eval {run}", "--then", "score all")  # fmt: skip
    assert result.status == 0, result.error
    run = Path("runs/run").absolute()
    names = ["0-seed=1+x=__touch_canary_", "1-seed=2+x=__touch_canary_"]
    assert sorted(path.name for path in run.iterdir()) == [*names, "slurm"]
    assert [values["seed"] for values in checked.values] == ["1", "2"]
    frozen = [yaml.safe_load((submitted(run) / "configs" / f"{n}.yaml").read_text()) for n in (0, 1)]
    assert frozen == [{"output_dir": str(run / name), "seed": seed, "x": "$(touch canary)"}
                      for name, seed in zip(names, "12", strict=True)]  # fmt: skip
    then = [(submitted(run) / f"then-{n}.sh").read_text() for n in (1, 2)]
    assert "#SBATCH --array=0-1\n#SBATCH --dependency=aftercorr:12\n" in then[0]
    assert "--array" not in then[1]
    assert "#SBATCH --dependency=afterok:13\n" in then[1]
    (train, follower) = read_jobs(run / names[1])
    assert (train.job, follower.job) == ("12_1", "13_1")
    assert train.output == f"{submitted(run)}/train-12_1.out"
    slurm.set_output("squeue", "12_1|RUNNING|None|0:01|n1\n")
    element = cli("submit", run_file(f"run/{names[1]}"), "--gpus-per-node", 0)
    assert "job 12_1 of this run is running" in element.error


def test_a_sweep_of_one_run_is_an_array(cli: Cli, slurm: FakeSlurm) -> None:
    result = cli("submit", run_file(), "--gpus-per-node", 0, "--array", "seed=1", "--then", "score all",
                 "--then", "eval {run}")  # fmt: skip
    assert result.status == 0, result.error
    run = Path("runs/run").absolute()
    assert cli("logs", run).error == "job 12 is an array of 1 runs; give one run's folder, or 12_0"
    element = run / "0-seed=1"
    assert [(job.job, job.output) for job in read_jobs(element)] == [
        ("12_0", f"{submitted(run)}/train-12_0.out"), ("14_0", f"{submitted(run)}/then-2-14_0.out"),
    ]  # fmt: skip
    (submitted(run) / "train-12_0.out").write_text("trained\n")
    assert cli("logs", element).out == "trained\n"
    slurm.set_output("scontrol", f"JobId=12\n   StdOut={submitted(run)}/train-12_0.out\n")
    assert cli("logs", "12_0").out == "trained\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--array", "seed"), "--array 'seed': must be key.sub=value,value, such as seed=0,1,2"),
        (("--array", "seed=1,,2"), "--array 'seed=1,,2': must be key.sub=value,value, such as seed=0,1,2"),
        (("--array", "a b=1"), "--array 'a b=1': must be key.sub=value,value, such as seed=0,1,2"),
        (("--array", "s=1", "--array", "s=2"), "--array 's=2': s is given twice; put all its values into one"),
        (("--array", "output_dir=a,b"),
         "--array 'output_dir=a,b': every element gets its own folder below output_dir"),
        (("--array-limit", "2"), "--array-limit: needs --array"),
        (("--then", "evil x"), "--then 'evil x': must be a crosslift command, one of eval, score"),
        (("--then", "eval 'x"), "--then \"eval 'x\": No closing quotation"),
        (("--after", "x;y"), "--after x;y: must be a job's number, such as 1234 or 1234_5"),
        (("--time", "soon"),
         "--time: 'soon': must be minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S (such as 12:00:00) or UNLIMITED"),
        (("--nodes", "0"), "--nodes: input should be greater than or equal to 1 (found 0)"),
        (("--setup", "a\nb"), "--setup: 'a\\nb' holds '\\n'; must be one line without control characters"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_line(cli: Cli, slurm: FakeSlurm, options: tuple[str, ...], message: str) -> None:
    result = cli("submit", run_file(), "--gpus-per-node", 0, *options)
    assert (result.status, result.error) == (2, message)
    assert slurm.calls("sbatch") == []
    assert not Path("runs").exists()


def test_the_number_of_gpus_must_be_given(cli: Cli) -> None:
    assert cli("submit", run_file()).error.startswith("--gpus-per-node: not given, nor in slurm.yaml; 0 means")
    Path("slurm.yaml").write_text("gpus_per_node: 4\n")
    assert cli("submit", run_file()).status == 0


def test_a_dry_run_only_prints_scripts_and_commands(cli: Cli, slurm: FakeSlurm, checked: Checked) -> None:
    config = run_file()
    before = sorted(Path().rglob("*"))
    result = cli("submit", config, "--gpus-per-node", 0, "--dry-run", "--then", "score x")
    assert result.status == 0
    assert "#SBATCH --job-name=run\n" in result.out
    assert "#SBATCH --dependency=afterok:JOB_OF_train\n" in result.out
    assert result.out.count("\n# sbatch --parsable ") == 2
    as_json = json.loads(cli("submit", config, "--gpus-per-node", 0, "--dry-run", "--json").out)
    assert [set(job) for job in as_json] == [{"script", "command"}]
    assert sorted(Path().rglob("*")) == before
    assert slurm.calls("sbatch") == slurm.calls("squeue") == checked.values == []


def test_a_sweep_over_two_keys_and_lists_can_run_in_a_container(cli: Cli) -> None:
    options = ("--container", "/i.sif", "--array", "a=[1,2],{b: 3}", "--array", "seed=1")
    result = cli("submit", run_file(), "--gpus-per-node", 0, *options)
    assert result.status == 0, result.error
    run = Path("runs/run").absolute()
    script = (submitted(run) / "train.sh").read_text()
    for name in ("0-a=_1_2_+seed=1", "1-a=_b__3_+seed=1"):
        assert f"--bind {run}/{name}:{run}/{name}" in script


def test_values_of_a_sweep_are_split_outside_of_brackets_and_quotes() -> None:
    assert [*sweep_points(["a=[1,2],{b: 3, c: 4},'x,y'"]).values()] == [
        ("a=[1,2]",), ("a={b: 3, c: 4}",), ("a='x,y'",),
    ]  # fmt: skip
    with pytest.raises(SlurmError, match=r"1001 elements; at most 1000"):
        sweep_points([f"a={','.join(map(str, range(1001)))}"])


# --- status, logs, cancel


@pytest.fixture
def queued(cli: Cli) -> Path:
    assert cli("submit", run_file(), "--gpus-per-node", 0, "--then", "score x").status == 0
    record_steps(Path("runs/run"), 3, 9)
    return Path("runs/run").absolute()


def test_status_of_queued_past_and_forgotten_jobs(cli: Cli, slurm: FakeSlurm, queued: Path) -> None:
    slurm.set_output("squeue", "12|RUNNING|None|1:02|n[1-2]\n13|PENDING|Dependency|0:00|\n")
    assert cli("status", queued).out.splitlines() == [
        "job 12 (train): running for 1:02 on n[1-2]",
        "job 13 (score x): pending (Dependency) for 0:00",
        "step 3 of 9",
    ]
    slurm.set_output("squeue", "")
    slurm.set_output("scontrol", "", "Invalid job id specified", 1)
    assert "no longer listed by Slurm" in cli("status", queued).out
    slurm.set_output("sacct", "12|FAILED|00:00:09|n1|1:0|2\n")
    found = json.loads(cli("status", queued, "--json").out)
    assert found["progress"] == "step 3 of 9"
    assert [(job["state"], job["exit"], job["restarts"]) for job in found["jobs"]] == [
        ("FAILED", "1:0", 2),
        ("UNKNOWN", None, None),
    ]


def test_status_of_a_sweep_shows_the_step_of_each_run(cli: Cli, slurm: FakeSlurm) -> None:
    assert cli("submit", run_file(), "--gpus-per-node", 0, "--array", "seed=1,2", "--then", "score x").status == 0
    for name in ("0-seed=1", "1-seed=2"):
        record_steps(Path("runs/run") / name, 3, 9)
    slurm.set_output("squeue", "12_0|RUNNING|None|1:02|n1\n12_1|PENDING|Priority|0:00|\n13|PENDING|Dependency|0:00|\n")
    assert cli("status", "runs/run").out.splitlines() == [
        "job 12_0 (train): running for 1:02 on n1; step 3 of 9",
        "job 12_1 (train): pending (Priority) for 0:00; step 3 of 9",
        "job 13 (score x): pending (Dependency) for 0:00",
    ]
    found = json.loads(cli("status", "runs/run", "--json").out)
    assert [found["progress"], *(job["progress"] for job in found["jobs"])] == [
        None,
        "step 3 of 9",
        "step 3 of 9",
        None,
    ]


def test_an_element_of_a_sweep_is_found_by_its_job_number(cli: Cli, slurm: FakeSlurm) -> None:
    assert cli("submit", run_file(), "--gpus-per-node", 0, "--array", "seed=1,2").status == 0
    slurm.set_output("scontrol", f"JobId=12\n   StdOut={submitted(Path('runs/run').absolute())}/train-12_1.out\n")
    log = Path("runs/run/1-seed=2/logs/rank-00000.log")
    log.parent.mkdir()
    log.write_text("rank 0 of it\n")
    assert cli("logs", "12_1", "--rank", 0).out == "rank 0 of it\n"


def test_a_run_is_found_by_its_job_number(cli: Cli, slurm: FakeSlurm, queued: Path) -> None:
    output = read_jobs(queued)[0].output
    slurm.set_output("scontrol", f"JobId=12 JobName=run\n   JobState=RUNNING Reason=None X=y\n   StdOut={output}\n")
    slurm.set_output("squeue", "12|RUNNING|None|1:02|n1\n")
    assert cli("status", "12").out.splitlines()[0] == "job 12 (train): running for 1:02 on n1"
    slurm.set_output("scontrol", "", "Invalid job id specified", 1)
    assert cli("status", "12").error == "12: Slurm has no such job of a run; give the run's folder"


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_a_folder_without_jobs_is_refused(cli: Cli, tmp_path: Path, command: str) -> None:
    result = cli(command, tmp_path)
    assert (result.status, result.error) == (
        2, f"{tmp_path}: no run there, neither jobs (slurm/jobs.jsonl) nor a record (record.jsonl); give a run's "
        "folder or a job's number",
    )  # fmt: skip


def test_a_damaged_line_of_jobs_jsonl_is_named(cli: Cli, queued: Path) -> None:
    with (queued / "slurm" / "jobs.jsonl").open("a") as file:
        file.write('{"job": 1}\n')
    assert cli("status", queued).error == f"{queued}/slurm/jobs.jsonl:3: not a line of this file; remove it"


def test_logs_of_the_job_and_of_a_rank(cli: Cli, slurm: FakeSlurm, queued: Path) -> None:
    slurm.set_output("squeue", "12|PENDING|Priority|0:00|\n13|PENDING|Dependency|0:00|\n")
    output = read_jobs(queued)[0].output
    assert cli("logs", queued).error == f"{output}: does not exist yet; job 12 is pending, job 13 is pending"
    Path(output).write_text("ä\nb")
    assert cli("logs", queued).out == "ä\nb"
    assert cli("logs", queued, "--rank", 1).error.endswith("no rank has a log yet")
    (queued / "logs").mkdir()
    for rank in (0, 1):
        (queued / "logs" / f"rank-{rank:05d}.log").write_text(f"rank {rank}\n")
    assert cli("logs", queued, "--rank", 1).out == "rank 1\n"
    assert cli("logs", queued, "--rank", 2).error.endswith("ranks with a log: 0 to 1")


def test_a_log_is_followed_until_the_job_ends(slurm: FakeSlurm, queued: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "FOLLOW_INTERVAL_S", 0.01)
    monkeypatch.setattr(jobs, "QUERY_INTERVAL_S", 0.0)
    slurm.set_output("squeue", "12|RUNNING|None|1:02|n1\n")
    target = find(str(queued))
    file = log_file(target, None)
    pieces = read_log(file, target, follow=True)
    file.write_text("one\n")
    assert next(pieces) == "one\n"
    with file.open("a") as log:
        log.write("two\n")
    assert next(pieces) == "two\n"
    with file.open("a") as log:
        log.write("last line\n")
    slurm.set_output("squeue", "")
    assert list(pieces) == ["last line\n"]


def test_cancel_ends_queued_jobs_in_reverse_order(cli: Cli, slurm: FakeSlurm, queued: Path) -> None:
    slurm.set_output("squeue", "12|PENDING|Priority|0:00|\n13|PENDING|Dependency|0:00|\n")
    assert cli("cancel", queued).out == "cancelled: job 13, job 12\n"
    assert slurm.calls("scancel") == [["13", "12"]]
    slurm.set_output("squeue", "")
    assert cli("cancel", queued).out == "no job is pending or running\n"
    assert len(slurm.calls("scancel")) == 1


def test_cancel_lets_a_running_training_save_a_checkpoint(cli: Cli, slurm: FakeSlurm, queued: Path) -> None:
    slurm.set_output("squeue", "12|RUNNING|None|1:02|n1\n13|PENDING|Dependency|0:00|\n")
    assert cli("cancel", queued).out.splitlines() == [
        "cancelled: job 13", "job 12 saves a checkpoint and ends (`scancel 12` does not wait for it)",
    ]  # fmt: skip
    assert slurm.calls("scancel") == [["13"], ["--batch", "--signal=ALRM", "12"]]


def test_each_run_of_a_sweep_is_cancelled_according_to_its_state(cli: Cli, slurm: FakeSlurm) -> None:
    """Pending runs first, or they would start in place of those that end; a command has nothing to save."""
    assert cli("submit", run_file(), "--gpus-per-node", 0, "--array", "seed=1,2,3", "--then", "eval {run}").status == 0
    slurm.set_output("squeue", "12_0|RUNNING|None|1:02|n1\n12_1|RUNNING|None|1:02|n1\n12_2|PENDING|Priority|0:00|\n"
                         "13_0|RUNNING|None|0:01|n1\n")  # fmt: skip
    assert cli("cancel", "runs/run").out.startswith("cancelled: job 13, job 12_2\njob 12_0 saves")
    assert slurm.calls("scancel") == [["13", "12_2"], ["--batch", "--signal=ALRM", "12_0", "12_1"]]
