"""The training loop: `Trainer.train` runs all steps, `Trainer.train_step` runs one. `fit.py` starts and ends it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.batching.batch import Batch
from data_pipeline.loader import Step
from data_pipeline.records import DataError
from training.assembly import Run
from training.checkpoints import checkpoint
from training.checkpoints.disks import checkpoint_disks
from training.checkpoints.run_state import RunState
from training.checkpoints.saving import Saver, run_state
from training.checkpoints.search import find_checkpoint
from training.config import RunConfig
from training.distributed import all_sum, cpu_sum, gather_objects, rank, same_modules_on_every_rank, seed_step
from training.engine.engine import NonFiniteUpdate
from training.engine.start_checks import check_packing, warm_up
from training.errors import CheckpointFailed, NonFiniteStep
from training.launch.heartbeat import heartbeat
from training.launch.stop import StoppedOnRequest, StopRequest
from training.loop.guard import Guard, Verdict, list_samples, shown
from training.loop.metric_window import LANGUAGES_A_LINE, FinishedStep, MetricWindow
from training.loop.progress import TrainingProgress
from training.loop.run_totals import RunTotals
from training.loop.step_sums import StepSums, mean_loss, memory, split_sums
from training.loop.straggler import StragglerMonitor
from training.objectives.base import LossTerms
from training.objectives.scaling import learning_rate, step_loss_share
from training.tracking.tracker import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Agreed:
    """What some rank has said before a step begins."""

    stop: bool  # it was asked to stop
    writing: bool  # it is still writing a checkpoint


class RollBack(Exception):
    """Internal to the loop: step `step` (from 1) failed, and the last checkpoint is to be restored."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class Trainer:
    """Trains on one rank of a run."""

    def __init__(self, run: Run, tracker: Tracker | None, stop: StopRequest | None = None) -> None:
        config = run.config
        self.run = run
        self.config: RunConfig = config
        self.tracker = tracker  # rank 0 only
        self.stop = stop or StopRequest()
        self.saver = Saver(run)
        self.disks = checkpoint_disks(config.output_dir, config.checkpoint.local_dir, config.zero_stage)
        self.guard = Guard(config.guard)
        self.stragglers = StragglerMonitor(config.watchdog.straggler_every, run.engine.device)
        self.totals = RunTotals(config.data.languages)  # of the steps whose sums were read
        n_terms, log_every = len(config.objective.terms), config.tracking.log_every
        self.window = MetricWindow(config.data.languages, n_terms, log_every, run.engine.device)
        self.data_offset = 0  # step t reads the data of step t + data_offset, as rollbacks skip data
        self._metrics: dict[str, float] = {}  # of the last step
        self._first_step = True

    def train(self, start: int) -> None:
        """Runs the steps `start` .. `max_steps - 1` and saves the last state.

        Raises:
            StoppedOnRequest: after a checkpoint, on all ranks at the same step.
        """
        warm_up(self.run)
        with TrainingProgress(start, self.config.max_steps, shown=rank() == 0) as progress:
            while start < self.config.max_steps:
                try:
                    self._train_from(start, progress)
                    break
                except RollBack as failed:
                    start = self._roll_back(failed.step)
        if rank() == 0:
            for line in self.totals.table():
                log.info("%s", line)

    def _train_from(self, start: int, progress: TrainingProgress) -> None:
        """Runs the steps from `start`, with the evaluations and checkpoints that are due."""
        config, run, offset = self.config, self.run, self.data_offset
        reader: Iterator[Step] = run.loader.steps(start + offset, config.max_steps + offset)
        batches = heartbeat.steps(_with_user_errors(reader), start)
        began = time.perf_counter()
        for step, read in zip(range(start, config.max_steps), batches, strict=True):
            waited = run.loader.waited
            batch, mistake = (None, read) if isinstance(read, Exception) else (read, None)
            try:
                agreed = self.agree(batch, mistake)
            except DataError:  # on every rank
                self._save_before_end(step)
                raise
            assert batch is not None
            if self.saver.open and not agreed.writing:
                self._complete_checkpoint()
            if agreed.stop:
                self._stop(step)
            metrics = run.objective.before_step(run.engine, step)
            if self._first_step:
                check_packing(run, batch)
            self.window.add_seconds(waiting=waited)
            metrics |= self.train_step(step, batch)
            done = step + 1
            metrics |= self.stragglers.after_step(done, waited)
            if run.heldout is not None and self._evaluates(done):
                metrics |= run.heldout.metrics(run.engine, run.objective)
            self._metrics = metrics
            if self._saves(done):
                metrics |= self.totals.metrics()
            if self.tracker is not None and metrics:
                self.tracker.log(done, metrics)
            progress.step_done(done, metrics)
            if self._saves(done):
                self.save(done, metrics)
            self.stop.record_step(time.perf_counter() - began)
            began = time.perf_counter()
        self._complete_checkpoint(required=True)

    def _evaluates(self, done: int) -> bool:
        return done % self.config.evaluation.every == 0 or done == self.config.max_steps

    def _saves(self, done: int) -> bool:
        return done % self.config.checkpoint.every == 0 or done == self.config.max_steps

    def _logs(self, done: int, by_language: bool = False) -> bool:
        """Whether the step that makes `done` finished ones logs metrics, or those by language; by the run file alone.

        The more languages there are, the fewer lines have them: their number in a step does not grow beyond that of
        `LANGUAGES_A_LINE`.
        """
        lines = math.ceil(len(self.config.data.languages) / LANGUAGES_A_LINE) if by_language else 1
        regular = done == 1 or done % (self.config.tracking.log_every * lines) == 0
        return regular or self._saves(done) or (self.run.heldout is not None and self._evaluates(done))

    def train_step(self, step: int, batch: Step) -> dict[str, float]:
        """Runs one optimiser step over the global batch; the metrics since the last logged step, if it logs.

        Raises:
            NonFiniteStep: the guard's verdict is to stop; there is no update.
            RollBack: the guard's verdict is to roll back.
        """
        started = time.perf_counter()
        sums = self.accumulate(step, batch)
        self.window.add(step + 1, sums, batch)
        rate = learning_rate(step, self.config.max_steps, self.config.optimizer.learning_rate, self.config.schedule)
        verdict, what = self.guard.judge(self._loss(sums)) if self.guard.needs_loss else None, ""
        applied = False
        if verdict is None:
            try:
                self.window.applied(self.run.engine.step(rate))
                applied = True
            except NonFiniteUpdate as error:
                what = str(error)
        if not applied:
            self.window.skipped()
            bad = math.isnan(self._read()[-1].loss)
            concerned = sums.bad_micro_batches() if bad else range(len(batch.micro_batches))
            verdict = verdict or self.guard.not_finite("loss" if bad else what)
            self._skip_update(step + 1, verdict, [batch.micro_batches[number].sample_ids for number in concerned])
        logs = self._logs(step + 1)
        if logs or self.window.full:
            self._read()
        self.window.add_seconds(time.perf_counter() - started)
        if not logs:
            return {}
        return {**self.window.take(self._logs(step + 1, by_language=True)), "train/learning_rate": rate, **memory()}

    def accumulate(self, step: int, batch: Step) -> StepSums:
        """Runs forward and backward of this rank's micro-batches, equally many on all ranks."""
        run = self.run
        seed_step(self.config.seed, step)
        sums = StepSums.zeros(len(self.config.data.languages), len(self.config.objective.terms), run.engine.device)
        for number, micro_batch in enumerate(batch.micro_batches):
            run.engine.begin_micro_batch(last=number == len(batch.micro_batches) - 1)
            terms = self._forward(micro_batch.to(run.engine.device))
            share = step_loss_share(terms.terms, batch.counts)
            run.engine.backward(share)
            sums.add(terms, share)
        return sums

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Begins a checkpoint of the state after `step` steps, whose metrics are `metrics`. Called on all ranks."""
        if self.saver.open:
            self._complete_checkpoint()
        heartbeat.phase("copying a checkpoint")
        kept = {"guard": self.guard.state(), "totals": self.totals.state(), "unlogged": self.window.state()}
        state = run_state(self.run, step, metrics, data_offset=self.data_offset, **kept)
        # The last checkpoint is written where all nodes and the export can read it.
        self.saver.begin(step, state, self.disks[-1] if step < self.config.max_steps else self.disks[0])

    def restore(self, path: Path, universal: Path | None = None) -> int:
        """Loads a checkpoint and returns its number of finished steps.

        Args:
            universal: the checkpoint converted for this number of ranks, if it was saved on another number.
        """
        state = RunState.read(path)
        self.run.engine.load_state(universal or path, universal=universal is not None)
        self.run.objective.load(path)
        self.data_offset = state.data_offset
        self.totals.restore(state.totals)
        self.window.restore(state.unlogged)
        self.guard.restore(state.guard)
        self.saver.saved_step = state.step
        return state.step

    def _complete_checkpoint(self, required: bool = False) -> None:
        """Completes the open checkpoint, if there is one; the metrics are written to disk first."""
        if not self.saver.open:
            return
        if self.tracker is not None:
            self.tracker.sync()
        heartbeat.phase("completing a checkpoint")
        self.saver.complete(required)
        self.stop.record_save(self.saver.seconds)

    def _ensure_saved(self, step: int) -> None:
        """Saves the state after `step` steps if it is not saved yet. Called on all ranks, between two steps."""
        self._complete_checkpoint()  # the open checkpoint may be of this step
        if self.saver.saved_step != step:
            self._read()
            self.save(step, self._metrics | (self.window.metrics(True) if self.window.begun else {}))
        self._complete_checkpoint(required=True)

    def _save_before_end(self, step: int | None) -> None:
        """As `_ensure_saved`, before an error that ends the run: a failure to save is only logged.

        With None, only an open checkpoint is completed, as the state of this step may be wrong.
        """
        try:
            self._complete_checkpoint() if step is None else self._ensure_saved(step)
        except CheckpointFailed as failed:
            if rank() == 0:
                log.warning("%s", failed)
            return
        if rank() == 0 and self.saver.saved_step:
            log.info("the run ends by an error; %d of %d steps are saved", self.saver.saved_step, self.config.max_steps)

    def _stop(self, step: int) -> None:
        """Saves the state and ends the loop on all ranks."""
        reason = next(each for each in gather_objects(self.stop.reason) if each)
        self._ensure_saved(step)
        raise StoppedOnRequest(f"stopped by {reason} after {step} of {self.config.max_steps} steps; all of it is saved")

    def agree(self, batch: Step | None, mistake: Exception | None = None) -> Agreed:
        """All-reduces mistakes and stop requests; gathers the step's unusable rows, if there are any.

        Args:
            batch: None if this rank could not read its share.
            mistake: why.

        Raises:
            DataError: on all ranks, if one could not read its share, or if there are too many unusable rows.
        """
        mistaken, stop, writing = cpu_sum([mistake is not None, self.stop.reason is not None, self.saver.writing])
        if mistaken or batch is None:
            raise DataError(next(filter(None, gather_objects(str(mistake or ""))))) from mistake
        if batch.unusable and not stop:  # after a stop, the resumed run reads this step and counts them
            met = [row for rows in gather_objects(batch.bad_rows) for row in rows]
            self.totals.add_bad_rows(met, self.config.data.max_bad_rows)
        return Agreed(bool(stop), bool(writing))

    def _forward(self, batch: Batch[Any]) -> LossTerms:
        run = self.run
        if not self._first_step:
            return run.objective.loss_terms(run.engine, batch)
        self._first_step = False
        with same_modules_on_every_rank(run.engine.module, run.engine.device):
            return run.objective.loss_terms(run.engine, batch)

    def _loss(self, sums: StepSums) -> float:
        """The step's mean loss over all ranks, NaN if that of a micro-batch is not finite; waits for the device."""
        summed = all_sum(sums.vector(), self.run.engine.device).tolist()
        bad, losses, labels, _ = split_sums(summed, len(self.config.data.languages))
        return math.nan if bad else mean_loss(losses, labels)

    def _read(self) -> list[FinishedStep]:
        """Reads the sums of the steps since the last read, on all ranks, and counts them."""
        finished = self.window.read()
        for step in finished:
            self.totals.add_step(step.slots, step.labels)
            if not self.guard.needs_loss and math.isfinite(step.loss):
                self.guard.record(step.loss)
        return finished

    def _skip_update(self, step: int, verdict: Verdict, sample_ids: list[tuple[str, ...]]) -> None:
        """Ends step `step` (from 1) without an update: all ranks drop it, roll back, or raise the same error."""
        mine = [sample for ids in sample_ids for sample in ids]
        by_rank = {number: ids for number, ids in enumerate(gather_objects(mine)) if ids}
        listed = gather_objects(list_samples(self.config.output_dir, step, verdict, by_rank) if rank() == 0 else None)[
            0
        ]
        text = f"step {step}: {verdict.what}; samples of {shown(by_rank)}; {listed}"
        if verdict.policy == "stop":
            self._save_before_end(None)
            raise NonFiniteStep(text)
        self.run.engine.drop_update()
        if rank() == 0:
            used = f"{self.guard.events} of {self.config.guard.max_events} such events"
            done = "the update is skipped" if verdict.policy == "skip" else "rolling back to the last checkpoint"
            log.warning("%s; %s (%s)", text, done, used)
        if verdict.policy == "rollback":
            raise RollBack(step)

    def _roll_back(self, failed: int) -> int:
        """Restores the last checkpoint, skips the data up to step `failed` (from 1), returns the finished steps."""
        self._complete_checkpoint()
        found = find_checkpoint("auto", self.disks)
        if found is None:
            raise NonFiniteStep(f"step {failed}: there is no checkpoint to roll back to; set checkpoint.every lower")
        events, offset = self.guard.events, self.data_offset
        start = self.restore(found)
        for disk in self.disks:
            if disk.leader:  # newer checkpoints belong to the abandoned steps
                checkpoint.set_aside_newer(disk.home, start)
        self.guard.events, self.data_offset = events, offset + failed - start
        if self.tracker is not None:
            self.tracker.rewind(start)
            log.info("back to the checkpoint of step %d; the data of steps %d to %d are left out",
                     start, start + 1 + offset, failed + offset)  # fmt: skip
        return start


def _with_user_errors(batches: Iterator[Step]) -> Iterator[Step | Exception]:
    """Yields the batches. A user error is yielded, not raised, so that all ranks can end with it."""
    try:
        yield from batches
    except Exception as error:
        if getattr(error, "exit_status", None) != 2:
            raise
        yield error
