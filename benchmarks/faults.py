"""Fault injection: kills, full disks, damaged checkpoints, unreachable servers and files, stopped ranks.

`python -m benchmarks.faults [--kills N] [--each N] [--only NAME ...] [--json FILE] [--work DIR]`

Checked after every fault: the run continues, or stops with the right message; no sample is lost or repeated; the losses
equal those of the undisturbed run to the last digit. A full disk needs root (it mounts a small file system). Takes
about twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.disturbed_run import RANKS, Comparison, DisturbedRun, compare, starts
from benchmarks.ranks import machine
from data_pipeline.toy_problems.corpus import LANGUAGES, CorpusSizes, write_corpus
from training.checkpoints import checkpoint
from training.launch.stop import STOPPED
from training.tracking.mlflow_store import server_answers

FAULTS = (
    "kills", "saving_kills", "full_disk", "flipped", "truncated", "mlflow_unreachable", "source_unreadable",
    "stopped_ranks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """One fault and its outcome."""

    fault: str
    as_expected: bool  # continued, or stopped with the right message
    samples: bool
    losses: bool
    note: str

    @property
    def passed(self) -> bool:
        return self.as_expected and self.samples and self.losses


class Faults:
    """The undisturbed run, and the faults to inject into runs like it."""

    def __init__(self, work: Path, seed: int, max_steps: int = 400, sizes: CorpusSizes | None = None) -> None:
        self.work, self.rng, self.max_steps = work, random.Random(seed), max_steps
        self.data = work / "data"
        write_corpus(self.data, sizes or CorpusSizes(), seed)
        undisturbed = self.run("undisturbed")
        if status := undisturbed.finish():
            raise RuntimeError(f"the undisturbed run ended with {status}: {undisturbed.log_text[-2000:]}")
        (self.reference,) = starts(undisturbed.output)
        self.weights = (undisturbed.output / "model" / "model.safetensors").read_bytes()

    def run(self, name: str, **changes: object) -> DisturbedRun:
        return DisturbedRun(self.work / name, self.data, max_steps=self.max_steps, **changes)

    def kills(self, n: int) -> list[Outcome]:
        """SIGKILL at a random moment of training."""

        def inject(run: DisturbedRun) -> str:
            time.sleep(self.rng.uniform(0, 1.5))
            run.kill(self.rng)
            return "killed"

        return self._inject_each("kill -9 in training", n, inject, lambda run, status: status != 0)

    def saving_kills(self, n: int) -> list[Outcome]:
        """SIGKILL while a checkpoint other than the first is written; kills that came too late are not counted."""

        def inject(run: DisturbedRun) -> str:
            root = checkpoint.checkpoint_root(run.output)
            run.wait_until(lambda: any(root.glob("step-*/COMPLETE")))  # otherwise there is nothing to resume
            time.sleep(self.rng.uniform(0, 1.5))
            run.wait_until(lambda: not any(root.glob(".incomplete-*")), pause=0.001)
            run.wait_until(lambda: any(root.glob(".incomplete-*")), pause=0.001)
            time.sleep(self.rng.uniform(0, 0.03))
            run.kill(self.rng)
            return "killed"

        def counted(run: DisturbedRun) -> bool:
            return any(checkpoint.checkpoint_root(run.output).glob(".incomplete-*"))

        return self._inject_each("kill -9 while saving", n, inject, lambda run, status: status != 0, counted)

    def stopped_ranks(self, n: int) -> list[Outcome]:
        """SIGSTOP to one rank: the watchdog names it and ends the run."""
        number = 0

        def inject(run: DisturbedRun) -> str:
            nonlocal number
            number = self.rng.randrange(RANKS)
            run.ranks()[number].send_signal(signal.SIGSTOP)
            return f"rank {number} stopped"

        return self._inject_each(
            "a rank stopped (SIGSTOP)", n, inject, lambda run, status: status == 1 and f"rank {number}" in run.log_text
        )

    def damaged(self, fault: str, n: int, damage: Callable[[Path], None]) -> list[Outcome]:
        """Damage a file of the newest checkpoint while the run is stopped: that checkpoint is passed over."""
        damaged_path: Path | None = None

        def inject(run: DisturbedRun) -> str:
            time.sleep(self.rng.uniform(0.5, 2))  # for older checkpoints to fall back on
            run.signal(signal.SIGTERM)
            return "stopped"

        def stopped(run: DisturbedRun, status: int) -> bool:
            nonlocal damaged_path
            passed_over = damaged_path is None or f"{damaged_path} is passed over" in run.log_text
            damaged_path = next(checkpoint.complete(run.output), None)
            files = checkpoint.files_of(damaged_path) if damaged_path else None
            assert files
            assert damaged_path
            damage(damaged_path / self.rng.choice(sorted(files)))
            return status == STOPPED and passed_over

        outcomes = self._inject_each(fault, n + 1, inject, stopped)
        return outcomes[1:]  # before the first stop nothing was damaged

    def flipped(self, n: int) -> list[Outcome]:
        def flip(file: Path) -> None:
            content = bytearray(file.read_bytes())
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(content)

        return self.damaged("a checkpoint's bit flipped", n, flip)

    def truncated(self, n: int) -> list[Outcome]:
        def cut(file: Path) -> None:
            os.truncate(file, self.rng.randrange(file.stat().st_size))

        return self.damaged("a checkpoint's file truncated", n, cut)

    def full_disk(self, n: int) -> list[Outcome]:
        """Fill the disk of the checkpoints for a while: the run reports it and continues; saved checkpoints stay."""
        run = self.run("full-disk")
        root = checkpoint.checkpoint_root(run.output)
        root.mkdir(parents=True)
        saved = checkpoint.checkpoint_root(self.work / "undisturbed" / "run").rglob("*")
        size = sum(file.stat().st_size for file in saved if file.is_file())
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={3 * size}", "tmpfs", str(root)], check=True)
        try:
            outcomes = []
            run.start()
            for number in range(1, n + 1):
                run.wait_for_steps(10 * number)
                (root / "filler").write_bytes(b"")
                with (root / "filler").open("wb", buffering=0) as filler:
                    try:
                        while True:
                            filler.write(bytes(1 << 16))
                    except OSError:
                        pass  # full, as intended
                reported = run.wait_until(lambda number=number: run.log_text.count("not saved") >= number)
                (root / "filler").unlink()
                complete = next(checkpoint.complete(run.output), None)
                fine = reported and "No space left on device" in run.log_text and complete is not None
                outcomes.append(fine)
            status = run.wait()
            return self._one_run("disk full while saving", run, status, outcomes)
        finally:
            subprocess.run(["umount", str(root)], check=True)

    def source_unreadable(self, n: int) -> list[Outcome]:
        """Move a source file away for some seconds: the run waits for it."""
        run = self.run("source-unreadable")
        run.start()
        outcomes = []
        for number in range(1, n + 1):
            run.wait_for_steps(10 * number)
            file = self.data / "finetune" / f"{self.rng.choice(LANGUAGES)}.jsonl"
            moved = file.with_suffix(".moved")
            file.rename(moved)
            try:
                waiting = run.wait_until(lambda number=number: run.log_text.count("; retrying for") >= number)
                time.sleep(self.rng.uniform(1, 4))
            finally:
                moved.rename(file)
            outcomes.append(waiting and run.running)
        return self._one_run("source file unreadable for a while", run, run.wait(), outcomes)

    def mlflow_unreachable(self, n: int) -> list[Outcome]:
        """Kill MLflow's server and start it again: at the end of the run it has every step."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        tracking = {"enabled": True, "uri": address, "experiment": "faults", "sync_seconds": 0.5}
        run = self.run("mlflow-unreachable", tracking=tracking)
        server = self._server(port)
        try:
            run.start()
            outcomes = []
            for number in range(1, n + 1):
                run.wait_for_steps(10 * number)
                before = run.last_step
                server.kill()
                server.wait()
                run.wait_until(lambda before=before: run.last_step >= before + 5)
                outcomes.append(run.last_step >= before + 5)
                server = self._server(port)
            status = run.wait()
            from mlflow.tracking import MlflowClient

            client = MlflowClient(address)
            experiment = client.get_experiment_by_name("faults")
            assert experiment is not None
            (found,) = client.search_runs([experiment.experiment_id])
            logged = {point.step: point.value for point in client.get_metric_history(found.info.run_id, "train/loss")}
            wanted = {step: values["train/loss"] for step, values in self.reference.metrics.items()}
            outcomes = [fine and logged == wanted for fine in outcomes]
            return self._one_run("MLflow server killed and restarted", run, status, outcomes)
        finally:
            server.kill()

    def _server(self, port: int) -> subprocess.Popen[bytes]:
        store = f"sqlite:///{self.work}/mlflow.db"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        command += ["--artifacts-destination", str(self.work / "artifacts"), "--port", str(port)]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        quiet = subprocess.DEVNULL
        server = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)
        while not server_answers(f"http://127.0.0.1:{port}", timeout=1.0):
            if server.poll() is not None:
                raise RuntimeError("MLflow's server does not start")
            time.sleep(0.2)
        return server

    def _inject_each(
        self,
        fault: str,
        n: int,
        inject: Callable[[DisturbedRun], str],
        expected: Callable[[DisturbedRun, int], bool],
        counted: Callable[[DisturbedRun], bool] = lambda run: True,
    ) -> list[Outcome]:
        """Inject `n` faults that each end the process, restart it, and check how the run continues."""
        outcomes: list[Outcome] = []
        name = fault.split(" (")[0].replace(" ", "-").replace("'", "")
        runs = tries = 0
        run = self.run(f"{name}-0")
        pending: tuple[bool, int, str] | None = None  # of the last fault: as expected, last step, note
        while tries < 3 * n:
            begun = len(starts(run.output))
            run.start()
            alive = run.wait_for_steps(1) if not begun else run.wait_until(partial(_moved, run, begun))
            if pending is not None:
                outcomes.append(self._resumed(fault, run, *pending))
                pending = None
            if len(outcomes) >= n:
                break
            if not alive or not run.running:  # it reached its end
                runs += 1
                run = self.run(f"{name}-{runs}")
                continue
            note = inject(run)
            tries += 1
            fine = expected(run, run.wait())
            if counted(run):
                pending = (fine, run.last_step, note)
        status = run.finish()
        return self._with_final_weights(outcomes, run, status)

    def _resumed(self, fault: str, run: DisturbedRun, as_expected: bool, before: int, note: str) -> Outcome:
        start = starts(run.output)[-1]
        found = compare(start, self.reference.metrics, before)
        note = f"{note} after step {before}, resumed from {start.resumed}"
        return Outcome(fault, as_expected, found.samples, found.losses, note)

    def _with_final_weights(self, outcomes: list[Outcome], run: DisturbedRun, status: int) -> list[Outcome]:
        """The last outcome also covers the run's end: its weights equal those of the undisturbed run."""
        end = self._end(run, status)
        last = outcomes[-1]
        outcomes[-1] = Outcome(last.fault, last.as_expected and not status, last.samples and end.samples,
                               last.losses and end.losses, f"{last.note}; final weights compared too")  # fmt: skip
        return outcomes

    def _one_run(self, fault: str, run: DisturbedRun, status: int, fine: list[bool]) -> list[Outcome]:
        """Faults that end no process, all injected into one run."""
        end = self._end(run, status)
        return [Outcome(fault, each and not status, end.samples, end.losses, f"exit status {status}") for each in fine]

    def _end(self, run: DisturbedRun, status: int) -> Comparison:
        found = [compare(each, self.reference.metrics, run.max_steps) for each in starts(run.output) if each.metrics]
        weights = run.output / "model" / "model.safetensors"
        equal = not status and weights.read_bytes() == self.weights
        whole = run.last_step == run.max_steps
        return Comparison(whole and all(each.samples for each in found), equal and all(each.losses for each in found))


def _moved(run: DisturbedRun, begun: int) -> bool:
    found = starts(run.output)
    return len(found) > begun and bool(found[-1].metrics)


def table(outcomes: list[Outcome]) -> str:
    """Faults by kind, as Markdown."""
    columns = ["fault", "times", "as expected", "no sample lost or repeated", "losses equal", "all three"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for fault in dict.fromkeys(each.fault for each in outcomes):
        of_it = [each for each in outcomes if each.fault == fault]
        counts = [sum(getattr(each, what) for each in of_it) for what in ("as_expected", "samples", "losses", "passed")]
        lines.append(f"| {fault} | {len(of_it)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def write_report(file: Path, outcomes: list[Outcome]) -> None:
    """Write all outcomes; kinds that were not run this time keep their outcomes in the file."""
    counted = {each.fault for each in outcomes}
    before = json.loads(file.read_text(encoding="utf-8"))["outcomes"] if file.exists() else []
    rows = [row for row in before if row["fault"] not in counted] + [asdict(each) for each in outcomes]
    report = {"machine": machine(RANKS), "outcomes": rows}
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in training, and as many while saving")
    parser.add_argument("--each", type=int, default=5, help="of every other fault")
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="a folder to keep; default: one that is removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        faults = Faults(options.work or Path(temporary), options.seed)
        counts = {"kills": options.kills, "saving_kills": options.kills}
        outcomes: list[Outcome] = []
        started = time.monotonic()
        for name in options.only or FAULTS:
            found = getattr(faults, name)(counts.get(name, options.each))
            for each in found:
                print(f"{'ok ' if each.passed else 'BAD'} {each.fault}: {each.note}", flush=True)
            outcomes += found
            seconds = time.monotonic() - started
            if options.json:  # after each kind, so that an interrupted benchmark keeps its outcomes
                write_report(options.json, outcomes)
    print(f"\n{table(outcomes)}\n\n{seconds / 60:.1f} minutes")
    return 0 if all(each.passed for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
