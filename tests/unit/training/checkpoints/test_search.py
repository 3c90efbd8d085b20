"""search.py and resume.py: which checkpoint a run resumes from if there are several disks, and when that is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from training.checkpoints import checkpoint, disks
from training.checkpoints.disks import Disk, shared_disk
from training.checkpoints.run_state import RunState
from training.checkpoints.search import find_checkpoint, newest_seen
from training.config import RunConfig
from training.engine.saved_files import shard_of
from training.errors import ConfigError
from training.loop.resume import resume_from
from training.loop.trainer import Trainer
from training.run_file import resolved, validate


@pytest.fixture
def config(tmp_path: Path, tiny_run: Callable[..., dict[str, Any]]) -> RunConfig:
    return validate(tiny_run(tmp_path / "run", **{"checkpoint.local_dir": str(tmp_path / "disk")}), "tiny run")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A node-local disk, which not all ranks can read."""
    return Disk(tmp_path / "disk", frozenset({0, 1}))


def save(home: Path, step: int, shard: bool = True, world_size: int = 1) -> Path:
    directory = checkpoint.begin(home, step)
    if shard:
        (directory / shard_of(0)).parent.mkdir()
        (directory / shard_of(0)).write_bytes(b"weights")
    RunState(step, world_size, {}, {}, {}).write(directory)
    return checkpoint.commit(home, step, {})


@pytest.mark.parametrize(("shared", "own"), [(4, 6), (6, 4), (None, 6), (6, None), (None, None)])
def test_the_newest_checkpoint_is_taken_from_any_disk(
    config: RunConfig, disk: Disk, shared: int | None, own: int | None
) -> None:
    here = {step: save(home, step) for home, step in ((config.output_dir, shared), (disk.home, own)) if step}
    assert find_checkpoint("auto", [shared_disk(config.output_dir), disk]) == here.get(max(here, default=0))


def test_read_only_commands_find_a_checkpoint_below_the_home_directory_or_a_variable(
    config: RunConfig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(disk.home, 6)
    monkeypatch.setenv("HOME", str(disk.home.parent))
    monkeypatch.setenv("LOCAL", str(disk.home))
    assert newest_seen(config.output_dir, "~/disk") == saved
    assert newest_seen(config.output_dir, "$LOCAL") == saved
    assert newest_seen(config.output_dir, None) is None


@pytest.mark.parametrize(
    ("shard", "world_size", "message"),
    [(False, 1, "rank 0 has no shard of it on its node"), (True, 2, "saved on 2 ranks, on node-local disks")],
)
def test_older_node_local_checkpoints_do_not_block_a_resume(
    config: RunConfig, disk: Disk, shard: bool, world_size: int, message: str
) -> None:
    """A checkpoint in the shared run folder needs neither the same nodes nor the same number of ranks."""
    save(disk.home, 4, shard, world_size)
    with pytest.raises(ConfigError, match=message):
        find_checkpoint("auto", [shared_disk(config.output_dir), disk])
    save(config.output_dir, 2)
    with pytest.raises(ConfigError, match=message):
        find_checkpoint("auto", [shared_disk(config.output_dir), disk])
    newer = save(config.output_dir, 6)
    assert find_checkpoint("auto", [shared_disk(config.output_dir), disk]) == newer


@pytest.mark.parametrize("ranks", [1, 2], ids=["shared", "own"])
def test_a_damaged_checkpoint_on_a_node_local_disk_is_skipped_too(
    config: RunConfig, disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """Without an older one the run starts from step 0, or resumes from the run folder; no shard is called missing."""
    monkeypatch.setattr(disks, "world_size", lambda: ranks)
    damaged = save(disk.home, 6)
    (damaged / shard_of(0)).write_bytes(b"weighty")
    both = [shared_disk(config.output_dir), Disk(disk.home, frozenset({0}))]
    assert both[1].shared == (ranks == 1)
    assert find_checkpoint("auto", both) is None
    assert caplog.messages == [f"{damaged} is passed over: {shard_of(0)} is damaged: its checksum differs"]
    older = save(config.output_dir, 4)
    assert find_checkpoint("auto", both) == older
    whole = save(disk.home, 5)
    assert find_checkpoint("auto", both) == whole


def test_a_max_bad_rows_below_the_saved_count_is_refused_before_loading(config: RunConfig, tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    met = {"bad_rows": ["sw.jsonl:3", "sw.jsonl:9", "de.jsonl:1"]}
    replace(RunState.read(path), totals=met, config=resolved(config)).write(path)
    data = SimpleNamespace(fingerprint={})
    run = SimpleNamespace(config=config, data=data, engine=SimpleNamespace(world_size=1))
    trainer = cast(Trainer, SimpleNamespace(run=run, restore=lambda path: 4))
    with pytest.raises(ConfigError) as refusal:
        resume_from(trainer, path)
    assert str(refusal.value) == (
        "data.max_bad_rows: 0, but 3 unusable rows before step-00000004 was saved; set data.max_bad_rows=3 or more"
    )
    run.config = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_rows": 3})})
    assert resume_from(trainer, path) == 4
