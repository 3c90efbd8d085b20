"""What a run goes on from: the newest checkpoint that is whole, on whatever disks, made fit for this number of ranks.

In: a run file and `--resume`, on every rank. Out: a checkpoint, the same on all, loaded. Next: `fit.py`.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from training import checkpoint
from training.assembly import Run
from training.config import RunConfig
from training.disks import Disk, checkpoint_disk
from training.distributed import barrier, gather_objects, rank, world_size
from training.engine_state import shard_of
from training.errors import ConfigError
from training.prepare import POLL_SECONDS
from training.run_file import resolved
from training.run_state import RunState, differences
from training.saving import base_of
from training.trainer import Trainer

log = logging.getLogger(__name__)
SOURCE = Path(__file__).resolve().parent.parent


def find_start(config: RunConfig, resume: str) -> Path | None:
    """The checkpoint to go on from, wherever the run keeps them; every rank calls it.

    Raises:
        ConfigError: as `checkpoint.find`, or a checkpoint on node-local disks of which this start's ranks lack a part.
    """
    found = find_checkpoint(resume, config.output_dir)
    if config.checkpoint.local_dir is None or resume != "auto":
        return found
    disk = checkpoint_disk(config)
    local = find_checkpoint("auto", disk.home) if disk.shared else find_on_all_disks(disk)
    both = [path for path in (found, local) if path is not None]
    return max(both, key=lambda path: RunState.read(path).step, default=None)


def find_on_all_disks(disk: Disk) -> Path | None:
    """The newest checkpoint of which every rank has its part on its own node's disk, verified; None where none began.

    Raises:
        ConfigError: there are some, but not for these ranks on these nodes.
    """
    refused: set[int] = set()
    while True:
        complete = {path for path in checkpoint.step_folders(disk.home) if checkpoint.problem(path) is None}
        mine = {checkpoint.step_of(path) for path in complete if (path / shard_of(rank())).is_file()} - refused
        told = gather_objects((mine, bool(complete)))
        common = set.intersection(*(steps for steps, _ in told))
        if not common:
            if any(there for _, there in told):
                lacking = next((number for number, (steps, _) in enumerate(told) if not steps), 0)
                raise ConfigError(
                    f"checkpoint.local_dir: {disk.home}: rank {lacking} finds no part of its own on its node: with "
                    "node-local checkpoints a run goes on with the same ranks on the same nodes; anything "
                    "else needs a shared folder"
                )
            return None
        path = checkpoint.checkpoint_path(disk.home, max(common))
        saved_on = RunState.read(path).world_size
        if saved_on != world_size():
            raise ConfigError(
                f"{path}: saved on {saved_on} ranks, on node-local disks; another number of ranks "
                f"({world_size()} here) needs checkpoints in a shared folder"
            )
        neighbours = sorted(disk.ranks)
        damage = checkpoint.damage(path, neighbours.index(rank()), len(neighbours))
        if not any(reasons := gather_objects(damage)):
            return path
        if rank() == 0:
            log.warning("%s is passed over: %s", path, next(filter(None, reasons)))
        refused.add(max(common))


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
    changes = differences(state, run.data.fingerprint, resolved(run.config))
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
