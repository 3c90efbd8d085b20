"""A rank's logs: a file of its own, a line of JSON for each message, and what a person at the terminal sees.

In: Python's logging, from every room. Out: `<output_dir>/logs/rank-00000.log` and `parts/rank-00000.jsonl`, each
with this node as its only writer: on a network disk, appends from two machines would tear each other's lines.
Next: `merged_logs.py` makes `run.log` and `events.jsonl` of the parts.

What does not come through logging (a traceback, a C++ abort, NCCL) goes to stderr, which the launcher reads
(`rank_output.py`), shows, and adds to the same rank log. Progress bars and what a person shall see bypass that, into
the launcher's own stderr. Without a launcher of ours, stderr is stderr, and a failure is written to the log here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TextIO

from training.errors import ConfigError
from training.launch.heartbeat import heart

TERMINAL = "CROSSLIFT_TERMINAL"  # the launcher's stderr, as a file descriptor of the rank
ROOMS = ("training", "modeling", "data_pipeline")
FORMAT = "%(asctime)s %(levelname)s %(message)s"

_SECRET_NAMES = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|KEY|CREDENTIAL)S?(_?\d+)?$", re.IGNORECASE)
_SHORTEST_SECRET = 6  # what is shorter would be found in the midst of words
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")

log = logging.getLogger(__name__)


def logs_folder(output_dir: Path) -> Path:
    """Where a run's logs lie."""
    return output_dir / "logs"


def make_logs_folder(output_dir: Path) -> None:
    """Before anything else is done. Raises ConfigError where the run's folder cannot be written."""
    try:
        (logs_folder(output_dir) / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir}: cannot be written: {error.strerror}") from None


def rank_log(output_dir: Path, rank: int) -> Path:
    """One rank's log, of all its starts."""
    return logs_folder(output_dir) / f"rank-{rank:05d}.log"


def part(output_dir: Path, name: str) -> Path:
    """One writer's share of `events.jsonl`."""
    return logs_folder(output_dir) / "parts" / f"{name}.jsonl"


class Secrets:
    """Hides the values of variables such as HF_TOKEN, and passwords in addresses, whoever prints them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        found = {
            value: name
            for name, value in environment.items()
            if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST_SECRET
        }
        longest_first = sorted(found, key=len, reverse=True)
        self._names = found
        self._values = re.compile("|".join(map(re.escape, longest_first))) if found else None

    def hidden(self, text: str) -> str:
        """`text` with `<HF_TOKEN>` instead of the value."""
        if self._values is not None:
            text = self._values.sub(lambda match: f"<{self._names[match[0]]}>", text)
        return _IN_ADDRESS.sub("...", text)


@cache
def terminal() -> TextIO:
    """Where what a person shall see goes: the launcher's stderr, or this process's own."""
    descriptor = os.environ.get(TERMINAL)
    if descriptor is None:
        return sys.stderr
    return os.fdopen(int(descriptor), "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def event(rank: int | None, level: str, step: int, message: str) -> str:
    """A line of `events.jsonl`: time in unix milliseconds and step from 1, as in `record.jsonl`; rank None: a launcher.

    `step` is the 0-based one of a beat; -1, before the first, becomes 0.
    """
    values = {
        "time": int(time.time() * 1000), "rank": rank, "host": socket.gethostname(), "level": level,
        "step": step + 1, "message": message,
    }  # fmt: skip
    return json.dumps(values, ensure_ascii=False) + "\n"


class Appender:
    """Whole lines at the end of a file. What cannot be written is dropped after one word about it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._warned = False
        self._torn = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self._descriptor).st_size
            self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"  # a kill -9 in mid-line
        except OSError as error:
            self._complain(error)

    def write(self, lines: str) -> None:
        """Append text that ends with a newline."""
        if self._descriptor < 0:
            return
        content = (b"\n" if self._torn else b"") + lines.encode(errors="backslashreplace")
        try:
            self._torn = os.write(self._descriptor, content) < len(content)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._warned:
            print(f"{self.path}: {error.strerror}; the run goes on, its log has a gap", file=sys.stderr, flush=True)
        self._warned = True


class _LogFile(logging.Handler):
    """A rank's own log."""

    def __init__(self, path: Path, secrets: Secrets) -> None:
        super().__init__()
        self._file, self._secrets = Appender(path), secrets
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        self._file.write(self._secrets.hidden(self.format(record)) + "\n")


class _Events(logging.Handler):
    """A rank's part of the lines for machines."""

    def __init__(self, path: Path, rank: int, secrets: Secrets) -> None:
        super().__init__()
        self._file, self._rank, self._secrets = Appender(path), rank, secrets

    def emit(self, record: logging.LogRecord) -> None:
        text = self._secrets.hidden(self.format(record))
        self._file.write(event(self._rank, record.levelname, heart.step, text))


class _ToPerson(logging.StreamHandler):
    """The terminal: rank 0's messages, and warnings of all."""

    def __init__(self, rank: int, secrets: Secrets) -> None:
        super().__init__(terminal())
        self._secrets = secrets
        self.setLevel(logging.INFO if rank == 0 else logging.WARNING)

    def format(self, record: logging.LogRecord) -> str:
        return self._secrets.hidden(super().format(record))


def log_to_person(rank: int) -> None:
    """From the start: what a person shall see."""
    handler = _ToPerson(rank, Secrets(os.environ))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    for room in ROOMS:
        logging.getLogger(room).setLevel(logging.INFO)


def log_to_files(output_dir: Path, rank: int) -> None:
    """As soon as the run's folder is known: this rank's log and its part of the events."""
    secrets = Secrets(os.environ)
    for handler in (
        _LogFile(rank_log(output_dir, rank), secrets),
        _Events(part(output_dir, f"rank-{rank:05d}"), rank, secrets),
    ):
        logging.getLogger().addHandler(handler)


def say_failure(text: str) -> None:
    """The last words of a rank that fails. A launcher takes them from stderr into the logs; else it is done here."""
    print(text, file=sys.stderr, flush=True)
    if TERMINAL in os.environ:
        return
    record = log.makeRecord(log.name, logging.CRITICAL, __file__, 0, text, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Events | _LogFile):
            handler.handle(record)


def read_lines(path: Path, start: int) -> tuple[list[bytes], int]:
    """The whole lines behind byte `start`, and where the next one begins; none where there is no file yet."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return [], start
    whole = content.rfind(b"\n") + 1
    return content[:whole].splitlines(), start + whole
