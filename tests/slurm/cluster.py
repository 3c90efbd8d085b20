"""A real Slurm cluster of two nodes on this machine, for tests and benchmarks: munge, slurmctld and two slurmd.

    with TwoNodeCluster(folder) as cluster:
        cluster.use()                      # sets SLURM_CONF, so that sbatch, squeue, ... use it
        cluster.wait_for_state(job, "RUNNING")
        cluster.kill_node("n2")

It needs root and Debian's `slurmctld slurmd slurm-client munge`, uses free ports and its own folder, and does not touch
the system's Slurm or munge. It imports nothing of the project.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
PACKAGES = "slurmctld slurmd slurm-client munge"
NODES = ("n1", "n2")
CPUS = 2  # of each node, as many as tests share
STARTS_WITHIN = 30.0
REVOKED_SECONDS = 3.0
# No memory accounting, no cgroups: processes are followed through the process tree. Times are as short as two busy
# cores allow; a requeued job would otherwise wait two minutes (see `skip_requeue_delay`).
CONFIGURATION = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=200000
ReturnToService=2
FirstJobId={first_job}
EnforcePartLimits=ALL
MpiDefault=none
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    absent = [name for name in PROGRAMS if _program(name) is None]
    return f"not installed: {', '.join(absent)} (Debian: {PACKAGES})" if absent else None


class TwoNodeCluster:
    """Runs for the duration of a `with` block; its jobs end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> TwoNodeCluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        ports = _free_ports(1 + len(NODES))
        # A job's port depends on its number, so two clusters on this machine must not use the same numbers.
        first = 1 + secrets.randbelow(10_000)
        self.conf.write_text(
            CONFIGURATION.format(folder=self.folder, host=socket.gethostname(), ports=ports, cpus=CPUS, first_job=first)
        )
        try:
            self._start("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}",
                        *(f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "seed", "log")),
                        f"--socket={self.folder}/munge.socket")  # fmt: skip
            self.wait_until(lambda: (self.folder / "munge.socket").exists(), "munge to listen")
            self._start("slurmctld", "-D", "-f", str(self.conf))
            for node in NODES:
                self.start_node(node)
            self.wait_until(lambda: self.node_states() == ["idle", "idle"], "both nodes to be idle")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End all jobs and daemons that were started here."""
        if "slurmctld" in self._daemons:
            self.slurm("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and self.slurm("squeue", "--noheader", check=False):
                time.sleep(0.2)
        for name in reversed(self._daemons):
            for process in _tree(self._daemons[name].pid):
                _kill(process)
            self._daemons[name].wait()
        for process in _stepds(self.folder):
            for child in _tree(process):
                _kill(child)
        self._daemons.clear()

    @contextmanager
    def use(self) -> Iterator[None]:
        """In this context, Slurm commands of this process and its children use this cluster."""
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(self.conf)
        try:
            yield
        finally:
            if before is None:
                del os.environ["SLURM_CONF"]
            else:
                os.environ["SLURM_CONF"] = before

    # --- queries

    def slurm(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands; returns its output."""
        done = subprocess.run(command, env={**os.environ, "SLURM_CONF": str(self.conf)}, capture_output=True, text=True,
                              timeout=60)  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def node_states(self) -> list[str]:
        """State of n1 and n2, such as idle, mixed, down, down*."""
        return self.slurm("sinfo", "--noheader", "--Node", "--format=%t", check=False).split()

    def job(self, job: str) -> dict[str, str]:
        """A job's fields, such as JobState, Restarts, ExitCode; an element of an array by 12_0."""
        text = self.slurm("scontrol", "show", "job", job)
        fields = (word.partition("=") for line in text.splitlines() for word in line.split())
        return {name: value for name, equals, value in fields if equals}

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for_state(self, job: str, *states: str, seconds: float = 120) -> None:
        """Until a job is in one of the states.

        Raises:
            TimeoutError: with Slurm's description of the job.
        """
        self.wait_until(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", seconds,
                        lambda: self.slurm("scontrol", "show", "job", job))  # fmt: skip

    def wait_until(
        self, condition: Callable[[], Any], what: str, seconds: float = STARTS_WITHIN,
        details: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        """Poll until the condition holds; TimeoutError with `details()`, by default the daemons' logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                text = details() if details else self.daemon_logs()
                raise TimeoutError(f"waited {seconds:.0f} s for {what}\n{text}")
            time.sleep(0.1)

    def daemon_logs(self) -> str:
        """The ends of the daemons' logs."""
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    # --- actions

    def skip_requeue_delay(self, job: str) -> None:
        """Start a requeued job without Slurm's delay of two minutes, in which nodes drop the revoked credential.

        Nodes refuse credentials issued until the second of the revocation, hence a pause.
        """
        self.wait_until(lambda: self.state(job) in ("PENDING", "RUNNING", "COMPLETED"), f"job {job} to be requeued", 60)
        if self.state(job) == "PENDING":
            time.sleep(REVOKED_SECONDS)
            self.slurm("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def start_node(self, node: str) -> None:
        """A node's slurmd."""
        self._start("slurmd", "-D", "-N", node, "-f", str(self.conf), name=node)

    def kill_node(self, node: str) -> None:
        """SIGKILL slurmd and all processes of the node, as in a power failure."""
        daemon = self._daemons.pop(node)
        processes = [*_tree(daemon.pid), *(each for top in _stepds(self.folder, node) for each in _tree(top))]
        for process in processes:
            _kill(process)
        daemon.wait()

    def processes(self, node: str) -> list[int]:
        """All processes that run on a node for jobs."""
        return [each for top in _stepds(self.folder, node) for each in _tree(top)[1:]]

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        path = _program(program)
        assert path is not None, f"{program} is not installed"
        name = name or program
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [path, *arguments], stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                # Jobs inherit nothing of slurmd's, but slurmd's own must find its configuration.
                env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "SLURM_CONF": str(self.conf)},
            )  # fmt: skip


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _processes() -> dict[int, tuple[int, str]]:
    """(parent, command line) by process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended meanwhile
                continue
            found[int(folder.name)] = (parent, line)
    return found


def _tree(top: int) -> list[int]:
    """A process and all below it, parents first."""
    everything, found = _processes(), [top]
    for process in found:
        found += [each for each, (parent, _) in everything.items() if parent == process]
    return found


def _stepds(folder: Path, node: str = "*") -> list[int]:
    """slurmstepd processes of this cluster, found by the log that they have open; they outlive slurmd."""
    logs, found = [str(log) for log in folder.glob(f"slurmd-{node}.log")], []
    for process, (_, line) in _processes().items():
        if line.startswith("slurmstepd"):
            try:
                held = [os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir()]
            except OSError:
                continue
            if any(log in held for log in logs):
                found.append(process)
    return found


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
