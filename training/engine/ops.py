"""DeepSpeed's compiled ops: which ones a run's settings need, and building them before the job starts.

`crosslift prefetch --build-ops` builds them, and `slurm/node.py` copies them to each node, where they would otherwise
be built while the GPUs wait. They are compiled for the processor that builds them: build on a node of the same kind.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.engine.settings import CHOOSES_ADAM
from training.errors import ConfigError

BUILD_TIMEOUT_S = 300.0


def required_ops(raw: Mapping[str, Any], optimizer_name: str = "adamw") -> dict[str, str]:
    """{op: the setting that needs it}; none for settings that PyTorch alone can execute, such as the default ones.

    A run without cpu_adam uses PyTorch's Adam, unless it is told not to; other ops must be there.

    Args:
        raw: the run file's `deepspeed:` section.
    """
    zero = raw.get("zero_optimization", {})
    device: dict[str, str] = {
        name: (zero.get(name) or {}).get("device", "none") for name in ("offload_optimizer", "offload_param")
    }
    optimizer: dict[str, Any] = raw.get("optimizer", {})
    torch_adam = optimizer.get("params", {}).get("torch_adam", True)
    needed = {}
    offloaded = device["offload_optimizer"] != "none"
    if offloaded and optimizer_name != "radam" and not CHOOSES_ADAM & optimizer.get("params", {}).keys():
        needed["cpu_adam"] = f"deepspeed.zero_optimization.offload_optimizer.device={device['offload_optimizer']}"
    if not torch_adam:
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


def build_problem(name: str) -> str | None:
    """Why an op cannot be used here, after an attempt to build it; None if it can. For a rank; raises nothing."""
    from training.engine.engine import build_op

    if (lock := _lasting_lock(name)) is not None:
        return f"{lock} shows another build of {name}, which was killed or is slow: remove the file if it was killed"
    try:
        build_op(name)
    except Exception as error:  # whatever compilers and DeepSpeed's builders raise
        return f"{name} cannot be built: {_first_error(error)}"
    return None


def _lasting_lock(name: str) -> Path | None:
    """The lock of a build of the op that began longer ago than a build takes; torch would wait for it forever.

    A younger one is waited for: it ends, or it becomes that old. The other ranks are in a collective call meanwhile.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    while (lock := next(root.glob(f"**/{name}/lock"), None)) is not None:
        with suppress(FileNotFoundError):  # that build has just ended
            if time.time() - lock.stat().st_mtime > BUILD_TIMEOUT_S:
                break
        time.sleep(1)
    return lock


def _first_error(error: Exception) -> str:
    """One line of a build's error: the compiler's first."""
    errors = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
    return " ".join(errors[0].split())[:300]


def build_ops(raw: Mapping[str, Any], optimizer_name: str = "adamw") -> Iterator[str]:
    """Build the ops that `required_ops` returns; yields a line for each.

    Raises:
        ConfigError: there is no compiler, another build is running or was killed, or an op cannot be built, with the
            compiler's first error.
    """
    needed = required_ops(raw, optimizer_name)
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
            hint = "; it needs libaio with its headers" if name == "async_io" else ""
            raise ConfigError(f"--build-ops: {name}, needed by {why}: {_first_error(error)}{hint}") from None
