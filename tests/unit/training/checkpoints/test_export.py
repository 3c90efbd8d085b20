"""export.py: an export is complete and of the last checkpoint, or the previous one stays; no leftovers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modeling.export_info import EXPORT_FILE, ExportInfo
from training.checkpoints import checkpoint, export, export_check
from training.checkpoints.checkpoint import MARKER
from training.checkpoints.export import export_checkpoint, export_newest
from training.checkpoints.export_check import CheckResult
from training.checkpoints.run_state import RunState
from training.config import RunConfig
from training.errors import ConfigError, ExportCheckFailed
from training.run_file import resolved, validate

Save = Callable[[int], Path]


@pytest.fixture
def save(tmp_path: Path, tiny_run: Callable[..., dict[str, Any]]) -> Save:
    """`save(step)`: a complete checkpoint with one file of weights, which contains the step."""
    config = resolved(validate(tiny_run(tmp_path), "tiny run"))

    def make(step: int) -> Path:
        directory = checkpoint.begin(tmp_path, step)
        (directory / "weights").write_text(f"weights after {step}")
        RunState(step, 1, {}, config, {}).write(directory)
        return checkpoint.commit(tmp_path, step, {})

    return make


@pytest.fixture(autouse=True)
def checked_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exports copy the checkpoint's file instead of writing a model; the steps of the exports that were checked."""
    steps: list[int] = []

    def write(checkpoint: Path, config: RunConfig, state: RunState, output: Path) -> None:
        (output / EXPORT_FILE).write_text(json.dumps(export._description(config.data, config.objective, state.step)))
        (output / "weights").write_text((checkpoint / "weights").read_text())

    def check(checkpoint: Path, config: RunConfig, weights: object, output: Path) -> CheckResult:
        assert output.name.startswith(".incomplete-"), "checked under its temporary name"
        steps.append(RunState.read(checkpoint).step)
        return CheckResult(None, "sdpa", 0.0, 1e-4)

    monkeypatch.setattr(export, "_write", write)
    monkeypatch.setattr(export_check, "check_export", check)
    return steps


def weights(model: Path) -> str:
    return (model / "weights").read_text()


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: Any) -> None:
        raise error

    return fail


def beside(model: Path) -> set[str]:
    return {path.name for path in model.parent.iterdir()} - {"checkpoints"}


def test_a_checkpoint_is_exported_once(save: Save, checked_steps: list[int], tmp_path: Path) -> None:
    model = tmp_path / "model"
    export_newest(save(10), model)
    assert (weights(model), checked_steps) == ("weights after 10", [10])
    export_newest(checkpoint.checkpoint_path(tmp_path, 10), model)
    assert checked_steps == [10]
    assert beside(model) == {"model"}


def test_an_export_of_another_step_is_replaced(save: Save, checked_steps: list[int], tmp_path: Path) -> None:
    model = tmp_path / "model"
    export_newest(save(10), model)
    (model / "only in the old one").touch()
    export_newest(save(20), model)
    assert (ExportInfo.read(model).step, weights(model), checked_steps) == (20, "weights after 20", [10, 20])
    assert not (model / "only in the old one").exists()
    assert beside(model) == {"model"}


def test_an_export_of_the_same_step_of_another_branch_is_replaced(
    save: Save, checked_steps: list[int], tmp_path: Path
) -> None:
    """Resumed from an earlier checkpoint with changes, a run reaches the same step with other weights."""
    model = tmp_path / "model"
    export_newest(save(10), model)
    again = save(10)
    later = (model / EXPORT_FILE).stat().st_mtime_ns + 1
    os.utime(again / MARKER, ns=(later, later))
    export_newest(again, model)
    assert checked_steps == [10, 10]


@pytest.mark.parametrize(("module", "where"), [(export, "_write"), (export_check, "check_export")])
@pytest.mark.parametrize("error", [OSError(28, "disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_if_the_new_export_fails_the_old_one_stays(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, where: str, error: BaseException
) -> None:
    model = tmp_path / "model"
    export_newest(save(10), model)
    real = getattr(module, where)

    def fail(*arguments: Any) -> None:
        real(*arguments)
        assert weights(model) == "weights after 10", "the old export stays in place while the new one is written"
        raise error

    monkeypatch.setattr(module, where, fail)
    with pytest.raises(type(error)) as raised:
        export_newest(save(20), model)
    assert error in (raised.value, raised.value.__cause__)
    assert (ExportInfo.read(model).step, weights(model)) == (10, "weights after 10")
    assert beside(model) == {"model"}


def failed(*arguments: Any) -> CheckResult:
    return CheckResult("w differs from the checkpoint's")


def test_an_export_that_fails_its_check_is_kept_marked_and_replaced_by_the_next(
    save: Save,
    checked_steps: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for export_to, model in ((export_newest, tmp_path / "model"), (export_checkpoint, tmp_path / "other")):
        with monkeypatch.context() as patch:
            patch.setattr(export_check, "check_export", failed)
            with pytest.raises(ExportCheckFailed, match=f"{model.name}: the export is kept, but its check failed: w d"):
                export_to(save(10), model)
        assert weights(model) == "weights after 10"
        info = ExportInfo.read(model)
        assert (info.step, info.check_failed) == (10, True)
        info.warn_if_check_failed(model)
        assert f"{model}: this export did not pass its check: w differs from the checkpoint's" in caplog.messages
    caplog.clear()
    assert export_newest(checkpoint.checkpoint_path(tmp_path, 10), tmp_path / "model")
    passed = ExportInfo.read(tmp_path / "model")
    passed.warn_if_check_failed(tmp_path / "model")
    assert (passed.check_failed, checked_steps) == (False, [10])
    assert not [text for text in caplog.messages if "did not pass" in text]
    assert beside(tmp_path / "model") == {"model", "other"}


def test_an_earlier_export_that_passed_is_kept_beside_one_that_failed(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    export_newest(save(10), model)
    with monkeypatch.context() as patch:
        patch.setattr(export_check, "check_export", failed)
        for step in (20, 30):
            with pytest.raises(ExportCheckFailed):
                export_newest(save(step), model)
    assert weights(model) == "weights after 30"
    assert weights(tmp_path / "model-step-00000010") == "weights after 10"
    assert beside(model) == {"model", "model-step-00000010"}


def test_leftovers_of_a_killed_export_are_deleted(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, replaced = tmp_path / "model", tmp_path / ".replaced-model"
    export_newest(save(10), model)
    model.rename(replaced)  # killed between the two renames
    (tmp_path / ".incomplete-model").mkdir()
    (tmp_path / ".incomplete-model" / "part-0.safetensors").touch()
    newer = save(20)
    with monkeypatch.context() as patch:
        patch.setattr(export_check, "check_export", fail_with(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            export_newest(newer, model)
    assert weights(model) == "weights after 10", "moved back"
    shutil.copytree(model, replaced)  # killed after the two renames
    export_newest(checkpoint.checkpoint_path(tmp_path, 10), model)
    assert beside(model) == {"model"}
    shutil.copytree(model, replaced)
    export_newest(checkpoint.checkpoint_path(tmp_path, 20), model)
    assert weights(model) == "weights after 20"
    assert {path.name for path in model.iterdir()} == {EXPORT_FILE, "weights"}
    assert beside(model) == {"model"}


def test_a_folder_that_is_not_an_export_is_refused_and_not_changed(
    save: Save, checked_steps: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").touch()
    with pytest.raises(ConfigError, match=r"model: exists and is not an export; move it"):
        export_newest(save(10), folder)
    assert {path.name for path in folder.iterdir()} == {"config.json"}
    assert not checked_steps


def test_a_torn_checkpoint_is_not_exported(save: Save, tmp_path: Path) -> None:
    model = tmp_path / "model"
    export_newest(save(10), model)
    torn = save(20)
    (torn / "weights").write_text("weig")
    for export_to in (export_newest, export_checkpoint):
        output = model if export_to is export_newest else tmp_path / "other"
        with pytest.raises(ConfigError, match=r"step-00000020: not a complete checkpoint: weights has 4 bytes"):
            export_to(torn, output)
    assert weights(model) == "weights after 10"
    assert beside(model) == {"model"}


def test_a_checkpoint_with_a_wrong_checksum_is_not_exported(
    save: Save, checked_steps: list[int], tmp_path: Path
) -> None:
    """The file sizes are right: checksums are verified before anything is loaded."""
    damaged = save(10)
    (damaged / "weights").write_text("weights after 11")
    for export_to in (export_newest, export_checkpoint):
        with pytest.raises(ConfigError, match="step-00000010: not a complete checkpoint: weights is damaged"):
            export_to(damaged, tmp_path / "model")
    assert not checked_steps
    assert not (tmp_path / "model").exists()


def test_export_to_an_existing_folder_is_refused(save: Save, checked_steps: list[int], tmp_path: Path) -> None:
    assert export_checkpoint(save(10), tmp_path / "a" / "b") == tmp_path / "a" / "b"
    with pytest.raises(ConfigError, match="b: exists already; give a new folder"):
        export_checkpoint(save(20), tmp_path / "a" / "b")
    assert weights(tmp_path / "a" / "b") == "weights after 10"
    assert checked_steps == [10]


LONG = {"id": "id", "language": "language", "prompt": "question", "completion": "answer"}
WITHOUT_LANGUAGE = {name: column for name, column in LONG.items() if name != "language"}
WITH_RESPONSE = {**LONG, "response_language": "answer_language"}
WIDE = {"id": "id", "prompt": "question_{language}", "completion": "answer"}


@pytest.mark.parametrize(
    ("sources", "fixed"),
    [
        ([{"columns": LONG}], None),
        ([{"columns": LONG, "response_language": "en"}], "en"),
        ([{"columns": WITH_RESPONSE, "response_language": "en"}], None),  # a row may have another one
        (
            [{"columns": WITH_RESPONSE, "response_language": "en"}, {"columns": WITHOUT_LANGUAGE, "language": "en"}],
            None,
        ),
        ([{"columns": LONG, "response_language": "en"}, {"columns": WITHOUT_LANGUAGE, "language": "en"}], "en"),
        ([{"columns": LONG, "response_language": "en"}, {"columns": WITHOUT_LANGUAGE, "language": "sw"}], None),
        ([{"columns": WITHOUT_LANGUAGE, "language": "sw", "response_language": "en"}], "en"),
        ([{"columns": LONG, "language": "en"}], None),  # `language` applies to rows without one
        ([{"columns": WIDE, "languages": ["en", "sw"]}], None),
        ([{"columns": WIDE, "languages": ["en", "sw"], "response_language": "en"}], "en"),
        ([{"columns": WIDE, "languages": ["sw"]}, {"columns": WITHOUT_LANGUAGE, "language": "sw"}], None),
        (
            [
                {"columns": WIDE, "languages": ["sw"]},
                {"columns": WITHOUT_LANGUAGE, "language": "en", "response_language": "sw"},
            ],
            "sw",
        ),
    ],
)
def test_the_response_language_is_fixed_only_if_every_answer_is_in_it(
    sources: list[dict[str, Any]], fixed: str | None, tmp_path: Path, tiny_run: Callable[..., dict[str, Any]]
) -> None:
    named = [{"name": str(number), "files": "*.jsonl", **source} for number, source in enumerate(sources)]
    config = validate(tiny_run(tmp_path, **{"data.sources": named}), "tiny run")
    assert export._description(config.data, config.objective, 1)["response_language"] == fixed
