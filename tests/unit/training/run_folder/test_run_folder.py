"""A run folder belongs to one run: read-only commands change nothing in it; only its own run resumes from it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import XMIXUP, PreparedRun, run_values, write_data, write_task_data

import crosslift
from modeling.errors import ModelError
from modeling.tasks.encoders import write_task_config, write_task_start
from modeling.weights.untrusted import read_tokenizer
from training import fit
from training.assembly import fingerprint
from training.check import check_run, inspect_data, plan_lines
from training.checkpoints import checkpoint
from training.checkpoints.run_state import RunState
from training.config import RunConfig
from training.errors import ConfigError
from training.launch.stop import StopRequest
from training.loop.resume import schedule_change
from training.run_file import load_config, resolved, validate
from training.run_folder.lock import LOCK_FILE, held
from training.run_folder.prepare import prepare, prepare_read_only

OTHER = ("seed=9", "tokenizer.train.vocab_size=460", "model.init.hidden_size=64", "model.init.intermediate_size=96")
TAGGER = XMIXUP | {"tokenizer.train": {"vocab_size": 120, "style": "encoder"}}
DONE = 6  # steps of the checkpoint
READ_ONLY_COMMANDS: dict[str, Callable[[RunConfig], Iterator[object]]] = {
    "check": check_run,
    "inspect": lambda config: inspect_data(config, 1),
    "plan": lambda config: plan_lines(config, range(2), 2),
}


@pytest.fixture
def run_yaml(prepared_run: PreparedRun, tmp_path: Path) -> Path:
    """The run file of a prepared run without a checkpoint, in `tmp_path / "run"`."""
    shutil.copytree(prepared_run.config.output_dir, tmp_path / "run")
    values = prepared_run.config.model_dump(mode="json") | {"output_dir": str(tmp_path / "run")}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture
def saved(run_yaml: Path) -> Path:
    """The same run with a checkpoint of step `DONE` of 12, without weights, which these tests do not load."""
    save(load_config(run_yaml))
    return run_yaml


def save(config: RunConfig, step: int = DONE) -> Path:
    prepared = prepare(config)
    directory = checkpoint.begin(config.output_dir, step)
    shutil.copytree(prepared.model_dir, directory / "model_config", ignore=shutil.ignore_patterns("*.safetensors"))
    RunState(step, 1, fingerprint(prepared), resolved(config), {}).write(directory)
    return checkpoint.commit(config.output_dir, step, {})


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files but those of `index/`, whose names depend on their content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != "index")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(config: RunConfig, **options: Any) -> tuple[list[str], str]:
    """The lines that `check` prints before it refuses a run, and the error."""
    lines: list[str] = []
    with pytest.raises(ConfigError) as refusal:
        lines.extend(check_run(config, **options))
    assert "\n" not in str(refusal.value)
    return lines, str(refusal.value)


def refusal(config: RunConfig, **options: Any) -> str:
    return refused(config, **options)[1]


# --- read-only commands


@pytest.mark.parametrize("name", READ_ONLY_COMMANDS)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_read_only_command_with_other_settings_changes_nothing_in_the_folder(
    name: str, checkpoints: bool, run_yaml: Path
) -> None:
    folder = load_config(run_yaml).output_dir
    if checkpoints:
        save(load_config(run_yaml))
    before = contents(folder)
    refuses = (name, checkpoints) == ("check", True)
    with pytest.raises(ConfigError) if refuses else nullcontext():
        list(READ_ONLY_COMMANDS[name](load_config(run_yaml, OTHER)))
    assert contents(folder) == before
    assert {"tokenizer/tokenizer.json", "initial_model/model.safetensors"} <= before.keys()


def test_look_uses_the_given_settings_and_writes_no_weights(run_yaml: Path) -> None:
    with prepare_read_only(load_config(run_yaml, OTHER)) as prepared:
        assert len(read_tokenizer(prepared.tokenizer_dir)) == 460
        described = json.loads(Path(prepared.model_dir, "config.json").read_text())
        assert (described["vocab_size"], described["hidden_size"]) == (460, 64)
        assert not list(Path(prepared.model_dir).glob("*.safetensors"))
    assert not Path(prepared.model_dir).exists()


def test_look_with_the_runs_settings_uses_the_runs_tokenizer_and_model(run_yaml: Path) -> None:
    config = load_config(run_yaml)
    with prepare_read_only(config) as prepared:
        assert prepared.tokenizer_dir == str(config.output_dir / "tokenizer")
        assert prepared.model_dir == str(config.output_dir / "initial_model")


def test_a_run_reuses_a_tokenizer_that_look_has_trained(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validate(run_values(corpus, tmp_path / "run"), "test")
    with prepare_read_only(config) as looked:
        trained = Path(looked.tokenizer_dir, "tokenizer.json").read_bytes()
    assert not (tmp_path / "run" / "tokenizer").exists()
    monkeypatch.setattr("training.run_folder.prepare.train_tokenizer_of", lambda *_: pytest.fail("trained twice"))
    assert Path(prepare(config).tokenizer_dir, "tokenizer.json").read_bytes() == trained


def test_the_tokenizer_of_a_run_with_checkpoints_is_kept_if_the_data_change(tmp_path: Path) -> None:
    """A tokenizer retrained on the larger data would assign the embeddings to other tokens."""
    config = validate(run_values(write_data(tmp_path / "data"), tmp_path / "run"), "test")
    save(config)
    tokenizer = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    write_data(tmp_path / "data", items=60)
    assert Path(prepare(config).tokenizer_dir, "tokenizer.json").read_bytes() == tokenizer
    line = refusal(config)
    assert "data en.jsonl: has changed" in line
    assert "data tokenizer" not in line
    assert any("resumes from step 6 of 12" in printed for printed in check_run(config, accept_changes=True))


def test_look_at_an_encoder_run_includes_the_head_of_its_task(tmp_path: Path) -> None:
    values = run_values(write_task_data(tmp_path / "data"), tmp_path / "run", **TAGGER)
    with prepare_read_only(validate(values, "test")) as prepared:
        described = json.loads(Path(prepared.model_dir, "config.json").read_text())
        assert described["label2id"] == {"WORD": 0, "NUMBER": 1}
    assert not (tmp_path / "run" / "task_model").exists()
    assert any(line.startswith("model: ") for line in check_run(validate(values, "test")))


def test_look_checks_a_pretrained_encoders_weights_against_the_task(tmp_path: Path) -> None:
    values = run_values(write_task_data(tmp_path / "data"), tmp_path / "run", **TAGGER)
    config = validate(values | {"max_steps": 1}, "test")
    start = prepare(config).model_dir
    assert config.data.task is not None
    made = write_task_config(start, "tagging", ["WORD", "NUMBER"], tmp_path / "made", pretrained=True)
    assert json.loads((made / "config.json").read_text())["label2id"] == {"WORD": 0, "NUMBER": 1}
    for write in (
        lambda path: write_task_config(start, "tagging", ["a", "b", "c"], path, pretrained=True),
        lambda path: write_task_start(start, "tagging", ["a", "b", "c"], path, 0),
    ):
        with pytest.raises(ModelError, match="2 weights of another shape than the task's"):
            write(tmp_path / "refused")


@pytest.fixture
def read_only(run_yaml: Path) -> Iterator[Path]:
    """The run file of a run whose folder is mounted read-only, which only root can do."""
    folder = str(load_config(run_yaml).output_dir)
    for options in (["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
        mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"needs a read-only mount, which only root can make: {mounted.stderr.strip()}")
    yield run_yaml
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_read_only_commands_work_on_a_read_only_folder(read_only: Path) -> None:
    assert list(plan_lines(load_config(read_only, OTHER), range(1), 1))
    assert list(inspect_data(load_config(read_only), 1))
    lines, line = refused(load_config(read_only))
    assert re.match(r"output_dir: .* cannot be written to \(Read-only file system\)", line)
    assert any(line.startswith("model: ") for line in lines)
    assert "ready to train" not in lines


# --- a checkpoint and its run


CHANGES_RESULT = [
    ("seed=9", "config seed: was 3, now 9"),
    ("optimizer.learning_rate=0.1", "config optimizer.learning_rate: was 0.003, now 0.1"),
    ("schedule.name=linear", "config schedule.name: was 'cosine', now 'linear'"),
    ("objective.contrastive.weight=0.1", "config objective.contrastive.weight: was 0.5, now 0.1"),
    ("data.slots_per_step=16", "config data.slots_per_step: was 8, now 16"),
    ("data.sources.0.name=others", "config data.sources.0.name: was 'problems', now 'others'"),
    ("max_steps=8", "config max_steps: was 12, now 8"),
]
KEEPS_RESULT = (
    "checkpoint.every=3", "tracking.experiment=x", "watchdog.stall_minutes=1", "data.heldout_items=0",
    "data.workers=2", "data.micro_batch_tokens=768", "gradient_checkpointing=true", "guard.non_finite=skip",
)  # fmt: skip
CANNOT_BE_LOADED = [
    "model.init.hidden_size=64",
    "model.init.num_hidden_layers=3",
    "tokenizer.train.vocab_size=460",
    "objective={name: sft}",
    "objective.layers=[0,1]",
    "data.languages=[en,de,zh,sw]",
    "precision=bf16",
    "zero_stage=2",
]


@pytest.mark.parametrize(("override", "difference"), CHANGES_RESULT)
def test_check_refuses_settings_that_change_the_result_and_shows_them(
    saved: Path, override: str, difference: str
) -> None:
    line = refusal(load_config(saved, [override]))
    assert line.startswith(
        f"{checkpoint.checkpoint_path(load_config(saved).output_dir, DONE)}: belongs to another run: "
    )
    assert difference in line
    assert "give another output_dir, or resume with --accept-changes" in line


def test_all_differences_are_reported_at_once(saved: Path) -> None:
    line = refusal(load_config(saved, ["seed=9", "optimizer.betas=[0.5,0.5]"]))
    assert "config optimizer.betas: was [0.9, 0.999], now [0.5, 0.5]; config seed: was 3, now 9" in line


def test_settings_that_keep_the_result_may_change(saved: Path) -> None:
    lines = list(check_run(load_config(saved, KEEPS_RESULT)))
    assert lines[-1] == "ready to train"
    assert lines[-2].startswith("time: not known before a measurement; ")
    assert lines[-3].endswith(f"resumes from step {DONE} of 12")


@pytest.mark.parametrize("override", CANNOT_BE_LOADED)
def test_settings_that_a_checkpoint_cannot_be_loaded_with_are_always_refused(saved: Path, override: str) -> None:
    line = refusal(load_config(saved, [override, "seed=9"]), accept_changes=True)
    assert f"cannot be loaded with: config {override.partition('=')[0]}" in line
    assert "(set it back, or give another output_dir)" in line
    assert "seed" not in line


def test_check_describes_the_model_of_the_config_and_not_of_the_run(saved: Path) -> None:
    lines, line = refused(load_config(saved, ["model.init.hidden_size=256", "model.init.num_hidden_layers=3"]))
    assert "model.init.hidden_size: was 32, now 256" in line
    (model,) = (line for line in lines if line.startswith("model: "))
    assert "3 layers" in model
    assert "0.0M parameters" not in model
    assert "ready to train" not in lines


def test_a_model_of_other_shapes_at_the_same_path_is_refused(saved: Path) -> None:
    """The run file has not changed; DeepSpeed's own error would be a traceback."""
    config = load_config(saved)
    file = checkpoint.checkpoint_path(config.output_dir, DONE) / "model_config" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"intermediate_size": 128}))
    newest = checkpoint.checkpoint_path(config.output_dir, DONE)
    (newest / checkpoint.MARKER).unlink()
    newest.rename(checkpoint.incomplete_path(config.output_dir, DONE))
    checkpoint.commit(config.output_dir, DONE, {})
    line = refusal(config, accept_changes=True)
    assert "weights of other shapes, such as model.layers.0.mlp.down_proj.weight: was [32, 128], now [32, 64]" in line


def test_options_added_in_later_versions_are_not_a_difference(saved: Path) -> None:
    config = load_config(saved)
    path = checkpoint.checkpoint_path(config.output_dir, DONE)
    state = RunState.read(path)
    del state.config["guard"], state.config["data"]["layout"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "read", classmethod(lambda cls, directory: state))
        assert "ready to train" in list(check_run(config))


def test_a_max_steps_below_the_checkpoints_step_is_refused(saved: Path) -> None:
    line = refusal(load_config(saved, ["max_steps=5"]), accept_changes=True)
    assert line.startswith(f"max_steps: 5, but {DONE} steps are done in ")


def test_more_steps_are_accepted_and_the_changed_schedule_is_shown(saved: Path) -> None:
    lines = list(check_run(load_config(saved, ["max_steps=24"])))
    assert lines[-4:-2] == [
        "max_steps: was 12, now 24: the learning rate falls until step 24 instead of 12 (cosine); at step 7 it is "
        "0.00256, instead of 0.0015",
        f"{checkpoint.checkpoint_path(load_config(saved).output_dir, DONE)}: resumes from step {DONE} of 24",
    ]


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ({"name": "linear"}, 6, "falls until step 24 instead of 12 (linear); at step 7 it is 0.00225, instead of"),
        ({"name": "linear"}, 12, "at step 13 it is 0.0015, instead of 0"),
        ({"name": "cosine", "final_ratio": 0.1}, 12, "instead of 0.0003"),
        ({"name": "constant", "warmup_ratio": 0.5}, 6, "warms up as a run of 24 instead of 12 steps does; at step 7"),
    ],
)
def test_the_schedule_of_a_longer_run(saved: Path, schedule: dict[str, Any], step: int, expected: str) -> None:
    values = yaml.safe_load(saved.read_text()) | {"schedule": schedule}
    state = RunState(step, 1, {}, resolved(validate(values, "test")), {})
    change = schedule_change(state, validate(values | {"max_steps": 24}, "test"))
    assert change is not None
    assert expected in change
    assert schedule_change(state, validate(values, "test")) is None


def test_train_refuses_another_run_in_the_folder_of_a_finished_one(run_yaml: Path) -> None:
    finished = save(load_config(run_yaml), step=12)
    for overrides in (["seed=9"], ["model.init.hidden_size=64"], ["optimizer.learning_rate=0.1"]):
        with pytest.raises(ConfigError, match=r": belongs to another run: config "):
            fit._fit(load_config(run_yaml, overrides), "auto", accept_changes=False, stop=StopRequest())
    assert fit._fit(load_config(run_yaml, KEEPS_RESULT), "auto", accept_changes=False, stop=StopRequest()) == (
        finished,
        None,
    )
    assert "nothing is left to train" in list(check_run(load_config(run_yaml)))[-1]


def test_train_logs_the_accepted_changes_and_the_changed_schedule(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fit, "assemble", lambda *_: pytest.exit("reached assemble"))
    monkeypatch.setattr(fit, "Tracker", lambda *_: None)
    config = load_config(saved, ["seed=9", "max_steps=24"])
    with caplog.at_level(logging.INFO), pytest.raises(pytest.exit.Exception):
        fit._fit(config, "auto", accept_changes=True, stop=StopRequest())
    assert "accepted: config seed: was 3, now 9" in caplog.text
    assert "max_steps: was 12, now 24: the learning rate falls until step 24" in caplog.text


# --- two runs


def cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["crosslift", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        crosslift.main()
    return int(end.value.code or 0)


def test_a_second_train_is_refused_in_one_line_and_check_reports_the_first(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = load_config(run_yaml).output_dir
    with held(folder):
        monkeypatch.setenv("CROSSLIFT_RUN_LOCK", "of another run")
        before = contents(folder)
        for command in (["train", run_yaml, *OTHER], ["train", run_yaml, "--nproc", 1]):
            assert cli(monkeypatch, *command) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"crosslift: output_dir: {folder}: in use by a run on ")
        assert contents(folder) == before
        assert f"output_dir: {folder} is in use by a run on " in "\n".join(check_run(load_config(run_yaml)))
    assert (folder / LOCK_FILE).read_text() == ""


def test_quickstart_and_xtreme_run_lock_their_folders_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    xtreme = ["--task", "xnli", "--model", "mbert", "--method", "x-mixup", "--data-dir", tmp_path]
    with held(tmp_path / "out"):
        monkeypatch.setenv("CROSSLIFT_RUN_LOCK", "of another run")
        for command in (["quickstart"], ["xtreme", "run", "configs/xtreme.yaml", *xtreme]):
            assert cli(monkeypatch, *command, "--output", tmp_path / "out") == 2
            assert "in use by a run on " in capsys.readouterr().err
