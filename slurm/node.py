"""The program that a job starts once on each node: looks whether the node can run the work, then starts it.

In: what the batch script says. Out: an exit status for srun. Next: `python -m training.launch`, which starts this
node's ranks, or another crosslift command. The standard library alone is needed: what is missing on a node shall be
said in a line that names the node, not in a trace-back of an import.

It stays the launcher's parent: srun must see 0, not 75, from a node that stopped on request. `--kill-on-bad-exit`
would kill the nodes that are a moment later, and srun's own status would say so. Node 0 writes the true status into
the outcome file, which the batch script reads on the same machine.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
if __name__ == "__main__":  # before all else: one that came now would end this program with a status of its own
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
OTHERS_SPEAK_SECONDS = 5  # a node that cannot work ends so late: srun then kills the others, which may have a say too
SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface


def main(arguments: list[str] | None = None) -> int:
    """Check this node, set what belongs to it, run the work; srun's status of this node."""
    options = _options(arguments)
    node = Node(options)
    if problems := node.problems():
        for number in STOP_SIGNALS:  # srun's, when another node was first to end: the status stays what a user can mend
            signal.signal(number, lambda *_: os._exit(USER_ERROR))
        for problem in problems:
            print(f"crosslift: node {node.name}: {problem}", file=sys.stderr, flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if options.nodes > 1:
            time.sleep(OTHERS_SPEAK_SECONDS)
        return USER_ERROR
    print(f"crosslift: node {node.name}: {', '.join(node.prepare())}", flush=True)
    status = Work(node.command()).run()
    if status != STOPPED or options.command:
        return status
    if node.rank == 0:
        options.outcome.write_text(str(STOPPED))
    return 0


class Node:
    """What is to be known of this node before anything runs on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank = int(os.environ.get("SLURM_NODEID", "0"))
        host, slurms = socket.gethostname(), os.environ.get("SLURMD_NODENAME")
        self.name = host if slurms in (None, host, host.partition(".")[0]) else f"{slurms} ({host})"

    def problems(self) -> list[str]:
        """One line for each reason why this node cannot run the work."""
        options, found = self.options, []
        if sys.version_info < OLDEST_PYTHON:
            found.append(f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 or newer is needed")
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            found.append(
                f"{sys.executable} lacks {', '.join(missing)}; the environment that crosslift is installed in must be "
                "on every node: give its interpreter (python), or the setup lines or container that bring it"
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
        """Set this node's variables, none of them where the user has; what was set, for people."""
        said = []
        # Compiled DeepSpeed ops: nodes differ in GPUs and compilers, and two that build in one folder wait for ever.
        # The folder beside it is `training.engine.ops.prebuilt`, which a program without imports cannot ask.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        extensions = cache / "crosslift" / "torch_extensions" / socket.gethostname()
        said.append(_default("TORCH_EXTENSIONS_DIR", str(extensions)))
        if os.environ["TORCH_EXTENSIONS_DIR"] == str(extensions):
            said += _take_over(extensions.with_name("prebuilt"), extensions)
        cores = len(os.sched_getaffinity(0))
        granted = int(os.environ.get("SLURM_CPUS_ON_NODE", cores))
        ranks = self.options.nproc or 1
        said.append(_default("OMP_NUM_THREADS", str(max(min(cores, granted) // ranks, 1))))
        if granted < ranks:
            said.append(f"only {granted} CPU cores for {ranks} ranks (cpus_per_task gives more)")
        if self.options.nodes > 1:
            interface = interface_to_others(self.rank)
            for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
                said.append(_default(name, interface) if interface else f"{name} left open: no route found")
        path = [str(self.options.code), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        return said

    def command(self) -> list[str]:
        """What this node runs."""
        options = self.options
        if options.command:
            return [sys.executable, str(options.code / "crosslift.py"), *options.arguments]
        words = [sys.executable, "-m", "training.launch", *options.arguments, "--nproc", str(options.nproc)]
        if options.nodes > 1:
            rendezvous = f"{reachable(options.host)}:{options.port}"
            words += ["--nodes", str(options.nodes), "--node-rank", str(self.rank), "--rendezvous", rendezvous]
        return words


class Work:
    """The launcher or command, and the signals that come for it."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self._asked: signal.Signals | None = None

    def run(self) -> int:
        """Its exit status; 128 + n for signal n, but 75 where a stop's own signal came before it could listen."""
        # Waited for, not handled: a handler may miss the moment between two calls, and none is left when Python ends.
        awaited = {*STOP_SIGNALS, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, awaited)

        def listen() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)

        process = subprocess.Popen(self.command, preexec_fn=listen)
        while (status := process.poll()) is None:
            number = signal.Signals(signal.sigwait(awaited))
            if number != signal.SIGCHLD:
                # Slurm signals every process of a step; whoever signals this one alone means the launcher. Twice does
                # no harm.
                self._asked = number
                process.send_signal(number)
        if status < 0:
            return STOPPED if self._asked is not None and -status in STOP_SIGNALS else 128 - status
        return status


def reachable(host: str) -> str:
    """The first node's name where this node can resolve it, else the address from which srun reached this node."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
        return f"[{address}]" if ":" in address else address


def interface_to_others(rank: int) -> str | None:
    """The network interface that leads to the other nodes.

    srun runs on node 0, and the others were started from its address: their route to it is what is looked for, and
    on node 0 the interface that has this address.
    """
    address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        return None
    here = address if rank == 0 else _source_address(address)
    return interface_of(here) if here else None


def _source_address(target: str) -> str | None:
    """This machine's address on the route to `target`; nothing is sent."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Name of the interface that has an address."""
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


def _take_over(prebuilt: Path, extensions: Path) -> list[str]:
    """Ops that `crosslift prefetch --build-ops` built, where this node has none or older ones; what was copied.

    Times are kept: where compiler, flags and sources are the same here, nothing is built again.
    """
    said = []
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
            said.append(f"{op} as built before")
        except OSError as error:
            said.append(f"{op} will be built here, as it cannot be copied: {error.strerror}")
    return said


def _default(name: str, value: str) -> str:
    if os.environ.setdefault(name, value) == value:
        return f"{name}={value}"
    return f"{name} kept"


def _same_folder(path: Path) -> bool:
    try:
        return os.path.samefile(path, os.getcwd())
    except OSError:
        return False


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One node of a job.", allow_abbrev=False)
    parser.add_argument("--code", type=Path, required=True, help="the frozen source")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--outcome", type=Path, help="file for the status of a stopped run")
    parser.add_argument("--chdir", type=Path, required=True, help="folder that relative paths begin at")
    parser.add_argument("--readable", type=Path, action="append", default=[], help="must be readable here")
    parser.add_argument("--host", default="localhost", help="name of the first node")
    parser.add_argument("--port", type=int, default=0, help="free port there")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--nproc", type=int, default=0, help="ranks on this node")
    parser.add_argument("--command", action="store_true", help="arguments are a crosslift command, not a run file")
    parser.add_argument("arguments", nargs="+")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
