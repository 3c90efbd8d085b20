"""DeepSpeed's checkpoint files: copying the state to memory, safe loading, conversion to other world sizes.

DeepSpeed's files are pickles. They are always read with torch's weights-only unpickler, so that a manipulated file
cannot run code; the few classes of DeepSpeed that its files contain are listed here.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.sources.paths import without_patterns
from training.engine.saved_files import TAG

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Context in which the environment variable `name` is set to `value`."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# What DeepSpeed imports and nothing here uses: MLflow, for its autotuner (two seconds and 75 MB of a rank's start), and
# torch's whole compiler (one second), for Muon, which it looks for in every engine.
_without_mlflow = "mlflow" not in sys.modules
if _without_mlflow:
    sys.modules["mlflow"] = None  # type: ignore[assignment]
try:
    with _variable("TORCHDYNAMO_DISABLE", "1"):
        import deepspeed as deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer
        from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
        from deepspeed.runtime.constants import BFLOAT16
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, ZeroStageEnum
        from deepspeed.utils.logging import get_log_level_from_string
        from deepspeed.utils.tensor_fragment import fragment_address
finally:
    if _without_mlflow:
        del sys.modules["mlflow"]

_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def read_settings(settings: dict[str, Any]) -> None:
    """Reads settings as DeepSpeed does; raises DeepSpeed's errors about them."""
    deepspeed.DeepSpeedConfig(settings)
    if (level := settings.get("log_level")) is not None:
        get_log_level_from_string(level)  # DeepSpeed itself reads it only when an engine is built


@contextmanager
def zero_optimizer() -> Iterator[None]:
    """Context in which DeepSpeed builds a ZeRO optimizer for every stage and precision.

    For stage 1 in bf16 with fp32 gradients DeepSpeed 0.19 would use its BF16_Optimizer, whose checkpoints cannot be
    consolidated for an export, and which prints memory lines. The ZeRO-1/2 optimizer accumulates in fp32 as well.
    """
    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(engine: Any, optimizer: Any) -> Any:
        chosen = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if chosen == BFLOAT16 else chosen

    DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


@contextmanager
def weights_only() -> Iterator[None]:
    """Context in which `torch.load` uses the weights-only unpickler, whatever its caller's arguments."""
    with _variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"), torch.serialization.safe_globals(_CLASSES):
        yield


class _MemoryWriter(CheckpointEngine):
    """Replaces DeepSpeed's writer and keeps the state in memory, so that it cannot fail on a single rank.

    A writer that raises, for example on a full disk, would leave the other ranks waiting at DeepSpeed's barrier.
    """

    def __init__(self, copy: bool) -> None:
        self.taken: list[tuple[Path, Any]] = []
        self._copy = copy

    def create(self, info: CheckpointCommitInfo) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        self.taken.append((Path(path), _on_host(state_dict, self._copy)))

    def load(self, path: str, map_location: Any = None) -> Any:
        raise RuntimeError("this checkpoint engine only saves")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def _on_host(state: Any, copy: bool) -> Any:
    """Nested containers with their tensors on the host, without storage beyond each tensor's elements.

    Without `copy`, tensors that are so already are shared.
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=copy or state.untyped_storage().nbytes() != state.nbytes)
    if isinstance(state, dict):
        return type(state)((key, _on_host(value, copy)) for key, value in state.items())
    if type(state) in (list, tuple):  # excludes torch.Size, which holds only numbers
        return type(state)(_on_host(value, copy) for value in state)
    return state


def take_state(engine: Any, directory: Path, copy: bool) -> list[tuple[Path, Any]]:
    """The (path, state) pairs that this rank would write below `directory`, in host memory.

    Called on all ranks. Frozen weights are excluded, as the run's initial model holds them. Without `copy`, a rank on a
    CPU returns its own tensors, which the next step changes.
    """
    taking, own = _MemoryWriter(copy), engine.checkpoint_engine
    engine.checkpoint_engine = taking
    engine._copy_recovery_script = lambda path: None  # DeepSpeed's conversion script; `export` replaces it
    try:
        engine.save_checkpoint(str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = own
    return taking.taken


def load_state(engine: Any, directory: Path, universal: bool) -> None:
    """Loads weights and optimiser state from a checkpoint's folder, or from the output of `to_universal`.

    Raises:
        FileNotFoundError: DeepSpeed finds nothing to load.
    """
    engine._config.load_universal_checkpoint = universal
    # Universal loading (0.19.8) sets the first parameter group's hyperparameters on all groups, so biases would decay,
    # and shares one step-count tensor, which every group would then increment. The checkpoint may also be of another
    # implementation of Adam (torch's, fused, DeepSpeed's for CPUs), with other options.
    groups = engine.optimizer.param_groups
    own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    frozen = any(not parameter.requires_grad for parameter in engine.module.parameters())
    with weights_only(), without_patterns(directory) as plain:
        path, _ = engine.load_checkpoint(str(plain), tag=TAG, load_module_strict=not (universal or frozen))
    if path is None:
        raise FileNotFoundError(f"{directory}: DeepSpeed found no state to load")
    for group, numbers in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(numbers)
    optimizer = engine.optimizer.optimizer
    on_device = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if "step" in state:  # saved as a number by DeepSpeed's CPU Adam; torch's fused one has it beside the moments
            state["step"] = torch.tensor(float(state["step"]), device=parameter.device if on_device else "cpu")


def to_universal(checkpoint: Path, output: Path) -> None:
    """Converts `checkpoint` to DeepSpeed's universal format (a folder per parameter), for any number of ranks."""
    from deepspeed.checkpoint.ds_to_universal import main

    workers = max(min(os.cpu_count() or 1, 4), 1)
    shutil.rmtree(output, ignore_errors=True)
    (output / TAG).mkdir(parents=True)
    with weights_only(), _quiet(), without_patterns(checkpoint) as source, without_patterns(output) as target:
        settings = Namespace(
            input_folder=str(source / TAG), output_folder=str(target / TAG), num_extract_workers=workers,
            num_merge_workers=workers, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )  # fmt: skip
        main(settings)


def consolidated(directory: Path, first: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, whole fp32 tensor) of a checkpoint, without starting ranks.

    Tensors are assembled one at a time. Names in `first` come first, in that order. A tied weight is yielded once,
    under the first of its names.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with without_patterns(directory) as plain:
        with weights_only(), _quiet():
            parts = get_fp32_state_dict_from_zero_checkpoint(str(plain), tag=TAG, lazy_mode=True)
        seen: set[int] = set()
        for name in (*(name for name in first if name in parts), *parts):
            part = parts[name]
            if id(part) not in seen:
                seen.add(id(part))
                with weights_only():
                    whole = part.contiguous()
                yield name, whole


@contextmanager
def _quiet() -> Iterator[None]:
    """Context that discards DeepSpeed's output."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":  # a separate process, as it forks workers, which a rank must not do
    from training.launch.heartbeat import die_with_parent

    die_with_parent()
    to_universal(Path(sys.argv[1]), Path(sys.argv[2]))
