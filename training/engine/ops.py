"""DeepSpeed's compiled ops: which ones a run's settings need, and building them before the job does.

In: a RunConfig. Out: names with the reason, and built extensions under TORCH_EXTENSIONS_DIR, by default `prebuilt()`.
Next: `crosslift prefetch --build-ops`; from there `slurm/node.py` takes them over, where each node would otherwise
build them while its GPUs wait.

They are compiled for the processor that builds them: build on a node of the kind that runs the job.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.config import RunConfig
from training.errors import ConfigError


def required_ops(config: RunConfig) -> dict[str, str]:
    """{op: the setting that needs it}; none for settings that PyTorch serves alone, such as the default ones."""
    zero = config.deepspeed.get("zero_optimization", {})
    device: dict[str, str] = {
        name: (zero.get(name) or {}).get("device", "none") for name in ("offload_optimizer", "offload_param")
    }
    optimizer: dict[str, Any] = config.deepspeed.get("optimizer", {})
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
    """Where ops are built for the nodes of later jobs, unless TORCH_EXTENSIONS_DIR says otherwise."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "crosslift" / "torch_extensions" / "prebuilt"


def build_ops(config: RunConfig) -> Iterator[str]:
    """Builds what `required_ops` names; a line for each.

    Raises:
        ConfigError: no compiler here, a build that was killed or is under way, or the op does not build, with the
            compiler's first complaint.
    """
    needed = required_ops(config)
    if not needed:
        yield "DeepSpeed ops: none is needed"
        return
    compiler = os.environ.get("CXX", "c++")
    for tool in (compiler, "ninja"):
        if shutil.which(tool) is None:
            raise ConfigError(
                f"--build-ops: {', '.join(needed)} must be compiled, and there is no {tool} here; load a module that "
                "has it, or build where the job will run"
            )
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(prebuilt())))
    for lock in folder.glob("*/lock"):  # torch would wait for it in silence, for ever where its owner was killed
        raise ConfigError(f"--build-ops: {lock}: another build is under way, or was killed: then remove this file")
    from training.engine.engine import build_op

    for name, why in needed.items():
        try:
            yield f"DeepSpeed op {name} ({why}): {build_op(name)}"
        except Exception as error:  # whatever compilers and DeepSpeed's builders throw
            complaints = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            said = " ".join(complaints[0].split())[:300]
            hint = "; it needs libaio with its headers" if name == "async_io" else ""
            raise ConfigError(f"--build-ops: {name}, needed by {why}: {said}{hint}") from None
