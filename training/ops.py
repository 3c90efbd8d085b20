"""DeepSpeed's compiled ops: which ones a run's settings need, and building them before the job does.

In: a RunConfig. Out: names with the reason, and built extensions under TORCH_EXTENSIONS_DIR. Next: `crosslift
prefetch --build-ops`; the job finds them there, or would build them on each node while GPUs wait.

They are compiled for the processor that builds them: build on a node of the kind that runs the job.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
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


def build_ops(config: RunConfig) -> Iterator[str]:
    """Builds what `required_ops` names; a line for each.

    Raises:
        ConfigError: no compiler here, or the op does not build, with the compiler's first complaint.
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
    from training.engine import build_op

    for name, why in needed.items():
        try:
            yield f"DeepSpeed op {name} ({why}): {build_op(name)}"
        except Exception as error:  # whatever compilers and DeepSpeed's builders throw
            complaints = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            said = " ".join(complaints[0].split())[:300]
            hint = "; it needs libaio with its headers" if name == "async_io" else ""
            raise ConfigError(f"--build-ops: {name}, needed by {why}: {said}{hint}") from None
