"""One revision of crosslift, checked out beside the other and used only through its command line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
# Several commands in one process, which imports torch once. stdin: argument lists, JSON; stdout: what each printed.
SEVERAL = """
import contextlib, io, json, runpy, sys
printed = []
for arguments in json.load(sys.stdin):
    sys.argv = ["crosslift.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path("crosslift.py", run_name="__main__")
        except SystemExit as end:
            if end.code:
                sys.exit(f"{arguments}: exit status {end.code}")
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""
FOREIGN = ("CROSSLIFT_", "MLFLOW_", "SLURM_", "HF_")  # variables of the calling shell that could change a run
TIMEOUT_S = 900


class SameNumbersError(Exception):
    """One line: which revision or command failed, and how."""


@dataclass(frozen=True, slots=True)
class Revision:
    """`tree` holds the files of `commit`; `folder` receives what its runs write."""

    commit: str
    tree: Path
    folder: Path

    @classmethod
    def check_out(cls, name: str, work: Path) -> Revision:
        """Extract a revision to `work/<commit>/tree`, once.

        Raises:
            SameNumbersError: the name is not a commit, or Python would import the code of another tree.
        """
        found = subprocess.run(
            ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"],
            cwd=SOURCE,
            capture_output=True,
            text=True,
        )
        if found.returncode:
            raise SameNumbersError(f"{name!r}: not a commit of this repository; see `git log`")
        commit = found.stdout.strip()
        revision = cls(commit, work / commit[:12] / "tree", work / commit[:12])
        if not (revision.tree / "crosslift.py").exists():
            archive = subprocess.run(["git", "archive", commit], cwd=SOURCE, capture_output=True, check=True).stdout
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(revision.tree, filter="data")
        imported = revision.python("-c", "import training; print(training.__file__)").strip()
        if not Path(imported).is_relative_to(revision.tree):
            raise SameNumbersError(f"{name}: `import training` loads {imported}, not the code of {revision.tree}")
        return revision

    def crosslift(self, *arguments: object) -> str:
        """What `crosslift ARGUMENTS` prints on stdout. Raises SameNumbersError if it fails."""
        return self.python("crosslift.py", *map(str, arguments))

    def crosslift_each(self, commands: Sequence[Sequence[object]]) -> list[str]:
        """As `crosslift`, for several commands that only read. Raises SameNumbersError if one fails."""
        stdin = json.dumps([list(map(str, arguments)) for arguments in commands])
        printed: list[str] = json.loads(self.python("-c", SEVERAL, stdin=stdin))
        return printed

    def python(self, *arguments: str, stdin: str | None = None) -> str:
        """What the interpreter prints on stdout, running in this revision's tree, given `stdin`."""
        command = [sys.executable, *arguments]
        try:
            done = subprocess.run(
                command, cwd=self.tree, env=self._environment(), input=stdin, capture_output=True, text=True,
                timeout=TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SameNumbersError(f"{self.commit[:12]}: {' '.join(arguments)}: not done after {TIMEOUT_S} s") from None
        if done.returncode:
            raise SameNumbersError(
                f"{self.commit[:12]}: {' '.join(arguments)}: exit status {done.returncode}\n{done.stderr[-3000:]}"
            )
        return done.stdout

    def kill_when(self, ready: Callable[[], bool], *arguments: object) -> None:
        """Start `crosslift ARGUMENTS` and kill it with all its ranks (SIGKILL) once `ready` holds.

        Raises:
            SameNumbersError: it ended before.
        """
        command = [sys.executable, "crosslift.py", *map(str, arguments)]
        process = subprocess.Popen(
            command, cwd=self.tree, env=self._environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            until = time.monotonic() + TIMEOUT_S
            while not ready():
                if process.poll() is not None or time.monotonic() > until:
                    raise SameNumbersError(
                        f"{self.commit[:12]}: {' '.join(map(str, arguments))}: to be killed during training, but it "
                        f"{'did not get that far' if process.poll() is None else 'ended before'}"
                    )
                time.sleep(0.02)
        finally:
            _kill_tree(process)

    def _environment(self) -> dict[str, str]:
        """One thread per process on CPU: sums of several threads may differ in the last digit from run to run."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        return kept | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all its descendants; ranks have separate process groups."""
    import psutil

    try:
        everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        everything = []
    for each in everything:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(everything, timeout=30)
