"""The launcher with real processes: signals, deaths, several nodes. Ranks are small programs, not trainings."""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import wait_for

from training.errors import ConfigError
from training.launch import launcher as launching
from training.launch import nodes as meeting
from training.launch.command import main
from training.launch.launcher import Launcher
from training.launch.nodes import Nodes, Place

HOST = socket.gethostname()
# Handles the signals as a rank of a run does: notes them, ends with 75 at its next step.
STOPS = """
    import os, signal, sys, time
    asked = []
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM"):
        signal.signal(getattr(signal, name), lambda number, frame: asked.append(number))
    open(f"{FOLDER}/ready-{os.environ['RANK']}", "w").close()
    while not asked:
        time.sleep(0.01)
    open(f"{FOLDER}/asked-{os.environ['RANK']}", "w").write(signal.Signals(asked[0]).name)
    sys.exit(75)
"""
DEAF = """
    import os, signal, sys, time
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    open(f"{FOLDER}/ready-{os.environ['RANK']}", "w").close()
    time.sleep(120)
"""


@pytest.fixture(autouse=True)
def terminal_signals() -> Iterator[None]:
    """Signals as a terminal leaves them: under nohup SIGHUP is ignored, in a script's background SIGINT."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def rank_program(folder: Path, program: str, when: dict[int, str] | None = None) -> list[str]:
    """A command: `program`, or for some ranks what `when` says."""
    parts = [f"FOLDER = {str(folder)!r}", "import os", "RANK = int(os.environ['RANK'])"]
    parts += [
        f"if RANK == {number}:\n{textwrap.indent(textwrap.dedent(text), '    ')}"
        for number, text in (when or {}).items()
    ]
    parts += [f"if RANK not in {list(when or {})}:\n{textwrap.indent(textwrap.dedent(program), '    ')}"]
    return [sys.executable, "-c", "\n".join(parts)]


def send_when_ready(folder: Path, ranks: int, *numbers: signal.Signals) -> threading.Thread:
    """Sends signals to this process, the launcher, when all ranks are ready."""

    def send() -> None:
        wait_for(lambda: len(list(folder.glob("ready-*"))) == ranks)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((75, 0), 75),
        ((2, 2), 2),
        ((3, 0), 3),
        ((4, 0), 4),
        ((3, 1), 1),
        ((5, 0), 1),
        ((75, 1), 1),
    ],
)
def test_the_status_is_the_ranks_own(statuses: tuple[int, int], expected: int, tmp_path: Path) -> None:
    command = rank_program(tmp_path, f"os._exit({statuses[0]})", {1: f"os._exit({statuses[1]})"})
    assert Launcher(Nodes(Place()), command, 2).run() == expected


@pytest.mark.parametrize(
    ("number", "seen"),
    [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGUSR2, "SIGUSR2"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGTERM")],
)
def test_a_stop_reaches_every_rank_and_the_launcher_lives_to_tell(
    number: signal.Signals, seen: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    send_when_ready(tmp_path, 2, number)
    assert Launcher(Nodes(Place()), rank_program(tmp_path, STOPS), 2).run() == 75
    assert signal.getsignal(number) == signal.SIG_DFL
    assert [(tmp_path / f"asked-{rank}").read_text() for rank in range(2)] == [seen, seen]
    assert capfd.readouterr().err == (
        f"crosslift: stopped by {number.name}; the same command goes on from the last checkpoint\n"
    )


def test_a_stop_before_ranks_can_handle_it_is_a_stop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = "open(f'{FOLDER}/ready-{RANK}', 'w').close(); import time; time.sleep(60)"
    send_when_ready(tmp_path, 2, signal.SIGUSR1)
    assert Launcher(Nodes(Place()), rank_program(tmp_path, program), 2).run() == 75
    assert "killed" not in capfd.readouterr().err


def test_a_rank_that_such_a_signal_killed_unasked_is_a_failure(tmp_path: Path) -> None:
    command = rank_program(tmp_path, "", {1: "os.kill(os.getpid(), 10)"})
    assert Launcher(Nodes(Place()), command, 2).run() == 1


def test_ctrl_c_ends_everything_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = """
        import time
        try:
            open(f"{FOLDER}/ready-{RANK}", "w").close()
            time.sleep(60)
        except KeyboardInterrupt:
            open(f"{FOLDER}/interrupted-{RANK}", "w").close()
            os._exit(1)
    """
    send_when_ready(tmp_path, 2, signal.SIGINT)
    started = time.monotonic()
    assert Launcher(Nodes(Place()), rank_program(tmp_path, program), 2).run() == 130
    assert time.monotonic() - started < launching.FAILED_GRACE
    assert len(list(tmp_path.glob("interrupted-*"))) == 2
    assert capfd.readouterr().err.count("stopped by SIGINT") == 1


def test_a_second_ctrl_c_kills_what_does_not_listen(tmp_path: Path) -> None:
    send_when_ready(tmp_path, 2, signal.SIGINT, signal.SIGINT)
    started = time.monotonic()
    assert Launcher(Nodes(Place()), rank_program(tmp_path, DEAF), 2).run() == 130
    assert time.monotonic() - started < launching.FAILED_GRACE


def test_when_a_rank_is_killed_it_is_named_and_the_others_end_soon(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "FAILED_GRACE", 1.0)
    command = rank_program(tmp_path, DEAF, {1: "import time; time.sleep(0.5); os.kill(os.getpid(), 9)"})
    started = time.monotonic()
    assert Launcher(Nodes(Place()), command, 2).run() == 1
    assert time.monotonic() - started < 10
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"crosslift: rank 1 on {HOST} was killed by signal 9 (SIGKILL")


def run_nodes(commands: list[list[str]], nproc: int) -> list[int]:
    """A launcher a node, in threads; their statuses."""
    rendezvous = f"127.0.0.1:{free_port()}"
    statuses = [-1] * len(commands)

    def run(node: int) -> None:
        place = Place(len(commands), node, rendezvous)
        statuses[node] = Launcher(Nodes(place), commands[node], nproc).run()

    threads = [threading.Thread(target=run, args=(node,), daemon=True) for node in range(len(commands))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return statuses


def test_ranks_of_two_nodes_are_numbered_through_and_share_a_store(tmp_path: Path) -> None:
    program = """
        from datetime import timedelta
        from torch.distributed import rendezvous
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=30)))
        store.set(f"from {rank}", os.environ["LOCAL_RANK"])
        assert [store.get(f"from {n}") for n in range(world)] == [b"0", b"1", b"0", b"1"]
        open(f"{FOLDER}/{rank}-of-{world}", "w").close()
    """
    assert run_nodes([rank_program(tmp_path, program)] * 2, 2) == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{rank}-of-4" for rank in range(4)]


def test_a_death_on_one_node_ends_the_ranks_of_the_other_and_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "FAILED_GRACE", 1.0)
    command = rank_program(tmp_path, DEAF, {1: "import time; time.sleep(0.5); os.kill(os.getpid(), 9)"})
    started = time.monotonic()
    assert run_nodes([command] * 2, 1) == [1, 1]
    assert time.monotonic() - started < 15
    (line,) = capfd.readouterr().err.splitlines()
    assert "rank 1 on" in line


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("end", "status"), [("os.kill(os.getpid(), 9)", 1), ("os._exit(2)", 2)])
def test_a_killed_rank_and_one_that_says_why_are_causes_whoever_was_seen_first(
    end: str,
    status: int,
    nodes: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launching, "NEWS_SECONDS", 6.0)  # of which a busy machine may take some
    program = """
        import time
        while not os.path.exists(f"{FOLDER}/ready-1"):
            time.sleep(0.01)
        os._exit(1)
    """
    ends_later = f"""
        import time
        open(f"{{FOLDER}}/ready-1", "w").close()
        time.sleep(0.8)
        {end}
    """
    command = rank_program(tmp_path, program, {1: ends_later})
    assert run_nodes([command] * nodes, 2 // nodes) == [status] * nodes
    said = capfd.readouterr().err.splitlines()
    assert len(said) == (status == 1)  # what a user can mend the rank has said itself
    assert all(f"rank 1 on {HOST} was killed" in line for line in said)


def test_a_node_0_that_does_not_come_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "COME_SECONDS", 1.0)
    port = free_port()
    assert Launcher(Nodes(Place(2, 1, f"127.0.0.1:{port}")), rank_program(tmp_path, ""), 1).run() == 1
    assert f"node 1 ({HOST}): no answer from node 0 at 127.0.0.1:{port}" in capfd.readouterr().err


def test_a_taken_port_is_the_users_to_change() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--rendezvous 127.0.0.1:{port}: node 0 cannot listen there"):
            Launcher(Nodes(Place(2, 0, f"127.0.0.1:{port}")), [], 1).run()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "2"], "--rendezvous: missing; with --nodes above 1 give HOST:PORT of node 0"),
        (["--nodes", "2", "--rendezvous", "host"], "--rendezvous 'host': must be HOST:PORT, such as node-1:29400"),
        (["--nodes", "2", "--rendezvous", "host:70000"], "must be HOST:PORT"),
        (["--nodes", "2", "--node-rank", "2", "--rendezvous", "a:1"], "--node-rank 2: must be 0 to 1, as --nodes is 2"),
        (["--node-rank", "-1"], "--node-rank -1: must be 0 to 0"),
        ([], "absent.yaml: no such file"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["absent.yaml", "--nproc", "1", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("crosslift: ")
    assert said in line


def test_a_run_folder_that_cannot_be_written_is_one_line(
    run_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "run"
    assert main([str(run_file(tmp_path)), f"output_dir={output}", "--nproc", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"output_dir: {output}: lies below {tmp_path / 'file'}, which is " in line


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send_when_ready(tmp_path, 1, signal.SIGHUP, signal.SIGTERM)
        assert Launcher(Nodes(Place()), rank_program(tmp_path, STOPS), 1).run() == 75
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_that_does_not_end_after_the_others_stopped_is_killed_and_it_is_a_stop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "STOPPED_GRACE", 1.0)
    command = rank_program(tmp_path, DEAF, {0: "import time; time.sleep(0.5); os._exit(75)"})
    assert Launcher(Nodes(Place()), command, 2).run() == 75
    assert "; ranks [1] did not end and were killed; the same command goes on" in capfd.readouterr().err


# As a rank that has lost its connection: fails when rank 0 is gone.
FOLLOWS = """
    import signal, sys, time
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    open(f"{FOLDER}/ready-{RANK}", "w").close()
    while not os.path.exists(f"{FOLDER}/asked-0"):
        time.sleep(0.01)
    print("RuntimeError: Connection closed by peer", file=sys.stderr)
    os._exit(1)
"""


def test_ranks_that_fail_since_one_was_stopped_outside_of_training_are_no_failures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 has not come to its first step, the other waits for it in a collective: the run is to be requeued."""
    send_when_ready(tmp_path, 2, signal.SIGUSR1)
    assert Launcher(Nodes(Place()), rank_program(tmp_path, FOLLOWS, {0: STOPS}), 2).run() == 75
    said = capfd.readouterr().err
    assert "stopped by SIGUSR1; ranks [1] failed when others had ended; the same command goes on" in said
    assert "ended first" not in said


def test_neither_are_they_on_another_node(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "NEWS_SECONDS", 4.0)  # of which a busy machine may take some
    start = Launcher._start

    def start_and_ask(launcher: Launcher) -> None:
        """In a thread no signal reaches a launcher, so node 0's is told of one as its handler would."""
        start(launcher)
        if launcher.nodes.place.node == 0:
            wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
            launcher._asked.append(signal.SIGUSR1)

    monkeypatch.setattr(Launcher, "_start", start_and_ask)
    assert run_nodes([rank_program(tmp_path, FOLLOWS, {0: STOPS})] * 2, 1) == [75, 75]
    assert "ended first" not in capfd.readouterr().err


def test_a_rank_that_was_stopped_before_its_first_step_leaves_the_others_no_time_to_save(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait in a collective that nobody ends (NCCL), and nothing is there to be saved."""
    monkeypatch.setattr(launching, "FAILED_GRACE", 0.5)
    beats = "from training.launch.heartbeat import Heart; heart = Heart(); heart.attach()"
    send_when_ready(tmp_path, 2, signal.SIGUSR1)
    command = rank_program(tmp_path, DEAF, {0: f"{beats}\n{textwrap.dedent(STOPS)}"})
    started = time.monotonic()
    assert Launcher(Nodes(Place()), command, 2).run() == 75
    assert time.monotonic() - started < launching.STOPPED_GRACE / 2
    assert "; ranks [1] did not end and were killed" in capfd.readouterr().err


@pytest.mark.parametrize("status", [0, 75])
def test_what_a_rank_started_ends_with_it(tmp_path: Path, status: int) -> None:
    """Such as the process that converts a checkpoint, under a rank that is stopped."""
    program = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], stderr=subprocess.DEVNULL)
        open(f"{{FOLDER}}/child", "w").write(str(child.pid))
        os._exit({status})
    """
    assert Launcher(Nodes(Place()), rank_program(tmp_path, program), 1).run() == status
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    wait_for(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")
