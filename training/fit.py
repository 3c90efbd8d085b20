"""`fit` runs a whole training on every rank: it prepares, resumes, trains, exports, and ends the record."""

from __future__ import annotations

import logging
from pathlib import Path

from data_pipeline.atomic import write_text
from data_pipeline.yaml_values import write_yaml
from modeling.export_info import VECTORS_FILE
from modeling.weights.untrusted import read_tokenizer
from training.assembly import assemble, fingerprint
from training.checkpoints import checkpoint
from training.checkpoints.disks import checkpoint_disks
from training.checkpoints.search import find_checkpoint
from training.checks.data_report import contamination
from training.checks.quantised import refuse_quantised_here
from training.conclusion import conclude
from training.config import DataConfig, RunConfig
from training.distributed import barrier, gather_objects, placement, rank
from training.engine.engine import deepspeed_settings, process_group
from training.launch.heartbeat import heartbeat
from training.launch.stop import StoppedOnRequest, StopRequest
from training.layer_area import with_area
from training.loop.profiler import profiled_steps
from training.loop.resume import permitted, resume_from, schedule_change
from training.loop.trainer import Trainer
from training.provenance import description
from training.run_file import resolved
from training.run_folder.date import CONFIG_FILE, with_date
from training.run_folder.prepare import Prepared, forget_preparation, prepare
from training.tracking.plots import draw_plots
from training.tracking.run_record import Status
from training.tracking.tracker import Tracker

log = logging.getLogger(__name__)
SOURCE = Path(__file__).resolve().parent.parent


def fit(
    config: RunConfig,
    resume: str = "auto",
    accept_changes: bool = False,
    stop: StopRequest | None = None,
    profile: int = 0,
) -> Path:
    """Run `config` to its last step on every rank, and export it; the last checkpoint.

    Args:
        resume: "auto", "never" or a path (see `find_checkpoint`).
        accept_changes: resume although data or config differ from the checkpoint's.
        stop: the request to stop before the last step, set by signals.
        profile: steps of which rank 0 writes a profile; 0: none.

    Raises:
        StoppedOnRequest: after a checkpoint; the same call resumes.
        ExportCheckFailed, NotExported: on rank 0, after the last step; see `conclude`.
    """
    deepspeed_settings(config, 1)  # reports user errors before anything is written
    refuse_quantised_here(config.model)
    tracker: Tracker | None = None
    try:
        with process_group(timeout_minutes=30, output_dir=config.output_dir):
            last, tracker = _fit(config, resume, accept_changes, stop or StopRequest(), profile)
    except BaseException:
        if tracker is not None:  # the ranks failed after the last step
            tracker.finish("FAILED")
        raise
    if rank() == 0:
        conclude(config, last, tracker)
    return last


def _fit(
    config: RunConfig, resume: str, accept_changes: bool, stop: StopRequest, profile: int = 0
) -> tuple[Path, Tracker | None]:
    """The last checkpoint, and on rank 0 the tracker if this start trained to the last step; it is still open."""
    if rank() == 0:
        forget_preparation(config)
    barrier()  # no rank uses an earlier start's preparation
    prepared = prepare(config, rank())
    disks = checkpoint_disks(config.output_dir, config.checkpoint.local_dir, config.zero_stage)
    homes = [disk.home for disk in disks if disk.leader]
    for home in homes:
        checkpoint.clear_leftovers(home)
    barrier()
    found = find_checkpoint(resume, disks)
    config = config.model_copy(update={"data": _dated(config.data, config.output_dir, prepared, found)})
    config = with_area(config, prepared, found)
    if found is not None:
        state = permitted(found, config, prepared, fingerprint(prepared), accept_changes)
        if state.step >= config.max_steps:
            log.info("%s: the run is finished already", found)
            return found, None
        if change := schedule_change(state, config):
            log.info("%s", change)
    tracker = Tracker(config.output_dir, config.tracking) if rank() == 0 else None
    run = assemble(config, prepared)
    trainer = Trainer(run, tracker, stop)
    start = resume_from(trainer, found) if found is not None else 0
    for home in homes:
        checkpoint.set_aside_newer(home, start)
    if tracker is not None:
        log.info("%s from step %d on %d ranks", config.output_dir, start, run.engine.world_size)
        for line in contamination(run.data.index):
            log.warning("%s", line.removeprefix("warning: "))
        _write_resolved(config)
        tracker.start(resolved(config), {**description(), **placement()}, resumed_step=start if found else None)
    status: Status = "FAILED"
    try:
        stop.training = True
        with profiled_steps(profile, config.output_dir, start):
            trainer.train(start)
        status = "FINISHED"
    except StoppedOnRequest:
        status = "SCHEDULED"  # MLflow's status of a run that will be resumed
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        heartbeat.end()
        stop.training = False
        if tracker is not None:
            _finish(tracker, config.output_dir, status)
    run.engine.destroy()
    return checkpoint.checkpoint_path(config.output_dir, config.max_steps), tracker


def _dated(data: DataConfig, output_dir: Path, prepared: Prepared, found: Path | None) -> DataConfig:
    """`data` with the date of the prompts, if the chat template prints one; the same on all ranks."""
    if data.template.name != "chat":
        return data
    tokenizer = read_tokenizer(prepared.tokenizer_dir)
    mine = with_date(data, tokenizer, output_dir, found)  # an unusable template ends all ranks alike
    dated: DataConfig = gather_objects(mine)[0]
    if rank() == 0 and (day := dated.template.date) is not None:
        log.info("the chat template prints the date: %s in all of this run, and in its export", day)
    return dated


def _write_resolved(config: RunConfig) -> None:
    """The run file with every default filled in, in the run folder."""
    text = write_yaml(resolved(config))
    write_text(config.output_dir / CONFIG_FILE, text, exclusive=True)


def _finish(tracker: Tracker, output_dir: Path, status: Status) -> None:
    """Ends the record, with the plots as artifacts. Errors of the plots do not change the status.

    After the last step the record stays open for the export (`conclude`).
    """
    try:
        _track_files(tracker, output_dir)
    except Exception as error:  # such as a full disk
        log.warning("%s: some plots could not be drawn: %s", output_dir, error)
    except BaseException:
        status = "KILLED"
        raise
    finally:
        if status != "FINISHED":
            tracker.finish(status)


def _track_files(tracker: Tracker, output_dir: Path) -> None:
    """Adds the resolved config, plots and the newest language vectors to the run's artifacts."""
    tracker.artifact(output_dir / CONFIG_FILE)
    for plot in draw_plots(output_dir):
        tracker.artifact(plot, "plots")
    newest = next(checkpoint.complete(output_dir), None)
    if newest is not None and (newest / VECTORS_FILE).is_file():
        tracker.artifact(newest / VECTORS_FILE)
