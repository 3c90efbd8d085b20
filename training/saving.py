"""Saving a run without making it wait: a copy in memory, written by a thread, made complete at a later step boundary.

In: a Run after some steps. Out: a complete checkpoint, or a warning that names the rank that could not write it.
Next: `checkpoint.py` marks it.

No rank is left waiting where one cannot write (a full disk): writing fails only in a rank's own thread, and what came
of it is told at the next step boundary, in the all-reduce that every step has anyway.
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
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import IO, Any, cast

import torch

from modeling.loading import directory_hash
from training import checkpoint
from training.assembly import Run
from training.checkpoint import FileRecord
from training.config import CheckpointConfig
from training.distributed import gather_objects, rank
from training.errors import CheckpointFailed
from training.provenance import versions
from training.run_file import resolved
from training.run_state import RunState
from training.start_checks import reference_outputs

log = logging.getLogger(__name__)
FAILURES_IN_A_ROW = 3  # saves that may fail before the run stops rather than go on unsaved


class HashingFile(io.RawIOBase):
    """A file that knows the SHA-256 of what was written to it, without reading it back."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._bytes += self._file.write(data)
        return len(data)

    def synced(self) -> FileRecord:
        """What was written; it is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(self._bytes, self._hash.hexdigest())

    def close(self) -> None:
        self._file.close()
        super().close()


class FileWriter:
    """Writes this rank's files of one checkpoint, in a thread of its own; what goes wrong is kept, not raised."""

    def __init__(self, root: Path, files: Sequence[tuple[Path, Any]]) -> None:
        self.records: dict[str, FileRecord] = {}
        self.error: str | None = None
        self._root = root
        self._files = list(files)
        self._thread = Thread(target=self._write_all, name="checkpoint-writer")

    def start(self) -> None:
        self._thread.start()

    @property
    def writing(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def _write_all(self) -> None:
        while self._files:
            path, state = self._files.pop(0)  # its memory is free as soon as it is written
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.records[path.relative_to(self._root).as_posix()] = _write(path, state)
            except Exception as error:  # told by the Saver, on every rank
                self.error = f"{path.name}: {_reason(error)}"
                self._files.clear()


class Saver:
    """One rank's side of saving; `begin` and `settle` are called by every rank at the same step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config: CheckpointConfig = run.config.checkpoint
        self.seconds = 0.0  # from the last checkpoint's beginning until it was complete
        self._step: int | None = None
        self._writer: FileWriter | None = None
        self._began = 0.0
        self._failures = 0

    @property
    def open(self) -> bool:
        """Whether a checkpoint is begun and not settled; the same on every rank."""
        return self._step is not None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._writer is not None and self._writer.writing

    def begin(self, step: int, state: RunState) -> None:
        """Copy the state after `step` steps and let it be written; what an earlier call began is settled first.

        Raises CheckpointFailed where that was one failure too many.
        """
        if self.open:
            self.settle()
        run, self._began = self.run, time.perf_counter()
        output_dir = run.config.output_dir
        directory = checkpoint.incomplete_path(output_dir, step)
        files = run.engine.take_state(directory)
        reference = reference_outputs(run)
        problem = None
        try:
            if rank() == 0:
                checkpoint.begin(output_dir, step)
        except OSError as error:
            problem = _reason(error)
        problem = gather_objects(problem)[0]  # and nobody writes into a folder that rank 0 has yet to clear
        if problem is None:
            try:
                self._write_small_files(directory, state, reference)
            except Exception as error:  # told when settled, as every other reason why a file was not written
                problem = _reason(error)
        self._step = step
        self._writer = FileWriter(directory, [] if problem else files)
        self._writer.error = problem
        self._writer.start()
        if not self.config.background:
            self.settle()

    def settle(self, required: bool = False) -> bool:
        """Wait for every rank's files, and make the checkpoint complete; whether it is.

        Raises CheckpointFailed on every rank where it is not and `required`, or where too many failed in a row.
        """
        assert self._step is not None
        assert self._writer is not None
        step, writer, output_dir = self._step, self._writer, self.run.config.output_dir
        writer.wait()
        self._step = self._writer = None
        told = gather_objects((writer.records, writer.error, socket.gethostname()))
        problems = [f"rank {number} on {host}: {error}" for number, (_, error, host) in enumerate(told) if error]
        if not problems:
            problem = None
            if rank() == 0:
                written = {name: record for records, *_ in told for name, record in records.items()}
                problem = self._commit(step, written)
            problem = gather_objects(problem)[0]
            problems = [problem] if problem else []
        self.seconds = time.perf_counter() - self._began
        if not problems:
            self._failures = 0
            return True
        self._failures += 1
        if rank() == 0:
            shutil.rmtree(checkpoint.incomplete_path(output_dir, step), ignore_errors=True)
        self._tell(step, problems, required)
        return False

    def _commit(self, step: int, written: dict[str, FileRecord]) -> str | None:
        try:
            checkpoint.commit(self.run.config.output_dir, step, written, self.config)
        except Exception as error:
            return _reason(error)
        return None

    def _tell(self, step: int, problems: list[str], required: bool) -> None:
        text = f"checkpoint of step {step}: not saved: {'; '.join(problems)}"
        if required or self._failures >= FAILURES_IN_A_ROW:
            raise CheckpointFailed(text)
        if rank() == 0:
            log.warning("%s; training goes on (%d of %d failures in a row)", text, self._failures, FAILURES_IN_A_ROW)

    def _write_small_files(self, directory: Path, state: RunState, reference: dict[str, torch.Tensor]) -> None:
        """What rank 0 adds; the objective's part is gathered from all ranks."""
        run = self.run
        run.objective.save(run.engine, directory)
        if rank() > 0:
            return
        from safetensors.torch import save_file

        save_file(reference, directory / checkpoint.REFERENCE_FILE)
        run.engine.module.config.save_pretrained(directory / "model_config")
        run.data.tokenizer.save_pretrained(directory / "model_config")
        state.write(directory)


def run_state(
    run: Run, step: int, bad_slots: int, data_offset: int, metrics: dict[str, float], guard: dict[str, Any]
) -> RunState:
    """What a resume has to know after `step` steps."""
    return RunState(
        step=step, world_size=run.engine.world_size, bad_slots=bad_slots, data_offset=data_offset,
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)}, guard=guard,
        fingerprint=dict(run.data.index.fingerprint), config=resolved(run.config), versions=versions(),
        zero_stage=run.config.zero_stage, base=base_of(run),
    )  # fmt: skip


def base_of(run: Run) -> dict[str, str] | None:
    """Which model the frozen weights are of; None where all are trained."""
    if run.config.model.lora is None:
        return None
    return {"directory": str(run.model_dir), "hash": directory_hash(run.model_dir)}


def _write(path: Path, state: Any) -> FileRecord:
    with HashingFile(path) as file:
        torch.save(state, cast(IO[bytes], file))
        return file.synced()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
