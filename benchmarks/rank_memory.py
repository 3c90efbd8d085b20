"""The memory of a whole rank on a CPU, phase by phase, against `check`'s estimate.

    python -m benchmarks.rank_memory [CONFIG] [KEY.SUB=VALUE...] [--json FILE]

One rank trains, saves and exports. Measured is the peak of its resident memory in each phase (VmHWM of Linux, which is
reset between phases). Without CONFIG, the model is made here, with random weights: few layers in Gemma's shape and a
large vocabulary, where gradients of one weight, logits and temporary copies exceed the activations.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ranks import machine, run_ranks
from training.config import RunConfig

GIB = 2**20  # in KiB, as /proc has it
GEMMA = {
    "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 131_072,
}  # fmt: skip
RESULT = "rank_memory.json"


class Phases:
    """Peak resident memory of this process in the calls of each wrapped function, GiB."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self._inside: list[str] = []

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Counts the calls of `owner.name` as `phase`, without those of phases inside it."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def measured(*arguments: Any, **options: Any) -> Any:
            self._end_part(self._inside[-1] if self._inside else "between phases")
            self._inside.append(phase)
            try:
                return function(*arguments, **options)
            finally:
                self._end_part(self._inside.pop())

        setattr(owner, name, measured)

    def _end_part(self, phase: str) -> None:
        """Counts the peak since the last reset for `phase`, and resets it."""
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), int(line.split()[1]) / GIB)
        Path("/proc/self/clear_refs").write_text("5")


def own_config(folder: Path) -> RunConfig:
    """A run of three steps in bf16, whose second is saved while the third runs; the model is written to `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.parallel_data import write_data
    from benchmarks.step_time import run_values
    from training.run_file import validate

    if not (folder / "data").exists():
        write_data(folder / "data")
        torch.manual_seed(0)
        config = AutoConfig.for_model("gemma3_text", **GEMMA)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "start")
    values = run_values(folder, "5M", 48, on_gpu=False)
    values["model"] = {"path": str(folder / "start")}
    values |= {"max_steps": 3, "precision": "bf16", "objective": {"name": "sft"}, "checkpoint": {"every": 2}}
    del values["deepspeed"]
    return validate(values, "benchmark")


def rank_main(config: RunConfig, result: Path) -> None:
    """The rank: trains and writes its peaks."""
    from training import assembly, fit
    from training.checkpoints.saving import Saver
    from training.engine.engine import Engine
    from training.loop.trainer import Trainer

    phases = Phases()
    for owner, name, phase in (
        (assembly, "assemble_data", "imports, tokenizer, data"),
        (assembly, "starting_model", "model and its weights"),
        (Engine, "__init__", "engine"),
        (Trainer, "train_step", "losses and the rest of a step"),
        (Engine, "forward", "forward"),
        (Engine, "backward", "backward"),
        (Engine, "step", "update"),
        (Saver, "begin", "copy of a checkpoint"),
        (Saver, "complete", "waiting for a checkpoint"),
        (fit, "conclude", "export"),
    ):
        phases.wrap(owner, name, phase)
    fit.fit(config, resume="never")
    result.write_text(json.dumps(phases.peaks))


def estimated(config: RunConfig) -> list[str]:
    """The lines of `check` about the memory of one rank on a CPU."""
    from training.check import check_run

    lines = list(check_run(config, gpus_per_node=0))
    first = next(number for number, line in enumerate(lines) if line.startswith("memory of each"))
    last = next(number for number, line in enumerate(lines) if line.startswith("  peak"))
    return lines[first : last + 1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_memory", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?", help="run file; by default the model that is made here")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    from training.run_file import load_config

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.rank_folder or Path(temporary)
        config = load_config(options.config, options.overrides) if options.config else own_config(folder)
        if options.rank_folder is not None:
            rank_main(config, folder / RESULT)
            return
        lines = estimated(config)
        given = [*filter(None, [options.config and str(options.config)]), *options.overrides]
        run_ranks("benchmarks.rank_memory", [*given, "--rank-folder", temporary], 1)
        peaks = json.loads((folder / RESULT).read_text())
    estimate, measured = float(lines[-1].split()[1]), max(peaks.values())
    print(*lines, "", "| phase | peak, GiB |\n|---|---|", sep="\n")
    print(*(f"| {phase} | {peak:.2f} |" for phase, peak in peaks.items()), sep="\n")
    print(f"estimate {estimate:.2f} GiB, measured {measured:.2f}: {estimate / measured:.2f}")
    if options.json is not None:
        result = {"machine": machine(1), "estimate": lines, "peaks_gib": peaks}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
