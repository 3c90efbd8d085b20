"""Checkpoints that exist only when complete: mark, verify, find, keep, compare.

In: files that `saving.py` wrote under a temporary name. Out: `<output_dir>/checkpoints/step-00000100/`, synced, marked
COMPLETE, renamed: a name without COMPLETE is no checkpoint. Next: `retention.py`, `search.py`, `export.py`.

    step-00000100/
        zero/                            DeepSpeed's shards of weights and optimiser state, one set a rank
        model_config/                    the model's config and the tokenizer, as an export needs them
        state.json                       step, world size, data fingerprint, config, versions
        language_vectors.safetensors     ShifCon only
        xmixup.safetensors               X-Mixup only
        reference.safetensors            a few tokens and their logits: every export is checked against them
        COMPLETE                         name, size and SHA-256 of every file; written last

No random state is saved: random streams derive from (seed, step, rank).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline import atomic
from training.checkpoints.run_state import FORMAT
from training.errors import ConfigError

log = logging.getLogger(__name__)
MARKER = "COMPLETE"
REFERENCE_FILE = "reference.safetensors"
_NAME = re.compile(r"step-\d{8}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of a checkpoint must be."""

    bytes: int
    sha256: str


def checkpoint_root(output_dir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return output_dir / "checkpoints"


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return checkpoint_root(output_dir) / f"step-{step:08d}"


def incomplete_path(output_dir: Path, step: int) -> Path:
    """Temporary name that a checkpoint has while it is written."""
    return atomic.incomplete_path(checkpoint_path(output_dir, step))


def universal_path(output_dir: Path, step: int) -> Path:
    """What a checkpoint is converted to while another number of ranks loads it."""
    return checkpoint_root(output_dir) / f".universal-step-{step:08d}"


def begin(output_dir: Path, step: int) -> Path:
    """Rank 0: an empty temporary folder for the checkpoint of `step`."""
    path = incomplete_path(output_dir, step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def commit(output_dir: Path, step: int, written: Mapping[str, FileRecord]) -> Path:
    """Rank 0, after every rank has written: mark COMPLETE, rename.

    What had the name before (torn, or of before a roll-back) is set aside until all disks are known to have theirs.

    `written` are the files that ranks have written and synced, by their name in the checkpoint; others that lie
    there are read to record them.

    Raises:
        ConfigError: a file that a rank has written is not seen from here; OSError: the disk's own errors.
    """
    temporary, final = incomplete_path(output_dir, step), checkpoint_path(output_dir, step)
    if unseen := sorted(name for name in written if not (temporary / name).is_file()):
        raise ConfigError(
            f"{temporary / unseen[0]}: written by its rank, but not seen by rank 0: the folder of checkpoints must "
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
    """Rank 0, where the checkpoint of `step` did not become complete on every disk: what was there before is again.

    `committed` says whether it became so on this one.
    """
    shutil.rmtree(incomplete_path(output_dir, step), ignore_errors=True)
    if committed:  # a part of a checkpoint that other disks lack
        shutil.rmtree(checkpoint_path(output_dir, step), ignore_errors=True)
    resolve_replaced(output_dir)


def clear_leftovers(output_dir: Path) -> None:
    """Rank 0, at a run's start: what earlier starts were killed over is deleted, or put back where nothing replaced it.

    Nobody writes there then: this start's ranks wait, those of an earlier one die with their launcher and converters
    with their rank, and a rank that is lost to its job cannot complete anything without the others.
    """
    resolve_replaced(output_dir)
    for pattern in (".incomplete-step-*", ".universal-step-*"):
        for path in checkpoint_root(output_dir).glob(pattern):
            log.info("%s: left by a start that was killed; deleted", path)
            shutil.rmtree(path, ignore_errors=True)


def resolve_replaced(output_dir: Path) -> None:
    """Rank 0: what was set aside by `commit` is deleted, or put back where nothing has come in its place."""
    for path in checkpoint_root(output_dir).glob(".replaced-step-*"):
        try:
            atomic.recover(path.with_name(path.name.removeprefix(".replaced-")))
        except OSError as error:
            log.warning("%s stays: %s", path, error)


def files_of(path: Path) -> dict[str, FileRecord] | None:
    """What a checkpoint's marker says of its files; None where the marker is missing or torn."""
    try:
        files = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
        return {name: FileRecord(int(each["bytes"]), str(each["sha256"])) for name, each in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None where it is complete; content is not read (see `damage`)."""
    if not (path / MARKER).is_file():
        return f"no {MARKER} marker"
    files = files_of(path)
    if files is None:
        return f"its {MARKER} marker is torn"
    for name, record in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != record.bytes:
            return f"{name} has {size} bytes instead of {record.bytes}"
    return None


def fault(path: Path) -> str | None:
    """Why nothing of a checkpoint may be loaded, or None where it is complete and its content what was saved."""
    return problem(path) or damage(path)


def damage(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """Why a complete checkpoint's content cannot be trusted, or None: reads files `share`, `share + shares`, ...

    Comes before anything of it is loaded: DeepSpeed's files are pickles.
    """
    files = files_of(path) or {}
    for name in sorted(files)[share::shares]:
        try:
            found = _record(path / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != files[name]:
            return f"{name} is not what was saved: its checksum differs"
    return None


def latest(output_dir: Path, refuse: Callable[[Path], str | None] = problem) -> Path | None:
    """The newest complete checkpoint; says why newer ones were passed over.

    `refuse` gives the reason why a checkpoint cannot be used, or None.
    """
    for path in reversed(step_folders(output_dir)):
        reason = refuse(path)
        if reason is None:
            return path
        log.warning("%s is passed over: %s", path, reason)
    return None


def find(resume: str, output_dir: Path, refuse: Callable[[Path], str | None] = problem) -> Path | None:
    """The checkpoint that `--resume` asks for; None starts from the beginning.

    Args:
        resume: "auto" (the run's newest complete one, if any), "never", or a path to a checkpoint or a run.
        refuse: the reason why a checkpoint cannot be used, or None; as `latest`.

    Raises:
        ConfigError: "never" where checkpoints exist, or a path that holds no complete checkpoint.
    """
    if resume == "auto":
        return latest(output_dir, refuse)
    if resume == "never":
        if (existing := latest(output_dir, refuse)) is not None:
            raise ConfigError(
                f"{existing}: --resume never, but this run folder holds a checkpoint; "
                "take another output_dir, remove the folder, or use --resume auto"
            )
        return None
    return at(Path(resume), refuse)


def at(path: Path, refuse: Callable[[Path], str | None] = problem) -> Path:
    """A checkpoint's own folder, or a run's newest complete one. Raises ConfigError where there is none."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give a checkpoint's or a run's")
    if checkpoint_root(path).is_dir():
        if (found := latest(path, refuse)) is None:
            raise ConfigError(f"{path}: this run has no complete checkpoint")
        return found
    if (reason := refuse(path)) is not None:
        raise ConfigError(f"{path}: not a complete checkpoint: {reason}")
    return path


def set_aside_newer(output_dir: Path, step: int) -> None:
    """Rank 0, on resuming from an older checkpoint: the newer ones are another branch, which `auto` must not take."""
    for path in step_folders(output_dir):
        if path > checkpoint_path(output_dir, step):
            aside = path.with_name(f"set-aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s is newer than the checkpoint resumed from; kept as %s", path, aside.name)


def step_folders(output_dir: Path) -> list[Path]:
    """A run's checkpoints, complete or torn, the newest last; what a person has put beside them is not ours."""
    return sorted(path for path in checkpoint_root(output_dir).glob("step-*") if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """Finished steps of a checkpoint, by its folder's name."""
    return int(path.name.removeprefix("step-"))


def _record(file: Path) -> FileRecord:
    with file.open("rb") as content:
        return FileRecord(file.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest())
