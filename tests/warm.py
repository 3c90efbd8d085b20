"""Programs that start warm: forked from a process that has imported what they need.

A small program spends most of its time importing torch, transformers and DeepSpeed: some 9 s of CPU. A `Warm` imports
its modules once; each program is then a separate process, with its own variables, folder, outputs and exit status.
Values that a module reads from the environment at import do not change later. So a program with variables that a
library reads (HF_HOME, HF_HUB_OFFLINE) is started by a `Warm` that has not imported that library.

As a program (`python warm.py FD MODULE...`) this file is that process. It ends with the tests that started it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[1]
Done = subprocess.CompletedProcess[str]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with the source and `tests` first on the path and one thread per process."""
    path = os.pathsep.join([str(SOURCE), str(SOURCE / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(extra or {})}


class Program(NamedTuple):
    """`python ARGUMENTS` with only these variables, in the source's folder; its output is written to two files."""

    arguments: Sequence[str]
    variables: Mapping[str, str]
    out: Path
    err: Path


class Warm:
    """Starts Python programs as forks of a process that has imported these modules only."""

    def __init__(self, *modules: str) -> None:
        self.modules = modules
        self._server: Connection | None = None
        self._ended: dict[int, int] = {}  # exit status by process id

    def run(self, arguments: Sequence[str], variables: Mapping[str, str] | None = None, timeout: float = 240) -> Done:
        """Run `python ARGUMENTS` to its end; `variables` default to those of `environment`."""
        (done,) = self.run_together([arguments], [environment() if variables is None else variables], timeout)
        return done

    def run_together(
        self, programs: Sequence[Sequence[str]], variables: Sequence[Mapping[str, str]], timeout: float
    ) -> list[Done]:
        """Run all at once to their ends. At the deadline they are killed and the assertion fails."""
        with TemporaryDirectory() as temporary:
            started = [
                Program(each, values, Path(temporary, f"{number}.out"), Path(temporary, f"{number}.err"))
                for number, (each, values) in enumerate(zip(programs, variables, strict=True))
            ]
            ids: list[int] = []
            deadline = time.monotonic() + timeout
            try:
                ids += [self.start(program) for program in started]
                statuses = [self.status(each, deadline - time.monotonic()) for each in ids]
                assert None not in statuses, f"still running after {timeout} s: {programs}"
            finally:
                for each in ids:
                    self.kill(each)
            return [
                subprocess.CompletedProcess(list(arguments), status or 0, out.read_text(), err.read_text())
                for status, (arguments, _, out, err) in zip(statuses, started, strict=True)
            ]

    def start(self, program: Program) -> int:
        """Start a program; returns its process id."""
        if self._server is None:
            self._server, theirs = multiprocessing.Pipe()
            command = [sys.executable, str(Path(__file__)), str(theirs.fileno()), *self.modules]
            server = subprocess.Popen(command, env=environment(), cwd=SOURCE, pass_fds=[theirs.fileno()])
            theirs.close()
            atexit.register(server.wait, 60)
            atexit.register(self._server.close)  # runs before the wait
        self._server.send(program)
        return int(self._receive_start())

    def status(self, process: int, timeout: float) -> int | None:
        """Exit status of a program, or minus the signal that killed it; None if it still runs after these seconds."""
        assert self._server is not None
        deadline = time.monotonic() + timeout
        while process not in self._ended and self._server.poll(max(deadline - time.monotonic(), 0)):
            self._note(self._server.recv())
        return self._ended.get(process)

    def kill(self, process: int) -> None:
        """Kill a program with SIGKILL if it has not ended; returns when it has."""
        if self.status(process, 0) is None:
            os.kill(process, 9)
            assert self.status(process, 60) is not None, f"process {process} runs after SIGKILL"

    def _receive_start(self) -> int:
        """The process id that answers a start; ends of other programs are noted before it."""
        assert self._server is not None
        while isinstance(received := self._server.recv(), tuple):
            self._note(received)
        return int(received)

    def _note(self, ended: tuple[int, int]) -> None:
        self._ended[ended[0]] = ended[1]


def _serve(tests: Connection) -> None:
    """Fork a process for each program; send its id, and (id, exit status) when it ends. Returns when the tests end."""
    running: dict[int, multiprocessing.process.BaseProcess] = {}
    while True:
        ready = wait([tests, *running])
        for sentinel in running.keys() & set(ready):
            process = running.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            tests.send((process.pid, process.exitcode))
        if tests in ready:
            try:
                program = tests.recv()
            except EOFError:
                break
            process = multiprocessing.get_context("fork").Process(target=_run_program, args=(program,))
            process.start()
            running[process.sentinel] = process
            tests.send(process.pid)
    for process in running.values():
        process.kill()


def _run_program(program: Program) -> None:
    """Run the program, in the forked process."""
    for number, file in ((1, program.out), (2, program.err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(program.variables)
    os.chdir(SOURCE)
    kind, *arguments = program.arguments
    code = arguments.pop(0) if kind in ("-m", "-c") else kind
    sys.argv = [kind if kind == "-c" else code, *arguments]
    sys.path[0:1] = program.variables.get("PYTHONPATH", "").split(os.pathsep)[:2]
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # it read OMP_NUM_THREADS when it was imported
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(code).parent))
        runpy.run_path(code, run_name="__main__")


if __name__ == "__main__":
    connection = Connection(int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # collections in the programs skip what was imported: half a second each
    _serve(connection)
