"""DeepSpeed's compiled ops: which ones a run's settings need, and building them before the job starts.

`crosslift prefetch --build-ops` builds them, and `slurm/node.py` copies them to each node, where they would otherwise
be built while the GPUs wait. They are compiled for the processor that builds them: build on a node of the same kind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.errors import ConfigError


def required_ops(raw: Mapping[str, Any]) -> dict[str, str]:
    """{op: the setting that needs it}; none for settings that PyTorch alone can execute, such as the default ones.

    `raw` is the run file's `deepspeed:` section.
    """
    zero = raw.get("zero_optimization", {})
    device: dict[str, str] = {
        name: (zero.get(name) or {}).get("device", "none") for name in ("offload_optimizer", "offload_param")
    }
    optimizer: dict[str, Any] = raw.get("optimizer", {})
    torch_adam = optimizer.get("params", {}).get("torch_adam", True)
    needed = {}
    if not torch_adam:
        offloaded = device["offload_optimizer"] != "none"
        needed["cpu_adam" if offloaded else "fused_adam"] = "deepspeed.optimizer.params.torch_adam=false" + (
            " with zero_optimization.offload_optimizer" if offloaded else ""
        )
    for name, place in device.items():
        if place == "nvme":
            needed["async_io"] = f"deepspeed.zero_optimization.{name}.device=nvme"
    return needed


def prebuilt() -> Path:
    """The folder in which ops are built for the nodes of later jobs, unless TORCH_EXTENSIONS_DIR is set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "crosslift" / "torch_extensions" / "prebuilt"


def build_ops(raw: Mapping[str, Any]) -> Iterator[str]:
    """Build the ops that `required_ops` returns; yields a line for each.

    Raises:
        ConfigError: there is no compiler, another build is running or was killed, or an op cannot be built, with the
            compiler's first error.
    """
    needed = required_ops(raw)
    if not needed:
        yield "DeepSpeed ops: none needed"
        return
    compiler = os.environ.get("CXX", "c++")
    for tool in (compiler, "ninja"):
        if shutil.which(tool) is None:
            raise ConfigError(
                f"--build-ops: {', '.join(needed)} must be compiled, and there is no {tool} here; load a module that "
                "has it, or build where the job will run"
            )
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(prebuilt())))
    for lock in folder.glob("*/lock"):  # torch would wait for it without a message, forever if its owner was killed
        raise ConfigError(f"--build-ops: {lock}: another build is running; if it was killed, remove this file")
    from training.engine.engine import build_op

    for name, why in needed.items():
        try:
            yield f"DeepSpeed op {name} ({why}): {build_op(name)}"
        except Exception as error:  # whatever compilers and DeepSpeed's builders raise
            errors = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            first = " ".join(errors[0].split())[:300]
            hint = "; it needs libaio with its headers" if name == "async_io" else ""
            raise ConfigError(f"--build-ops: {name}, needed by {why}: {first}{hint}") from None
