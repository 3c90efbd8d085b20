"""Logs: which file gets which line, merging, and redaction. The ranks are small programs that only log."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from training.launch import logs
from training.launch.launcher import Launcher
from training.launch.logs import Appender, LogMerger, event_line, events_part, rank_log, read_lines
from training.launch.rank_process import DRAIN_TIMEOUT_S
from training.launch.status_exchange import NodePlace

HOST = socket.gethostname()
ROOT = Path(__file__).resolve().parents[4]
TOKEN = "hf_fakeFAKEfakeFAKE"
PASSWORD = "correct horse"
RANK = """
    import ctypes, logging, os, sys
    from pathlib import Path
    from training.launch import logs
    from training.launch.heartbeat import heartbeat
    rank = int(os.environ["RANK"])
    heartbeat.attach()
    logs.log_to_terminal(rank)
    log = logging.getLogger("training.loop.trainer")
"""


def run(folder: Path, program: str, nproc: int = 2) -> int:
    code = textwrap.dedent(RANK) + textwrap.dedent(program)
    return Launcher(NodePlace(), [sys.executable, "-c", code.replace("FOLDER", repr(str(folder)))], nproc, folder).run()


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs" / "events.jsonl").read_text().splitlines()]


def test_each_message_goes_to_its_files_and_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = """
        with logs.run_logs(Path(FOLDER), rank):
            log.info("info of %d", rank)
            for _ in heartbeat.steps("ab", 3):
                pass
            log.warning("warning of %d", rank)
            print(f"native {rank}", file=sys.stderr)
    """
    assert run(tmp_path, program) == 0
    shown = capfd.readouterr().err.splitlines()
    assert sorted(shown) == ["info of 0", "native 0", "native 1", "warning of 0", "warning of 1"]
    for rank in range(2):
        lines = rank_log(tmp_path, rank).read_text().splitlines()
        assert [line.rpartition(",")[2][4:] for line in lines] == [
            f"INFO info of {rank}", f"WARNING warning of {rank}", f"native {rank}"[4:]
        ]  # fmt: skip
    found = {(each["rank"], each["level"], each["step"], each["message"]) for each in events(tmp_path)}
    assert found == {
        (rank, level, step, f"{word} of {rank}")
        for rank in range(2) for level, step, word in (("INFO", 0, "info"), ("WARNING", 5, "warning"))
    } | {(rank, "STDERR", 5, f"native {rank}") for rank in range(2)}  # fmt: skip
    assert {each["host"] for each in events(tmp_path)} == {HOST}
    merged = (tmp_path / "logs" / "run.log").read_text()
    assert "rank 0 INFO info of 0" in merged
    assert "rank 1 WARNING warning of 1" in merged
    assert "info of 1" not in merged


@pytest.mark.parametrize(
    ("failure", "printed"),
    [
        ("raise RuntimeError('of the reader')", "RuntimeError: of the reader"),
        ("ctypes.CDLL(None).perror(b'from C'); os.abort()", "from C: "),
        ("logs.report_failure('crosslift: rank 1: no memory'); os._exit(1)", "crosslift: rank 1: no memory"),
    ],
)
def test_the_last_lines_of_a_failing_rank_reach_the_terminal_and_its_log_once(
    failure: str, printed: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = f"""
        context = logs.run_logs(Path(FOLDER), rank)
        context.__enter__()
        if rank == 1:
            {failure}
    """
    assert run(tmp_path, program) == 1
    assert capfd.readouterr().err.count(printed) == 1
    assert rank_log(tmp_path, 1).read_text().count(printed) == 1
    assert (tmp_path / "logs" / "run.log").read_text().count(printed) == 1
    assert not rank_log(tmp_path, 0).read_text()
    assert [each["rank"] for each in events(tmp_path) if printed in each["message"]] == [1]


def test_the_same_message_of_all_ranks_is_printed_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = "logs.report_failure('crosslift: a.yaml: no such file'); os._exit(2)"
    assert run(tmp_path, program, nproc=3) == 2
    assert capfd.readouterr().err == "crosslift: a.yaml: no such file\n"


def test_a_rank_without_a_launcher_writes_all_logs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import subprocess

    program = """
        with logs.run_logs(Path(FOLDER), 0):
            log.info("hello")
            logs.report_failure("crosslift: rank 0: of itself")
    """
    code = (textwrap.dedent(RANK) + textwrap.dedent(program)).replace("FOLDER", repr(str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "RANK": "0"}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "hello\ncrosslift: rank 0: of itself\n"
    assert [each["message"] for each in events(tmp_path)] == ["hello", "crosslift: rank 0: of itself"]
    assert rank_log(tmp_path, 0).read_text().count("of itself") == 1


def test_secrets_are_neither_written_nor_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    program = """
        with logs.run_logs(Path(FOLDER), rank):
            log.warning("login with %s at http://me:pass@host/x", os.environ["HF_TOKEN"])
            print(os.environ, file=sys.stderr)
            print("printed", os.environ["HF_TOKEN"])
            try:
                raise ValueError(os.environ["MLFLOW_TRACKING_PASSWORD"])
            except ValueError:
                log.exception("refused")
            logs.report_failure(os.environ["HF_TOKEN"])
            os.kill(os.getpid(), 9)
    """
    assert run(tmp_path, program) == 1
    shown = capfd.readouterr()
    everything = shown.out + shown.err + "".join(
        path.read_text() for path in (tmp_path / "logs").rglob("*") if path.is_file()
    )  # fmt: skip
    assert shown.out == "printed <HF_TOKEN>\n" * 2
    assert "<HF_TOKEN>" in everything
    assert "http://...@host/x" in everything
    assert TOKEN not in everything
    assert PASSWORD not in everything


def launched(folder: Path, lines: int) -> subprocess.Popen[bytes]:
    """A launcher in its own process, whose two ranks print `lines` lines of a hundred characters each."""
    program = folder / "rank.py"
    program.write_text(f"for number in range({lines}):\n    print(number, 'x' * 100)\n")
    code = (
        "import sys; from pathlib import Path\n"
        "from training.launch.launcher import Launcher; from training.launch.status_exchange import *\n"
        f"command = [sys.executable, {str(program)!r}]\n"
        f"sys.exit(Launcher(NodePlace(), command, 2, Path({str(folder)!r})).run())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE)


def test_a_closed_stdout_does_not_block_the_ranks(tmp_path: Path) -> None:
    """As in `crosslift train CONFIG | head`: the run continues and ends with its own status."""
    launcher = launched(tmp_path, 2000)  # more than pipes hold
    assert launcher.stdout is not None
    launcher.stdout.readline()
    launcher.stdout.close()
    assert launcher.wait(timeout=60) == 0


def test_a_slow_reader_of_stdout_gets_every_line(tmp_path: Path) -> None:
    launcher = launched(tmp_path, 550)  # fits the ranks' own pipes, so that they can end, but not the launcher's pipe
    assert launcher.stdout is not None
    time.sleep(3 * DRAIN_TIMEOUT_S)  # longer than the wait for the end of a rank's output
    assert launcher.poll() is None
    lines = launcher.stdout.read().decode().splitlines()
    assert launcher.wait(timeout=60) == 0
    assert sorted(lines) == sorted(f"{number} {'x' * 100}" for number in range(550) for _ in range(2))


def test_a_line_after_a_torn_one_starts_on_a_new_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"whole": 1}\n{"to')
    Appender(path).write('{"next": 1}\n')
    assert path.read_text() == '{"whole": 1}\n{"to\n{"next": 1}\n'


def test_a_log_that_cannot_be_written_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = Appender(Path("/dev/full"))
    full.write("a\n")
    full.write("b\n")
    (tmp_path / "file").write_text("")
    Appender(tmp_path / "file" / "x").write("a\n")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "/dev/full: No space left on device; the run continues, its log is incomplete",
        f"{tmp_path}/file/x: File exists; the run continues, its log is incomplete",
    ]


def test_merging_continues_where_it_stopped_and_sorts_by_time(tmp_path: Path) -> None:
    def write(rank: int, at: int, message: str) -> None:
        line = json.loads(event_line(rank, "INFO", 0, message))
        Appender(events_part(tmp_path, f"rank-{rank:05d}")).write(json.dumps({**line, "time": at}) + "\n")

    write(0, 20, "second")
    write(1, 10, "first")
    with events_part(tmp_path, "rank-00000").open("a") as torn:
        torn.write('{"time": 3')
    LogMerger(tmp_path).close()
    write(0, 5, "after a restart")
    LogMerger(tmp_path).close()
    LogMerger(tmp_path).close()
    assert [each["message"] for each in events(tmp_path)] == ["first", "second", "after a restart"]


def test_later_lines_are_merged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MERGE_INTERVAL_S", 0.05)
    mine = Appender(events_part(tmp_path, "rank-00000"))
    merger = LogMerger(tmp_path)
    for message in "abc":
        mine.write(event_line(0, "INFO", 0, message))
        time.sleep(0.2)
    merger.close()
    assert [each["message"] for each in events(tmp_path)] == ["a", "b", "c"]


def test_an_unfinished_line_is_read_later(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a\nbc")
    assert read_lines(path, 0) == ([b"a"], 2)
    path.write_bytes(b"a\nbcd\n")
    assert read_lines(path, 2) == ([b"bcd"], 6)
    assert read_lines(tmp_path / "absent", 3) == ([], 3)


def test_a_stop_reported_by_the_ranks_is_not_reported_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = f"""
        import signal
        signal.signal(signal.SIGTERM, lambda *_: (logs.report_failure("crosslift: stopped, saved"), os._exit(75)))
        os.kill({os.getpid()}, signal.SIGTERM)
        signal.pause()
        signal.pause()
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run(tmp_path, program, nproc=1) == 75
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == "crosslift: stopped, saved\n"
