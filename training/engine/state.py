"""DeepSpeed's own files: what the engine would save, taken in memory; loading that runs no code; other world sizes.

In: a DeepSpeed engine, or a folder of its files. Out: states to write (`saving.py` writes them), a loaded engine,
whole tensors for an export, or the same checkpoint in DeepSpeed's universal format. Next: `engine.py`, `export.py`.

DeepSpeed's files are pickles. They are read with torch's weights-only unpickler, everywhere, so that a file that was
tampered with can name no code to run; the few classes of DeepSpeed that its files hold are listed here.
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
    """Inside, the environment has `name` set to `value`."""
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
_HYPERPARAMETERS = ("betas", "eps", "weight_decay")


def read_settings(settings: dict[str, Any]) -> None:
    """Read settings as DeepSpeed does; raises what it has against them."""
    deepspeed.DeepSpeedConfig(settings)
    if (level := settings.get("log_level")) is not None:
        get_log_level_from_string(level)  # which it reads only when an engine is made


@contextmanager
def zero_optimizer() -> Iterator[None]:
    """Inside, DeepSpeed makes a ZeRO optimizer for every stage and precision.

    For stage 1 in bf16 with fp32 gradients it would take its BF16_Optimizer instead (0.19): its checkpoints can't be
    consolidated for an export, and it prints memory lines. The ZeRO-1/2 optimizer accumulates in fp32 as well.
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
    """Inside, `torch.load` runs no code of a file's choice, whatever its caller asked for."""
    with _variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"), torch.serialization.safe_globals(_CLASSES):
        yield


class _Taking(CheckpointEngine):
    """In the place of DeepSpeed's writer: keeps copies of what it is given, and cannot fail on one rank alone.

    A writer that raises, on a full disk say, would leave the other ranks at DeepSpeed's barrier.
    """

    def __init__(self) -> None:
        self.taken: list[tuple[Path, Any]] = []

    def create(self, info: CheckpointCommitInfo) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        self.taken.append((Path(path), _copied(state_dict)))

    def load(self, path: str, map_location: Any = None) -> Any:
        raise RuntimeError("made to take, not to load")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def _copied(state: Any) -> Any:
    """The same nest of containers, its tensors on the host, with no more storage than they show."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)((key, _copied(value)) for key, value in state.items())
    if type(state) in (list, tuple):  # and no torch.Size, which is one of numbers
        return type(state)(map(_copied, state))
    return state


def take_state(engine: Any, directory: Path) -> list[tuple[Path, Any]]:
    """What this rank would write below `directory`: (path, state), copied to host memory. Every rank calls it.

    Frozen weights are left out: they are those of the model that the run started from.
    """
    taking, own = _Taking(), engine.checkpoint_engine
    engine.checkpoint_engine = taking
    engine._copy_recovery_script = lambda path: None  # a program among the weights, for which we have `export`
    try:
        engine.save_checkpoint(str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = own
    return taking.taken


def load_state(engine: Any, directory: Path, universal: bool) -> None:
    """Weights and optimiser state from a checkpoint's folder, or from what `to_universal` made of it.

    Raises FileNotFoundError where DeepSpeed finds nothing to load.
    """
    engine._config.load_universal_checkpoint = universal
    # Universal loading (0.19.8) gives the first parameter group's numbers to all, so that biases would decay, and one
    # tensor of the step count, which each group would then raise.
    groups = engine.optimizer.param_groups
    own = [{name: group[name] for name in _HYPERPARAMETERS} for group in groups]
    frozen = any(not parameter.requires_grad for parameter in engine.module.parameters())
    with weights_only(), without_patterns(directory) as plain:
        path, _ = engine.load_checkpoint(str(plain), tag=TAG, load_module_strict=not (universal or frozen))
    if path is None:
        raise FileNotFoundError(f"{directory}: DeepSpeed found no state to load")
    for group, numbers in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(numbers)
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def to_universal(checkpoint: Path, output: Path) -> None:
    """The state of `checkpoint` as one folder a parameter, which any number of ranks can load."""
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
    """(name, whole fp32 tensor) of a checkpoint, without starting ranks.

    Tensors are put together one at a time. Names in `first` come first, in that order. A tied weight is given once, by
    the first of its names.
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
    """DeepSpeed's progress, for nobody."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":  # in a process of its own: it forks workers, which a rank must not
    from training.launch.heartbeat import die_with_parent

    die_with_parent()
    to_universal(Path(sys.argv[1]), Path(sys.argv[2]))
