"""The lock on a run's folder: only one run writes into an `output_dir` at a time.

A launcher (or rank 0, if torchrun, srun or deepspeed starts the ranks) writes `run.lock` into the folder, with host,
process and start time; the file is empty when no run holds it. Whether the holder is still alive is decided

- on the same machine by its process: pid and start time, because a pid can be in use again;
- for a later start of the same Slurm job by the job: Slurm has ended the earlier start;
- otherwise by the file's time, which a holder renews every few seconds: without a renewal for a minute it has ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

from training.errors import ConfigError
from training.messages import print_message

LOCK_FILE = "run.lock"
HELD = "CROSSLIFT_RUN_LOCK"  # environment variable: token of the lock that this process or its parent holds
RENEW_SECONDS = 10.0
SILENT_SECONDS = 60.0  # without a renewal, after which a holder on another machine counts as ended
POLL_SECONDS = 0.5
GUARD_SECONDS = 5.0  # longest wait for another start that is reading or writing the file


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a run's folder."""

    token: str
    host: str
    machine: str  # in which the pid is valid: one boot and one pid namespace
    pid: int
    started: int  # start time of the process, in clock ticks since the boot; 0: unknown
    since: str  # when it acquired the lock
    port: int  # rendezvous port of the run's ranks; 0: single node
    job: str  # Slurm's; empty outside
    restart: int  # of the job

    @classmethod
    def here(cls, port: int) -> Holder:
        """This process."""
        process = process_of(os.getpid())
        return cls(
            uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), process[1] if process else 0,
            time.strftime("%Y-%m-%d %H:%M:%S"), port, os.environ.get("SLURM_JOB_ID", ""),
            int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )  # fmt: skip

    def alive(self, successor: Holder) -> bool | None:
        """Whether it still runs; None if that cannot be determined on the machine of `successor`, this process."""
        if self.machine == successor.machine:
            process = process_of(self.pid)
            return process is not None and process[0] not in "ZX" and self.started in (0, process[1])
        if self.job and self.job == successor.job and self.restart < successor.restart:
            return False
        return None

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"a run on {self.host} (pid {self.pid}{job}, since {self.since})"


@contextmanager
def held(output_dir: Path, port: int = 0) -> Iterator[None]:
    """Context in which no other run writes into `output_dir`. Processes started in it share the lock.

    Args:
        port: rendezvous port of the ranks of several nodes (see `refuse_other`).

    Raises:
        ConfigError: another run holds it, or the folder cannot be written.
    """
    current = holder_of(output_dir)
    if current is not None and current.token == os.environ.get(HELD):
        yield
        return
    mine = _acquire(output_dir, Holder.here(port))
    before, ended = os.environ.get(HELD), threading.Event()
    os.environ[HELD] = mine.token
    renewing = threading.Thread(target=_renew, args=(output_dir, mine, ended), name="run-lock", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        os.environ.pop(HELD)
        if before is not None:
            os.environ[HELD] = before
        with suppress(OSError), _guarded(output_dir / LOCK_FILE) as (file, _):
            if _read(file) == mine:
                os.ftruncate(file, 0)


def refuse_other(output_dir: Path, port: int) -> None:
    """For launchers and ranks that do not hold the lock themselves: checks that no other run holds it.

    They belong to the same run if they have the same rendezvous `port`.

    Raises:
        ConfigError: another run holds it, as far as can be determined on this machine.
    """
    holder = holder_of(output_dir)
    if holder is None or holder.port == port or holder.token == os.environ.get(HELD):
        return
    if holder.alive(Holder.here(port)):
        raise in_use(output_dir, holder)


def running_in(output_dir: Path) -> Holder | None:
    """The run that holds the folder, unless its process is known to have ended."""
    holder = holder_of(output_dir)
    return None if holder is None or holder.alive(Holder.here(0)) is False else holder


def holder_of(output_dir: Path) -> Holder | None:
    """The holder named in the folder's lock, alive or not; None if there is none."""
    try:
        with (output_dir / LOCK_FILE).open("rb") as file:
            return _parsed(file.read())
    except OSError:
        return None


def in_use(output_dir: Path, holder: Holder) -> ConfigError:
    """The error for a second run in the same folder."""
    return ConfigError(
        f"output_dir: {output_dir}: in use by {holder}; wait for it or end it, or give another output_dir"
    )


def make_folder(output_dir: Path) -> None:
    """Creates the run's folder. Raises ConfigError if it cannot be created or written."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise cannot_write(output_dir, error) from None


def cannot_write(output_dir: Path, error: OSError) -> ConfigError:
    """The error for a folder that cannot be written."""
    return ConfigError(f"output_dir: {output_dir}: cannot be written to ({error.strerror}); name a folder of your own")


def _acquire(output_dir: Path, mine: Holder) -> Holder:
    """Write `mine` into the lock once it is free."""
    make_folder(output_dir)
    path = output_dir / LOCK_FILE
    silent: Holder | None = None  # a holder on another machine that did not renew its lock
    while True:
        with _guarded(path) as (file, guarded):
            holder = _read(file)
            alive = False if holder is None or holder == silent else holder.alive(mine)
            if alive is False:
                content = json.dumps(asdict(mine), indent=1).encode()
                os.pwrite(file, content, 0)
                os.ftruncate(file, len(content))
                os.fsync(file)
        if alive is False:
            if not guarded:  # if two wrote at the same time, the later one holds it
                time.sleep(2 * POLL_SECONDS)
            if holder_of(output_dir) == mine:
                if holder is not None:
                    print_message(f"{path}: left by {holder}, which has ended; taken over")
                return mine
        elif holder is not None:
            if alive or _renews_lock(path, holder):
                raise in_use(output_dir, holder)
            silent = holder


def _renews_lock(path: Path, holder: Holder) -> bool:
    """Whether a holder on another machine renews its lock."""
    first = _time_of(path)
    print_message(
        f"{path}: held by {holder}; waiting up to {SILENT_SECONDS:.0f} s for its lock to be renewed "
        "(if you know that it has ended, remove the file and start again)"
    )
    until = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < until:
        time.sleep(POLL_SECONDS)
        if _time_of(path) != first:
            return holder_of(path.parent) is not None
    return False


def _time_of(path: Path) -> int | None:
    """The file's modification time; the file is opened, since network disks cache the time of a closed file."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _renew(output_dir: Path, mine: Holder, ended: threading.Event) -> None:
    """The holder's thread: renews the lock, and ends the run if another run has taken the lock over."""
    path = output_dir / LOCK_FILE
    while not ended.wait(RENEW_SECONDS):
        with suppress(OSError):  # the disk is unreachable: try again at the next renewal
            if (now := holder_of(output_dir)) == mine:
                os.utime(path)
            elif now is None:  # removed by hand
                path.write_text(json.dumps(asdict(mine), indent=1), encoding="utf-8")
            else:
                print_message(
                    f"{path}: {now} has taken this folder over, as this run did not renew its lock; this run ends"
                )
                if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started with & by a script
                    os._exit(128 + signal.SIGINT)  # at once: a checkpoint would be written into the other run's folder
                os.kill(os.getpid(), signal.SIGINT)
                return


@contextmanager
def _guarded(path: Path) -> Iterator[tuple[int, bool]]:
    """The lock's file, and whether this process has exclusive access: without `flock` on the disk that is unknown."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        until, guarded = time.monotonic() + GUARD_SECONDS, False
        while not guarded and time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                guarded = True
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield file, guarded
    finally:
        os.close(file)


def _read(file: int) -> Holder | None:
    return _parsed(os.pread(file, 2**16, 0))


def _parsed(content: bytes) -> Holder | None:
    """The holder in a lock's content; None if it is empty or was cut off by a kill."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _machine() -> str:
    """Ids of this machine's boot and of this process's pid namespace; the host's name if there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_of(pid: int) -> tuple[str, int] | None:
    """State (a letter) and start time, in clock ticks since the boot, of a process; None if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "?", 0
