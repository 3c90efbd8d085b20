"""A fake Slurm: programs on PATH with output chosen by the test, for cases that the test cluster does not produce.

Each records its arguments and prints the content of `NAME.out` and `NAME.err`, with the status in `NAME.status`.
`srun` runs its command as the only node, unless a test sets a status; `sbatch` numbers jobs from 12 on, and runs the
script if `runs_jobs` is set. It imports nothing of the project.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

PROGRAM = """#!{python}
import json, os, pathlib, subprocess, sys, time
home = pathlib.Path({folder!r})
name = os.path.basename(sys.argv[0])
with (home / (name + ".calls")).open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
def setting(kind, otherwise=""):
    file = home / (name + "." + kind)
    return file.read_text() if file.exists() else otherwise
if name == "srun":
    words = sys.argv[1:]
    while words[0].startswith("--"):
        words.pop(0)
    if words == ["true"]:
        sys.exit(int(setting("probe", "0")))
    (home / "srun.environment").write_text(json.dumps(dict(os.environ)))
    while setting("waits"):
        time.sleep(0.02)
    if not setting("status"):
        sys.exit(subprocess.call(words))
    for word in words:
        if word.startswith("--outcome=") and setting("outcome"):
            pathlib.Path(word.partition("=")[2]).write_text(setting("outcome"))
number = str(11 + len((home / (name + ".calls")).read_text().splitlines()))
if name == "sbatch" and setting("runs_jobs"):
    job = {{"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1",
           "SLURMD_NODENAME": "n1"}}
    status = subprocess.call(["bash", sys.argv[-1]], env={{**os.environ, **job}}, stdout=(home / "job.out").open("w"),
                             stderr=subprocess.STDOUT)
    (home / "job.status").write_text(str(status))
sys.stdout.write(setting("out", number + "\\n" if name == "sbatch" else ""))
sys.stderr.write(setting("err"))
sys.exit(int(setting("status", "0")))
"""
NAMES = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sacct")


class FakeSlurm:
    """A folder of such programs; `search_path` is a PATH with them first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "bin"
        self.path.mkdir(parents=True)
        for name in NAMES:
            program = self.path / name
            program.write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
            program.chmod(program.stat().st_mode | stat.S_IEXEC)
        self.set_output("scontrol", "localhost\n")
        self.set_output("sacct", "", "sacct: error: Slurm accounting storage is disabled\n", 1)

    @property
    def search_path(self) -> str:
        return f"{self.path}{os.pathsep}{os.environ['PATH']}"

    def set_output(self, name: str, out: str, err: str = "", status: int = 0) -> None:
        """Set the output of a program."""
        for kind, text in (("out", out), ("err", err), ("status", str(status))):
            self.set(name, kind, text)

    def set(self, name: str, kind: str, text: str) -> None:
        """Set one file of a program: out, err, status; srun's probe, outcome, waits; sbatch's runs_jobs."""
        (self.folder / f"{name}.{kind}").write_text(text)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of a program."""
        file = self.folder / f"{name}.calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def environment(self) -> dict[str, str]:
        """Environment of srun's step."""
        found: dict[str, str] = json.loads((self.folder / "srun.environment").read_text())
        return found

    def job_output(self) -> str:
        return (self.folder / "job.out").read_text()

    def job_status(self) -> int:
        return int((self.folder / "job.status").read_text())
