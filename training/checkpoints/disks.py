"""Where checkpoints lie: in the run's folder, which all nodes share, or on each node's own disk.

In: a run's config, on every rank. Out: a Disk. Next: `saving.py` writes to it, `fit.py` looks there for what to go on
from.

On node-local disks each node holds its own ranks' shards, so a run goes on with the same ranks on the same nodes only.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from training.config import CheckpointConfig, RunConfig
from training.distributed import barrier, gather_objects, rank, world_size
from training.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Disk:
    """The folder whose `checkpoints` this rank writes to, and with whom it shares it."""

    home: Path
    ranks: frozenset[int]  # that see this folder

    @property
    def shared(self) -> bool:
        """Whether all ranks see it."""
        return len(self.ranks) == world_size()

    @property
    def leader(self) -> bool:
        """Whether this rank begins and completes the checkpoints on it."""
        return rank() == min(self.ranks)


def own_homes(config: RunConfig, disk: Disk) -> list[Path]:
    """Of the run's folder and its disk for checkpoints, those whose checkpoints this rank looks after."""
    homes = {config.output_dir: rank() == 0, disk.home: disk.leader}
    return [home for home, mine in homes.items() if mine]


def shared_disk(config: RunConfig) -> Disk:
    """The run's own folder."""
    return Disk(config.output_dir, frozenset(range(world_size())))


def checkpoint_disk(config: RunConfig) -> Disk:
    """Where the run's checkpoints lie, seen by trying; every rank calls it.

    Raises:
        ConfigError: `checkpoint.local_dir` names a variable that is not set, or a folder that cannot be written.
    """
    settings: CheckpointConfig = config.checkpoint
    if settings.local_dir is None:
        return shared_disk(config)
    home, problem = Path(os.path.expanduser(os.path.expandvars(settings.local_dir))), None
    token = home / f".rank-{rank()}-{uuid.uuid4().hex}"
    if "$" in str(home):
        problem = f"checkpoint.local_dir: {settings.local_dir}: names a variable that is not set on rank {rank()}"
    else:
        try:
            home.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            problem = f"checkpoint.local_dir: {home}: cannot be written on rank {rank()}: {error.strerror}"
    told = gather_objects((token.name, problem))
    if problems := [each for _, each in told if each]:
        raise ConfigError(problems[0])
    seen = frozenset(number for number, (name, _) in enumerate(told) if (home / name).exists())
    barrier()  # all have looked
    token.unlink()
    if config.zero_stage != 3 and len(seen) < world_size():
        raise ConfigError(f"checkpoint.local_dir: {home} is not shared by all ranks, which needs zero_stage=3")
    return Disk(home, seen)
