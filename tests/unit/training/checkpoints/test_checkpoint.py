"""checkpoint.py: only complete checkpoints are valid; the newest complete one is found, torn ones are skipped."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import atomic
from training.checkpoints import checkpoint
from training.checkpoints.checkpoint import ALL_CONTENT, MARKER, FileRecord
from training.checkpoints.disks import shared_disk
from training.checkpoints.export import export_checkpoint
from training.checkpoints.retention import kept, no_such_metric, retain
from training.checkpoints.run_state import FORMAT, STATE_FILE, RunState, differences
from training.checkpoints.search import find_checkpoint
from training.config import CheckpointConfig
from training.errors import ConfigError

CONFIG = {
    "seed": 1,
    "output_dir": "runs/a",
    "data_dir": "data",
    "max_steps": 10,
    "data": {"languages": ["en", "de"], "workers": 1, "max_bad_rows": 0, "mixture": {"weights": None}},
    "checkpoint": {"every": 2, "keep": 2},
    "evaluation": {"every": 0},
    "tracking": {"uri": None},
    "deepspeed": {},
}
FINGERPRINT = {"en.jsonl": "aa", "de.jsonl": "bb", "languages": "en de"}


def state(step: int = 0) -> RunState:
    return RunState(step=step, world_size=2, fingerprint=FINGERPRINT, config=CONFIG, versions={"torch": "2"})


def save(output_dir: Path, step: int, keep: int = 9) -> Path:
    """Save a checkpoint as the trainer does."""
    directory = checkpoint.begin(output_dir, step)
    (directory / "zero").mkdir()
    (directory / "zero" / "rank_0.pt").write_bytes(b"x" * 1000)
    state(step).write(directory)
    path = checkpoint.commit(output_dir, step, {})
    retain(output_dir, step, CheckpointConfig(keep=keep))
    return path


def find(resume: str, output_dir: Path, content: bool = False) -> Path | None:
    return find_checkpoint(resume, [shared_disk(output_dir)], content=content)


def newest(output_dir: Path) -> Path | None:
    return find("auto", output_dir)


def steps_of(output_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoint.checkpoint_root(output_dir).iterdir())


def cut(path: Path, size: int = 10) -> None:
    os.truncate(path, size)


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


TORN: dict[str, tuple[Callable[[Path], object], str]] = {
    "marker missing": (lambda path: (path / MARKER).unlink(), "no COMPLETE marker"),
    "marker torn": (lambda path: cut(path / MARKER), "its COMPLETE marker is torn"),
    "marker empty": (lambda path: cut(path / MARKER, 0), "its COMPLETE marker is torn"),
    "marker of zeros": (lambda path: (path / MARKER).write_bytes(bytes(80)), "its COMPLETE marker is torn"),
    "marker of something else": (lambda path: (path / MARKER).write_text("null"), "its COMPLETE marker is torn"),
    "marker not text": (lambda path: (path / MARKER).write_bytes(b"\xff\xfe\x80"), "its COMPLETE marker is torn"),
    "file truncated": (lambda path: cut(path / "zero/rank_0.pt"), "zero/rank_0.pt has 10 bytes instead of 1000"),
    "file grown": (lambda path: (path / "zero/rank_0.pt").write_bytes(b"x" * 1001), "has 1001 bytes instead of 1000"),
    "file missing": (lambda path: (path / "zero/rank_0.pt").unlink(), "zero/rank_0.pt is missing"),
    "folder missing": (lambda path: shutil.rmtree(path / "zero"), "zero/rank_0.pt is missing"),
    "state missing": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "all missing": (empty, "no COMPLETE marker"),
}


def test_a_committed_checkpoint_is_complete_and_marks_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step-00000100"
    assert checkpoint.defect(path) is None
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert files.pop(MARKER)
    expected = {name: FileRecord(len(content), sha256(content).hexdigest()) for name, content in files.items()}
    assert checkpoint.files_of(path) == expected
    assert set(expected) == {"zero/rank_0.pt", "state.json"}
    assert checkpoint.defect(path, ALL_CONTENT) is None


def test_the_state_is_read_as_written(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert RunState.read(path) == state(7)


@pytest.mark.parametrize("saved", [2, 99])
def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path: Path, saved: int) -> None:
    """Also by an export: both read the state before they load anything."""
    directory = checkpoint.begin(tmp_path, 7)
    state(7).write(directory)
    file = directory / STATE_FILE
    file.write_text(file.read_text().replace(f'"format": {FORMAT}', f'"format": {saved}'))
    path = checkpoint.commit(tmp_path, 7, {})
    for read in (lambda: RunState.read(path), lambda: export_checkpoint(path, tmp_path / "model")):
        with pytest.raises(ConfigError) as refusal:
            read()
        assert str(refusal.value) == (
            f"{path / STATE_FILE}: format {saved}, this version reads {FORMAT}: the checkpoint was saved by another "
            "version of crosslift; give another output_dir, or use that version"
        )
        assert refusal.value.exit_status == 2
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("how", TORN)
def test_a_torn_checkpoint_is_skipped_and_the_log_gives_the_reason(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    assert newest(tmp_path) == newer
    tear, reason = TORN[how]
    tear(newer)
    assert reason in str(checkpoint.defect(newer))
    with caplog.at_level(logging.WARNING, logger="training.checkpoints.search"):
        assert newest(tmp_path) == older
    (message,) = caplog.messages
    assert message.startswith(f"{newer} is passed over: ")
    assert reason in message


def test_no_checkpoint_is_found_if_all_are_torn(tmp_path: Path) -> None:
    for step in (10, 20):
        cut(save(tmp_path, step) / MARKER)
    assert newest(tmp_path) is None
    assert newest(tmp_path / "never started") is None


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step in (900, 1000, 99):
        save(tmp_path, step)
    assert newest(tmp_path) == checkpoint.checkpoint_path(tmp_path, 1000)


@pytest.mark.parametrize("name", ["zero/rank_0.pt", "state.json"])
def test_a_flipped_bit_is_found_only_if_content_is_verified(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 10)
    file = path / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert checkpoint.defect(path) is None, "sizes are right"
    assert checkpoint.defect(path, ALL_CONTENT) == f"{name} is damaged: its checksum differs"
    shares = [checkpoint.defect(path, (share, 2)) for share in (0, 1)]
    assert sorted(map(str, shares)) == sorted(["None", str(checkpoint.defect(path, ALL_CONTENT))]), (
        "each file is read once"
    )


def test_damaged_content_is_refused_if_content_is_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    (newer / "zero" / "rank_0.pt").write_bytes(b"y" * 1000)
    assert find("auto", tmp_path) == newer
    assert find("auto", tmp_path, content=True) == older
    reason = "zero/rank_0.pt is damaged: its checksum differs"
    assert caplog.messages == [f"{newer} is passed over: {reason}"]
    assert find(str(tmp_path), tmp_path / "other run", content=True) == older
    with pytest.raises(ConfigError, match=f"step-00000020: not a complete checkpoint: {reason}"):
        find(str(newer), tmp_path, content=True)
    with pytest.raises(ConfigError, match=f"{older}: --resume never, but this run folder holds a checkpoint"):
        find("never", tmp_path, content=True)


def test_an_unreadable_file_is_a_defect_if_content_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 10)

    def unreadable(file: Path) -> FileRecord:
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(checkpoint, "_record", unreadable)
    assert checkpoint.defect(path) is None
    assert checkpoint.defect(path, ALL_CONTENT) == "state.json cannot be read: Input/output error"


def test_complete_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (10, 20, 30)]
    cut(paths[1] / MARKER)
    assert list(checkpoint.complete(tmp_path)) == [paths[2], paths[0]]
    assert list(checkpoint.complete(tmp_path / "never started")) == []


def test_a_file_that_rank_0_cannot_find_prevents_the_commit(tmp_path: Path) -> None:
    directory = checkpoint.begin(tmp_path, 10)
    state(10).write(directory)
    with pytest.raises(ConfigError, match=r"zero/rank_1\.pt: written by its rank, but not visible on rank 0"):
        checkpoint.commit(tmp_path, 10, {"zero/rank_1.pt": FileRecord(1, "x")})
    assert newest(tmp_path) is None


def test_checksums_reported_by_ranks_are_recorded(tmp_path: Path) -> None:
    """The writer computes the checksum of what it wrote; it is not computed from the file on disk."""
    directory = checkpoint.begin(tmp_path, 10)
    state(10).write(directory)
    (directory / "rank_0.pt").write_bytes(b"abc")
    reported = FileRecord(3, sha256(b"abd").hexdigest())
    path = checkpoint.commit(tmp_path, 10, {"rank_0.pt": reported})
    assert "rank_0.pt is damaged" in str(checkpoint.defect(path, ALL_CONTENT))


@pytest.mark.parametrize(
    ("values", "newest", "every", "mode", "expected"),
    [
        ({10: None, 20: None, 30: None}, 1, 0, "min", {30}),
        ({10: None, 20: None, 30: None, 40: None, 50: None}, 1, 20, "min", {20, 40, 50}),
        ({10: 3.0, 20: 1.0, 30: 2.0}, 1, 0, "min", {20, 30}),
        ({10: 3.0, 20: 1.0, 30: 2.0}, 1, 0, "max", {10, 30}),
        ({10: 1.0, 20: 1.0, 30: 2.0}, 1, 0, "min", {20, 30}),
        ({10: float("nan"), 20: 5.0, 30: None}, 1, 0, "max", {20, 30}),
        ({10: -1.0, 20: -2.0, 30: 0.0}, 2, 0, "min", {20, 30}),
    ],
)
def test_the_newest_every_kth_and_the_best_are_kept(
    values: dict[int, float | None], newest: int, every: int, mode: str, expected: set[int]
) -> None:
    assert kept(values, newest, every, mode) == expected


def test_the_best_checkpoint_is_kept_beside_newer_ones(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, best="eval/loss")
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5)):
        directory = checkpoint.begin(tmp_path, step)
        replace(state(step), metrics={"eval/loss": loss}).write(directory)
        checkpoint.commit(tmp_path, step, {})
        retain(tmp_path, step, config)
    assert steps_of(tmp_path) == [20, 40]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(10, 60, 10):
        save(tmp_path, step, keep)
        assert steps_of(tmp_path) == list(range(10, step + 1, 10))[-keep:]


def test_a_torn_checkpoint_does_not_count_toward_keep(tmp_path: Path) -> None:
    save(tmp_path, 10, keep=2)
    cut(save(tmp_path, 20, keep=2) / MARKER)
    save(tmp_path, 30, keep=2)
    assert [step for step in steps_of(tmp_path) if step != 20] == [10, 30]


def test_the_checkpoint_just_saved_is_never_deleted(tmp_path: Path) -> None:
    """A run resumed from an earlier checkpoint saves steps below those of existing checkpoints."""
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    assert save(tmp_path, 15, keep=2).is_dir()
    assert steps_of(tmp_path) == [10, 15, 20, 30, 40]
    assert save(tmp_path, 17, keep=2).is_dir()
    assert steps_of(tmp_path) == [15, 17, 20, 30, 40]


def test_a_checkpoint_gets_its_final_name_only_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each sync and at the rename, the older checkpoint is the only one that can be found."""
    older = save(tmp_path, 10)
    synced: list[Path] = []
    real_sync, real_rename = atomic.sync, os.rename

    def watched_sync(path: Path) -> None:
        synced.append(path)
        if not checkpoint.checkpoint_path(tmp_path, 20).exists():
            assert newest(tmp_path) == older
            assert not list(checkpoint.checkpoint_root(tmp_path).glob("step-00000020*"))
        real_sync(path)

    def watched_rename(source: Path, target: Path) -> None:
        assert checkpoint.defect(Path(source)) is None, "complete before it gets its name"
        written = list(Path(source).rglob("*"))
        assert set(written) | {Path(source)} <= set(synced), "all on disk before the rename"
        files = [path for path in synced if path.is_file()]
        assert files[-1].name == MARKER, "the marker is written last"
        real_rename(source, target)

    monkeypatch.setattr(atomic, "sync", watched_sync)
    monkeypatch.setattr(os, "rename", watched_rename)
    newer = save(tmp_path, 20)
    assert synced[-1] == newer.parent, "the rename itself is synced"
    assert newest(tmp_path) == newer


def test_begin_deletes_the_files_of_an_interrupted_save(tmp_path: Path) -> None:
    directory = checkpoint.begin(tmp_path, 10)
    (directory / "left over").write_text("x")
    assert newest(tmp_path) is None
    assert not list(checkpoint.begin(tmp_path, 10).iterdir())
    path = save(tmp_path, 10)
    assert not (path / "left over").exists()


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    (path / "old").write_text("x")
    assert save(tmp_path, 10) == path
    assert not (path / "old").exists()
    assert checkpoint.defect(path) is None


def test_a_repeated_save_killed_at_any_point_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each rename, deletion and sync in turn: the next start finds a complete checkpoint of the step."""

    def begin_save() -> None:
        directory = checkpoint.begin(tmp_path, 10)
        (directory / "new").write_text("x")
        state(10).write(directory)

    class Killed(BaseException):
        pass

    calls_left = [0]

    def killed_after(work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            calls_left[0] -= 1
            if calls_left[0] < 0:
                raise Killed
            return work(*arguments, **options)

        return counted

    for calls in range(20):
        shutil.rmtree(checkpoint.checkpoint_root(tmp_path), ignore_errors=True)
        save(tmp_path, 10, keep=1)
        begin_save()
        calls_left[0] = calls
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", killed_after(os.replace))
            patched.setattr(os, "rename", killed_after(os.rename))
            patched.setattr(shutil, "rmtree", killed_after(shutil.rmtree))
            patched.setattr(atomic, "sync", killed_after(atomic.sync))
            try:
                checkpoint.commit(tmp_path, 10, {})
                retain(tmp_path, 10, CheckpointConfig(keep=1))
                killed = False
            except Killed:
                killed = True
        checkpoint.clear_leftovers(tmp_path)
        found = newest(tmp_path)
        assert found is not None, f"killed at call {calls + 1}"
        assert checkpoint.defect(found, ALL_CONTENT) is None
        assert [path.name for path in found.parent.iterdir()] == [found.name], "no leftovers"
        if not killed:
            assert (found / "new").exists()
            assert calls > 4
            return
    raise AssertionError("the save never completed")


@pytest.mark.parametrize("committed", [True, False])
def test_a_failed_save_of_the_same_step_restores_the_earlier_checkpoint(tmp_path: Path, committed: bool) -> None:
    """On node-local disks, whether or not this disk had committed its part when another disk failed."""
    path = save(tmp_path, 10)
    (path / "old").write_text("x")
    directory = checkpoint.begin(tmp_path, 10)
    state(10).write(directory)
    if committed:
        checkpoint.commit(tmp_path, 10, {})
    checkpoint.abandon(tmp_path, 10, committed)
    assert (path / "old").exists()
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_part_that_other_disks_lack_is_deleted_and_older_checkpoints_are_kept(tmp_path: Path) -> None:
    older = save(tmp_path, 10, keep=1)
    state(20).write(checkpoint.begin(tmp_path, 20))
    checkpoint.commit(tmp_path, 20, {})
    checkpoint.abandon(tmp_path, 20, committed=True)
    assert newest(tmp_path) == older
    assert steps_of(tmp_path) == [10]


def test_files_of_the_user_beside_checkpoints_are_neither_found_nor_deleted(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    copy = path.with_name(f"{path.name}-backup")
    shutil.copytree(path, copy)
    (path.parent / "step-notes.txt").write_text("x")
    newer = save(tmp_path, 20, keep=1)
    assert sorted(each.name for each in path.parent.iterdir()) == [copy.name, newer.name, "step-notes.txt"]
    assert newest(tmp_path) == newer
    checkpoint.set_aside_newer(tmp_path, 5)
    assert copy.is_dir()


def test_an_old_checkpoint_that_cannot_be_deleted_is_logged_and_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = [save(tmp_path, step) for step in (10, 20, 30)]
    real = shutil.rmtree

    def failing_rmtree(path: Path, *arguments: Any, **options: Any) -> None:
        if path == old[1]:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", failing_rmtree)
    save(tmp_path, 40, keep=1)
    assert steps_of(tmp_path) == [20, 40]
    assert f"{old[1]}: an old checkpoint that cannot be deleted: [Errno 13] Permission denied" in caplog.text


def test_an_unreadable_state_counts_as_without_metric_and_fails_no_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for content in ('{"format": 1}', "[]", "not json"):
        directory = checkpoint.begin(tmp_path, 10)
        (directory / STATE_FILE).write_text(content)
        checkpoint.commit(tmp_path, 10, {})
        save(tmp_path, 20)
        retain(tmp_path, 20, CheckpointConfig(keep=1, best="eval/loss"))
        assert steps_of(tmp_path) == [20]
        assert "step-00000010: its eval/loss is not known: " in caplog.text


def test_only_leftovers_of_killed_starts_are_deleted(tmp_path: Path) -> None:
    kept_ones = [save(tmp_path, 10), save(tmp_path, 20)]
    checkpoint.set_aside_newer(tmp_path, 10)
    root = checkpoint.checkpoint_root(tmp_path)
    for name in (".incomplete-step-00000030", ".universal-step-00000010/zero", ".replaced-step-00000010"):
        (root / name).mkdir(parents=True)
        (root / name / "large").write_text("x")
    (root / "mine").mkdir()
    other_run = save(tmp_path / "b", 5).with_name(".incomplete-step-00000006")
    other_run.mkdir()
    checkpoint.clear_leftovers(tmp_path)
    assert sorted(path.name for path in root.iterdir()) == ["mine", "set-aside-step-00000020", "step-00000010"]
    assert checkpoint.defect(kept_ones[0]) is None
    assert other_run.is_dir()
    checkpoint.clear_leftovers(tmp_path / "never started")


def test_the_error_for_an_unknown_metric_names_the_nearest_ones() -> None:
    available = ["train/loss", "eval/loss", "eval/loss/sw", "data/overlong", "memory/host_peak_gib"]
    assert no_such_metric("eval_loss", 4, available) == (
        "checkpoint.best: eval_loss: no such metric at step 4, so its checkpoint cannot be the best; "
        "nearest: eval/loss, eval/loss/sw, train/loss"
    )
    assert no_such_metric("eval_loss", 4, []).endswith("nearest: none")


def test_find_auto(tmp_path: Path) -> None:
    assert find("auto", tmp_path) is None
    path = save(tmp_path, 10)
    assert find("auto", tmp_path) == path


def test_find_never(tmp_path: Path) -> None:
    assert find("never", tmp_path) is None
    path = save(tmp_path, 10)
    with pytest.raises(ConfigError) as refusal:
        find("never", tmp_path)
    assert str(refusal.value).startswith(f"{path}: --resume never")
    assert "--resume auto" in str(refusal.value)
    cut(path / MARKER)
    assert find("never", tmp_path) is None, "a torn checkpoint does not count"


def test_find_path(tmp_path: Path) -> None:
    """The path of a checkpoint or a run folder, of this or another run."""
    older, newer = save(tmp_path / "a", 10), save(tmp_path / "a", 20)
    here = tmp_path / "b"
    assert find(str(older), here) == older
    assert find(str(tmp_path / "a"), here) == newer
    cut(newer / MARKER)
    assert find(str(tmp_path / "a"), here) == older


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no such folder; give a checkpoint's or a run's"),
        ("file", "no such folder"),
        ("torn", "this run has no complete checkpoint"),
        ("torn/checkpoints/step-00000010", "not a complete checkpoint: its COMPLETE marker is torn"),
        ("empty", "not a complete checkpoint: no COMPLETE marker"),
    ],
)
def test_find_path_errors_state_what_is_wrong(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    cut(save(tmp_path / "torn", 10) / MARKER)
    with pytest.raises(ConfigError) as refusal:
        find(str(tmp_path / name), tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / name}: {message}")


def test_newer_checkpoints_are_set_aside_on_resuming_from_an_older_one(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    checkpoint.set_aside_newer(tmp_path, 10)
    assert newest(tmp_path) == older
    assert (newer.parent / f"set-aside-{newer.name}" / MARKER).is_file(), "renamed, not deleted"
    checkpoint.set_aside_newer(tmp_path, 10)
    assert newest(tmp_path) == older


def with_key(key: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    node = config
    *parents, last = key.split(".")
    for name in parents:
        node = node[name]
    node[last] = value
    return config


def test_the_same_run_has_no_differences() -> None:
    assert differences(state(), dict(FINGERPRINT), json.loads(json.dumps(CONFIG))) == []


@pytest.mark.parametrize(
    ("key", "value", "lines"),
    [
        ("seed", 2, ["config seed: was 1, now 2"]),
        ("max_steps", 9, ["config max_steps: was 10, now 9"]),
        ("data.languages", ["en", "fr"], ["config data.languages: was ['en', 'de'], now ['en', 'fr']"]),
        (
            "data.mixture.weights",
            {"en": 0.5},
            ["config data.mixture.weights: was None, now None", "config data.mixture.weights.en: was None, now 0.5"][
                1:
            ],
        ),
        ("deepspeed.fp16", True, ["config deepspeed.fp16: was None, now True"]),
        ("data.workers_too", 1, ["config data.workers_too: was None, now 1"]),
    ],
)
def test_a_changed_key_is_named_with_both_values(key: str, value: Any, lines: list[str]) -> None:
    found = list(map(str, differences(state(), FINGERPRINT, with_key(key, value))))
    assert set(lines) <= set(found)
    assert all(line.startswith(f"config {key.rsplit('.', 1)[0] if '.' in key else key}") for line in found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", "runs/b"),
        ("data_dir", "elsewhere"),
        ("checkpoint.every", 3),
        ("evaluation.every", 3),
        ("tracking.uri", "http://x"),
        ("data.workers", 4),
        ("data.max_bad_rows", 4),
    ],
)
def test_keys_that_change_no_sample_and_no_gradient_may_differ(key: str, value: Any) -> None:
    assert differences(state(), FINGERPRINT, with_key(key, value)) == []


def test_dora_and_rslora_are_compared() -> None:
    lora = {"rank": 2, "use_dora": False, "use_rslora": False}
    old = RunState(7, 1, FINGERPRINT, {"model": {"lora": lora}}, {})
    assert differences(old, FINGERPRINT, {"model": {"lora": lora}}) == []
    found = differences(old, FINGERPRINT, {"model": {"lora": {**lora, "use_dora": True}}})
    assert [(each.text, each.fixed) for each in found] == [("config model.lora.use_dora: was False, now True", True)]
    found = differences(old, FINGERPRINT, {"model": {"lora": {**lora, "use_rslora": True}}})
    assert [each.fixed for each in found] == [False]


def test_data_overlong_is_compared() -> None:
    old = replace(state(), config={"data": {"task": None, "overlong": "drop"}})
    assert list(map(str, differences(old, FINGERPRINT, {"data": {"task": None, "overlong": "truncate"}}))) == [
        "config data.overlong: was 'drop', now 'truncate'"
    ]


def test_changed_new_and_missing_files_are_named() -> None:
    now = {"en.jsonl": "aa", "de.jsonl": "changed", "fr.jsonl": "cc"}
    assert list(map(str, differences(state(), now, CONFIG))) == [
        "data de.jsonl: has changed",
        "data fr.jsonl: is new",
        "data languages: is gone",
    ]


def test_data_and_config_are_reported_together() -> None:
    found = differences(state(), FINGERPRINT | {"en.jsonl": "zz"}, with_key("seed", 5))
    assert list(map(str, found)) == ["config seed: was 1, now 5", "data en.jsonl: has changed"]
