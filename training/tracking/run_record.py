"""The run's record: an append-only file of JSON lines in the run folder, from which MLflow is fed.

One line is one event: `{"time": ms since 1970, "kind": ..., ...}` with

- `start`     id (the same for the whole record), parent (null, or the id of the parent run's record), experiment,
              run_name, uri (null: the default store), resumed_step
- `params`    values: flat, dotted names to text
- `tags`      values: names to text
- `metrics`   step, values: names to numbers; "NaN", "Infinity", "-Infinity" for those that JSON cannot express
- `artifact`  path below the run folder, folder in the store
- `finish`    status: FINISHED, FAILED, KILLED, or SCHEDULED: stopped with a checkpoint, to be started again
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from training.errors import ConfigError
from training.messages import print_message

RECORD_NAME = "record.jsonl"
SCORES_NAME = "scores.jsonl"  # metrics and artifacts of the run's model, added by evaluations
RESULTS_FILE, TABLE_FILE = "results.json", "table.txt"  # of an evaluation; copied below the run folder's scores/
PARAMS_NAME = "params.json"  # the complete params, if one is too long for MLflow
MAX_QUEUED_BYTES = 2**26  # of lines kept in memory while the disk is full: some 50,000 steps
Kind = Literal["start", "params", "tags", "metrics", "artifact", "finish"]
Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]  # MLflow's statuses of a run
# Required fields by kind; a line without them is damaged.
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"id": str, "experiment": str, "run_name": str},
    "params": {"values": dict},
    "tags": {"values": dict},
    "metrics": {"values": dict, "step": int},
    "artifact": {"path": str, "folder": str},
    "finish": {"status": str},
}


class RunRecord:
    """Writes the record; one process at a time.

    Each line is passed to the kernel when it is written, so it survives a killed process; after `sync` it survives a
    crash of the machine. While the disk is full, lines are queued in memory, in order and with their times. Lines
    beyond `MAX_QUEUED_BYTES`, or still queued when the process ends, are lost and counted. The run continues.
    """

    def __init__(self, output_dir: Path) -> None:
        """Open or create the record, and repair a last line that a killed process has cut off.

        Raises:
            ConfigError: the file cannot be written.
        """
        self.path = output_dir / RECORD_NAME
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._end = _repair(self._fd)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror}); choose another folder") from None
        self._torn = False  # the file ends within a line
        self._warned = False
        self._queue: deque[bytes] = deque()  # lines that are not on the disk yet
        self._queued_bytes = 0
        self._lost = 0

    def append(self, kind: Kind, **fields: Any) -> None:
        """Write one event with the current time. Does not raise if the disk fails."""
        event = {"time": time.time_ns() // 1_000_000, "kind": kind, **fields}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        if self._queued_bytes + len(line) > MAX_QUEUED_BYTES:
            self._lost += 1
        else:
            self._queue.append(line)
            self._queued_bytes += len(line)
        self._write()

    def sync(self) -> None:
        """Sync the record to disk; called at checkpoints, so that it is never older than they are."""
        self._write()
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Close the file; reports the lines that could not be written."""
        self.sync()
        os.close(self._fd)
        if lost := self._lost + len(self._queue):
            print_message(f"{self.path}: {lost} lines are lost: the disk was full")

    def _write(self) -> None:
        """Write the queued lines, as far as the disk accepts them."""
        try:
            if self._torn:  # a full disk may have accepted half a line: remove it before the next attempt
                os.ftruncate(self._fd, self._end)
                self._torn = False
            while self._queue:
                line = self._queue[0]
                self._torn = os.write(self._fd, line) != len(line)
                if self._torn:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._end += len(line)
                self._queued_bytes -= len(self._queue.popleft())
        except OSError as error:
            self._torn = True
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            print_message(f"{self.path}: {error.strerror}; training continues, unwritten lines are kept in memory")
            self._warned = True


def json_number(value: float) -> float | str:
    """A metric's value as the record stores it; `float()` restores it."""
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as dotted names and text; lists and empty mappings become JSON."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{key}."))
        elif isinstance(value, list | tuple | Mapping):
            flat[key] = json.dumps(value, ensure_ascii=False, default=str)
        else:
            flat[key] = str(value)
    return flat


def read_events(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset behind the line, event) for the complete lines in bytes [start, stop) of the record.

    An unfinished last line is not yielded: it is being written, or was cut off. A damaged line becomes
    `{"kind": "damaged"}`, so that readers can count it.
    """
    with path.open("rb") as file:
        end = file.seek(start)
        for line in file:
            end += len(line)
            if not line.endswith(b"\n") or (stop is not None and end > stop):
                return
            yield end, _parse(line)


def read_starts(path: Path, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset of the line, event) for the starts in a record, one per job; none if there is no record."""
    offset = 0
    for end, event in read_events(path, stop=stop) if path.exists() else ():
        if event["kind"] == "start":
            yield offset, event
        offset = end


def latest_start(path: Path) -> dict[str, Any] | None:
    """The event of the last start in a record; None if there is none."""
    starts = [event for _, event in read_starts(path)]
    return starts[-1] if starts else None


def run_folders(folder: Path) -> Iterator[Path]:
    """Folders with a record. Within one, only child runs are searched: checkpoints are large trees."""
    for each, below, files in os.walk(folder):
        if RECORD_NAME in files:
            below[:] = [name for name in below if Path(each, name, RECORD_NAME).is_file()]
            yield Path(each)


def is_line_start(path: Path, offset: int) -> bool:
    """Whether a line of the record begins at the offset, or will."""
    with path.open("rb") as file:
        file.seek(max(0, offset - 1))
        return offset == 0 or file.read(1) == b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {"kind": "damaged"}
    if not isinstance(event, dict) or not isinstance(event.get("time"), int):
        return {"kind": "damaged"}
    fields = _FIELDS.get(str(event.get("kind")))
    if fields is None or not all(isinstance(event.get(name), of) for name, of in fields.items()):
        return {"kind": "damaged"}
    return event


def _repair(fd: int) -> int:
    """Complete a last line that lacks only its newline, cut off any other unfinished one. Returns the file's size."""
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        rest = content[end:]
    if rest and _parse(rest)["kind"] != "damaged":
        return size + os.write(fd, b"\n")
    os.ftruncate(fd, end)
    return end
