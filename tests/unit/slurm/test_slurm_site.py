"""Settings of jobs: three layers, every mistake in one line with file and key, values that no script can contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from slurm import site
from slurm.errors import SlurmError
from slurm.site import load_settings
from slurm.spec import Container, Element, JobSettings, JobSpec, seconds

ROOT = Path(__file__).resolve().parents[3]


def test_later_layers_override_key_by_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    user = site.user_file()
    user.parent.mkdir(parents=True)
    user.write_text(
        "partition: one\naccount: mine\nqos: low\nenvironment: {A: '1', B: '1', C: '1'}\nsbatch: {constraint: a100}\n"
    )
    (tmp_path / "slurm.yaml").write_text("partition: two\nqos: null\nenvironment: {B: '2', A: null}\n")
    found = load_settings({"partition": None, "account": "yours", "nodes": 3})
    assert (found.partition, found.account, found.qos, found.nodes) == ("two", "yours", None, 3)
    assert found.environment == {"B": "2", "C": "1"}
    assert found.sbatch == {"constraint": "a100"}


def test_another_image_keeps_the_mounts_and_program_of_the_site(tmp_path: Path) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text("container: {image: a.sif, mounts: ['/scratch:/scratch'], command: singularity exec}\n")
    found = load_settings({"container": {"image": "b.sif"}}, (file,)).container
    assert found == Container(image="b.sif", mounts=("/scratch:/scratch",), command=("singularity", "exec"))


def test_without_files_the_defaults_apply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load_settings({}) == JobSettings()


def test_the_example_file_is_valid() -> None:
    found = load_settings({}, (ROOT / "configs" / "slurm-site.example.yaml",))
    assert (found.time, found.ranks, found.grace) == ("24:00:00", 8, 300)
    assert "constraint" in found.sbatch


MISTAKES = [
    ("partitoin: gpu", "partitoin: unknown key; did you mean 'partition'?"),
    ("container: {image: a, monts: [b]}", "container.monts: unknown key; did you mean 'mounts'?"),
    ("nodes: many", "nodes: input should be a valid integer, unable to parse string as an integer (found 'many')"),
    ("nodes: 0", "nodes: input should be greater than or equal to 1 (found 0)"),
    ("time: tomorrow", "time: 'tomorrow': must be minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S (such as 12:00:00) or "
     "UNLIMITED"),
    ("mem: lots", "mem: 'lots': must be a number with K, M, G or T, such as 500G; 0 is all of a node"),
    ('partition: "a\\nb"', "partition: 'a\\nb' holds '\\n'; must be one line without control characters"),
    ('setup: ["a\\rb"]', "setup.0: 'a\\rb' holds '\\r'; must be one line without control characters"),
    ("environment: {HF_TOKEN: x}", "environment: HF_TOKEN looks like a secret, and job scripts are files; set it in "
     "the shell that submits, from which jobs inherit it"),
    ("environment: {MLFLOW_TRACKING_URI: 'http://u:pw@h'}", "environment: MLFLOW_TRACKING_URI holds an address with a "
     "login, and job scripts are files; set it in the shell that submits, from which jobs inherit it"),
    ("environment: {PROXY: 'https://hush@h'}", "environment: PROXY holds an address with a login, and job scripts are "
     "files; set it in the shell that submits, from which jobs inherit it"),
    ("environment: {1A: x}", "environment: '1A' is not a valid name of a variable"),
    ("sbatch: {nodes: 2}", "sbatch: nodes is set by crosslift; use nodes"),
    ("sbatch: {output: x}", "sbatch: output is set by crosslift"),
    ("sbatch: {'a b': x}", "sbatch: 'a b' is not an option; write it as sbatch does, such as constraint: a100"),
    ('sbatch: {constraint: "a\\nb"}', "sbatch: constraint: 'a\\nb' is not one line without control characters"),
    ("gpus_per_node: a100", "gpus_per_node: 'a100': must be a number of GPUs, or TYPE:NUMBER such as a100:4"),
    ("gpus_per_node: -1", "gpus_per_node: -1: must be a number of GPUs, or TYPE:NUMBER such as a100:4"),
    ("gpus_per_node: 'a100:'", "gpus_per_node: 'a100:': must be a number of GPUs, or TYPE:NUMBER such as a100:4"),
    ("{gpus_per_node: 'a100:2', nproc_per_node: 4}", "nproc_per_node: 4 ranks for 2 GPUs; at most one each"),
    ("{gpus_per_node: 2, nproc_per_node: 4}", "nproc_per_node: 4 ranks for 2 GPUs; at most one each"),
    ('{time: "5", grace_seconds: 300}', "grace_seconds: 300 is not less than the time limit, 5"),
    ("- a", "must hold a mapping of keys, not list"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text(text)
    with pytest.raises(SlurmError) as refused:
        load_settings({}, (file,))
    assert str(refused.value) == f"{file}: {message}"
    assert refused.value.exit_status == 2


def test_values_that_only_resemble_secrets_are_accepted(tmp_path: Path) -> None:
    plain = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_TOKEN_PATH": "/a",
        "DB": "postgresql://me@h/db",
        "URI": "http://h/a@b",
    }
    assert JobSettings(environment=plain).environment == plain


def test_times_and_numbers_are_read_as_written(tmp_path: Path) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text("time: 12:00:00\nmax_requeues: 1e1\ngpu_memory_gib: 8e1\nsbatch: {constraint: no}\n")
    with pytest.raises(SlurmError, match="sbatch: constraint is the text 'no'; write true or false"):
        load_settings({}, (file,))
    file.write_text("time: 12:00:00\nmax_requeues: 1e1\ngpu_memory_gib: 8e1\n")
    found = load_settings({}, (file,))
    assert (found.time, found.max_requeues, found.gpu_memory_gib) == ("12:00:00", 10, 80)
    file.write_text("time: 90\n")
    assert load_settings({}, (file,)).time == "90"
    file.write_text("gpu_memory_gib: .inf\n")
    with pytest.raises(SlurmError, match="gpu_memory_gib: input should be a finite number"):
        load_settings({}, (file,))


def test_variables_in_paths_are_expanded_on_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch/ada")
    monkeypatch.delenv("NOWHERE", raising=False)
    file = tmp_path / "slurm.yaml"
    file.write_text(
        "python: ~/venv/bin/python\ncontainer: {image: $SCRATCH/a.sif, mounts: ['$SCRATCH:/data']}\n"
        "environment: {HF_HOME: '${SCRATCH}/hf'}\n"
    )
    found = load_settings({"container": {"image": "~/b.sif"}}, (file,))
    assert found.python == "/home/ada/venv/bin/python"
    assert found.container == Container(image="/home/ada/b.sif", mounts=("/scratch/ada:/data",))
    assert found.environment == {"HF_HOME": "/scratch/ada/hf"}
    file.write_text("environment: {HF_HOME: $NOWHERE/hf}\n")
    with pytest.raises(SlurmError, match=r"environment.HF_HOME: .* names the variable NOWHERE, which is not set here"):
        load_settings({}, (file,))


def test_two_mistakes_are_two_lines(tmp_path: Path) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text("container: {imge: a}")
    with pytest.raises(SlurmError) as refused:
        load_settings({}, (file,))
    assert str(refused.value).splitlines() == [
        f"{file}: container.image: required, but missing",
        f"{file}: container.imge: unknown key; did you mean 'image'?",
    ]


def test_a_mistake_in_an_option_names_the_option() -> None:
    with pytest.raises(SlurmError, match=r"^--time: 'soon': must be minutes"):
        load_settings({"time": "soon"}, ())
    with pytest.raises(SlurmError, match=r"^--cpus-per-task: input should be greater"):
        load_settings({"cpus_per_task": 0}, ())


def test_invalid_yaml_is_reported_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text("a: 1\nb: [\n")
    with pytest.raises(SlurmError, match=rf"^{file}:3: not valid YAML: "):
        load_settings({}, (file,))


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-2:30", 95400), ("1-2:30:05", 95405),
        ("0", None), ("0:00:00", None), ("0-0", None), ("UNLIMITED", None), ("unlimited", None), ("INFINITE", None),
    ],
)  # fmt: skip
def test_time_limits_as_slurm_reads_them(time: str, expected: int | None) -> None:
    assert seconds(time) == expected


@pytest.mark.parametrize("text", ["time: 0", "time: UNLIMITED", 'time: "0"'])
def test_a_job_without_a_time_limit_may_have_any_grace_period(tmp_path: Path, text: str) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text(f"{text}\ngrace_seconds: 600\n")
    found = load_settings({}, (file,))
    assert (found.time_limit, found.grace) == (None, 600)
    assert load_settings({"grace_seconds": 7}, ()).time is None


@pytest.mark.parametrize(
    ("value", "written", "number"),
    [(8, "8", 8), ("8", "8", 8), ("a100:4", "a100:4", 4), ("gpu:h100-80gb:2", "h100-80gb:2", 2), (0, "0", 0),
     ("a100:0", "a100:0", 0), ("08", "8", 8)],
)  # fmt: skip
def test_gpus_are_normalised_to_slurms_notation(value: object, written: str, number: int) -> None:
    found = load_settings({"gpus_per_node": value}, ())
    assert (found.gpus_per_node, found.gpus, found.ranks) == (written, number, number or 1)


def test_an_option_overrides_the_gpu_type_of_the_site(tmp_path: Path) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text("gpus_per_node: a100:4\n")
    assert load_settings({}, (file,)).gpus_per_node == "a100:4"
    assert load_settings({"gpus_per_node": "2"}, (file,)).gpus_per_node == "2"


def test_short_jobs_have_a_shorter_grace_period() -> None:
    assert JobSettings(time="4").grace == 60
    assert JobSettings(time="1-0").grace == JobSettings().grace == 300
    assert JobSettings(time="4", grace_seconds=30).grace == 30


def spec(place: Path, **changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "name": "run", "kind": "train", "stem": "train", "settings": JobSettings(gpus_per_node=0), "folder": place,
        "code": place, "chdir": place, "python": "python3",
        "elements": (Element(run_dir=place, arguments=("config.yaml",)),),
    }  # fmt: skip
    return JobSpec(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a\nb"}, r"holds '\\n'"),
        ({"folder": Path("/a\x1bb")}, r"holds '\\x1b'"),
        ({"folder": Path("/a\\b")}, "holds a backslash, which prevents Slurm from putting job numbers into file names"),
        ({"chdir": Path("/a\nb")}, r"holds '\\n'"),
        ({"after": ("12; rm",)}, "must be a job's number, such as 1234 or 1234_5"),
        ({"python": "a\nb"}, r"holds '\\n'"),
    ],
)
def test_values_that_no_script_can_contain_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(tmp_path, **changes)
    assert spec(tmp_path).name == "run"
