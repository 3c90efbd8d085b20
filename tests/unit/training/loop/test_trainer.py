"""trainer.py: stop requests, rollbacks, skipped updates and what each of them saves, with a fake engine."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.loader import Step, no_slots
from data_pipeline.records import BadRow, DataError
from training.assembly import Run
from training.checkpoints import checkpoint, saving
from training.checkpoints.run_state import RunState
from training.engine.engine import NonFiniteUpdate
from training.errors import CheckpointFailed, NonFiniteStep
from training.launch.stop import StoppedOnRequest
from training.loop.guard import Verdict
from training.loop.progress import TrainingProgress
from training.loop.step_sums import StepSums
from training.loop.trainer import Trainer
from training.objectives.base import LossTerm, LossTerms
from training.objectives.shifcon import ShifConConfig
from training.run_file import validate

Made = Callable[..., Trainer]


class Engine:
    """A fake engine that saves one file of weights; `copied`: whether its state was, each time that it was taken."""

    def __init__(self) -> None:
        self.world_size, self.device, self.copied, self.loaded = 1, torch.device("cpu"), list[bool](), [""]
        config = SimpleNamespace(save_pretrained=lambda directory: None, _attn_implementation="sdpa")
        self.module = SimpleNamespace(config=config)

    def take_state(self, directory: Path, copy: bool) -> list[tuple[Path, Any]]:
        self.copied.append(copy)
        return [(directory / "zero" / "weights.pt", torch.arange(1000.0))]

    def load_state(self, directory: Path, universal: bool) -> None:
        self.loaded.append(directory.name)

    def drop_update(self) -> None: ...


@pytest.fixture
def trainer(tmp_path: Path, tiny_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Made:
    """`trainer(**changes)`: a Trainer of the tiny run on one rank, with a stop request and a fake engine."""
    monkeypatch.setattr(saving, "reference_outputs", lambda run: {"logits": torch.ones(1)})

    def make(**changes: Any) -> Trainer:
        run = SimpleNamespace(
            config=validate(tiny_run(tmp_path / "run", **changes), "tiny run"), engine=Engine(), model_dir=tmp_path,
            objective=SimpleNamespace(save=lambda engine, directory: None, load=lambda directory: None),
            data=SimpleNamespace(
                tokenizer=SimpleNamespace(save_pretrained=lambda directory: None),
                fingerprint={}, index=SimpleNamespace(rows=lambda language: range(3)),
            ),
            base=None,
        )  # fmt: skip
        made = Trainer(cast(Run, run), None)
        made.config.output_dir.mkdir()
        made.stop._reason = "SIGUSR1"
        return made

    return make


def saved(trainer: Trainer) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.step_folders(trainer.config.output_dir)]


def times_taken(trainer: Trainer) -> int:
    return len(cast(Engine, trainer.run.engine).copied)


@pytest.mark.parametrize("background", [True, False])
def test_the_state_is_copied_only_if_training_goes_on_while_it_is_written(trainer: Made, background: bool) -> None:
    made = trainer(**{"checkpoint.background": background})
    made.save(4, {})
    made._complete_checkpoint()
    made.save(made.config.max_steps, {})
    assert cast(Engine, made.run.engine).copied == [background, False]


@pytest.mark.parametrize("settled", [True, False])
def test_a_stop_does_not_repeat_a_save_that_is_done_or_in_progress(trainer: Made, settled: bool) -> None:
    made = trainer()
    made.save(4, {})
    if settled:
        made._complete_checkpoint()
    with pytest.raises(StoppedOnRequest, match="stopped by SIGUSR1 after 4 of 12 steps; all of it is saved"):
        made._stop(4)
    assert saved(made) == [4]
    assert times_taken(made) == 1


def test_a_stop_saves_an_unsaved_step(trainer: Made) -> None:
    made = trainer()
    made.save(4, {})
    with pytest.raises(StoppedOnRequest):
        made._stop(5)
    assert saved(made) == [4, 5]


def test_a_stop_saves_a_step_whose_checkpoint_failed(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    with monkeypatch.context() as full:
        full.setattr(torch, "save", no_space)
        made.save(4, {})
        made._complete_checkpoint()
    assert saved(made) == []
    with pytest.raises(StoppedOnRequest):
        made._stop(4)
    assert saved(made) == [4]


def no_space(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_stop_before_the_first_new_step_saves_nothing(trainer: Made) -> None:
    made = trainer()
    with pytest.raises(StoppedOnRequest):
        made._stop(0)
    made.save(4, {})
    made._complete_checkpoint()
    again = trainer_of(made)
    assert again.restore(checkpoint.checkpoint_path(made.config.output_dir, 4)) == 4
    with pytest.raises(StoppedOnRequest):
        again._stop(4)
    assert times_taken(made) == 1


def trainer_of(made: Trainer) -> Trainer:
    again = Trainer(made.run, None)
    again.stop._reason = "SIGUSR1"
    return again


def test_a_stop_that_cannot_be_saved_is_an_error(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(CheckpointFailed, match=r"checkpoint of step 5: not saved: rank 0 on .*No space left on device"):
        made._stop(5)


def save_4_and_damaged_6(made: Trainer) -> bytes:
    """Two checkpoints, the newer one with one bit of its weights flipped; returns the original weights."""
    for step in (4, 6):
        made.save(step, {})
        made._complete_checkpoint()
    weights = checkpoint.checkpoint_path(made.config.output_dir, 6) / "zero" / "weights.pt"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return content


def test_a_rollback_skips_a_damaged_checkpoint(trainer: Made, caplog: pytest.LogCaptureFixture) -> None:
    """Its size is right, only the checksum is not. Later, a new checkpoint of the same step replaces it."""
    made = trainer()
    save_4_and_damaged_6(made)
    assert made._roll_back(failed=8) == 4
    assert cast(Engine, made.run.engine).loaded[-1] == "step-00000004"
    assert made.data_offset == 4
    assert "step-00000006 is passed over: zero/weights.pt is damaged" in caplog.text
    with pytest.raises(StoppedOnRequest):
        made._stop(6)
    assert checkpoint.defect(checkpoint.checkpoint_path(made.config.output_dir, 6), checkpoint.ALL_CONTENT) is None
    assert RunState.read(checkpoint.checkpoint_path(made.config.output_dir, 6)).data_offset == 4


def test_the_next_start_ignores_a_checkpoint_that_a_rollback_skipped(trainer: Made) -> None:
    """Step 6 was unreadable for a moment and belongs to the abandoned branch with the bad data."""
    made = trainer()
    content = save_4_and_damaged_6(made)
    assert made._roll_back(failed=8) == 4
    (aside,) = checkpoint.checkpoint_root(made.config.output_dir).glob("set-aside-*/zero/weights.pt")
    aside.write_bytes(content)
    with pytest.raises(StoppedOnRequest):
        made._stop(5)
    newest = next(checkpoint.complete(made.config.output_dir), None)
    assert newest is not None
    assert (newest.name, RunState.read(newest).data_offset) == ("step-00000005", 4)


def test_a_rollback_without_a_complete_checkpoint_is_an_error(trainer: Made) -> None:
    with pytest.raises(NonFiniteStep, match="step 8: there is no checkpoint to roll back to"):
        trainer()._roll_back(failed=8)


def terms_of(loss: Tensor) -> dict[str, LossTerm]:
    """ShifCon's terms, all with this sum."""
    weights = dict(zip(ShifConConfig.terms, (1.0, 0.1, 0.0), strict=True))
    return {
        name: LossTerm(loss, "label_tokens" if name == "sft" else "pairs", weight) for name, weight in weights.items()
    }


def step_with(made: Trainer, losses: list[float], engine_step: Callable[[float], Tensor]) -> dict[str, float]:
    """Metrics of step 3 (1-based), with one micro-batch per loss, whose labels are of languages 0, 1, .."""
    languages = made.config.data.languages
    sums = StepSums.zeros(len(languages), len(ShifConConfig.terms), torch.device("cpu"))
    for language, loss in enumerate(losses):
        label = torch.tensor([loss])
        found = LossTerms(label, torch.ones(1), torch.tensor([language]), terms_of(label.sum()))
        sums.add(found, 1.1 * label.sum())
    micro_batches: Any = [SimpleNamespace(sample_ids=(f"{language}-{n}",)) for n, language in enumerate(languages)]
    made.accumulate = lambda step, batch: sums  # type: ignore[method-assign]
    made.run.engine.step = engine_step  # type: ignore[method-assign]
    counts = {"label_tokens": len(losses), "pairs": 1}
    labels = (np.arange(len(languages)) < len(losses)).astype(np.int64)
    shown = tuple(micro_batches[: len(losses)])
    return made.train_step(2, rank_step(languages, micro_batches=shown, counts=counts, labels=labels))


def overflow(rate: float) -> Tensor:
    raise NonFiniteUpdate("gradient norm inf")


@pytest.mark.parametrize("spike", ["off", "stop"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_skipped_for_its_loss_has_nan_for_every_language_and_term(
    trainer: Made, bad: float, spike: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Sums of the other languages are incomplete and would look like those of the whole step."""
    made = trainer(**{"guard.non_finite": "skip", "guard.spike": spike})
    reads_before = spike != "off"
    metrics = step_with(
        made, [2.0, bad, 4.0], (lambda rate: pytest.fail("the update was made")) if reads_before else overflow
    )
    losses = {name: value for name, value in metrics.items() if name.startswith(("train/loss", "train/contrastive"))}
    en, de, sw = made.config.data.languages[:3]
    names = {"train/loss", "train/contrastive", *(f"train/loss/{language}" for language in (en, de, sw))}
    assert losses.keys() == names
    assert all(math.isnan(value) for value in losses.values())
    assert metrics["guard/skipped"] == 1
    assert "step 3: loss is not finite; samples of rank 0: de-1; " in caplog.text
    (file,) = made.config.output_dir.glob("not-finite-step-3.json")
    assert json.loads(file.read_text())["step"] == 3
    assert made.guard.state()["losses"] == []


def test_a_step_skipped_for_its_gradient_keeps_its_losses(trainer: Made, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(**{"guard.non_finite": "skip"})
    metrics = step_with(made, [2.0, 3.0, 4.0], overflow)
    de = made.config.data.languages[1]
    assert (metrics["train/loss"], metrics[f"train/loss/{de}"], metrics["guard/skipped"]) == (3.0, 3.0, 1.0)
    assert "train/grad_norm" not in metrics
    assert "step 3: gradient norm inf is not finite; " in caplog.text


class Lines(dict[int, dict[str, float]]):
    """A tracker that keeps what it is given, without what the machine measures."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        kept = {name: value for name, value in metrics.items() if "second" not in name and "memory/" not in name}
        self[step] = self.get(step, {}) | kept

    def sync(self) -> None: ...


def loop(made: Trainer, start: int) -> Lines:
    """What the loop logs from step `start` on; the loss of step t is 1 / t, and twice that in every third step."""
    languages = made.config.data.languages

    def accumulate(step: int, batch: Step) -> StepSums:
        sums = StepSums.zeros(len(languages), len(ShifConConfig.terms), torch.device("cpu"))
        loss = torch.tensor([(1 + (step % 3 == 0)) / (step + 1)])
        found = LossTerms(loss, torch.ones(1), torch.tensor([step % len(languages)]), terms_of(loss.sum()))
        sums.add(found, loss.sum())
        return sums

    run: Any = made.run
    run.loader = SimpleNamespace(
        steps=lambda start, stop: (
            rank_step(
                languages, fingerprint=number, labels=np.eye(len(languages), dtype=np.int64)[number % len(languages)]
            )
            for number in range(start, stop)
        ),
        waited=0.0,
    )
    run.objective.before_step, run.heldout = lambda engine, step: {"shift/norm/sw": 0.5} if step == 4 else {}, None
    run.engine.step = lambda rate: torch.tensor(rate)
    made.accumulate, made.tracker, made._first_step = accumulate, Lines(), False  # type: ignore[method-assign, assignment]
    with suppress(StoppedOnRequest):
        made._train_from(start, TrainingProgress(start, made.config.max_steps, shown=False))
    return cast(Lines, made.tracker)


EVERY_4_STEPS = {"max_steps": 13, "checkpoint.every": 6, "tracking.log_every": 4}


@pytest.mark.parametrize("spike", ["off", "stop"])
def test_steps_log_every_so_often_and_at_the_first_the_last_and_each_save(trainer: Made, spike: str) -> None:
    made = trainer(**EVERY_4_STEPS, **{"guard.spike": spike})
    made.stop._reason = None
    lines = loop(made, 0)
    assert [step for step in lines if "train/loss" in lines[step]] == [1, 4, 6, 8, 12, 13]
    losses = [(1 + (step % 3 == 0)) / (step + 1) for step in range(13)]
    assert lines[8]["train/loss"] == pytest.approx(sum(losses[6:8]) / 2)
    assert lines[12]["train/loss"] == pytest.approx(sum(losses[8:12]) / 4)
    assert lines[5] == {"shift/norm/sw": 0.5}, "other metrics are logged by the step that has them"
    assert made.totals.steps == 13
    assert made.guard.state()["losses"] == pytest.approx(losses)


def test_with_many_languages_not_every_line_has_their_values(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four languages, as if a line had room for two; steps that save have all, for checkpoint.best."""
    monkeypatch.setattr("training.loop.trainer.LANGUAGES_A_LINE", 2)
    made = trainer(**{**EVERY_4_STEPS, "tracking.log_every": 2})
    made.stop._reason = None
    lines = loop(made, 0)
    en = made.config.data.languages[0]
    assert [step for step in lines if f"train/token_share/{en}" in lines[step]] == [1, 4, 6, 8, 12, 13]
    assert [step for step in lines if "train/loss" in lines[step]] == [1, 2, 4, 6, 8, 10, 12, 13]


@pytest.mark.parametrize("stopped_after", [2, 6, 10])
def test_a_run_stopped_between_two_logged_steps_logs_the_same_after_its_resume(
    trainer: Made, stopped_after: int
) -> None:
    made = trainer(**EVERY_4_STEPS)
    made.stop._reason = None
    expected, agree = loop(made, 0), Trainer.agree
    again = trainer_of(made)
    again.agree = lambda batch, mistake=None: replace(agree(again, batch), stop=batch.fingerprint == stopped_after)  # type: ignore[method-assign]
    lines = loop(again, 0)
    assert max(lines) <= stopped_after
    state = RunState.read(checkpoint.checkpoint_path(made.config.output_dir, stopped_after))
    assert state.metrics["train/loss"] > 0, "checkpoint.best may name it"
    resumed = trainer_of(made)
    resumed.stop._reason = None
    assert resumed.restore(checkpoint.checkpoint_path(made.config.output_dir, stopped_after)) == stopped_after
    assert lines | loop(resumed, stopped_after) == expected
    assert (resumed.totals.state(), resumed.guard.state()) == (made.totals.state(), made.guard.state())


def test_a_non_finite_best_metric_is_not_reported_as_missing(trainer: Made, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(**{"checkpoint.best": "train/loss", "checkpoint.keep": 1})
    for step, loss in ((2, 1.0), (4, math.nan), (6, 2.0)):
        made.save(step, {"train/loss": loss})
        made._complete_checkpoint()
    assert "no such metric" not in caplog.text
    assert saved(made) == [2, 6]


@pytest.mark.parametrize("full", [True, False])
def test_a_list_of_samples_that_cannot_be_written_does_not_end_the_run(
    trainer: Made, full: bool, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(**{"guard.non_finite": "skip"})
    file = made.config.output_dir / "not-finite-step-3.json"
    if full:
        file.symlink_to("/dev/full")
    made._skip_update(3, Verdict("skip", "loss is not finite"), [("en-1", "sw-2")])
    (message,) = caplog.messages
    assert "step 3: loss is not finite; samples of rank 0: en-1, sw-2; " in message
    if full:
        assert f"not listed in {file}: No space left on device" in message
    else:
        assert f"all of them in {file}" in message
        assert json.loads(file.read_text())["sample_ids"] == {"0": ["en-1", "sw-2"]}


def rank_step(languages: Sequence[str], **changes: Any) -> Step:
    zeros = np.zeros(len(languages), np.int64)
    step = Step(
        step=0, micro_batches=(), counts={"label_tokens": 5, "pairs": 2}, tokens=zeros, labels=zeros,
        slots=no_slots(len(languages)), bad_rows=(), unusable=0, overlong=1, fingerprint=7, dropped_pairs=3,
    )  # fmt: skip
    return replace(step, **{"unusable": len(changes.get("bad_rows", ())), **changes})


def test_bad_rows_of_a_step_that_a_stop_prevents_are_not_counted_twice(trainer: Made) -> None:
    made = trainer(**{"data.max_bad_rows": 1})
    bad = rank_step(made.config.data.languages, bad_rows=(BadRow("sw.jsonl:3", "no answer"),))
    assert made.agree(bad).stop
    assert not made.totals.bad_rows
    made.stop._reason = None
    assert not made.agree(bad).stop
    assert list(made.totals.bad_rows) == ["sw.jsonl:3"]


def test_an_unusable_row_counts_once_however_often_it_is_read(trainer: Made, caplog: pytest.LogCaptureFixture) -> None:
    """As in `check`: a run does not end in its second epoch because of rows that were counted in the first."""
    made = trainer(**{"data.max_bad_rows": 1})
    made.stop._reason = None
    languages, row = made.config.data.languages, BadRow("sw.jsonl:3", "no answer")
    for _ in range(3):
        made.agree(rank_step(languages, bad_rows=(row, row)))
    assert len([message for message in caplog.messages if "sw.jsonl:3" in message]) == 1
    with pytest.raises(DataError) as refusal:
        made.agree(rank_step(languages, bad_rows=(row, BadRow("de.jsonl:9", "no text"))))
    assert str(refusal.value) == "de.jsonl:9: no text (2 unusable rows so far; data.max_bad_rows is 1)"


UNREADABLE = "sw.jsonl:7: the file has changed since the run began; start again"


def run_steps(made: Trainer, at: int, event: Step | Exception) -> None:
    """Run the loop over empty steps, with `event` in place of step `at` (0-based)."""
    languages = made.config.data.languages

    def steps(start: int, stop: int) -> Iterator[Step]:
        for step in range(start, stop):
            if step == at and isinstance(event, Exception):
                raise event
            yield event if step == at and isinstance(event, Step) else rank_step(languages)

    run: Any = made.run
    run.loader = SimpleNamespace(steps=steps, waited=0.0)
    run.objective.before_step, run.heldout = lambda engine, step: {}, None
    made.train_step = lambda step, batch: {"train/loss": 1.0}  # type: ignore[method-assign]
    made._first_step, made.stop._reason = False, None
    made._train_from(0, TrainingProgress(0, made.config.max_steps, shown=False))


@pytest.mark.parametrize("every", [4, 100])
def test_unreadable_data_end_the_run_after_the_last_good_step_is_saved(
    trainer: Made, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = trainer(**{"checkpoint.every": every})
    with pytest.raises(DataError) as refusal:
        run_steps(made, 5, DataError(UNREADABLE))
    assert str(refusal.value) == UNREADABLE
    assert saved(made) == ([4, 5] if every == 4 else [5])
    assert "the run ends by an error; 5 of 12 steps are saved" in caplog.messages


def test_one_bad_row_too_many_ends_the_run_after_the_last_good_step_is_saved(trainer: Made) -> None:
    made = trainer(**{"checkpoint.every": 100})
    row = BadRow("sw.jsonl:7", "no answer")
    with pytest.raises(DataError, match=r"^sw.jsonl:7: no answer \(1 unusable row"):
        run_steps(made, 5, rank_step(made.config.data.languages, bad_rows=(row,)))
    assert saved(made) == [5]
    state = RunState.read(checkpoint.checkpoint_path(made.config.output_dir, 5))
    assert state.totals["bad_rows"] == [], "the next start reads that step, and counts it"


def test_an_error_before_the_first_step_saves_nothing(trainer: Made) -> None:
    made = trainer()
    with pytest.raises(DataError, match=UNREADABLE):
        run_steps(made, 0, DataError(UNREADABLE))
    assert times_taken(made) == 0


def test_a_full_disk_does_not_hide_the_error_that_ends_the_run(
    trainer: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(**{"checkpoint.every": 100})
    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(DataError, match=UNREADABLE):
        run_steps(made, 5, DataError(UNREADABLE))
    assert saved(made) == []
    assert "No space left on device" in caplog.text
    assert "are saved" not in caplog.text


def test_a_program_error_is_raised_without_saving(trainer: Made) -> None:
    made = trainer(**{"checkpoint.every": 100})
    with pytest.raises(RuntimeError, match="a fault of the program"):
        run_steps(made, 5, RuntimeError("a fault of the program"))
    assert times_taken(made) == 0


def test_unreadable_data_on_another_rank_end_this_rank_with_the_same_message(
    trainer: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The all-reduce is patched as if another rank had failed."""
    monkeypatch.setattr("training.loop.trainer.cpu_sum", lambda values: np.array([1, *values[1:]]))
    monkeypatch.setattr("training.loop.trainer.gather_objects", lambda mine: [mine, UNREADABLE])
    made = trainer()
    with pytest.raises(DataError) as refusal:
        made.agree(rank_step(made.config.data.languages))
    assert str(refusal.value) == UNREADABLE


def test_a_non_finite_step_does_not_discard_a_checkpoint_being_written(trainer: Made) -> None:
    made = trainer()
    made.save(4, {})
    with pytest.raises(NonFiniteStep):
        made._skip_update(6, Verdict("stop", "loss is not finite"), [("en-1",)])
    assert saved(made) == [4], "and none of the non-finite step"


def test_run_totals_are_restored_by_a_rollback_and_by_a_resume(trainer: Made) -> None:
    made = trainer(**{"data.max_bad_rows": 3})
    made.stop._reason = None
    languages = made.config.data.languages
    slots = no_slots(len(languages)) + 2
    made.totals.add_step(slots, np.arange(len(languages)))
    made.agree(rank_step(languages, bad_rows=(BadRow("sw.jsonl:3", "no answer"),)))
    before = made.totals.state()
    made.save(4, {})
    made._complete_checkpoint()
    made.totals.add_step(slots, np.arange(len(languages)))
    made.agree(rank_step(languages, bad_rows=(BadRow("de.jsonl:9", "no text"),)))
    assert made.totals.state() != before
    assert made._roll_back(failed=6) == 4
    assert made.totals.state() == before
    again = trainer_of(made)
    again.restore(checkpoint.step_folders(made.config.output_dir)[0])
    assert again.totals.state() == before


def test_a_missing_best_metric_is_warned_of_once(trainer: Made, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(**{"checkpoint.best": "train/loss/zh"})
    for step in (2, 4):
        made.save(step, {"train/loss/en": 1.0, "train/loss": 2.0})
        made._complete_checkpoint()
    assert [each for each in caplog.messages if "train/loss/zh" in each] == [
        "checkpoint.best: train/loss/zh: no such metric at step 2, so its checkpoint cannot be the best; "
        "nearest: train/loss, train/loss/en"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        made.saver = saving.Saver(trainer_config(made, "eval/loss"))
        made.save(6, {"eval/loss": 1.0})
        made._complete_checkpoint()
    assert not caplog.messages


def trainer_config(made: Trainer, best: str) -> Run:
    settings = made.config.checkpoint.model_copy(update={"best": best})
    run = SimpleNamespace(**vars(made.run))
    run.config = made.config.model_copy(update={"checkpoint": settings})
    return cast(Run, run)


def test_a_failed_second_save_of_a_step_keeps_the_first(trainer: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    made.save(4, {})
    made._complete_checkpoint()
    monkeypatch.setattr(checkpoint, "commit", no_space)
    made.save(4, {})
    made._complete_checkpoint()
    assert saved(made) == [4]
