"""Cost of a checkpoint: steps without one, with one written in the background, and with one written before them.

    python -m benchmarks.saving --json FILE

One run under ZeRO-3 trains in rounds of three blocks of steps, in rotating order. A block with a checkpoint starts
the checkpoint and ends when it is complete. Two figures a checkpoint: how long training waited for it, in `begin` and
`complete`; and how much longer its block took than the round's block without one, which includes the CPU and disk time
that the background thread takes from the steps. Wall clock of the slowest rank. The disk is that of the temporary
folder (TMPDIR); `written_gb_per_second` is the speed of writing and syncing a plain file of one rank's size there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.parallel_data import write_data
from benchmarks.ranks import add_rank_options, machine, run_ranks, usable_ranks
from benchmarks.step_time import SIZES, run_values, timed

BLOCKS = ("none", "background", "foreground")


class Timed:
    """A trainer that measures how long it waits for the saver."""

    def __init__(self, config: Any) -> None:
        from training.assembly import assemble
        from training.distributed import rank
        from training.loop.trainer import Trainer
        from training.run_folder.prepare import prepare

        self.trainer = Trainer(assemble(config, prepare(config, rank())), tracker=None)
        self.step = 0
        self.wait_seconds = 0.0

    def block(self, kind: str, n_steps: int) -> None:
        """Run steps of the loop (`Trainer._train_from`) after starting a checkpoint of this kind."""
        trainer, self.wait_seconds = self.trainer, 0.0
        if kind != "none":
            background = kind == "background"
            trainer.saver.config = trainer.config.checkpoint.model_copy(update={"background": background})
            self._timed_wait(partial(trainer.save, self.step, {}))
        for _ in range(n_steps):
            (batch,) = trainer.run.loader.steps(self.step, self.step + 1)
            agreed = trainer.agree(batch)
            if trainer.saver.open and not agreed.writing:
                self._timed_wait(trainer._complete_checkpoint)
            trainer.train_step(self.step, batch)
            self.step += 1
        self._timed_wait(trainer._complete_checkpoint)

    def _timed_wait(self, work: Any) -> None:
        started = time.perf_counter()
        work()
        self.wait_seconds += time.perf_counter() - started


def measure(config: Any, rounds: int, n_steps: int) -> dict[str, Any]:
    """Seconds of every block and of waiting in it; the same on every rank."""
    from benchmarks.ranks import all_max
    from training.checkpoints import checkpoint

    run = Timed(config)
    device = run.trainer.run.engine.device
    run.block("background", 2)  # unmeasured: DeepSpeed's traces, the allocator
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in BLOCKS}
    for number in range(rounds):
        for place in range(len(BLOCKS)):
            kind = BLOCKS[(place + number) % len(BLOCKS)]
            seconds, _ = timed(partial(run.block, kind, n_steps), device)
            found[kind].append({"seconds": seconds, "wait_seconds": float(all_max(run.wait_seconds, device))})
    newest = next(checkpoint.complete(config.output_dir), None)
    assert newest is not None
    return {
        "parameters": sum(each.ds_numel for each in run.trainer.run.engine.module.parameters()),
        "checkpoint_bytes": sum(each.stat().st_size for each in newest.rglob("*") if each.is_file()),
        "steps_a_block": n_steps,
        "blocks": found,
    }


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds; `cost` is paired by round, so noise of the machine affects both sides."""
    blocks = measured["blocks"]
    rows = {}
    for kind in BLOCKS[1:]:
        pairs = zip(blocks[kind], blocks["none"], strict=True)
        rows[kind] = {
            "wait_seconds": statistics.median(each["wait_seconds"] for each in blocks[kind]),
            "cost": statistics.median(saved["seconds"] - none["seconds"] for saved, none in pairs),
        }
    return {
        "step_seconds": statistics.median(each["seconds"] for each in blocks["none"]) / measured["steps_a_block"],
        **rows,
        "background_to_foreground": {
            what: rows["background"][what] / rows["foreground"][what] for what in ("wait_seconds", "cost")
        },
    }


def disk_speed(folder: Path, n_bytes: int) -> float:
    """GB/s of one file, written and synced."""
    block = os.urandom(1 << 24)
    file = folder / "speed"
    started = time.perf_counter()
    with file.open("wb") as opened:
        for _ in range(max(n_bytes >> 24, 1)):
            opened.write(block)
        opened.flush()
        os.fsync(opened.fileno())
    seconds, size = time.perf_counter() - started, file.stat().st_size
    file.unlink()
    return size / seconds / 1e9


def table(measured: dict[str, Any]) -> str:
    found = measured["summary"]
    lines = [
        f"{measured['parameters'] / 1e6:.1f}M parameters, {measured['checkpoint_bytes'] / 1e6:.0f} MB a checkpoint, "
        f"disk {measured['written_gb_per_second']:.2f} GB/s, {found['step_seconds']:.2f} s a step",
        "",
        "| a checkpoint written | training waits, s | it costs, s |",
        "|---|---|---|",
    ]
    for kind in BLOCKS[1:]:
        lines.append(f"| {kind} | {found[kind]['wait_seconds']:.2f} | {found[kind]['cost']:.2f} |")
    ratios = found["background_to_foreground"]
    lines.append(f"| background / foreground | {ratios['wait_seconds']:.2f} | {ratios['cost']:.2f} |")
    return "\n".join(lines)


def rank_main(folder: Path, options: argparse.Namespace) -> None:
    """One rank; rank 0 writes the figures."""
    import torch

    from training.distributed import rank
    from training.engine.engine import process_group
    from training.run_file import validate

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    with process_group(timeout_minutes=10):
        values = run_values(folder, options.size, options.slots, torch.cuda.is_available())
        values["checkpoint"] = {"keep": 1}
        measured = measure(validate(values, "benchmark"), options.rounds, options.steps)
        if rank() == 0:
            (folder / "measured.json").write_text(json.dumps(measured))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="20M", choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="in a block")
    parser.add_argument("--slots", type=int, default=24, help="samples in a step's global batch")
    add_rank_options(parser)
    options = parser.parse_args()
    if options.rank_folder is not None:
        rank_main(options.rank_folder, options)
        return
    nproc = usable_ranks(options.nproc)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "data")
        shared = [f"--{name}={getattr(options, name)}" for name in ("size", "rounds", "steps", "slots")]
        run_ranks("benchmarks.saving", [*shared, "--rank-folder", temporary], nproc)
        measured = json.loads((folder / "measured.json").read_text())
        measured["written_gb_per_second"] = disk_speed(folder, measured["checkpoint_bytes"] // nproc)
    measured["summary"] = summary(measured)
    print(table(measured))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(nproc), **measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
