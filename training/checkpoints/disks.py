"""The disks that hold a run's checkpoints: the run's folder, which all nodes share, and each node's own disk.

On node-local disks each node holds the shards of its own ranks, so such a checkpoint can be loaded by the same ranks on
the same nodes only.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from training.distributed import barrier, gather_objects, rank, world_size
from training.engine.saved_files import needs_shared_disk
from training.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder whose `checkpoints` this rank writes to, and the ranks that see the same folder."""

    home: Path
    ranks: frozenset[int]

    @property
    def shared(self) -> bool:
        """Whether all ranks see it."""
        return len(self.ranks) == world_size()

    @property
    def leader(self) -> bool:
        """Whether this rank creates, completes and deletes the checkpoints on it."""
        return rank() == min(self.ranks)

    @property
    def share(self) -> tuple[int, int]:
        """This rank's index among the ranks that see the disk, and their number."""
        return sorted(self.ranks).index(rank()), len(self.ranks)


def shared_disk(home: Path) -> Disk:
    """A folder that all ranks see, such as the run's own."""
    return Disk(home, frozenset(range(world_size())))


def expanded(local_dir: str) -> Path:
    """The folder of `checkpoint.local_dir`, which may begin with `~` and name environment variables."""
    return Path(os.path.expanduser(os.path.expandvars(local_dir)))


def checkpoint_disks(output_dir: Path, local_dir: str | None, zero_stage: int) -> tuple[Disk, ...]:
    """The run's folder, and `checkpoint.local_dir` if it is set, which then holds the checkpoints before the last step.

    All ranks call it, as they write files to find out which ranks share a folder.

    Raises:
        ConfigError: `checkpoint.local_dir` names a variable that is not set, or a folder that cannot be written.
    """
    own = shared_disk(output_dir)
    if local_dir is None:
        return (own,)
    home, problem = expanded(local_dir), None
    token = home / f".rank-{rank()}-{uuid.uuid4().hex}"
    if "$" in str(home):
        problem = f"checkpoint.local_dir: {local_dir}: names a variable that is not set on rank {rank()}"
    else:
        try:
            home.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            problem = f"checkpoint.local_dir: {home}: cannot be written on rank {rank()}: {error.strerror}"
    reports = gather_objects((token.name, problem))
    if problems := [each for _, each in reports if each]:
        raise ConfigError(problems[0])
    seen = frozenset(number for number, (name, _) in enumerate(reports) if (home / name).exists())
    barrier()  # all ranks have checked
    token.unlink()
    if len(seen) < world_size() and (reason := needs_shared_disk(zero_stage)) is not None:
        raise ConfigError(f"checkpoint.local_dir: {home} is not shared by all ranks, {reason}")
    return own, Disk(home, seen)
