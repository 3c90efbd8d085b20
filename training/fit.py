"""A whole run: `fit` prepares, resumes, trains and ends it, on every rank.

In: a RunConfig on every rank. Out: the last checkpoint. Next: `export.py`, `evals`.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch.distributed as dist
import yaml

from modeling.export_info import VECTORS_FILE
from training import checkpoint
from training.assembly import Run, assemble
from training.config import RunConfig
from training.distributed import barrier, gather_objects, rank, world_size
from training.engine import init_process_group
from training.errors import ConfigError
from training.heartbeat import heart
from training.plots import draw_plots
from training.prepare import POLL_SECONDS, forget_preparation, prepare
from training.provenance import git_state, versions
from training.run_file import resolved
from training.run_state import RunState, differences
from training.saving import base_of
from training.stop import StoppedOnRequest, StopRequest
from training.tracking import Tracker
from training.trainer import Trainer

log = logging.getLogger(__name__)
SOURCE = Path(__file__).resolve().parent.parent


def fit(config: RunConfig, resume: str = "auto", accept_changes: bool = False, stop: StopRequest | None = None) -> Path:
    """Run `config` to its last step on every rank; the last checkpoint.

    Args:
        resume: "auto", "never" or a path (see `checkpoint.find`).
        accept_changes: go on although data or config differ from the checkpoint's.
        stop: what asks the run to stop before its last step.

    Raises:
        StoppedOnRequest: after a checkpoint; the same call goes on.
    """
    stop = stop or StopRequest()
    init_process_group(timeout_minutes=30, output_dir=config.output_dir)
    if rank() == 0:
        forget_preparation(config)
    barrier()  # nobody takes an earlier start's word for it
    prepared = prepare(config, rank())
    found = find_checkpoint(resume, config.output_dir)
    if found is not None and RunState.read(found).step >= config.max_steps:
        log.info("%s: the run is finished already", found)
        return found
    tracker = Tracker(config.output_dir, config.tracking) if rank() == 0 else None
    run = assemble(config, prepared)
    trainer = Trainer(run, tracker, stop)
    start = go_on(trainer, found, accept_changes) if found is not None else 0
    if rank() == 0:
        checkpoint.set_aside_newer(config.output_dir, start)
    if tracker is not None:
        log.info("%s from step %d on %d ranks", config.output_dir, start, run.engine.world_size)
        _write_resolved(config)
        tracker.start(resolved(config), {**versions(), **git_state()}, resumed_step=start if found else None)
    status: Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"] = "FAILED"
    try:
        stop.begin_training()
        trainer.train(start)
        status = "FINISHED"
    except StoppedOnRequest:
        status = "SCHEDULED"  # MLflow's word for a run that is to go on
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        heart.end()
        stop.end_training()
        if tracker is not None:
            _track_files(tracker, config.output_dir)
            tracker.finish(status)
    barrier()
    run.engine.destroy()
    dist.destroy_process_group()
    return checkpoint.checkpoint_path(config.output_dir, config.max_steps)


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, its content verified; every rank calls it and gets the same answer.

    Rank 0 looks; all ranks read a share of the files each, and what one of them finds damaged is passed over.

    Raises:
        ConfigError: as `checkpoint.find`.
    """
    refused: dict[Path, str] = {}

    def refuse(path: Path) -> str | None:
        return checkpoint.problem(path) or refused.get(path)

    while True:
        answer = gather_objects(_look(resume, output_dir, refuse) if rank() == 0 else None)[0]
        if isinstance(answer, ConfigError):
            raise answer
        if answer is None:
            return None
        reasons = gather_objects(checkpoint.damage(answer, rank(), world_size()))
        reason = next(filter(None, reasons), None)
        if reason is None:
            return Path(answer)
        refused[answer] = reason


def _look(resume: str, output_dir: Path, refuse: Callable[[Path], str | None]) -> Path | ConfigError | None:
    """What rank 0 finds, its error as a value: the other ranks wait for an answer."""
    try:
        return checkpoint.find(resume, output_dir, refuse)
    except ConfigError as error:
        return error


def go_on(trainer: Trainer, path: Path, accept_changes: bool) -> int:
    """Load a checkpoint of any number of ranks; the number of finished steps.

    Raises:
        ConfigError: data or config are not those of the checkpoint.
    """
    run, state = trainer.run, RunState.read(path)
    changes = differences(state, run.data.index.fingerprint, resolved(run.config))
    if changes and not accept_changes:
        listed = "; ".join(changes)
        raise ConfigError(f"{path}: cannot resume, since this is another run: {listed} (--accept-changes goes on)")
    if state.base is not None and (now := base_of(run)) != state.base and (now or {}).get("hash") != state.base["hash"]:
        raise ConfigError(
            f"{path}: holds adapters to the model that lay in {state.base['directory']}, not to that in {run.model_dir}"
        )
    if state.world_size == run.engine.world_size:
        return trainer.restore(path)
    if state.zero_stage != run.config.zero_stage:
        raise ConfigError(
            f"{path}: saved on {state.world_size} ranks under ZeRO-{state.zero_stage}; on {run.engine.world_size} "
            f"ranks it goes on under the same stage: set zero_stage={state.zero_stage}"
        )
    universal = _universal(run, path, state)
    start = trainer.restore(path, universal)
    barrier()
    if rank() == 0:
        shutil.rmtree(universal)
    return start


def _universal(run: Run, path: Path, state: RunState) -> Path:
    """The checkpoint in a form that any number of ranks can load; made by one process, the ranks wait for its marker.

    They wait for a file and not in a collective call, which would time out while a large model is converted.
    """
    output = checkpoint.universal_path(run.config.output_dir, state.step)
    marker = output / checkpoint.MARKER
    if rank() == 0:
        shutil.rmtree(output, ignore_errors=True)
    barrier()
    if rank() == 0:
        log.info(
            "%s was saved on %d ranks, this run has %d: converting it", path, state.world_size, run.engine.world_size
        )
        made = subprocess.run(
            [sys.executable, "-m", "training.engine_state", str(path), str(output)],
            cwd=SOURCE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"{path}: could not be converted for another number of ranks:\n{made.stderr[-2000:]}")
        marker.touch()
    while not marker.is_file():
        time.sleep(POLL_SECONDS)
    return output


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
