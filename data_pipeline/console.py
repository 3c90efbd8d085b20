"""Console output: aligned tables, and progress as a bar on a terminal or as lines elsewhere. Rendered by rich.

It is in `data_pipeline` because scans of data show progress, and because `training`, `evals` and `slurm` may import
from here. rich is imported inside the functions, so that `--help` is fast.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from io import StringIO
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

TERMINAL = "CROSSLIFT_TERMINAL"  # environment variable: the launcher's stderr as a file descriptor of the rank
MARK = "*"  # after a number that a note below the table explains
REFRESH_S = 0.1  # minimum time between two updates of a bar
SPEED_PERIOD_S = 3600.0  # over which a bar averages its speed and time left; rich's 30 s may be less than a step
LINE_INTERVAL_S = 15.0  # minimum time between two lines
_BLANK = "\ue000"  # a space that rich does not strip; a private-use character
_WIDE = 100_000  # columns: no table is wrapped or cut

log = logging.getLogger(__name__)
Item = TypeVar("Item")
_bars: list[RichProgress] = []  # those displayed now


def terminal() -> TextIO:
    """The stream for the user: the launcher's stderr, or this process's own."""
    descriptor = os.environ.get(TERMINAL)
    return sys.stderr if descriptor is None else _stream(int(descriptor))


@cache
def _stream(descriptor: int) -> TextIO:
    return os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, text: Collection[int] = (0,), notes: Sequence[str] = ()
) -> str:
    """Lines of aligned columns under a header, by the width of the characters on a terminal; no colours, never wrapped.

    Args:
        rows: one cell per column; None is shown as "-". A number may end with a star (MARK).
        text: the columns that hold text, aligned left; the others hold numbers, aligned right.
        notes: lines below the table.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """
    from rich.console import Console
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for number in range(len(header)):
        drawn.add_column(justify="left" if number in text else "right", no_wrap=True)
    drawn.add_row(*map(Text, header))
    drawn.add_row(*(Rule(characters="-", style="") for _ in header))
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {row[0]!r} has {len(row)} cells for {len(header)} columns")
    columns = [["-" if cell is None else str(cell) for cell in column] for column in zip(*rows, strict=True)]
    for number, column in enumerate(columns):
        if number not in text and any(cell.endswith(MARK) for cell in column):  # digits below digits
            columns[number] = [cell if cell.endswith(MARK) else cell + _BLANK for cell in column]
    for cells in zip(*columns, strict=True):
        drawn.add_row(*map(Text, cells))
    page = StringIO()
    Console(file=page, width=_WIDE, color_system=None, force_terminal=False).print(drawn)
    return "\n".join([*(line.replace(_BLANK, " ").rstrip() for line in page.getvalue().splitlines()), *notes])


def duration(seconds: float) -> str:
    """Rounded to minutes, such as "3 h 20 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "under 1 min"


def print_line(line: str) -> None:
    """Print a line on the user's terminal, above a progress bar if there is one."""
    if _bars:
        from rich.text import Text

        _bars[-1].console.print(Text(line), soft_wrap=True)
    else:
        print(line, file=terminal(), flush=True)


class Progress:
    """Progress of one long task, shown on the user's terminal.

    On a terminal it is a bar. Elsewhere it is a line every `LINE_INTERVAL_S` seconds, in the log if the process logs
    messages (a rank), else on stderr; a short task writes none.
    """

    def __init__(self, what: str, total: int | None, unit: str, *, start: int = 0, shown: bool = True) -> None:
        """
        Args:
            what: name of the task, such as "training".
            total: None if it is not known.
            unit: what is counted, in the plural.
            start: number done before.
            shown: False shows nothing, as on all ranks but the first.
        """
        self.what, self.total, self.unit, self.done = what, total, unit, start
        self._shown = shown
        self._bar = _bar(unit) if shown and not _bars and terminal().isatty() else None
        self._last_draw = self._last_line = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=total, completed=start, details="")
            self._bar.start()
            _bars.append(self._bar)

    @property
    def is_bar(self) -> bool:
        """Whether a bar is displayed; otherwise lines are written."""
        return self._bar is not None

    def advance(self, n: int = 1) -> None:
        """Add `n` to the number done."""
        self.update(self.done + n)

    def update(self, done: int, details: str = "") -> None:
        """Set the number done, which may decrease; `details` are shown beside the bar."""
        self.done, now = done, time.monotonic()
        if self._bar is not None:
            if now - self._last_draw >= REFRESH_S or done == self.total:
                self._last_draw = now
                self._bar.update(self._task, completed=done, details=details)
                self._draw(self._bar.refresh)
        elif self._shown and now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            self._write_line(details)

    def _write_line(self, details: str) -> None:
        of = "" if self.total is None else f" of {self.total:,}"
        line = f"{self.what}: {self.done:,}{of} {self.unit}{f'  {details}' if details else ''}"
        if log.isEnabledFor(logging.INFO):
            log.info("%s", line)
        else:
            print_line(line)

    def close(self) -> None:
        """End the bar; it stays on the terminal."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            _bars.remove(bar)
            self._draw(bar.stop)
        self._shown = False

    def _draw(self, draw: Callable[[], None]) -> None:
        try:
            draw()
        except OSError:  # the terminal was closed, which must not end the task
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def track(items: Iterable[Item], total: int, what: str, unit: str) -> Iterator[Item]:
    """Yield the items, showing how many of `total` have been processed."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def _bar(unit: str) -> RichProgress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if not task.speed else f"{task.speed:.3g} {unit}/s")

    return RichProgress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn(), Rate(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[details]}", markup=False),
        console=Console(file=terminal(), force_terminal=True), auto_refresh=False, redirect_stdout=False,
        redirect_stderr=False, speed_estimate_period=SPEED_PERIOD_S,
    )  # fmt: skip
