"""Logging of a rank: its own log file, its events as JSON lines, and what is printed at the terminal.

Files: `<output_dir>/logs/rank-00000.log` and `logs/parts/rank-00000.jsonl`. Each has one node as its only writer: on a
network disk, appends from two machines would mix their lines. `LogMerger` merges the parts into `run.log` (for people:
rank 0, and all warnings) and `events.jsonl` (all).

What does not go through `logging` (tracebacks, C++ aborts, NCCL) is written to stderr, which the launcher reads and
adds to the same files (`rank_process.py`). Progress bars and messages to the user bypass that: they go to the
launcher's stderr. Without a crosslift launcher, stderr is stderr, and a failure is written to the log here.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_text
from data_pipeline.console import TERMINAL, print_line
from data_pipeline.secrets import Redactor
from training.errors import ConfigError
from training.launch.heartbeat import heartbeat

PACKAGES = ("training", "modeling", "data_pipeline")
MERGE_INTERVAL_S = 1.0
OFFSETS_FILE = "merged.json"
FORMAT = "%(asctime)s %(levelname)s %(message)s"

log = logging.getLogger(__name__)


def logs_folder(output_dir: Path) -> Path:
    """The folder of a run's logs."""
    return output_dir / "logs"


def make_logs_folder(output_dir: Path) -> None:
    """Create the folder of logs.

    Raises:
        ConfigError: the run's folder cannot be written.
    """
    try:
        (logs_folder(output_dir) / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir}: cannot be written: {error.strerror}") from None


def rank_log(output_dir: Path, rank: int) -> Path:
    """The log of one rank, over all its starts."""
    return logs_folder(output_dir) / f"rank-{rank:05d}.log"


def events_part(output_dir: Path, writer: str) -> Path:
    """One writer's part of `events.jsonl`."""
    return logs_folder(output_dir) / "parts" / f"{writer}.jsonl"


def event_line(rank: int | None, level: str, step: int, message: str) -> str:
    """A line of `events.jsonl`: time in unix milliseconds, step counted from 1, as in `record.jsonl`.

    Args:
        rank: None for a launcher.
        step: 0-based, as in a heartbeat; -1, before the first step, becomes 0.
    """
    values = {
        "time": int(time.time() * 1000), "rank": rank, "host": socket.gethostname(), "level": level,
        "step": step + 1, "message": message,
    }  # fmt: skip
    return json.dumps(values, ensure_ascii=False) + "\n"


class Appender:
    """Appends whole lines to a file. If it cannot be written, prints that once and drops the lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._warned = False
        self._torn = False  # the file ends within a line, after a kill -9 or on a full disk
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self._descriptor).st_size
            self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        except OSError as error:
            self._warn(error)

    def write(self, lines: str) -> None:
        """Append text that ends with a newline."""
        if self._descriptor < 0:
            return
        content = (b"\n" if self._torn else b"") + lines.encode(errors="backslashreplace")
        try:
            self._torn = os.write(self._descriptor, content) < len(content)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            text = f"{self.path}: {error.strerror}; the run continues, its log is incomplete"
            print(text, file=sys.stderr, flush=True)
        self._warned = True


class _Redacting(logging.Formatter):
    """A message without secrets."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self._redactor = Redactor(os.environ)

    def format(self, record: logging.LogRecord) -> str:
        return self._redactor.redact(super().format(record))


class _FileHandler(logging.Handler):
    """Writes a rank's own log, and its part of the events."""

    def __init__(self, output_dir: Path, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self._log = Appender(rank_log(output_dir, rank))
        self._events = Appender(events_part(output_dir, f"rank-{rank:05d}"))
        self._text, self._message = _Redacting(FORMAT), _Redacting("%(message)s")

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write(self._text.format(record) + "\n")
        self._events.write(event_line(self._rank, record.levelname, heartbeat.step, self._message.format(record)))


class _TerminalHandler(logging.Handler):
    """Prints messages above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print_line(self.format(record))
        except Exception:
            self.handleError(record)


def log_to_terminal(rank: int) -> None:
    """Print log messages at the terminal, from the start of a rank on: all of rank 0, the warnings of the others."""
    handler = _TerminalHandler(logging.INFO if rank == 0 else logging.WARNING)
    handler.setFormatter(_Redacting("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def report_failure(text: str) -> None:
    """Print why this rank fails. A launcher copies it from stderr to the logs; without a launcher it is logged here."""
    print(text, file=sys.stderr, flush=True)
    if TERMINAL in os.environ:
        return
    record = log.makeRecord(log.name, logging.CRITICAL, __file__, 0, text, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _FileHandler):
            handler.handle(record)


def read_lines(path: Path, start: int) -> tuple[list[bytes], int]:
    """The complete lines after byte `start`, and the offset after them; none if there is no file yet."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return [], start
    end = content.rfind(b"\n") + 1
    return content[:end].splitlines(), start + end


@contextmanager
def run_logs(output_dir: Path, rank: int) -> Iterator[None]:
    """Write a rank's messages to its log files; rank 0 also merges them where no launcher does.

    Raises:
        ConfigError: the folder of logs cannot be created.
    """
    make_logs_folder(output_dir)
    logging.getLogger().addHandler(_FileHandler(output_dir, rank))
    with closing(LogMerger(output_dir)) if rank == 0 and TERMINAL not in os.environ else nullcontext():
        yield


class LogMerger:
    """Merges the events of all ranks and launchers in a thread, until closed.

    One process merges, the launcher of node 0 (or rank 0 without a launcher), so no line is torn on a network disk;
    lines of other nodes appear when the disk shows them. The merged length of each part is stored beside the parts, so
    a restart continues there. After a kill -9 at the wrong moment, one second's lines may appear twice; none is lost.
    """

    def __init__(self, output_dir: Path) -> None:
        folder = logs_folder(output_dir)
        self._parts = folder / "parts"
        self._run_log = Appender(folder / "run.log")
        self._events = Appender(folder / "events.jsonl")
        self._offsets = self._read_offsets()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._merge_until_closed, name="log-merger", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Merge the remaining lines and stop."""
        self._closing.set()
        self._thread.join()

    def _merge_until_closed(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(MERGE_INTERVAL_S)
            try:
                self._merge()
            except OSError as error:
                log.warning("%s: %s; the ranks' own logs continue", self._parts, error)

    def _merge(self) -> None:
        offsets = dict(self._offsets)
        merged: list[dict[str, Any]] = []
        for part in sorted(self._parts.glob("*.jsonl")):
            lines, offsets[part.name] = read_lines(part, offsets.get(part.name, 0))
            merged += [event for line in lines if (event := read_event(line)) is not None]
        if not merged:
            return
        merged.sort(key=lambda event: event["time"])  # stable: keeps the order within a part
        self._events.write("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in merged))
        self._run_log.write("".join(_log_line(event) for event in merged if _belongs_in_run_log(event)))
        self._offsets = offsets
        write_text(self._parts / OFFSETS_FILE, json.dumps(offsets), exclusive=True)

    def _read_offsets(self) -> dict[str, int]:
        try:
            offsets = json.loads((self._parts / OFFSETS_FILE).read_text(encoding="utf-8"))
            return {name: int(offset) for name, offset in offsets.items()}
        # None yet, or damaged: repeating lines is better than losing them.
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            return {}


def read_event(line: bytes) -> dict[str, Any] | None:
    """The event in a line of `events.jsonl`; None for a line that a kill has cut off."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("time"), int) else None


def _belongs_in_run_log(event: dict[str, Any]) -> bool:
    return event["rank"] in (0, None) or event["level"] not in ("DEBUG", "INFO")


def _log_line(event: dict[str, Any]) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"] / 1000))
    writer = f"launcher on {event['host']}" if event["rank"] is None else f"rank {event['rank']}"
    return f"{date} {writer} {event['level']} {event['message']}\n"
