"""Finds the checkpoint that a run resumes from or rolls back to: the newest usable one, over all disks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.checkpoints.checkpoint import checkpoint_root, defect, step_folders, step_of
from training.checkpoints.disks import Disk, expanded, shared_disk
from training.checkpoints.run_state import RunState
from training.distributed import gather_objects, rank, world_size
from training.engine.saved_files import shard_of
from training.errors import ConfigError

log = logging.getLogger(__name__)


def find_checkpoint(resume: str, disks: Sequence[Disk], *, content: bool = True) -> Path | None:
    """The checkpoint that `--resume` names; None: start from the beginning. All ranks call it and get the same one.

    Args:
        resume: "auto" (the newest usable one, if any), "never", or the path of a checkpoint or of a run.
        disks: where the run keeps checkpoints; the first is its own folder, the only one read for "never".
        content: compare the files with their checksums, each rank a share of them, and pass over damaged
            checkpoints; without it only names and sizes are compared.

    Raises:
        ConfigError: "never" although the run's folder holds a checkpoint; a path without a usable one; or the newest
            checkpoint is on node-local disks, but some rank's part of it is not on that rank's node.
    """
    if resume == "auto":
        return _newest(disks, content)
    if resume == "never":
        if (existing := _newest(disks[:1], content)) is not None:
            raise ConfigError(
                f"{existing}: --resume never, but this run folder holds a checkpoint; "
                "take another output_dir, remove the folder, or use --resume auto"
            )
        return None
    return checkpoint_at(Path(resume), content=content)


def checkpoint_at(path: Path, *, content: bool = True) -> Path:
    """The checkpoint at `path`, or the newest usable one of the run at `path`; all ranks call it.

    Raises:
        ConfigError: there is none.
    """
    is_folder, is_run = gather_objects((path.is_dir(), checkpoint_root(path).is_dir()))[0]
    if not is_folder:
        raise ConfigError(f"{path}: no such folder; give a checkpoint's or a run's")
    disk = shared_disk(path)
    if is_run:
        if (found := _newest([disk], content)) is None:
            raise ConfigError(f"{path}: this run has no complete checkpoint")
        return found
    if (reason := _defect(path, disk, content)) is not None:
        raise ConfigError(f"{path}: not a complete checkpoint: {reason}")
    return path


def newest_seen(output_dir: Path, local_dir: str | None) -> Path | None:
    """The newest complete checkpoint visible to one process, without reading its content; for read-only commands.

    `local_dir` is `checkpoint.local_dir`.
    """
    homes = [output_dir]
    if local_dir is not None:
        homes.append(expanded(local_dir))
    return find_checkpoint("auto", [shared_disk(home) for home in homes], content=False)


def _newest(disks: Sequence[Disk], content: bool) -> Path | None:
    passed_over: set[Path] = set()
    while True:
        found: tuple[Path, Disk] | None = None
        for disk in disks:
            if (path := _newest_on(disk, step_of(found[0]) if found else -1, passed_over)) is not None:
                found = path, disk
        if found is None:
            return None
        path, disk = found
        if (reason := _defect(path, disk, content)) is None:
            return path
        _pass_over(path, reason, passed_over)


def _defect(path: Path, disk: Disk, content: bool) -> str | None:
    """`defect`, computed by all ranks together; the first reason found by any rank."""
    mine = defect(path, disk.share) if content else defect(path) if rank() == 0 else None
    return next(filter(None, gather_objects(mine)), None)


def _newest_on(disk: Disk, newer_than: int, passed_over: set[Path]) -> Path | None:
    """The newest complete checkpoint on a disk after more than `newer_than` steps; all ranks call it.

    Raises:
        ConfigError: on a node-local disk there are some, but none for these ranks on these nodes.
    """
    if disk.shared:
        newest = next(_complete(disk.home, newer_than, passed_over), None) if rank() == 0 else None
        name = gather_objects(newest.name if newest else None)[0]
        return None if name is None else checkpoint_root(disk.home) / name
    complete = list(_complete(disk.home, newer_than, passed_over))
    mine = {path.name for path in complete if (path / shard_of(rank())).is_file()}
    found = gather_objects((mine, bool(complete)))
    common = set.intersection(*(names for names, _ in found))
    if not common:
        if any(some for _, some in found):
            lacking = next((number for number, (names, _) in enumerate(found) if not names), 0)
            raise ConfigError(
                f"checkpoint.local_dir: {disk.home}: rank {lacking} has no shard of it on its node: node-local "
                "checkpoints can only be resumed with the same ranks on the same nodes; for anything else, keep "
                "checkpoints in a shared folder"
            )
        return None
    path = checkpoint_root(disk.home) / max(common)
    saved_on = RunState.read(path).world_size
    if saved_on != world_size():
        raise ConfigError(
            f"{path}: saved on {saved_on} ranks, on node-local disks; another number of ranks "
            f"({world_size()} here) needs checkpoints in a shared folder"
        )
    return path


def _complete(home: Path, newer_than: int, passed_over: set[Path]) -> Iterator[Path]:
    """The complete checkpoints on this rank's disk, the newest first."""
    for path in reversed(step_folders(home)):
        if step_of(path) > newer_than and path not in passed_over:
            if (reason := defect(path)) is None:
                yield path
            else:
                _pass_over(path, reason, passed_over)


def _pass_over(path: Path, reason: str, passed_over: set[Path]) -> None:
    passed_over.add(path)
    if rank() == 0:
        log.warning("%s is passed over: %s", path, reason)
