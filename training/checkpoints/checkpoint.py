"""The format of checkpoints: folders that exist only when complete. Writing, checking, setting aside.

`saving.py` writes the files under a temporary name; `commit` adds the COMPLETE marker and renames the folder.
`search.py` finds checkpoints, `retention.py` deletes old ones, `export.py` converts them.

    step-00000100/
        zero/                            the engine's shards of weights and optimizer state, one set per rank
        model_config/                    the model's config and the tokenizer, for exports
        state.json                       step, world size, data fingerprint, config, versions
        language_vectors.safetensors     ShifCon only
        xmixup.safetensors               X-Mixup only
        reference.safetensors            a few tokens and their logits, to check exports against
        COMPLETE                         name, size and SHA-256 of every file; written last

No random state is saved: random streams derive from (seed, step, rank).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline import atomic
from training.checkpoints.run_state import FORMAT
from training.errors import ConfigError

log = logging.getLogger(__name__)
MARKER = "COMPLETE"
REFERENCE_FILE = "reference.safetensors"
ALL_CONTENT = (0, 1)
_NAME = re.compile(r"step-\d{8}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and checksum of a checkpoint's file."""

    bytes: int
    sha256: str


def checkpoint_root(output_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return output_dir / "checkpoints"


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return checkpoint_root(output_dir) / f"step-{step:08d}"


def incomplete_path(output_dir: Path, step: int) -> Path:
    """The temporary name of a checkpoint while it is written."""
    return atomic.incomplete_path(checkpoint_path(output_dir, step))


def universal_path(output_dir: Path, step: int) -> Path:
    """The folder that a checkpoint is converted into while another number of ranks loads it."""
    return checkpoint_root(output_dir) / f".universal-step-{step:08d}"


def step_of(path: Path) -> int:
    """The number of finished steps of a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("step-"))


def step_folders(output_dir: Path) -> list[Path]:
    """A run's checkpoints, complete or not, the newest last; folders of other names are ignored."""
    return sorted(path for path in checkpoint_root(output_dir).glob("step-*") if _NAME.fullmatch(path.name))


def complete(output_dir: Path) -> Iterator[Path]:
    """A run's complete checkpoints, the newest first; their content is not read."""
    return (path for path in reversed(step_folders(output_dir)) if defect(path) is None)


def defect(path: Path, content: tuple[int, int] | None = None) -> str | None:
    """Why a checkpoint must not be used; None if it can be.

    Args:
        content: None: the names and sizes of all files. (share, shares): also the checksums, of every `shares`-th file
            from number `share`, so that ranks can divide the reading among them. Checksums must be right before
            anything is loaded, because the engine's files are pickles.
    """
    if not (path / MARKER).is_file():
        return f"no {MARKER} marker"
    files = files_of(path)
    if files is None:
        return f"its {MARKER} marker is torn"
    share, shares = content or ALL_CONTENT
    for name in sorted(files)[share::shares]:
        try:
            if (reason := _file_defect(path, name, files[name], checksum=content is not None)) is not None:
                return reason
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _file_defect(path: Path, name: str, record: FileRecord, checksum: bool) -> str | None:
    file = path / name
    if not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != record.bytes:
        return f"{name} has {size} bytes instead of {record.bytes}"
    if checksum and _record(file) != record:
        return f"{name} is damaged: its checksum differs"
    return None


def files_of(path: Path) -> dict[str, FileRecord] | None:
    """The files that a checkpoint's marker lists; None where the marker is missing or torn."""
    try:
        files = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
        return {name: FileRecord(int(each["bytes"]), str(each["sha256"])) for name, each in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _record(file: Path) -> FileRecord:
    with file.open("rb") as content:
        return FileRecord(file.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest())


def begin(output_dir: Path, step: int) -> Path:
    """On the leading rank of a disk: an empty temporary folder for the checkpoint of `step`."""
    path = incomplete_path(output_dir, step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def commit(output_dir: Path, step: int, written: Mapping[str, FileRecord]) -> Path:
    """On the leading rank of a disk, after every rank has written: add the marker and rename.

    A folder that has the name already (incomplete, or from before a roll-back) is set aside until every disk has its
    part (`resolve_replaced`).

    Args:
        written: the files that ranks have written and synced, by their name in the checkpoint. Other files in the
            folder are read to record them.

    Raises:
        ConfigError: a file that a rank has written cannot be seen from here.
        OSError: the disk's own errors.
    """
    temporary, final = incomplete_path(output_dir, step), checkpoint_path(output_dir, step)
    if unseen := sorted(name for name in written if not (temporary / name).is_file()):
        raise ConfigError(
            f"{temporary / unseen[0]}: written by its rank, but not visible on rank 0: the folder of checkpoints must "
            "be on a disk that all nodes share"
        )
    files = {}
    for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
        name = file.relative_to(temporary).as_posix()
        files[name] = asdict(written[name] if name in written else _record(file))
    atomic.sync_tree(temporary, skip={temporary / name for name in written})
    marker = temporary / MARKER
    marker.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    atomic.sync(marker)
    atomic.sync(temporary)
    atomic.swap(temporary, final, atomic.replaced_path(final))
    return final


def abandon(output_dir: Path, step: int, committed: bool) -> None:
    """On the leading rank of a disk, after the checkpoint of `step` failed on any disk: restore the previous state.

    `committed`: whether it was complete on this disk.
    """
    shutil.rmtree(incomplete_path(output_dir, step), ignore_errors=True)
    if committed:  # a part of a checkpoint that other disks lack
        shutil.rmtree(checkpoint_path(output_dir, step), ignore_errors=True)
    resolve_replaced(output_dir)


def resolve_replaced(output_dir: Path) -> None:
    """Delete what `commit` set aside, or move it back if nothing has replaced it."""
    for path in checkpoint_root(output_dir).glob(".replaced-step-*"):
        try:
            atomic.recover(path.with_name(path.name.removeprefix(".replaced-")))
        except OSError as error:
            log.warning("%s stays: %s", path, error)


def clear_leftovers(output_dir: Path) -> None:
    """At a run's start: delete what killed starts left behind, or move it back if nothing has replaced it.

    No other process writes there: this start's ranks wait; the ranks and converters of an earlier start end with their
    launcher; and a rank that has lost its job cannot complete a checkpoint without the others.
    """
    resolve_replaced(output_dir)
    for pattern in (".incomplete-step-*", ".universal-step-*"):
        for path in checkpoint_root(output_dir).glob(pattern):
            log.info("%s: left by a start that was killed; deleted", path)
            shutil.rmtree(path, ignore_errors=True)


def set_aside_newer(output_dir: Path, step: int) -> None:
    """After resuming from step `step`: rename newer checkpoints, which belong to another branch, out of the way."""
    for path in step_folders(output_dir):
        if path > checkpoint_path(output_dir, step):
            aside = path.with_name(f"set-aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s is newer than the checkpoint resumed from; kept as %s", path, aside.name)
