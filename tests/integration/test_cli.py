"""The command line: fast help, one line and status 2 for mistakes of the user, and commands that show a run's data."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

import crosslift

ROOT = Path(__file__).resolve().parents[2]


class Result(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`crosslift ARGUMENTS`, in this process: torch is imported once for all tests."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["crosslift", *map(str, arguments)])
        capsys.readouterr()
        try:
            crosslift.main()
            status: Any = 0
        except SystemExit as end:
            status = end.code or 0
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory, prepared_run: Any) -> Path:
    """The run file of the run that is prepared already."""
    values = prepared_run.config.model_dump(mode="json")
    path = tmp_path_factory.mktemp("cli") / "run.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def refused(result: Result) -> str:
    """The one line of an error; `check` may have printed results before it."""
    assert result.status == 2
    assert "ready to train" not in result.out
    assert result.err.endswith("\n")
    (line,) = result.err.splitlines()
    assert line.startswith("crosslift: ")
    return line.removeprefix("crosslift: ")


def objects(result: Result) -> list[dict[str, Any]]:
    assert result.status == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


# --- help


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group of commands, by its words."""
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = list(commands(typer.main.get_command(crosslift.app)))


def test_commands_at_every_depth_are_found() -> None:
    assert {(), ("train",), ("check",), ("data",), ("data", "plan"), ("data", "inspect"), ("export",)} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "crosslift")
def test_help_has_an_example_and_is_fast(command: tuple[str, ...]) -> None:
    """Below one second of CPU time, which, unlike wall time, does not depend on the load of the machine."""
    arguments = [sys.executable, str(ROOT / "crosslift.py"), *command, "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    text = " ".join(done.stdout.split())
    is_group = any(each[: len(command)] == command and each != command for each in COMMANDS)
    assert is_group or f"Example: crosslift {' '.join(command)} " in text


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("crosslift", {"torch", "transformers", "deepspeed", "mlflow", "datasets", "numpy", "pydantic", "yaml"}),
        ("training.config", {"torch", "transformers", "deepspeed", "mlflow", "datasets"}),
    ],
)
def test_help_and_config_import_nothing_heavy(module: str, heavy: set[str]) -> None:
    """So that help and errors in run files are fast; times would depend on the load of the machine."""
    code = f"import {module}, sys; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "")


# --- errors


def test_a_real_process_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crosslift", "check", str(tmp_path / "absent.yaml")],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"crosslift: {tmp_path / 'absent.yaml'}: no such file\n"


@pytest.mark.parametrize("command", [("check",), ("train",), ("data", "inspect"), ("data", "plan")])
def test_every_command_refuses_a_bad_config(cli: Cli, shared_file: Path, command: tuple[str, ...]) -> None:
    line = refused(cli(*command, shared_file, "max_stepz=3"))
    assert line == f"{shared_file}: max_stepz: unknown key; did you mean 'max_steps'?"


def test_two_mistakes_are_two_lines(cli: Cli, shared_file: Path) -> None:
    result = cli("check", shared_file, "max_steps=0", "precision=fp8")
    assert (result.status, result.out) == (2, "")
    assert [line.split(": ")[-2].split(":")[-1].strip() for line in result.err.splitlines()] == [
        "max_steps",
        "precision",
    ]


def test_ctrl_c_ends_a_command_without_a_traceback(
    cli: Cli, shared_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.run_file.load_config", interrupted)
    result = cli("check", shared_file)
    assert (result.status, result.out) == (130, "")
    assert "Traceback" not in result.err


def test_a_bad_override_is_named(cli: Cli, shared_file: Path) -> None:
    assert refused(cli("check", shared_file, "max_steps")).startswith("override 'max_steps': must be key.sub=value")


def write_data(folder: Path, *lines: str, name: str = "en.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def row(number: int, language: str = "en", **changes: str) -> str:
    return json.dumps({"id": f"i{number}", "language": language, "question": f"{number}?", "answer": "1"} | changes)


@pytest.fixture
def data_file(tmp_path: Path, run_file: Callable[..., Path]) -> Path:
    """A run file whose data_dir is `tmp_path/data`, with English and German declared."""
    return run_file(tmp_path, **{"data_dir": str(tmp_path / "data"), "data.languages": ["en", "de"]})


def test_a_missing_data_dir_is_named(cli: Cli, data_file: Path, tmp_path: Path) -> None:
    assert refused(cli("check", data_file)) == f"data_dir: {tmp_path / 'data'}: no such folder"
    (tmp_path / "data").mkdir()
    line = refused(cli("check", data_file))
    assert line == f"data.sources.0.files: no file matches {tmp_path / 'data' / '*.jsonl'}"


def test_mistakes_of_different_kinds_are_reported_together(cli: Cli, data_file: Path, tmp_path: Path) -> None:
    """An unknown key, a bad value, a bad override and two missing folders: one line each, exit status 2."""
    result = cli("train", data_file, "max_stepz=3", "seed=x", "no equals sign", "model.path=./none", "model.init=null")
    assert result.status == 2
    assert result.err.removeprefix("crosslift: ").splitlines() == [
        "override 'no equals sign': must be key.sub=value, e.g. max_steps=100",
        f"{data_file}: seed: input should be a valid integer, unable to parse string as an integer (found 'x')",
        f"{data_file}: max_stepz: unknown key; did you mean 'max_steps'?",
        f"{data_file}: data_dir: {tmp_path / 'data'}: no such folder",
        f"{data_file}: model.path: ./none: no such folder",
    ]


def test_an_impossible_output_dir_is_named(cli: Cli, data_file: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data", row(1), row(1, "de"))
    (tmp_path / "taken").write_text("a file")
    for command in (("check",), ("data", "inspect"), ("train",)):
        line = refused(cli(*command, data_file, f"output_dir={tmp_path / 'taken'}"))
        assert line.startswith(f"{data_file}: output_dir: {tmp_path / 'taken'}: is a file")
        assert (tmp_path / "taken").read_text() == "a file"


def test_sources_without_rows_are_named(cli: Cli, data_file: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    assert "source 'problems' has no usable rows" in refused(cli("check", data_file))


def test_a_declared_language_without_rows_is_named(cli: Cli, data_file: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data", row(1), row(2))
    line = refused(cli("check", data_file))
    assert line.startswith("language 'de' of data.languages has nothing to train on")


def test_an_undeclared_language_is_named_with_its_line(cli: Cli, data_file: Path, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", row(1), row(1, "de"), row(2, "fr"))
    line = refused(cli("check", data_file))
    assert line.startswith(f"{folder / 'en.jsonl'}:3: language 'fr' is not declared; data.languages are de, en")


def test_a_broken_line_is_named_with_file_and_line(cli: Cli, data_file: Path, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", row(1), row(1, "de"), '{"id": "i2", "lang')
    line = refused(cli("data", "plan", data_file))
    assert line.startswith(f"{folder / 'en.jsonl'}:3: not valid JSON")
    assert "max_bad_rows is 0" in line


def test_a_missing_column_is_named_with_the_existing_ones(cli: Cli, data_file: Path, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", json.dumps({"id": "1", "language": "en", "prompt": "a", "answer": "b"}))
    line = refused(cli("check", data_file))
    assert line.startswith(str(folder / "en.jsonl"))
    assert all(name in line for name in ("'question'", "'prompt'", "'answer'"))


def test_steps_of_the_plan_are_checked(cli: Cli, shared_file: Path) -> None:
    for steps in ("5", "a:b", "3:", ":"):
        assert refused(cli("data", "plan", shared_file, "--steps", steps)).startswith(f"--steps '{steps}': must be A:B")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.train.vocab_size=90000", "tokenizer.train.vocab_size: 90000 is too large"),
        ("model.init.hidden_sise=3", "hidden_sise: not a key of LlamaConfig; the nearest is 'hidden_size'"),
        ("model.init.model_type=lama", "model_type: 'lama' is not a model type of transformers"),
        ("data.template={name: chat}", "has no chat template"),
        (
            "data.mixture={strategy: explicit, weights: {fr: 1}}",
            "data: 'mixture.weights' names 'fr'; 'languages' has en, de, sw, zh",
        ),
        ("data.micro_batch_tokens=96", "data.micro_batch_tokens: 96, but a contrast set takes about"),
        ("data.heldout_items=40", "heldout_items is 40, but the sources have only 40 items"),
    ],
)
def test_impossible_runs_are_refused_before_training(
    cli: Cli, tmp_path: Path, run_file: Callable[..., Path], override: str, message: str
) -> None:
    assert message in refused(cli("check", run_file(tmp_path), override))


# --- commands that show data


def test_check_reports_everything_and_ends_with_ready(cli: Cli, shared_file: Path) -> None:
    result = cli("check", shared_file)
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[-1] == "ready to train"
    for language in ("en", "de", "sw", "zh"):
        assert re.search(rf"^{language} +40 +0$", result.out, re.MULTILINE)
        assert re.search(
            rf"^--- {language}  .*{language}\.jsonl:\d+  \d+ tokens, \d+ labels$", result.out, re.MULTILINE
        )
    assert result.out.count("⟦label: ") == 4
    assert "in 12 steps of 8 slots:" in lines
    assert re.search(r"^sw +40 +24 +0\.60 +25\.0% +0\.0% of 40 rows$", result.out, re.MULTILINE)
    assert not any(line.startswith("warning") for line in lines)
    assert any(line.startswith("layout: packed") for line in lines)
    assert any(line.startswith("model: ") and "2 layers" in line for line in lines)


def test_check_counts_overlong_rows_and_names_one_if_they_are_an_error(cli: Cli, shared_file: Path) -> None:
    result = cli("check", shared_file, "data.sequence_length=60")
    assert result.status == 0, result.err
    (warning,) = [line for line in result.out.splitlines() if line.startswith("warning")]
    assert re.fullmatch(
        r"warning: rows longer than data.sequence_length \(60\) are left out, their slots stay empty: "
        r"(\w+ [\d.]+%(, |;))+ raise data.sequence_length, or set data.overlong=truncate",
        warning,
    )
    result = cli("check", shared_file, "data.sequence_length=60", "data.overlong=truncate")
    assert result.status == 0, result.err
    assert "(60) are cut to fit: " in result.out
    line = refused(cli("check", shared_file, "data.sequence_length=60", "data.overlong=error"))
    assert re.fullmatch(r".*/en\.jsonl:\d+: \d+ tokens, data\.sequence_length is 60; shorten the row, raise .*", line)


def test_inspect_shows_every_language(cli: Cli, shared_file: Path, corpus: Path) -> None:
    """The requested number of samples, with the user's words and the answer marked."""
    result = cli("data", "inspect", shared_file, "--samples", 3)
    assert result.status == 0, result.err
    shown = re.findall(r"^--- (\w+)  (.*):(\d+)  ", result.out, re.MULTILINE)
    assert Counter(language for language, _, _ in shown) == dict.fromkeys(("en", "de", "sw", "zh"), 3)
    assert len(set(shown)) == 12
    for language, file, number in shown:
        assert file == str(corpus / f"{language}.jsonl")
        record = json.loads((corpus / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()[int(number) - 1])
        assert f"⟦content: {record['question']}⟧\n⟦label: {record['answer']}</s>⟧" in result.out


def test_heldout_items_are_counted(cli: Cli, shared_file: Path) -> None:
    result = cli("data", "inspect", shared_file, "data.heldout_items=5")
    assert len(re.findall(r"^\w\w +35 +5$", result.out, re.MULTILINE)) == 4


def test_plan_prints_one_json_line_per_micro_batch(cli: Cli, shared_file: Path) -> None:
    lines = objects(cli("data", "plan", shared_file, "--steps", "2:5", "--world-size", 2))
    assert [set(line) for line in lines] == [{"step", "rank", "micro_step", "ids", "languages"}] * len(lines)
    places = [(line["step"], line["rank"], line["micro_step"]) for line in lines]
    assert places == sorted(places)
    assert {(step, rank) for step, rank, _ in places} == {(step, rank) for step in (2, 3, 4) for rank in (0, 1)}
    for line in lines:
        assert len(line["ids"]) == len(line["languages"]) > 0
        assert set(line["languages"]) <= {"en", "de", "sw", "zh"}


def read_by_step(lines: list[dict[str, Any]]) -> dict[int, Counter[tuple[str, str]]]:
    read: dict[int, Counter[tuple[str, str]]] = {}
    for line in lines:
        read.setdefault(line["step"], Counter()).update(zip(line["ids"], line["languages"], strict=True))
    return read


def test_the_plan_is_the_same_on_any_number_of_ranks_and_from_any_step(cli: Cli, shared_file: Path) -> None:
    one, two, four = (
        read_by_step(objects(cli("data", "plan", shared_file, "--steps", "0:6", "--world-size", ranks)))
        for ranks in (1, 2, 4)
    )
    assert one == two == four
    assert {step: samples.total() for step, samples in one.items()} == dict.fromkeys(range(6), 8)
    later = read_by_step(objects(cli("data", "plan", shared_file, "--steps", "4:6")))
    assert later == {step: one[step] for step in (4, 5)}
    other = read_by_step(objects(cli("data", "plan", shared_file, "seed=4", "--steps", "0:6")))
    assert other != one


def test_the_plan_follows_the_mixture(cli: Cli, shared_file: Path) -> None:
    """Three English slots to one Swahili slot; samples have the language that the line gives."""
    mixture = "data.mixture={strategy: explicit, weights: {en: 3, sw: 1}}"
    lines = objects(cli("data", "plan", shared_file, mixture, "--steps", "0:4"))
    assert Counter(language for line in lines for language in line["languages"]) == {"en": 24, "sw": 8}


def test_a_range_of_no_steps_prints_nothing(cli: Cli, shared_file: Path) -> None:
    assert cli("data", "plan", shared_file, "--steps", "3:3") == Result(0, "", "")


def test_only_json_lines_are_printed(cli: Cli, shared_file: Path) -> None:
    assert cli("data", "plan", shared_file).err == ""


# --- paths, numbers and places on the command line


def test_home_and_variables_are_expanded_in_path_options(
    cli: Cli, run_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    run_file(tmp_path)
    assert cli("tokenizer", "~/run.yaml", "output_dir=~/run", "--output=~/tokenizer").status == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    line = refused(cli("tokenizer", "~/run.yaml", "--output=$NOWHERE/tokenizer"))
    assert line.startswith("--output: '$NOWHERE/tokenizer' names the variable NOWHERE, which is not set here")
    line = refused(cli("check", "~/run.yaml", "output_dir=$NOWHERE/run"))
    assert line.startswith(f"{tmp_path / 'run.yaml'}: output_dir: '$NOWHERE/run' names the variable NOWHERE")


def _with_output(command: tuple[str, ...]) -> bool:
    found: Any = typer.main.get_command(crosslift.app)
    for word in command:
        found = found.commands[word]
    return any(parameter.name == "output" for parameter in found.params)


@pytest.mark.parametrize("command", filter(_with_output, COMMANDS), ids=" ".join)
def test_an_output_below_a_file_is_refused_by_every_command(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    """Before anything else is checked: the other arguments do not exist."""
    (tmp_path / "file").touch()
    required = {
        "score": ["mgsm"], "export": ["a"], "eval": ["a", "--data-dir", "a"], "tokenizer": ["a"],
        "run": ["a", "--task", "xnli", "--model", "m", "--method", "x", "--data-dir", "a"],
        "retrieve": ["a", "--data-dir", "a"],
        "prepare": ["xnli", "--data-dir", "a"], "soft-labels": ["a", "--task", "panx", "--translations", "a"],
        "analyse": ["--model", "a=b", "--texts", "a"], "probe": ["a", "--data", "a"],
    }  # fmt: skip
    line = refused(cli(*command, *required.get(command[-1], []), "--output", tmp_path / "file" / "a"))
    assert line.startswith(f"--output {tmp_path / 'file' / 'a'}: lies below {tmp_path / 'file'}, which is a file")
    assert (tmp_path / "file").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ui", "--port", "99999"), "Invalid value for '--port'"),
        (("ui", "--port", "-1"), "Invalid value for '--port'"),
        (("quickstart", "--seed", "-1"), "Invalid value for '--seed'"),
        (("quickstart", "--seed", str(2**70)), "Invalid value for '--seed'"),
        (("train", "a", "--nprc", "2"), "No such option"),
        (("check",), "Missing argument 'CONFIG'"),
        (("trian",), "No such command 'trian'"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(cli(*arguments))


@pytest.mark.parametrize("memory", ["nan", "inf", "-1", "0"])
def test_a_gpus_memory_is_a_number_above_0(cli: Cli, shared_file: Path, memory: str) -> None:
    assert refused(cli("check", shared_file, "--gpu-memory", memory)).startswith("--gpu-memory ")


@pytest.mark.parametrize("command", ["check", "train", "prefetch"])
def test_a_store_in_a_missing_folder_is_named(
    cli: Cli, run_file: Callable[..., Path], tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.prefetch.use_caches", lambda variables: None)  # the hub's libraries are imported
    changes = ("tracking.enabled=true", f"tracking.uri=sqlite:///{tmp_path}/none/mlflow.db")
    line = refused(cli(command, run_file(tmp_path), *changes))
    assert line.endswith(f"there is no folder {tmp_path / 'none'}; make it, or name another place")
    assert line.startswith("tracking.uri: ")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none/mlflow.db")
    assert refused(cli(command, run_file(tmp_path), "tracking.enabled=true")).startswith("MLFLOW_TRACKING_URI: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["check", "train"])
def test_an_untrainable_model_is_refused_before_any_rank_starts(
    cli: Cli, run_file: Callable[..., Path], tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because of its stored files, or of the model that `model.init` describes."""
    monkeypatch.setattr("training.launch.launcher.launch", lambda *_: pytest.fail("ranks were started"))
    (tmp_path / "model").mkdir()
    stored = run_file(tmp_path, model={"path": str(tmp_path / "model")}, tokenizer={})
    assert refused(cli(command, stored)).startswith(f"{tmp_path / 'model' / 'config.json'}: missing; copy it")
    assert not (tmp_path / "run").exists()
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "n_positions": 64}
    made = run_file(tmp_path, model={"init": {"model_type": "gpt2", **sizes}})
    assert refused(cli(command, made)).startswith("data.sequence_length: 96 tokens, but the model has positions for 64")


def test_a_run_is_checked_in_folders_whose_names_are_patterns(
    cli: Cli, run_file: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "[v1] a*{b}?"
    shutil.copytree(corpus, folder / "data")
    result = cli(
        "check", run_file(folder), f"data_dir={folder / 'data'}", "tracking.enabled=true"
    )  # its store does not exist yet
    assert (result.status, result.out.splitlines()[-1]) == (0, "ready to train"), result.err


def test_tokenizer_is_trained_into_a_new_folder(cli: Cli, shared_file: Path, tmp_path: Path) -> None:
    result = cli("tokenizer", shared_file, "--output", tmp_path / "tokenizer")
    assert (result.status, result.out.splitlines()[-1:]) == (0, [str(tmp_path / "tokenizer")])
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    line = refused(cli("tokenizer", shared_file, "--output", tmp_path / "tokenizer"))
    assert line == f"--output {tmp_path / 'tokenizer'}: exists already; give a new folder"


def test_export_of_a_folder_that_is_no_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    line = refused(cli("export", tmp_path / "absent", "--output", tmp_path / "model"))
    assert line.startswith(f"{tmp_path / 'absent'}: no such folder")
    (tmp_path / "empty").mkdir()
    line = refused(cli("export", tmp_path / "empty", "--output", tmp_path / "model"))
    assert "not a complete checkpoint: no COMPLETE marker" in line
    assert not (tmp_path / "model").exists()
