"""fit.py: the status with which a run ends, also if plots or the export fail; cleanup at its start."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from training import conclusion, fit
from training.checkpoints import checkpoint
from training.checkpoints.disks import shared_disk
from training.checkpoints.run_state import RunState
from training.config import RunConfig
from training.errors import ConfigError, ExportCheckFailed, NotExported
from training.launch.stop import StoppedOnRequest, StopRequest
from training.run_file import resolved, validate
from training.tracking.plots import draw_plots
from training.tracking.run_record import RunRecord, json_number, read_events

STOPPED = StoppedOnRequest("stopped by SIGUSR1 after 4 of 12 steps; all of it is saved")


@pytest.fixture
def config(tmp_path: Path, tiny_run: Callable[..., dict[str, Any]]) -> RunConfig:
    made = validate(tiny_run(tmp_path / "run", **{"tracking.enabled": False}), "tiny run")
    made.output_dir.mkdir()
    return made


@pytest.fixture
def run_fit(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], Path]:
    """`run_fit(error)`: a run without a model that logs one step, then raises the error or finishes."""

    def run(error: Exception | None) -> Path:
        def trainer(run: object, tracker: Any, stop: StopRequest) -> SimpleNamespace:
            def train(start: int) -> None:
                tracker.log(1, {"train/loss/en": 1.0})
                if error is not None:
                    raise error

            return SimpleNamespace(train=train, disks=[shared_disk(config.output_dir)])

        engine = SimpleNamespace(world_size=1, destroy=lambda: None)
        monkeypatch.setattr(fit, "forget_preparation", lambda config: None)
        monkeypatch.setattr(fit, "prepare", lambda config, rank: None)
        monkeypatch.setattr(
            fit, "assemble", lambda config, prepared: SimpleNamespace(engine=engine, data=SimpleNamespace(index=None))
        )
        monkeypatch.setattr(fit, "contamination", lambda index: [])
        monkeypatch.setattr(fit, "Trainer", trainer)
        monkeypatch.setattr(fit, "process_group", lambda **_: nullcontext())
        return fit.fit(config)

    return run


@pytest.fixture(autouse=True)
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that were exported; nothing is written."""
    checkpoints: list[Path] = []
    monkeypatch.setattr(conclusion, "export_newest", lambda last, output: checkpoints.append(last) or True)
    return checkpoints


def last_event(config: RunConfig) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((config.output_dir / "record.jsonl").read_text().splitlines()[-1])
    return event


def folder_in_the_way(output_dir: Path) -> None:
    (output_dir / "plots" / "train_loss.png").mkdir(parents=True)


def file_in_the_way(output_dir: Path) -> None:
    (output_dir / "plots").write_text("mine")


def full_disk(output_dir: Path) -> None:
    (output_dir / "plots").mkdir()
    (output_dir / "plots" / "train_loss.png").symlink_to("/dev/full")


@pytest.mark.parametrize("obstruct", [folder_in_the_way, file_in_the_way, full_disk])
@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), (STOPPED, "SCHEDULED"), (OSError(5, "x"), "FAILED")])
def test_a_plot_that_cannot_be_drawn_does_not_change_the_status_of_the_run(
    config: RunConfig,
    run_fit: Callable[[Exception | None], Path],
    obstruct: Callable[[Path], None],
    error: Exception | None,
    status: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    obstruct(config.output_dir)
    if error is None:
        assert run_fit(None) == checkpoint.checkpoint_path(config.output_dir, config.max_steps)
    else:
        with pytest.raises(type(error)) as raised:
            run_fit(error)
        assert raised.value is error
    last = last_event(config)
    assert (last["kind"], last["status"]) == ("finish", status)
    assert f"{config.output_dir}: some plots could not be drawn: " in caplog.text


def test_ctrl_c_while_plots_are_drawn_ends_the_record_as_killed(
    config: RunConfig, run_fit: Callable[[Exception | None], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(output_dir: Path) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "draw_plots", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(None)
    assert last_event(config)["status"] == "KILLED"


def raises(error: BaseException) -> Callable[[Path, Path], bool]:
    def export(last: Path, output: Path) -> bool:
        raise error

    return export


CHECK = "run/model: the export is kept, but its check failed: w differs"


@pytest.mark.parametrize(
    ("error", "expected", "exit_status", "message", "tag"),
    [
        (ExportCheckFailed(CHECK), ExportCheckFailed, 3, f"training finished, all steps are saved; {CHECK}",
         "kept, but its check failed: w differs"),
        (OSError(28, "No space left"), NotExported, 4, "training finished, but there is no export: [Errno 28] No space",
         "none: [Errno 28] No space left"),
        (ConfigError("model: in the way"), NotExported, 4, "there is no export: model: in the way",
         "none: model: in the way"),
    ],
    ids=["check", "disk", "in the way"],
)  # fmt: skip
def test_a_run_whose_export_failed_ends_as_failed_in_its_record_and_in_mlflow(
    config: RunConfig,
    run_fit: Callable[[Exception | None], Path],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[Exception],
    exit_status: int,
    message: str,
    tag: str,
) -> None:
    from mlflow.tracking import MlflowClient

    from training.tracking.mlflow_feed import sync_record

    monkeypatch.setattr(conclusion, "export_newest", raises(error))
    with pytest.raises(expected) as raised:
        run_fit(None)
    assert message in str(raised.value)
    assert raised.value.exit_status == exit_status  # type: ignore[attr-defined]
    assert last_event(config)["status"] == "FAILED"
    store = f"sqlite:///{config.output_dir}/mlflow.db"
    run = MlflowClient(store).get_run(sync_record(config.output_dir, store).run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["crosslift.training"] == "finished"
    assert run.data.tags["crosslift.export"] == tag


def test_the_record_ends_as_finished_only_after_the_export(
    config: RunConfig, run_fit: Callable[[Exception | None], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(conclusion, "export_newest", lambda *_: seen.append(last_event(config)["kind"]) or True)
    run_fit(None)
    assert seen == ["artifact"], "the record has no final status while the export is made"
    assert last_event(config)["status"] == "FINISHED"


def test_the_next_start_of_a_finished_run_exports_it_and_ends_its_record_as_finished(
    config: RunConfig,
    run_fit: Callable[[Exception | None], Path],
    exported: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(conclusion, "export_newest", raises(OSError(28, "No space left")))
        with pytest.raises(NotExported):
            run_fit(None)
    last = tmp_path / "last"
    last.mkdir()
    RunState(step=config.max_steps, world_size=1, fingerprint={}, config=resolved(config), versions={}).write(last)
    monkeypatch.setattr(fit, "find_checkpoint", lambda *_: last)
    monkeypatch.setattr(fit, "permitted", lambda found, *_: RunState.read(found))
    monkeypatch.setattr(fit, "fingerprint", lambda prepared: {})
    assert run_fit(None) == last
    assert exported == [last]
    assert last_event(config)["status"] == "FINISHED"
    events = [event for _, event in read_events(config.output_dir / "record.jsonl")]
    assert [event["status"] for event in events if event["kind"] == "finish"] == ["FAILED", "FINISHED"]
    monkeypatch.setattr(conclusion, "export_newest", lambda *_: False)  # the export exists already
    run_fit(None)
    assert [event for _, event in read_events(config.output_dir / "record.jsonl")] == events, "nothing new"


def test_a_start_deletes_leftovers_of_killed_starts(
    config: RunConfig, run_fit: Callable[[Exception | None], Path]
) -> None:
    left = [checkpoint.incomplete_path(config.output_dir, 6), checkpoint.universal_path(config.output_dir, 4)]
    for folder in left:
        folder.mkdir(parents=True)
    run_fit(None)
    assert not any(folder.exists() for folder in left)


def test_a_loss_that_is_not_finite_is_a_gap_and_a_mark_in_the_plot(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    record = RunRecord(config.output_dir)
    for step, loss in enumerate((3.0, 2.5, math.nan, 2.0, 1.5), start=1):
        values = {f"train/loss/{language}": loss for language in ("en", "sw")}
        record.append("metrics", step=step, values={name: json_number(value) for name, value in values.items()})
    record.close()
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw_plots(config.output_dir)
    (axes,) = figures[0].axes
    drawn = {str(line.get_label()): line.get_data() for line in axes.lines}
    assert list(drawn["not finite"][0]) == [3]
    for language in ("en", "sw"):
        steps, losses = drawn[language]
        assert list(steps) == [1, 2, 3, 4, 5]
        assert math.isnan(float(losses[2]))
    bottom, top = axes.get_ylim()
    assert 1.3 < bottom < 1.5 < 3.0 < top, "the mark does not change the limits of the axis"


def test_of_many_languages_the_plot_shows_the_spread_and_the_extremes(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Language n ends at loss n; one has no finite value, and another none in the last step."""
    from matplotlib.figure import Figure

    record = RunRecord(config.output_dir)
    for step in (1, 2):
        values = {f"train/loss/l{n:03d}": n + 2.0 - step for n in range(101) if (n, step) != (50, 2)}
        record.append("metrics", step=step, values={**values, "train/loss/bad": "NaN"})
    record.close()
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw_plots(config.output_dir)
    (axes,) = figures[0].axes
    names = [str(line.get_label()) for line in axes.lines]
    assert names == ["median", *(f"l{n:03d}" for n in (0, 1, 2, 3, 97, 98, 99, 100)), "not finite"]
    (band,) = axes.collections
    assert band.get_label() == "middle 80 % of 102"
    assert list(axes.lines[0].get_data()[1]) == [51.0, 51.0]  # of 101 values; of 100, without 50
    corners = band.get_paths()[0].vertices
    assert {(x, y) for x, y in corners if x == 1} == {(1.0, 11.0), (1.0, 91.0)}
