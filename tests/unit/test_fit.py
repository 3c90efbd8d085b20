"""fit.py: how a run ends, whatever becomes of its plots; and what it clears away before it begins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from training import checkpoint, fit
from training.config import RunConfig
from training.disks import shared_disk
from training.plots import draw_plots
from training.run_file import validate
from training.run_record import RunRecord, number
from training.stop import StoppedOnRequest, StopRequest

STOPPED = StoppedOnRequest("stopped by SIGUSR1 after 4 of 12 steps; all of it is saved")


@pytest.fixture
def config(tmp_path: Path, tiny_run: Callable[..., dict[str, Any]]) -> RunConfig:
    made = validate(tiny_run(tmp_path / "run", **{"tracking.enabled": False}), "tiny run")
    made.output_dir.mkdir()
    return made


@pytest.fixture
def ends(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], Path]:
    """`ends(error)`: a run without a model that logs one step and then ends so."""

    def run(error: Exception | None) -> Path:
        def trainer(run: object, tracker: Any, stop: StopRequest) -> SimpleNamespace:
            def train(start: int) -> None:
                tracker.log(1, {"train/loss/en": 1.0})
                if error is not None:
                    raise error

            return SimpleNamespace(train=train, disk=shared_disk(config))

        engine = SimpleNamespace(world_size=1, destroy=lambda: None)
        monkeypatch.setattr(fit, "forget_preparation", lambda config: None)
        monkeypatch.setattr(fit, "prepare", lambda config, rank: None)
        monkeypatch.setattr(fit, "assemble", lambda config, prepared: SimpleNamespace(engine=engine))
        monkeypatch.setattr(fit, "Trainer", trainer)
        return fit._fit(config, "auto", accept_changes=False, stop=StopRequest())

    return run


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


@pytest.mark.parametrize("trouble", [folder_in_the_way, file_in_the_way, full_disk])
@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), (STOPPED, "SCHEDULED"), (OSError(5, "x"), "FAILED")])
def test_a_plot_that_cannot_be_drawn_changes_no_runs_end(
    config: RunConfig,
    ends: Callable[[Exception | None], Path],
    trouble: Callable[[Path], None],
    error: Exception | None,
    status: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trouble(config.output_dir)
    if error is None:
        assert ends(None) == checkpoint.checkpoint_path(config.output_dir, config.max_steps)
    else:
        with pytest.raises(type(error)) as raised:
            ends(error)
        assert raised.value is error
    last = last_event(config)
    assert (last["kind"], last["status"]) == ("finish", status)
    assert f"{config.output_dir}: its plots are not all drawn: " in caplog.text


def test_even_ctrl_c_while_plots_are_drawn_leaves_a_finished_record(
    config: RunConfig, ends: Callable[[Exception | None], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(output_dir: Path) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "draw_plots", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ends(None)
    assert last_event(config)["status"] == "FINISHED"


def test_a_start_clears_away_what_killed_starts_left(
    config: RunConfig, ends: Callable[[Exception | None], Path]
) -> None:
    left = [checkpoint.incomplete_path(config.output_dir, 6), checkpoint.universal_path(config.output_dir, 4)]
    for folder in left:
        folder.mkdir(parents=True)
    ends(None)
    assert not any(folder.exists() for folder in left)


def test_a_loss_that_is_not_finite_is_a_gap_and_a_mark_in_the_plot(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    record = RunRecord(config.output_dir)
    for step, loss in enumerate((3.0, 2.5, math.nan, 2.0, 1.5), start=1):
        values = {f"train/loss/{language}": loss for language in ("en", "sw")}
        record.append("metrics", step=step, values={name: number(value) for name, value in values.items()})
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
    assert 1.3 < bottom < 1.5 < 3.0 < top, "the mark is no value"
