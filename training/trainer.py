"""The loop: `fit` runs a whole run, `Trainer.train_step` one step, which reads like the method.

In: a RunConfig on every rank. Out: checkpoints, metrics, and an exported model. Next: `export.py`, `evals`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from tqdm import tqdm

from data_pipeline.loader import RankStep
from data_pipeline.packing import MicroBatch
from data_pipeline.records import DataError
from data_pipeline.tasks.batches import TaskBatch
from data_pipeline.tasks.reader import TaskStep
from modeling.export_info import VECTORS_FILE
from training import checkpoint
from training.assembly import Run, assemble
from training.config import RunConfig
from training.distributed import all_sum, barrier, gather_objects, rank, same_modules_on_every_rank, seed_step
from training.engine import NonFiniteUpdate, init_process_group
from training.errors import ConfigError
from training.objectives import LossTerms
from training.plots import draw_plots
from training.prepare import forget_preparation, prepare
from training.provenance import git_state, versions
from training.run_file import resolved
from training.scaling import StepTotals, learning_rate, step_loss_share
from training.start_checks import check_packing, reference_outputs, warm_up
from training.step_sums import StepRead, StepSums, memory
from training.tracking import Tracker

log = logging.getLogger(__name__)


class NonFiniteStep(Exception):
    """A loss or gradient that is not a number; names step, ranks and sample ids."""


class Trainer:
    """One rank's side of a run."""

    def __init__(self, run: Run, tracker: Tracker | None) -> None:
        self.run = run
        self.config = run.config
        self.tracker = tracker  # rank 0 only
        self.bad_slots = 0
        self._first_step = True

    def train(self, start: int) -> None:
        """Steps `start` .. `max_steps - 1`, with refreshes, evaluations and checkpoints when due."""
        config, run = self.config, self.run
        warm_up(run)
        steps = range(start, config.max_steps)
        progress = tqdm(
            run.loader.steps(start, config.max_steps), total=config.max_steps, initial=start, unit="step",
            disable=rank() > 0 or not sys.stderr.isatty(), dynamic_ncols=True,
        )  # fmt: skip
        waiting_since = time.perf_counter()
        for step, batch in zip(steps, progress, strict=True):
            waited = time.perf_counter() - waiting_since
            metrics = {"data/wait_seconds": waited, **run.objective.before_step(run.engine, step)}
            if self._first_step:
                check_packing(run, batch)
            metrics |= self.train_step(step, batch)
            done = step + 1
            if run.heldout is not None and (done % config.evaluation.every == 0 or done == config.max_steps):
                metrics |= run.heldout.metrics(run.engine, run.objective)
            self._log(done, metrics, progress)
            if done % config.checkpoint.every == 0 or done == config.max_steps:
                self.save(done)
            waiting_since = time.perf_counter()

    def train_step(self, step: int, batch: RankStep | TaskStep) -> dict[str, float]:
        """One optimiser step over the global batch; metrics of it.

        Raises:
            NonFiniteStep: before the update where a loss or gradient is not finite; DataError: too many bad rows.
        """
        started = time.perf_counter()
        totals, read = self._agree(batch)
        sums, micro_batches = self.accumulate(step, batch, totals)
        reduced = self._reduce(step, sums, micro_batches)
        rate = learning_rate(step, self.config.max_steps, self.config.optimizer.learning_rate, self.config.schedule)
        try:
            grad_norm = self.run.engine.step(rate)
        except NonFiniteUpdate as error:
            self._stop_not_finite(step, str(error), [each.sample_ids for each in micro_batches])
        seconds = time.perf_counter() - started
        languages = self.config.data.languages
        return {
            **sums.metrics(reduced, totals, languages),
            **read.metrics(languages),
            "train/grad_norm": grad_norm,
            "train/learning_rate": rate,
            "train/step_seconds": seconds,
            "train/tokens_per_second": float(read.tokens.sum()) / seconds,
            **memory(),
        }

    def accumulate(
        self, step: int, batch: RankStep | TaskStep, totals: StepTotals
    ) -> tuple[StepSums, list[MicroBatch | TaskBatch]]:
        """Forward and backward of this rank's micro-batches; the same number of them on every rank."""
        run = self.run
        seed_step(self.config.seed, step)
        objective = run.objective
        sums = StepSums.zeros(len(self.config.data.languages), len(objective.term_names), run.engine.device)
        idle = [run.data.packer.idle()] * (totals.micro_batches - len(batch.micro_batches))
        micro_batches = [*batch.micro_batches, *idle]
        for number, micro_batch in enumerate(micro_batches):
            run.engine.begin_micro_batch(last=number == len(micro_batches) - 1)
            terms = self._forward(micro_batch.to(run.engine.device))
            share = step_loss_share(terms.terms, totals)
            run.engine.backward(share)
            sums.add(terms, share)
        return sums, micro_batches

    def save(self, step: int) -> None:
        """A checkpoint of the state after `step` steps; every rank calls it."""
        run, output_dir = self.run, self.config.output_dir
        if rank() == 0:
            checkpoint.begin(output_dir, step)
        barrier()
        directory = checkpoint.incomplete_path(output_dir, step)
        run.engine.save_state(directory)
        run.objective.save(run.engine, directory)
        reference = reference_outputs(run)
        if rank() == 0:
            from safetensors.torch import save_file

            save_file(reference, directory / checkpoint.REFERENCE_FILE)
            run.engine.module.config.save_pretrained(directory / "model_config")
            run.data.tokenizer.save_pretrained(directory / "model_config")
            state = checkpoint.RunState(
                step=step, world_size=run.engine.world_size, bad_slots=self.bad_slots,
                fingerprint=dict(run.data.index.fingerprint), config=resolved(self.config), versions=versions(),
            )  # fmt: skip
            state.write(directory)
            checkpoint.commit(output_dir, step, self.config.checkpoint.keep)
            if self.tracker is not None:
                self.tracker.sync()
        barrier()

    def restore(self, path: Path, accept_changes: bool) -> int:
        """Load a checkpoint; the number of finished steps.

        Raises:
            ConfigError: data, config or number of ranks are not those of the checkpoint.
        """
        state = checkpoint.RunState.read(path)
        changes = checkpoint.differences(state, self.run.data.index.fingerprint, resolved(self.config))
        if changes and not accept_changes:
            listed = "; ".join(changes)
            raise ConfigError(f"{path}: cannot resume, since this is another run: {listed} (--accept-changes goes on)")
        if state.world_size != self.run.engine.world_size:
            raise ConfigError(
                f"{path}: saved on {state.world_size} ranks, this run has {self.run.engine.world_size}; "
                f"resume with --nproc {state.world_size}"
            )
        self.run.engine.load_state(path)
        self.run.objective.load(path)
        self.bad_slots = state.bad_slots
        return state.step

    def _agree(self, batch: RankStep | TaskStep) -> tuple[StepTotals, StepRead]:
        """The step's one small all-reduce: label tokens, pairs, micro-batches, empty slots, what was read."""
        ranks = self.run.engine.world_size
        n_micro_batches = [0] * ranks
        n_micro_batches[rank()] = max(len(batch.micro_batches), 1)
        seen = [len(batch.bad_rows), batch.overlong, batch.fingerprint]
        total = all_sum(
            [*seen, *batch.counts.values(), *n_micro_batches, *batch.tokens.tolist()], self.run.engine.device
        )
        sizes = [len(seen), len(batch.counts), ranks, len(batch.tokens)]
        seen_by_all, counts, by_rank, tokens = total.split(sizes)
        bad_rows, overlong, fingerprint = seen_by_all.long().tolist()
        for line in batch.bad_rows:
            log.warning("step %d: a slot stays empty: %s", batch.step, line)
        self.bad_slots += bad_rows
        if self.bad_slots > self.config.data.max_bad_rows:
            lines = [line for lines in gather_objects(batch.bad_rows) for line in lines]
            raise DataError(
                f"{lines[0]} ({self.bad_slots} slots left empty by bad rows so far; "
                f"data.max_bad_rows is {self.config.data.max_bad_rows})"
            )
        totals = StepTotals(dict(zip(batch.counts, counts.tolist(), strict=True)), int(by_rank.max()))
        return totals, StepRead(tokens, overlong, fingerprint)

    def _forward(self, batch: MicroBatch | TaskBatch) -> LossTerms:
        run = self.run
        if not self._first_step:
            return run.objective.loss_terms(run.engine, batch)
        self._first_step = False
        with same_modules_on_every_rank(run.engine.module, run.engine.device):
            return run.objective.loss_terms(run.engine, batch)

    def _reduce(self, step: int, sums: StepSums, micro_batches: list[MicroBatch | TaskBatch]) -> Tensor:
        """Step sums over ranks; stops the run where any rank's loss is not finite."""
        bad = sums.bad_micro_batches()
        flag = torch.tensor([float(len(bad))], dtype=torch.float64, device=sums.losses.device)
        reduced = all_sum(torch.cat([flag, sums.finite()]), self.run.engine.device)
        if reduced[0]:
            self._stop_not_finite(step, "loss", [micro_batches[number].sample_ids for number in bad])
        return reduced[1:]

    def _stop_not_finite(self, step: int, what: str, sample_ids: list[tuple[str, ...]]) -> None:
        """All ranks raise the same error; the complete list of samples goes into a file."""
        mine = [sample for ids in sample_ids for sample in ids]
        by_rank = {number: ids for number, ids in enumerate(gather_objects(mine)) if ids}
        file = self.config.output_dir / f"not-finite-step-{step}.json"
        if rank() == 0:
            file.write_text(json.dumps({"step": step, "what": what, "sample_ids": by_rank}, indent=1))
        shown = "; ".join(
            f"rank {number}: {', '.join(ids[:8])}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"
            for number, ids in by_rank.items()
        )
        raise NonFiniteStep(f"step {step}: {what} is not finite; samples of {shown}; all of them in {file}")

    def _log(self, step: int, metrics: dict[str, float], progress: tqdm) -> None:
        if self.tracker is None:
            return
        self.tracker.log(step, metrics)
        brief = {"loss": f"{metrics['train/loss']:.3f}", "tok/s": f"{metrics['train/tokens_per_second']:.0f}"}
        if "train/contrastive" in metrics:
            brief["contrastive"] = f"{metrics['train/contrastive']:.3f}"
        if "eval/loss" in metrics:
            brief["held-out"] = f"{metrics['eval/loss']:.3f}"
        progress.set_postfix(brief)
        every = max(self.config.max_steps // 20, 1)
        if progress.disable and (step % every == 0 or "eval/loss" in metrics or step == self.config.max_steps):
            log.info("step %d/%d  %s", step, self.config.max_steps, "  ".join(f"{k} {v}" for k, v in brief.items()))


def fit(config: RunConfig, resume: str = "auto", accept_changes: bool = False) -> Path:
    """Run `config` to its last step on every rank; the last checkpoint.

    Args:
        resume: "auto", "never" or a path (see `checkpoint.find`).
        accept_changes: go on although data or config differ from the checkpoint's.
    """
    init_process_group(timeout_minutes=30)
    if rank() == 0:
        forget_preparation(config)
    barrier()  # nobody takes an earlier start's word for it
    prepared = prepare(config, rank())
    found = checkpoint.find(resume, config.output_dir)
    if found is not None and checkpoint.RunState.read(found).step >= config.max_steps:
        log.info("%s: the run is finished already", found)
        return found
    tracker = Tracker(config.output_dir, config.tracking) if rank() == 0 else None
    run = assemble(config, prepared)
    trainer = Trainer(run, tracker)
    start = trainer.restore(found, accept_changes) if found is not None else 0
    if rank() == 0:
        checkpoint.set_aside_newer(config.output_dir, start)
    if tracker is not None:
        log.info("%s from step %d on %d ranks", config.output_dir, start, run.engine.world_size)
        _write_resolved(config)
        tracker.start(resolved(config), {**versions(), **git_state()}, resumed_step=start if found else None)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        trainer.train(start)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if tracker is not None:
            _track_files(tracker, config.output_dir)
            tracker.finish(status)
    barrier()
    run.engine.destroy()
    dist.destroy_process_group()
    return checkpoint.checkpoint_path(config.output_dir, config.max_steps)


def _write_resolved(config: RunConfig) -> None:
    """The run file with every default filled in, in the run folder."""
    text = yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)
    (config.output_dir / "config.yaml").write_text(text, encoding="utf-8")


def _track_files(tracker: Tracker, output_dir: Path) -> None:
    """Resolved config, plots and the newest vectors, as artefacts of the run."""
    tracker.artifact(output_dir / "config.yaml")
    for plot in draw_plots(output_dir):
        tracker.artifact(plot, "plots")
    newest = checkpoint.latest(output_dir)
    if newest is not None and (newest / VECTORS_FILE).is_file():
        tracker.artifact(newest / VECTORS_FILE)
