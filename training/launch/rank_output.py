"""What a rank writes without logging: tracebacks, C++ aborts, NCCL. The launcher reads it, and hides secrets in it.

In: the rank's stderr and stdout, pipes. Out: of stderr the launcher's own stderr, the rank's log, and events, of level
CRITICAL where crosslift says why it ends, STDERR otherwise; of stdout the launcher's own stdout.
Next: `merged_logs.py`. The launcher reads, since a process that aborts cannot look after its own last words.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from training.launch.logs import Appender, Secrets, event, part, rank_log

CLOSE_SECONDS = 2.0  # a process that a rank left behind may keep the pipe open
OURS = "crosslift: "
STDOUT = 1


class RankOutput:
    """Reads one rank's stderr and stdout, each in a thread."""

    def __init__(
        self,
        stderr: IO[bytes],
        stdout: IO[bytes],
        rank: int,
        output_dir: Path | None,
        secrets: Secrets,
        first_to_say: Callable[[str, int], bool],
        step: Callable[[], int],
    ) -> None:
        """`first_to_say` is asked before a rank's n-th line of the same words is shown, where they are our own."""
        self.spoke = False  # one of our own lines came: the rank has said why it ended
        self._said: Counter[str] = Counter()
        self._stderr = stderr
        self._stdout = stdout
        self._rank = rank
        self._secrets = secrets
        self._first_to_say = first_to_say
        self._step = step
        self._log = Appender(rank_log(output_dir, rank)) if output_dir else None
        self._events = Appender(part(output_dir, f"stderr-{rank:05d}")) if output_dir else None
        self._writing = threading.Event()  # whoever reads our stdout is slower than the rank
        self._threads = [
            threading.Thread(target=self._read, name=f"stderr-{rank}", daemon=True),
            threading.Thread(target=self._pass_on, name=f"stdout-{rank}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """After the rank's end: what it still said is shown, however long our reader takes."""
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)
            while thread.is_alive() and self._writing.is_set():
                thread.join(CLOSE_SECONDS)

    def _read(self) -> None:
        for line in self._stderr:
            text = self._text(line)
            self._show(text)
            text = text.rstrip("\r").rpartition("\r")[2]  # of a bar that redraws itself, how it ended
            if self._log is not None:
                self._log.write(text + "\n")
            if self._events is not None and text.strip():
                level = "CRITICAL" if text.startswith(OURS) else "STDERR"
                self._events.write(event(self._rank, level, self._step(), text))

    def _pass_on(self) -> None:
        for line in self._stdout:
            rest = f"{self._text(line)}\n".encode(errors="backslashreplace")
            self._writing.set()
            with suppress(OSError):  # nobody reads it any more; a full pipe would stop the rank
                while rest:  # past Python's buffer, on whose lock and last flush the end of this process depends
                    rest = rest[os.write(STDOUT, rest) :]
            self._writing.clear()

    def _text(self, line: bytes) -> str:
        return self._secrets.hidden(line.decode(errors="backslashreplace").rstrip("\n"))

    def _show(self, text: str) -> None:
        if text.startswith(OURS):
            self.spoke = True
            self._said[text] += 1
            if not self._first_to_say(text, self._said[text]):
                return
        print(text, file=sys.stderr, flush=True)
