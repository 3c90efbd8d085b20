"""Saves checkpoints in the background: copies the state to host memory, writes it in a thread, completes it later.

A rank that cannot write (a full disk) does not block other ranks: writing fails in the rank's own thread, and the
outcome is exchanged at the next step boundary, in the all-reduce of the step.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import IO, Any, cast

import torch

from training.assembly import Run
from training.checkpoints import checkpoint
from training.checkpoints.checkpoint import FileRecord
from training.checkpoints.disks import Disk, shared_disk
from training.checkpoints.export_text import GENERATION_FILE
from training.checkpoints.retention import no_such_metric, retain
from training.checkpoints.run_state import RunState
from training.config import CheckpointConfig
from training.distributed import gather_objects, rank
from training.engine.start_checks import reference_outputs, reference_setting
from training.errors import CheckpointFailed
from training.launch.heartbeat import heartbeat
from training.provenance import versions
from training.run_file import resolved

log = logging.getLogger(__name__)
BEAT_SECONDS = 1.0
FAILURES_IN_A_ROW = 3  # failed saves in a row after which the run stops


class HashingFile(io.RawIOBase):
    """A file that computes the SHA-256 of what is written to it, without reading it back."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.n_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.n_bytes += self._file.write(data)
        return len(data)

    def synced(self) -> FileRecord:
        """Sync the file to disk and return the size and checksum of its content."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(self.n_bytes, self._hash.hexdigest())

    def close(self) -> None:
        self._file.close()
        super().close()


class FileWriter:
    """Writes this rank's files of one checkpoint in a thread, started at once; `error` has an error, none is raised."""

    def __init__(self, root: Path, files: Sequence[tuple[Path, Any]]) -> None:
        self.records: dict[str, FileRecord] = {}
        self.error: str | None = None
        self._root = root
        self._file: HashingFile | None = None
        self._files = list(files)
        self._thread = Thread(target=self._write_all, name="checkpoint-writer")
        self._thread.start()

    @property
    def writing(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        """Wait until all is written or has failed; the heartbeat continues while bytes are written."""
        before = -1
        while self.writing:
            self._thread.join(BEAT_SECONDS)
            if (now := self._written()) != before:
                heartbeat.phase("waiting for a checkpoint to be written")
            before = now

    def _written(self) -> int:
        return sum(record.bytes for record in tuple(self.records.values())) + (self._file.n_bytes if self._file else 0)

    def _write_all(self) -> None:
        while self._files:
            path, state = self._files.pop(0)  # frees its memory once it is written
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with HashingFile(path) as self._file:
                    torch.save(state, cast(IO[bytes], self._file))
                    self.records[path.relative_to(self._root).as_posix()] = self._file.synced()
                self._file = None
            except Exception as error:  # reported by the Saver on every rank
                self.error = f"{path.name}: {_reason(error)}"
                self._files.clear()


class Saver:
    """Saves this rank's part of the checkpoints; all ranks call `begin` and `complete` at the same step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config: CheckpointConfig = run.config.checkpoint
        self.seconds = 0.0  # duration of the last checkpoint, from `begin` until it was complete
        self._writer: FileWriter | None = None  # of the checkpoint after `_step` steps; None: none is open
        self._step = 0
        self._began = 0.0
        self._disk = shared_disk(run.config.output_dir)
        self._failures = 0
        self._warned = False  # that the metric of `checkpoint.best` is not measured
        self.saved_step = 0  # of the last complete checkpoint, or of the one resumed from or rolled back to

    @property
    def open(self) -> bool:
        """Whether a checkpoint has been begun but not completed; the same on every rank."""
        return self._writer is not None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._writer is not None and self._writer.writing

    def begin(self, step: int, state: RunState, disk: Disk) -> None:
        """Copy the state after `step` steps and start writing it; an earlier checkpoint is completed first.

        Raises:
            CheckpointFailed: completing the earlier one failed, once too often.
        """
        if self.open:
            self.complete()
        best = self.config.best
        if best is not None and best not in state.metrics and not self._warned and rank() == 0:
            log.warning("%s", no_such_metric(best, state.step, state.metrics))
            self._warned = True
        run, self._began, self._disk = self.run, time.perf_counter(), disk
        directory = checkpoint.incomplete_path(disk.home, step)
        goes_on = self.config.background and step < run.config.max_steps  # while the files are written
        files = run.engine.take_state(directory, copy=goes_on)
        reference = reference_outputs(run)
        problem = _problem_of(lambda: checkpoint.begin(disk.home, step)) if disk.leader else None
        # No rank may write into the folder before its leader has cleared it.
        problem = next(filter(None, gather_objects(problem)), None)
        if problem is None:  # later errors are reported by `complete`
            problem = _problem_of(lambda: self._write_small_files(directory, state, reference))
            if not disk.shared:
                problem = self._copy_small_files(directory) or problem
        self._step = step
        self._writer = FileWriter(directory, [] if problem else files)
        if problem is not None:
            self._writer.error = problem
        if not self.config.background:
            self.complete()

    def complete(self, required: bool = False) -> None:
        """Wait for the files of all ranks and mark the checkpoint as complete; a failure is logged by rank 0.

        Raises:
            CheckpointFailed: on all ranks, if it failed and is `required`, or if too many failed in a row.
        """
        assert self._writer is not None
        step, writer, disk = self._step, self._writer, self._disk
        writer.wait()
        self._writer = None
        outcomes = gather_objects((writer.records, writer.error, socket.gethostname()))
        problems = [f"rank {number} on {host}: {error}" for number, (_, error, host) in enumerate(outcomes) if error]
        committed = False
        if not problems:
            problem = None
            if disk.leader:
                written = {name: record for each in disk.ranks for name, record in outcomes[each][0].items()}
                problem = _problem_of(lambda: checkpoint.commit(disk.home, step, written))
                committed = problem is None
            problems = [each for each in gather_objects(problem) if each]
        self.seconds = time.perf_counter() - self._began
        if not problems:
            self._failures, self.saved_step = 0, step
            if disk.leader:
                retain(disk.home, step, self.config)
            return
        self._failures += 1
        if disk.leader:
            checkpoint.abandon(disk.home, step, committed)
        text = f"checkpoint of step {step}: not saved: {'; '.join(problems)}"
        if required or self._failures >= FAILURES_IN_A_ROW:
            raise CheckpointFailed(text)
        if rank() == 0:
            log.warning("%s; training continues (%d of %d failures in a row)", text, self._failures, FAILURES_IN_A_ROW)

    def _write_small_files(self, directory: Path, state: RunState, reference: dict[str, torch.Tensor]) -> None:
        """Write the files of rank 0, and those of the objective, whose state is gathered from all ranks."""
        run = self.run
        run.objective.save(run.engine, directory)
        if rank() > 0:
            return
        from safetensors.torch import save_file

        save_file(reference, directory / checkpoint.REFERENCE_FILE, metadata=reference_setting(run))
        run.engine.module.config.save_pretrained(directory / "model_config")
        run.data.tokenizer.save_pretrained(directory / "model_config")
        if (generation := run.model_dir / GENERATION_FILE).is_file():
            shutil.copyfile(generation, directory / "model_config" / GENERATION_FILE)
        state.write(directory)

    def _copy_small_files(self, directory: Path) -> str | None:
        """Copy the files of rank 0 to the other nodes' disks; the reason if this one could not be written."""
        files = [file for file in directory.rglob("*") if file.is_file()] if rank() == 0 else []
        contents = gather_objects({str(file.relative_to(directory)): file.read_bytes() for file in files})[0]

        def write() -> None:
            for name, content in contents.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_bytes(content)

        return _problem_of(write) if self._disk.leader and rank() > 0 else None


def run_state(run: Run, step: int, metrics: dict[str, float], **kept: Any) -> RunState:
    """The state of a run after `step` steps; `kept`: the other fields, which the training loop keeps."""
    index, languages = run.data.index, run.config.data.languages
    return RunState(
        **kept, step=step, world_size=run.engine.world_size,
        metrics={name: value if math.isfinite(value) else None for name, value in metrics.items()},
        fingerprint=run.data.fingerprint, config=resolved(run.config), versions=versions(),
        base=run.base,
        rows={language: len(index.rows(number)) for number, language in enumerate(languages)},
    )  # fmt: skip


def _problem_of(work: Callable[[], object]) -> str | None:
    """Why the work failed, or None. Returned, not raised: the other ranks would otherwise wait for this one."""
    try:
        work()
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
