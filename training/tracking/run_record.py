"""The run's record: an append-only file of JSON lines that nothing but the disk can take away.

In: what rank 0 has to say about a run (`tracking.Tracker`). Out: `record.jsonl` in the run folder, and the
events read back from it. Next: `mlflow_feed.py`, which carries the events into an MLflow store.

One line is one event: `{"time": ms since 1970, "kind": ..., ...}` with

- `start`     id (the same for the whole record), parent (null, or the id of the record of the run that this one is
              part of), experiment, run_name, uri (null: none named), resumed_step
- `params`    values: flat, dotted names to text
- `tags`      values: names to text
- `metrics`   step, values: names to numbers; those JSON has no number for are "NaN", "Infinity", "-Infinity"
- `artifact`  path below the run folder, folder in the store
- `finish`    status: FINISHED, FAILED, KILLED, or SCHEDULED: stopped with a checkpoint, to be started again
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from training.errors import ConfigError

RECORD_NAME = "record.jsonl"
SCORES_NAME = "scores.jsonl"  # of the run's model, added by whoever scores it: metrics and artifacts
PARAMS_NAME = "params.json"  # the params whole, where one is too long for MLflow
MOST_WAITING = 2**26  # bytes of lines kept in memory while the disk is full: some 50,000 steps
Kind = Literal["start", "params", "tags", "metrics", "artifact", "finish"]
Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]  # MLflow's words for how a job of the run ended
# What each kind must hold to be of use; a line without it is damaged.
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"id": str, "experiment": str, "run_name": str},
    "params": {"values": dict},
    "tags": {"values": dict},
    "metrics": {"values": dict, "step": int},
    "artifact": {"path": str, "folder": str},
    "finish": {"status": str},
}


def say(text: str) -> None:
    """One line for people, on stderr."""
    print(f"crosslift: {text}", file=sys.stderr, flush=True)


class RunRecord:
    """The writing end of the record; one process holds it at a time.

    Each line is handed to the kernel as it is written, so it outlives a killed process; after `sync` it
    outlives the machine. While the disk is full, lines wait in memory, in order and with their times; only what is
    more than `MOST_WAITING`, or waits when the process ends, is lost, and that is said. The run goes on.
    """

    def __init__(self, output_dir: Path) -> None:
        """Opens (or creates) the record and mends a last line torn by a killed process.

        Raises ConfigError if the file cannot be written.
        """
        self.path = output_dir / RECORD_NAME
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._end = _mended_size(self._fd)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror}); choose another folder") from None
        self._torn = False
        self._warned = False
        self._waiting: deque[bytes] = deque()  # lines that the disk did not take yet
        self._waiting_bytes = 0
        self._lost = 0

    def append(self, kind: Kind, **fields: Any) -> None:
        """Writes one event, stamped with the time. Never raises for the disk."""
        event = {"time": time.time_ns() // 1_000_000, "kind": kind, **fields}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        if self._waiting_bytes + len(line) > MOST_WAITING:
            self._lost += 1
        else:
            self._waiting.append(line)
            self._waiting_bytes += len(line)
        self._write()

    def sync(self) -> None:
        """Forces the record to the disk; called at checkpoints, which it should not be older than."""
        self._write()
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Says what the disk did not take."""
        self.sync()
        os.close(self._fd)
        if lost := self._lost + len(self._waiting):
            say(f"{self.path}: {lost} lines are lost: the disk had no room for them")

    def _write(self) -> None:
        """Writes what waits, as far as the disk takes it. Never raises."""
        try:
            if self._torn:  # a full disk may have taken half a line; the next one must not join it
                os.ftruncate(self._fd, self._end)
                self._torn = False
            while self._waiting:
                line = self._waiting[0]
                self._torn = os.write(self._fd, line) != len(line)
                if self._torn:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._end += len(line)
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            self._torn = True
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            say(f"{self.path}: {error.strerror}; training goes on, and what cannot be written waits in memory")
            self._warned = True


def number(value: float) -> float | str:
    """A metric's value as the record holds it; `float()` of it gives the value back."""
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
    """Yields (offset behind the line, event) for the whole lines in bytes [start, stop) of the record.

    A last line without its end is left for later: it is being written, or torn. A damaged line comes as
    `{"kind": "damaged"}`, so that whoever reads can count it.
    """
    with path.open("rb") as file:
        end = file.seek(start)
        for line in file:
            end += len(line)
            if not line.endswith(b"\n") or (stop is not None and end > stop):
                return
            yield end, _event(line)


def read_starts(path: Path, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (offset of the line, event) for the starts in a record, one a job; none without a record."""
    offset = 0
    for end, event in read_events(path, stop=stop) if path.exists() else ():
        if event["kind"] == "start":
            yield offset, event
        offset = end


def run_folders(folder: Path) -> Iterator[Path]:
    """Folders with a record. Inside one, only the runs that it is made of: checkpoints are large trees."""
    for each, below, files in os.walk(folder):
        if RECORD_NAME in files:
            below[:] = [name for name in below if Path(each, name, RECORD_NAME).is_file()]
            yield Path(each)


def on_a_line(path: Path, offset: int) -> bool:
    """True if a line of the record begins at the offset, or would."""
    with path.open("rb") as file:
        file.seek(max(0, offset - 1))
        return offset == 0 or file.read(1) == b"\n"


def _event(line: bytes) -> dict[str, Any]:
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


def _mended_size(fd: int) -> int:
    """Ends a torn last line: kept if it is whole but for its newline, cut off otherwise. Returns the size."""
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as content:
        whole = content.rfind(b"\n") + 1
        torn = content[whole:]
    if torn and _event(torn)["kind"] != "damaged":
        return size + os.write(fd, b"\n")
    os.ftruncate(fd, whole)
    return whole
