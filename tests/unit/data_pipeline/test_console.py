"""`data_pipeline.console`: tables are aligned and plain; progress is a bar at a terminal and lines elsewhere."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
from rich.cells import cell_len

from data_pipeline import console
from data_pipeline.console import Progress, print_line, table


class Terminal(io.StringIO):
    """A terminal that can be disconnected."""

    disconnected = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.disconnected:
            raise OSError(5, "Input/output error")
        return super().write(text)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    monkeypatch.setattr(console, "terminal", lambda: found)
    return found


def test_text_is_aligned_left_and_numbers_right() -> None:
    rows = [("en", 12, None), ("average", "5*", 0.25)]
    assert table(["language", "n", "share"], rows, notes=["* some"]) == (
        "language    n  share\n--------  ---  -----\nen        12       -\naverage    5*   0.25\n* some"
    )
    assert table(["language", "n"], [("en", "5.25*"), ("de", 10.75), ("sw", None)]).splitlines()[2:] == [
        "en         5.25*", "de        10.75", "sw            -",
    ]  # fmt: skip
    assert table(["a", "name"], [("b", "left")], text=(0, 1)).splitlines()[2] == "b  left"


def test_columns_are_aligned_by_width_at_the_terminal() -> None:
    """A Chinese character takes two columns, a Thai vowel sign or a combining accent none."""
    lines = table(["name", "n"], [("中文", 1), ("กำลัง", 2), ("e\u0301te\u0301", 3), ("plain text", 4)]).splitlines()
    assert {cell_len(line) for line in lines} == {len("plain text  4")}
    assert [line[-1] for line in lines[2:]] == ["1", "2", "3", "4"]


def test_no_table_is_wrapped_cut_or_coloured() -> None:
    wide = "x" * 3000
    text = table(["name", "value"], [(wide, "[bold]50.0 %[/bold] [40.0, 60.0] :smile:")], text=(0, 1))
    assert text.splitlines()[2] == f"{wide}  [bold]50.0 %[/bold] [40.0, 60.0] :smile:"
    assert "\x1b" not in text


def test_a_row_with_another_number_of_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="row 'en' has 1 cells for 2 columns"):
        table(["language", "n"], [("en",)])


def test_at_a_terminal_progress_is_a_bar(terminal: Terminal, clock: Clock) -> None:
    with Progress("reading", 40, "rows") as progress:
        progress.update(10, "loss [1]")
        clock.now += 1
        progress.advance(20)
        print_line("a message [1]")
        progress.update(40)
    shown = terminal.getvalue()
    assert "30/40" in shown
    assert "40/40" in shown
    assert "10/40" not in shown, "redrawn too soon after the first time"
    assert "a message [1]\n" in shown
    print_line("after")
    assert terminal.getvalue().endswith("after\n")


def test_without_a_terminal_progress_is_an_occasional_line(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(console, "terminal", lambda: output)
    with Progress("indexing", None, "rows") as unknown, Progress("answering", 4000, "problems", start=1000) as known:
        for done in (1, 2):
            clock.now += 10
            unknown.update(1000 * done)
            known.update(1000 + done, "de")
    assert output.getvalue() == "indexing: 2,000 rows\nanswering: 1,002 of 4,000 problems  de\n"
    with caplog.at_level(logging.INFO, logger="data_pipeline"), Progress("indexing", None, "rows") as progress:
        clock.now += 20
        progress.advance(5)
    assert caplog.messages == ["indexing: 5 rows"]


def test_quick_and_hidden_tasks_print_nothing(
    terminal: Terminal, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("reading", 9, "rows", shown=False) as progress:
        clock.now += 60
        progress.advance(9)
    assert terminal.getvalue() == ""
    terminal.isatty = lambda: False  # type: ignore[method-assign]
    with Progress("reading", 9, "rows") as progress:
        progress.advance(9)
    assert terminal.getvalue() == ""


def test_a_disconnected_terminal_does_not_end_the_task(terminal: Terminal, clock: Clock) -> None:
    with Progress("reading", 9, "rows") as progress:
        terminal.disconnected = True
        clock.now += 1
        progress.advance(5)
        progress.advance(4)
    assert progress.done == 9
    terminal.disconnected = False
    print_line("the next command")
    assert terminal.getvalue().endswith("the next command\n")


def test_rich_is_imported_only_when_something_is_shown() -> None:
    program = "import sys, data_pipeline.console; print(any(name.partition('.')[0] == 'rich' for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_bar_shows_the_time_left_of_steps_that_take_minutes(clock: Clock, terminal: Terminal) -> None:
    """rich alone forgets what is older than 30 s, and shows none."""
    with Progress("training", 10, "steps") as progress:
        assert progress._bar is not None
        progress._bar.get_time = clock.monotonic
        for done in range(4):
            clock.now += 100
            progress.update(done)
        assert progress._bar.tasks[0].time_remaining == 700
