"""Which checkpoint a run goes on from, or back to: the newest that is whole, on whatever disks.

In: a run file and `--resume`, on every rank. Out: a checkpoint, the same on all, its content verified. Next:
`resume.py` loads it at a start, `trainer.py` at a roll-back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from training.checkpoints import checkpoint
from training.checkpoints.disks import Disk, checkpoint_disk
from training.checkpoints.run_state import RunState
from training.config import RunConfig
from training.distributed import gather_objects, rank, world_size
from training.engine.state import shard_of
from training.errors import ConfigError

log = logging.getLogger(__name__)


def find_start(config: RunConfig, resume: str) -> Path | None:
    """The checkpoint to go on from, wherever the run keeps them; every rank calls it.

    Raises:
        ConfigError: as `checkpoint.find`, or a checkpoint on node-local disks of which this start's ranks lack a part.
    """
    if config.checkpoint.local_dir is None or resume != "auto":
        return find_checkpoint(resume, config.output_dir)
    return find_newest(config, checkpoint_disk(config))


def newest_seen(config: RunConfig) -> Path | None:
    """The newest complete checkpoint that can be seen without ranks, its content not read: for a look at a run."""
    homes = [config.output_dir]
    if config.checkpoint.local_dir is not None:
        homes.append(Path(os.path.expandvars(config.checkpoint.local_dir)))
    found = [path for home in homes if (path := checkpoint.latest(home)) is not None]
    return max(found, key=checkpoint.step_of, default=None)


def find_newest(config: RunConfig, disk: Disk) -> Path | None:
    """The newest checkpoint, in the run's folder or on the disks where it keeps them; every rank calls it.

    Raises:
        ConfigError: as `find_on_all_disks`, of what is newer than the newest in the run's folder.
    """
    found = find_checkpoint("auto", config.output_dir)
    if disk.home == config.output_dir:
        return found
    than = checkpoint.step_of(found) if found is not None else -1
    local = find_checkpoint("auto", disk.home) if disk.shared else find_on_all_disks(disk, than)
    both = [path for path in (found, local) if path is not None]
    return max(both, key=checkpoint.step_of, default=None)


def find_on_all_disks(disk: Disk, newer_than: int) -> Path | None:
    """The newest checkpoint of which every rank has its part on its own node's disk, verified; None where none is
    whole of those after more than `newer_than` steps.

    Raises:
        ConfigError: there are some, but not for these ranks on these nodes.
    """
    refused: set[str] = set()
    while True:
        there = [path for path in checkpoint.step_folders(disk.home) if checkpoint.step_of(path) > newer_than]
        complete = [path for path in there if path.name not in refused and checkpoint.problem(path) is None]
        mine = {path.name for path in complete if (path / shard_of(rank())).is_file()}
        told = gather_objects((mine, bool(complete)))
        common = set.intersection(*(names for names, _ in told))
        if not common:
            if any(some for _, some in told):
                lacking = next((number for number, (names, _) in enumerate(told) if not names), 0)
                raise ConfigError(
                    f"checkpoint.local_dir: {disk.home}: rank {lacking} finds no part of its own on its node: with "
                    "node-local checkpoints a run goes on with the same ranks on the same nodes; anything "
                    "else needs a shared folder"
                )
            return None
        path = checkpoint.checkpoint_root(disk.home) / max(common)
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
        refused.add(path.name)


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
