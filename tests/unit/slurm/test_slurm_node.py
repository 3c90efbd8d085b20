"""node.py: problems of a node, environment variables, forwarded signals, the status for srun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import wait_for

from slurm import node
from training.engine.ops import prebuilt

SOURCE = Path(__file__).resolve().parents[3]
LAUNCHER = """
import os, signal, sys, time
def stop(number, frame):
    print("stopped by", signal.Signals(number).name, flush=True)
    sys.exit(75)
if "--no-handlers" not in sys.argv:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, stop)
print("launched", *sys.argv[1:], flush=True)
if "--waits" in sys.argv:
    time.sleep(60)
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A source folder with a fake launcher."""
    folder = tmp_path / "code"
    (folder / "training" / "launch").mkdir(parents=True)
    (folder / "training" / "__init__.py").touch()
    (folder / "training" / "launch" / "__init__.py").touch()
    (folder / "training" / "launch" / "__main__.py").write_text(LAUNCHER)
    (folder / "crosslift.py").write_text(LAUNCHER)
    return folder


@pytest.fixture
def start(tmp_path: Path, code: Path) -> Callable[..., subprocess.Popen[str]]:
    run = tmp_path / "run"
    run.mkdir()

    def begin(*arguments: str, options: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if "SLURM" not in key and "IFNAME" not in key}
        environment |= {"SLURMD_NODENAME": "n1", "SLURM_NODEID": "0", "XDG_CACHE_HOME": str(tmp_path)}
        words = ["--code", code, "--run", run, "--chdir", tmp_path, "--outcome", tmp_path / "outcome", "--nproc", 2]
        return subprocess.Popen(
            [sys.executable, "-u", SOURCE / "slurm" / "node.py", *map(str, words), *options, "--", *arguments],
            env={**environment, **variables}, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return begin


Start = Callable[..., subprocess.Popen[str]]


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out.splitlines()


def launched(process: subprocess.Popen[str]) -> str:
    """The launcher's first line, printed when its signal handlers are installed."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("launched"):
            return line.strip()
    raise AssertionError("never launched")


def test_node_py_imports_only_the_standard_library() -> None:
    alone = [sys.executable, "-I", "-S", SOURCE / "slurm" / "node.py", "--help"]
    done = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_node_needs_no_rendezvous(start: Start) -> None:
    status, lines = ended(start("config.yaml"))
    assert (status, lines[1:]) == (0, ["launched config.yaml --nproc 2"])


def test_several_nodes_have_the_first_one_as_rendezvous(start: Start) -> None:
    options = ("--nodes", "2", "--host", "localhost", "--port", "21000")
    _, lines = ended(start("config.yaml", options=options, SLURM_NODEID="1"))
    assert lines[1] == "launched config.yaml --nproc 2 --nodes 2 --node-rank 1 --rendezvous localhost:21000"


def test_a_name_that_does_not_resolve_is_replaced_by_sruns_address(start: Start) -> None:
    options = ("--nodes", "2", "--host", "no-such-host.invalid", "--port", "21000")
    _, lines = ended(start("config.yaml", options=options, SLURM_NODEID="1", SLURM_LAUNCH_NODE_IPADDR="127.0.0.1"))
    assert lines[1].endswith("--rendezvous 127.0.0.1:21000")


def test_other_commands_than_training(start: Start) -> None:
    status, lines = ended(start("eval", "a b", options=("--command",), STATUS="75"))
    assert (status, lines[1]) == (75, "launched eval a b")


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_srun_gets_the_launchers_status(start: Start, tmp_path: Path, status: int) -> None:
    assert ended(start("config.yaml", STATUS=str(status)))[0] == status
    assert not (tmp_path / "outcome").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_on_request_is_status_0_for_srun_and_node_0_records_it(start: Start, tmp_path: Path, rank: int) -> None:
    """--kill-on-bad-exit would kill the nodes that take a moment longer to save."""
    assert ended(start("config.yaml", STATUS="75", SLURM_NODEID=str(rank)))[0] == 0
    assert (tmp_path / "outcome").exists() == (rank == 0)
    if rank == 0:
        assert (tmp_path / "outcome").read_text() == "75"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_node_py_survives_stop_signals_and_forwards_them(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start("config.yaml", "--waits")
    launched(process)
    process.send_signal(number)
    status, lines = ended(process)
    assert (status, lines) == (0, [f"stopped by {number.name}"])
    assert (tmp_path / "outcome").read_text() == "75"


def test_a_stop_signal_before_the_launchers_handlers_counts_as_a_stop(start: Start, tmp_path: Path) -> None:
    """Nothing was started, nothing is lost: the job resumes later."""
    process = start("config.yaml", "--waits", "--no-handlers")
    launched(process)
    process.send_signal(signal.SIGUSR1)
    assert ended(process)[0] == 0
    assert (tmp_path / "outcome").read_text() == "75"


SIGNAL_AT_FIRST_IMPORT = """
import os, signal, sys
def hook(event, arguments):
    if event == "import" and arguments[0] == "argparse":
        os.kill(os.getpid(), signal.{name})
sys.addaudithook(hook)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stop_signal_while_the_program_starts_counts_as_a_stop(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    """The signal arrives during its first imports."""
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_AT_FIRST_IMPORT.format(name=number.name))
    assert ended(start("config.yaml", "--waits", PYTHONPATH=str(tmp_path)))[0] == 0
    assert (tmp_path / "outcome").read_text() == "75"


def test_a_killed_launcher_is_a_failure(start: Start, tmp_path: Path) -> None:
    process = start("config.yaml", "--waits")
    launched(process)
    (child,) = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(child, signal.SIGKILL)
    assert ended(process)[0] == 128 + signal.SIGKILL
    assert not (tmp_path / "outcome").exists()


def test_each_problem_is_one_line_with_the_nodes_name(start: Start, tmp_path: Path, code: Path) -> None:
    (code / "training" / "launch" / "__main__.py").unlink()
    (tmp_path / "run").rmdir()
    options = ("--readable", "/not/there", "--chdir", "/proc")
    status, lines = ended(start("config.yaml", options=options))
    prefix = f"crosslift: node n1 ({socket.gethostname()})"
    assert status == 2
    assert lines == [
        f"{prefix}: cannot enter /proc; it must be on a disk that all nodes share",
        f"{prefix}: cannot read {code}/training/launch/__main__.py; it must be on a disk that all nodes share",
        f"{prefix}: cannot read /not/there; it must be on a disk that all nodes share",
        f"{prefix}: cannot write into {tmp_path}/run: No such file or directory",
    ]


def test_a_node_with_problems_gives_the_others_time_to_report_theirs(start: Start) -> None:
    """When srun kills it, because another node ended first, it keeps the status of a user error."""
    process = start("config.yaml", options=("--readable", "/not/there", "--nodes", "2"))
    assert process.stdout is not None
    assert "cannot read /not/there" in process.stdout.readline()
    status = Path(f"/proc/{process.pid}/status")
    wait_for(lambda: "SigBlk:\t0000000000000000\n" in status.read_text())  # srun's signal is no longer blocked
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (2, [])


def test_missing_packages_are_named(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "NEEDED", ("json", "no_such_package", "another_one"))
    options = node._options(["--code", ".", "--run", str(tmp_path), "--chdir", os.getcwd(), "--", "x"])
    (first, *_) = node.Node(options).problems()
    assert first.startswith(f"{sys.executable} lacks no_such_package, another_one; ")


def test_a_nodes_variables_are_set_and_printed(start: Start, tmp_path: Path) -> None:
    options = ("--nodes", "2", "--host", "localhost", "--port", "1")
    _, lines = ended(
        start("config.yaml", options=options, SLURM_LAUNCH_NODE_IPADDR="127.0.0.1", SLURM_CPUS_ON_NODE="1")
    )
    host = socket.gethostname()
    assert lines[0] == (
        f"crosslift: node n1 ({host}): TORCH_EXTENSIONS_DIR={tmp_path}/crosslift/torch_extensions/{host}, "
        "OMP_NUM_THREADS=1, only 1 CPU cores for 2 ranks (cpus_per_task gives more), NCCL_SOCKET_IFNAME=lo, "
        "GLOO_SOCKET_IFNAME=lo"
    )


def test_prebuilt_ops_are_copied(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built, local = prebuilt() / "cpu_adam", prebuilt().with_name(socket.gethostname()) / "cpu_adam"
    built.mkdir(parents=True)
    for name in ("cpu_adam.so", ".ninja_log", "lock"):
        (built / name).write_text("built")
        os.utime(built / name, (1e9, 1e9))
    assert "cpu_adam as built before" in ended(start("config.yaml"))[1][0]
    assert sorted(path.name for path in local.iterdir()) == [".ninja_log", "cpu_adam.so"]
    assert {path.stat().st_mtime for path in local.iterdir()} == {1e9}  # else ninja would build again
    assert "cpu_adam" not in ended(start("config.yaml"))[1][0]
    (built / "cpu_adam.so").write_text("built again")
    os.utime(built / "cpu_adam.so", (2e9, 2e9))
    assert "cpu_adam as built before" in ended(start("config.yaml"))[1][0]
    assert (local / "cpu_adam.so").read_text() == "built again"
    assert "cpu_adam" not in ended(start("config.yaml", TORCH_EXTENSIONS_DIR=str(tmp_path / "own")))[1][0]


def test_variables_of_the_user_are_kept(start: Start) -> None:
    options = ("--nodes", "2", "--host", "localhost", "--port", "1")
    chosen = {"NCCL_SOCKET_IFNAME": "ib0", "TORCH_EXTENSIONS_DIR": "/mine", "OMP_NUM_THREADS": "7"}
    _, lines = ended(start("config.yaml", options=options, SLURM_LAUNCH_NODE_IPADDR="127.0.0.1", **chosen))
    for name in chosen:
        assert f"{name} kept" in lines[0]
    assert "GLOO_SOCKET_IFNAME=lo" in lines[0]


def test_the_interface_with_an_address() -> None:
    assert node.interface_of("127.0.0.1") == "lo"
    assert node.interface_of("203.0.113.7") is None  # an address that no interface has
    address = node._source_address("203.0.113.7")
    if address is not None:  # a machine with a default route: the interface with this address
        assert node.interface_of(address) in [name for _, name in socket.if_nameindex()]
        assert node.interface_of(address) != "lo"


def test_without_srun_there_is_no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_LAUNCH_NODE_IPADDR", raising=False)
    assert node.interface_to_others(0) is None
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    assert [node.interface_to_others(rank) for rank in (0, 1)] == ["lo", "lo"]


def test_repeated_signals_are_harmless(start: Start) -> None:
    process = start("config.yaml", "--waits")
    launched(process)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert ended(process)[0] == 0
