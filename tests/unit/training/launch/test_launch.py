"""The launcher with real processes: signals, failures, several nodes. The ranks are small programs."""

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
from ports import free_port
from waiting import wait_for

from training.errors import ConfigError
from training.launch import launcher as launching
from training.launch import status_exchange
from training.launch.__main__ import main
from training.launch.launcher import Launcher
from training.launch.status_exchange import NodePlace

HOST = socket.gethostname()
# Handles the signals as a training rank does: records them and exits with status 75 at its next step.
STOPPABLE = """
    import os, signal, sys, time
    received = []
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM"):
        signal.signal(getattr(signal, name), lambda number, frame: received.append(number))
    open(f"{FOLDER}/ready-{os.environ['RANK']}", "w").close()
    while not received:
        time.sleep(0.01)
    open(f"{FOLDER}/received-{os.environ['RANK']}", "w").write(signal.Signals(received[0]).name)
    sys.exit(75)
"""
IGNORES_SIGNALS = """
    import os, signal, sys, time
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    open(f"{FOLDER}/ready-{os.environ['RANK']}", "w").close()
    time.sleep(120)
"""


@pytest.fixture(autouse=True)
def terminal_signals() -> Iterator[None]:
    """Default handlers, as in a terminal: nohup ignores SIGHUP, a background shell SIGINT."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def rank_program(folder: Path, program: str, when: dict[int, str] | None = None) -> list[str]:
    """A command that runs `program`, or for some ranks the program in `when`."""
    parts = [f"FOLDER = {str(folder)!r}", "import os", "RANK = int(os.environ['RANK'])"]
    parts += [
        f"if RANK == {number}:\n{textwrap.indent(textwrap.dedent(text), '    ')}"
        for number, text in (when or {}).items()
    ]
    parts += [f"if RANK not in {list(when or {})}:\n{textwrap.indent(textwrap.dedent(program), '    ')}"]
    return [sys.executable, "-c", "\n".join(parts)]


def send_when_ready(folder: Path, ranks: int, *numbers: signal.Signals) -> threading.Thread:
    """Send signals to this process, the launcher, once all ranks are ready."""

    def send() -> None:
        wait_for(lambda: len(list(folder.glob("ready-*"))) == ranks)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


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
def test_the_run_ends_with_the_status_of_its_ranks(statuses: tuple[int, int], expected: int, tmp_path: Path) -> None:
    command = rank_program(tmp_path, f"os._exit({statuses[0]})", {1: f"os._exit({statuses[1]})"})
    assert Launcher(NodePlace(), command, 2, tmp_path).run() == expected


@pytest.mark.parametrize(
    ("number", "forwarded"),
    [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGUSR2, "SIGUSR2"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGTERM")],
)
def test_a_stop_signal_is_forwarded_to_every_rank(
    number: signal.Signals, forwarded: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    send_when_ready(tmp_path, 2, number)
    assert Launcher(NodePlace(), rank_program(tmp_path, STOPPABLE), 2, tmp_path).run() == 75
    assert signal.getsignal(number) == signal.SIG_DFL
    assert [(tmp_path / f"received-{rank}").read_text() for rank in range(2)] == [forwarded, forwarded]
    assert capfd.readouterr().err == (
        f"crosslift: stopped by {number.name}; the same command resumes from the last checkpoint\n"
    )


def test_a_stop_signal_before_ranks_handle_it_counts_as_a_stop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "open(f'{FOLDER}/ready-{RANK}', 'w').close(); import time; time.sleep(60)"
    send_when_ready(tmp_path, 2, signal.SIGUSR1)
    assert Launcher(NodePlace(), rank_program(tmp_path, program), 2, tmp_path).run() == 75
    assert "killed" not in capfd.readouterr().err


def test_a_rank_killed_by_a_stop_signal_that_was_not_forwarded_is_a_failure(tmp_path: Path) -> None:
    command = rank_program(tmp_path, "", {1: "os.kill(os.getpid(), 10)"})
    assert Launcher(NodePlace(), command, 2, tmp_path).run() == 1


def test_ctrl_c_ends_all_ranks_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
    assert Launcher(NodePlace(), rank_program(tmp_path, program), 2, tmp_path).run() == 130
    assert time.monotonic() - started < launching.FAILURE_GRACE_S
    assert len(list(tmp_path.glob("interrupted-*"))) == 2
    assert capfd.readouterr().err.count("stopped by SIGINT") == 1


def test_a_second_ctrl_c_kills_ranks_that_ignore_the_first(tmp_path: Path) -> None:
    send_when_ready(tmp_path, 2, signal.SIGINT, signal.SIGINT)
    started = time.monotonic()
    assert Launcher(NodePlace(), rank_program(tmp_path, IGNORES_SIGNALS), 2, tmp_path).run() == 130
    assert time.monotonic() - started < launching.FAILURE_GRACE_S


def test_a_killed_rank_is_named_and_the_others_end_soon(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "FAILURE_GRACE_S", 1.0)
    command = rank_program(tmp_path, IGNORES_SIGNALS, {1: "import time; time.sleep(0.5); os.kill(os.getpid(), 9)"})
    started = time.monotonic()
    assert Launcher(NodePlace(), command, 2, tmp_path).run() == 1
    assert time.monotonic() - started < 10
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"crosslift: rank 1 on {HOST} was killed by signal 9 (SIGKILL")


def run_nodes(commands: list[list[str]], nproc: int, folder: Path) -> list[int]:
    """Run one launcher per node, in threads, with the run folder `folder`; their exit statuses."""
    rendezvous = f"127.0.0.1:{free_port()}"
    statuses = [-1] * len(commands)

    def run(node: int) -> None:
        place = NodePlace(len(commands), node, rendezvous)
        statuses[node] = Launcher(place, commands[node], nproc, folder).run()

    threads = [threading.Thread(target=run, args=(node,), daemon=True) for node in range(len(commands))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return statuses


def test_ranks_of_two_nodes_have_global_numbers_and_share_a_store(tmp_path: Path) -> None:
    program = """
        from datetime import timedelta
        from torch.distributed import rendezvous
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=30)))
        store.set(f"from {rank}", os.environ["LOCAL_RANK"])
        assert [store.get(f"from {n}") for n in range(world)] == [b"0", b"1", b"0", b"1"]
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false", "data.workers threads tokenise, not one a core"
        open(f"{FOLDER}/{rank}-of-{world}", "w").close()
    """
    written = tmp_path / "written"
    written.mkdir()
    assert run_nodes([rank_program(written, program)] * 2, 2, tmp_path) == [0, 0]
    assert sorted(path.name for path in written.iterdir()) == [f"{rank}-of-4" for rank in range(4)]


def test_a_killed_rank_ends_the_ranks_of_the_other_node_and_is_reported_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "FAILURE_GRACE_S", 1.0)
    command = rank_program(tmp_path, IGNORES_SIGNALS, {1: "import time; time.sleep(0.5); os.kill(os.getpid(), 9)"})
    started = time.monotonic()
    assert run_nodes([command] * 2, 1, tmp_path) == [1, 1]
    assert time.monotonic() - started < 15
    (line,) = capfd.readouterr().err.splitlines()
    assert "rank 1 on" in line


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("end", "status"), [("os.kill(os.getpid(), 9)", 1), ("os._exit(2)", 2)])
def test_a_killed_rank_or_a_user_error_is_the_root_cause_even_if_noticed_later(
    end: str,
    status: int,
    nodes: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launching, "PROPAGATION_S", 6.0)  # a busy machine may take long
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
    assert run_nodes([command] * nodes, 2 // nodes, tmp_path) == [status] * nodes
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == (status == 1)  # a user error is printed by the rank itself
    assert all(f"rank 1 on {HOST} was killed" in line for line in printed)


def test_a_missing_node_0_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_exchange, "JOIN_TIMEOUT_S", 1.0)
    port = free_port()
    assert Launcher(NodePlace(2, 1, f"127.0.0.1:{port}"), rank_program(tmp_path, ""), 1, tmp_path).run() == 1
    assert f"node 1 ({HOST}): no answer from node 0 at 127.0.0.1:{port}" in capfd.readouterr().err


def test_a_port_in_use_is_a_user_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--rendezvous 127.0.0.1:{port}: node 0 cannot listen there"):
            Launcher(NodePlace(2, 0, f"127.0.0.1:{port}"), [], 1, tmp_path).run()


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--nodes", "2"], "--rendezvous: missing; with --nodes above 1 give HOST:PORT of node 0"),
        (["--nodes", "2", "--rendezvous", "host"], "--rendezvous 'host': must be HOST:PORT, such as node-1:29400"),
        (["--nodes", "2", "--rendezvous", "host:70000"], "must be HOST:PORT"),
        (["--nodes", "2", "--node-rank", "2", "--rendezvous", "a:1"], "--node-rank 2: must be 0 to 1, as --nodes is 2"),
        (["--node-rank", "-1"], "--node-rank -1: must be 0 to 0"),
        ([], "absent.yaml: no such file"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    arguments: list[str], printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["absent.yaml", "--nproc", "1", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("crosslift: ")
    assert printed in line


def test_a_run_folder_that_cannot_be_written_is_one_line(
    run_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "run"
    assert main([str(run_file(tmp_path)), f"output_dir={output}", "--nproc", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"output_dir: {output}: lies below {tmp_path / 'file'}, which is " in line


def test_a_signal_ignored_by_the_caller_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send_when_ready(tmp_path, 1, signal.SIGHUP, signal.SIGTERM)
        assert Launcher(NodePlace(), rank_program(tmp_path, STOPPABLE), 1, tmp_path).run() == 75
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_that_does_not_end_after_a_stop_is_killed_and_the_run_counts_as_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "STOP_GRACE_S", 1.0)
    command = rank_program(tmp_path, IGNORES_SIGNALS, {0: "import time; time.sleep(0.5); os._exit(75)"})
    assert Launcher(NodePlace(), command, 2, tmp_path).run() == 75
    assert "; ranks [1] did not end and were killed; the same command resumes" in capfd.readouterr().err


# Fails when rank 0 has ended, like a rank that has lost its connection.
FAILS_AFTER_RANK_0 = """
    import signal, sys, time
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    open(f"{FOLDER}/ready-{RANK}", "w").close()
    while not os.path.exists(f"{FOLDER}/received-0"):
        time.sleep(0.01)
    print("RuntimeError: Connection closed by peer", file=sys.stderr)
    os._exit(1)
"""


def test_ranks_that_fail_because_another_was_stopped_before_training_are_not_failures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 has not reached its first step, the other waits for it in a collective: the run is to be requeued."""
    send_when_ready(tmp_path, 2, signal.SIGUSR1)
    assert Launcher(NodePlace(), rank_program(tmp_path, FAILS_AFTER_RANK_0, {0: STOPPABLE}), 2, tmp_path).run() == 75
    printed = capfd.readouterr().err
    assert "stopped by SIGUSR1; ranks [1] failed after others had ended; the same command resumes" in printed
    assert "the first to end" not in printed


def test_ranks_of_another_node_that_fail_because_of_a_stop_are_not_failures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "PROPAGATION_S", 4.0)  # a busy machine may take long
    start = Launcher._start

    def start_and_signal(launcher: Launcher, heartbeat_dir: Path) -> None:
        """Signals do not reach a launcher in a thread: queue one for node 0's as its handler would."""
        start(launcher, heartbeat_dir)
        if launcher.exchange.place.node == 0:
            wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
            launcher._pending.append(signal.SIGUSR1)

    monkeypatch.setattr(Launcher, "_start", start_and_signal)
    assert run_nodes([rank_program(tmp_path, FAILS_AFTER_RANK_0, {0: STOPPABLE})] * 2, 1, tmp_path) == [75, 75]
    assert "the first to end" not in capfd.readouterr().err


def test_after_a_stop_before_the_first_step_the_other_ranks_get_no_time_to_save(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait in a collective that never ends (NCCL), and there is nothing to save."""
    monkeypatch.setattr(launching, "FAILURE_GRACE_S", 0.5)
    attach = "from training.launch.heartbeat import heartbeat; heartbeat.attach()"
    send_when_ready(tmp_path, 2, signal.SIGUSR1)
    command = rank_program(tmp_path, IGNORES_SIGNALS, {0: f"{attach}\n{textwrap.dedent(STOPPABLE)}"})
    started = time.monotonic()
    assert Launcher(NodePlace(), command, 2, tmp_path).run() == 75
    assert time.monotonic() - started < launching.STOP_GRACE_S / 2
    assert "; ranks [1] did not end and were killed" in capfd.readouterr().err


@pytest.mark.parametrize("status", [0, 75])
def test_child_processes_of_a_rank_end_with_it(tmp_path: Path, status: int) -> None:
    """Such as the process that converts a checkpoint."""
    program = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], stderr=subprocess.DEVNULL)
        open(f"{{FOLDER}}/child", "w").write(str(child.pid))
        os._exit({status})
    """
    assert Launcher(NodePlace(), rank_program(tmp_path, program), 1, tmp_path).run() == status
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    wait_for(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")
