"""The program that a job runs once per node: checks the node, then starts the launcher or another crosslift command.

It imports only the standard library, so that a missing package is reported in one line with the node's name, not by a
traceback.

It stays the launcher's parent, because srun must get 0, not 75, from a node that stopped on request:
`--kill-on-bad-exit` would kill the nodes that take a moment longer. Node 0 writes the real status into the outcome
file, which the batch script reads on the same machine.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
if __name__ == "__main__":  # first of all: a signal that arrives now would end this program with a wrong status
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

# ruff: noqa: E402
import argparse
import fcntl
import importlib.util
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STOPPED, USER_ERROR = 75, 2
OLDEST_PYTHON = (3, 11)
NEEDED = ("torch", "deepspeed", "transformers", "pydantic", "yaml", "typer")
OTHER_NODES_S = 5  # delay of a node with problems: when it exits, srun kills the others before they report theirs
SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface


def main(arguments: list[str] | None = None) -> int:
    """Check and prepare this node and run the work. Returns this node's status for srun."""
    options = _options(arguments)
    node = Node(options)
    if problems := node.problems():
        for number in STOP_SIGNALS:  # srun's, when another node ends first: keep the status of a user error
            signal.signal(number, lambda *_: os._exit(USER_ERROR))
        for problem in problems:
            print(f"crosslift: node {node.name}: {problem}", file=sys.stderr, flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if options.nodes > 1:
            time.sleep(OTHER_NODES_S)
        return USER_ERROR
    print(f"crosslift: node {node.name}: {', '.join(node.prepare())}", flush=True)
    status = run(node.command())
    if status != STOPPED or options.command:
        return status
    if node.rank == 0:
        options.outcome.write_text(str(STOPPED))
    return 0


class Node:
    """This node: its problems, its environment, its command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank = int(os.environ.get("SLURM_NODEID", "0"))
        host, slurm_name = socket.gethostname(), os.environ.get("SLURMD_NODENAME")
        self.name = host if slurm_name in (None, host, host.partition(".")[0]) else f"{slurm_name} ({host})"

    def problems(self) -> list[str]:
        """One line per reason why this node cannot run the work."""
        options, found = self.options, []
        if sys.version_info < OLDEST_PYTHON:
            found.append(f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 or newer is needed")
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            found.append(
                f"{sys.executable} lacks {', '.join(missing)}; the environment that crosslift is installed in must be "
                "on every node: give its interpreter (python), or the setup lines or container that provide it"
            )
        if os.getcwd() != str(options.chdir) and not _same_folder(options.chdir):
            found.append(f"cannot enter {options.chdir}; it must be on a disk that all nodes share")
        for path in (options.code / "training" / "launch" / "__main__.py", *options.readable):
            if not os.access(path, os.R_OK):
                found.append(f"cannot read {path}; it must be on a disk that all nodes share")
        try:
            with tempfile.TemporaryFile(dir=options.run):
                pass
        except OSError as error:
            found.append(f"cannot write into {options.run}: {error.strerror}")
        return found

    def prepare(self) -> list[str]:
        """Set this node's environment variables, except those set by the user. Returns what was set, for the log."""
        done = []
        # Compiled ops: nodes differ in GPUs and compilers, and two that build in the same folder block each other.
        # `prebuilt` is the folder of `training.engine.ops.prebuilt`, which this program cannot import.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        extensions = cache / "crosslift" / "torch_extensions" / socket.gethostname()
        done.append(_set_default("TORCH_EXTENSIONS_DIR", str(extensions)))
        if os.environ["TORCH_EXTENSIONS_DIR"] == str(extensions):
            done += _copy_prebuilt(extensions.with_name("prebuilt"), extensions)
        cores = len(os.sched_getaffinity(0))
        granted = int(os.environ.get("SLURM_CPUS_ON_NODE", cores))
        ranks = self.options.nproc or 1
        done.append(_set_default("OMP_NUM_THREADS", str(max(min(cores, granted) // ranks, 1))))
        if granted < ranks:
            done.append(f"only {granted} CPU cores for {ranks} ranks (cpus_per_task gives more)")
        if self.options.nodes > 1:
            interface = interface_to_others(self.rank)
            for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
                done.append(_set_default(name, interface) if interface else f"{name} not set: no route found")
        path = [str(self.options.code), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        return done

    def command(self) -> list[str]:
        """The command line that this node runs."""
        options = self.options
        if options.command:
            return [sys.executable, str(options.code / "crosslift.py"), *options.arguments]
        words = [sys.executable, "-m", "training.launch", *options.arguments, "--nproc", str(options.nproc)]
        if options.nodes > 1:
            rendezvous = f"{reachable(options.host)}:{options.port}"
            words += ["--nodes", str(options.nodes), "--node-rank", str(self.rank), "--rendezvous", rendezvous]
        return words


def run(command: list[str]) -> int:
    """Run the launcher or command, and forward signals to it.

    Returns:
        The exit status: 128 + n for signal n, but 75 for a stop signal before its handler.
    """
    # Signals are awaited, not handled: a handler could miss one between two calls, and none runs at Python's exit.
    awaited = {*STOP_SIGNALS, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)

    process = subprocess.Popen(command, preexec_fn=unblock)
    forwarded = False
    while (status := process.poll()) is None:
        number = signal.Signals(signal.sigwait(awaited))
        if number != signal.SIGCHLD:
            # Slurm signals every process of a step, others perhaps only this one. A second signal is harmless.
            forwarded = True
            process.send_signal(number)
    if status < 0:
        return STOPPED if forwarded and -status in STOP_SIGNALS else 128 - status
    return status


def reachable(host: str) -> str:
    """The first node's name if this node can resolve it, else the address from which srun reached this node."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
        return f"[{address}]" if ":" in address else address


def interface_to_others(rank: int) -> str | None:
    """The network interface of the route to the other nodes.

    srun runs on node 0 and has started the others from its address: on them it is the interface of the route to this
    address, on node 0 the interface with this address.
    """
    address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        return None
    here = address if rank == 0 else _source_address(address)
    return interface_of(here) if here else None


def _source_address(target: str) -> str | None:
    """This machine's address on the route to `target`. Sends nothing."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Name of the interface with an address."""
    if ":" in address:
        wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        try:
            lines = Path("/proc/net/if_inet6").read_text().splitlines()
        except OSError:
            return None
        return next((line.split()[-1] for line in lines if line.split()[0] == wanted), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                packed = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(packed[20:24]) == address:
                return name
    return None


def _copy_prebuilt(prebuilt: Path, extensions: Path) -> list[str]:
    """Copy the ops that `crosslift prefetch --build-ops` built, if this node has none or older ones.

    Times are kept: if compiler, flags and sources are the same here, nothing is built again.
    """
    done = []
    for built in sorted(prebuilt.glob("*/*.so")):
        op, here = built.parent.name, extensions / built.parent.name
        mine = here / built.name
        if mine.exists() and mine.stat().st_mtime >= built.stat().st_mtime:
            continue
        try:
            extensions.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=extensions) as unfinished:
                copy = shutil.copytree(built.parent, Path(unfinished, op), ignore=shutil.ignore_patterns("lock"))
                shutil.rmtree(here, ignore_errors=True)
                copy.rename(here)
            done.append(f"{op} as built before")
        except OSError as error:
            done.append(f"{op} will be built here, as it cannot be copied: {error.strerror}")
    return done


def _set_default(name: str, value: str) -> str:
    if os.environ.setdefault(name, value) == value:
        return f"{name}={value}"
    return f"{name} kept"


def _same_folder(path: Path) -> bool:
    try:
        return os.path.samefile(path, os.getcwd())
    except OSError:
        return False


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs one node of a job.", allow_abbrev=False)
    parser.add_argument("--code", type=Path, required=True, help="the frozen source")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--outcome", type=Path, help="file to write the status of a stopped run to")
    parser.add_argument("--chdir", type=Path, required=True, help="folder to which relative paths refer")
    parser.add_argument("--readable", type=Path, action="append", default=[], help="path that must be readable here")
    parser.add_argument("--host", default="localhost", help="name of the first node")
    parser.add_argument("--port", type=int, default=0, help="free port of the first node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--nproc", type=int, default=0, help="ranks on this node")
    parser.add_argument("--command", action="store_true", help="arguments are a crosslift command, not a run file")
    parser.add_argument("arguments", nargs="+")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
