"""A model under DeepSpeed: construction, forward, backward, step, gathering. `engine/state.py` saves and loads.

No other files import deepspeed. Gradients are those of the global batch, independent of how it is split over ranks
and micro-batches.

DeepSpeed is used as follows; tests check each point:
- `gradient_accumulation_steps` stays 1 and the boundary is set by hand, since micro-batches vary by step;
- gradients are averaged over ranks, so a loss share is multiplied by the world size before backward;
- every training forward goes through the engine (only there its micro-step counter advances);
- bf16 accumulates and reduces in fp32;
- a non-finite update is dropped without an error: `step()` raises instead.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    prevent_arange_dtype_change,
    unset_hf_deepspeed_config,
)

from data_pipeline.config import merged
from training.config import RunConfig
from training.distributed import barrier, gather_objects, rank
from training.engine import ops
from training.engine import state as engine_state
from training.engine.settings import mistakes, own_settings, wants_cpu_adam, with_fastest_adam
from training.engine.state import deepspeed
from training.errors import ConfigError
from training.launch import preflight
from training.launch.heartbeat import heartbeat

log = logging.getLogger(__name__)
deepspeed.utils.logger.setLevel(logging.WARNING)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class NonFiniteUpdate(Exception):
    """A NaN or infinite gradient: DeepSpeed has dropped the update; weights and moments are unchanged."""


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def process_group(timeout_minutes: float, output_dir: Path | None = None) -> Iterator[None]:
    """Context in which this process is a rank of the run, after the preflight: NCCL on GPUs, gloo on CPU.

    All ranks leave together, after a barrier. A rank that fails leaves without it, as others may be in a collective
    call. Raises the errors of `preflight.join`.
    """
    from datetime import timedelta

    timeout = timedelta(minutes=timeout_minutes)
    preflight.join(output_dir, timeout)
    # On CPU DeepSpeed would compile a shared-memory op here; gloo does the same without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), timeout=timeout, verbose=False
    )  # uses the existing group
    yield
    barrier()
    dist.destroy_process_group()


def build_op(name: str) -> Path:
    """Compiles one of DeepSpeed's ops (cpu_adam, fused_adam, async_io) as a run would; returns the extension's file."""
    from deepspeed.ops import op_builder

    builder = {"cpu_adam": "CPUAdamBuilder", "fused_adam": "FusedAdamBuilder", "async_io": "AsyncIOBuilder"}[name]
    module = getattr(op_builder, builder)().load(verbose=False)
    return Path(module.__file__)


def deepspeed_settings(config: RunConfig, world_size: int, *, in_run: bool = False) -> dict[str, Any]:
    """The DeepSpeed JSON of a run; `config.deepspeed` is merged last.

    Args:
        in_run: all ranks call it, for the engine. For an offloaded optimizer they then compile DeepSpeed's CPU Adam,
            which a first check of the settings need not wait for.

    Raises:
        ConfigError: DeepSpeed rejects a value, or a key is unknown.
    """
    on_gpu = torch.cuda.is_available()
    own = own_settings(config.optimizer, config.precision, config.zero_stage, world_size=world_size, on_gpu=on_gpu)
    settings = merged(own, config.deepspeed)
    if lines := list(mistakes(settings, own, engine_state.read_settings, deepspeed.__version__)):
        raise ConfigError("\n".join(lines))
    cpu_adam = in_run and wants_cpu_adam(settings, config.deepspeed)
    if cpu_adam:
        problem = _cpu_adam_problem()
        cpu_adam = problem is None
        if rank() == 0:
            log.info(
                "offloaded optimizer: %s", "DeepSpeed's CPU Adam" if cpu_adam else f"torch's, as {problem} "
                "(crosslift prefetch --build-ops compiles it before the job)"
            )  # fmt: skip
    return with_fastest_adam(settings, cpu_adam=cpu_adam)


def _cpu_adam_problem() -> str | None:
    """Why some rank cannot use DeepSpeed's CPU Adam; None if all can. Called on all ranks.

    Ranks that compile it into the same folder wait for each other's lock, so they take turns: rank 0, then one of each
    other node, then the rest, which find it compiled.
    """
    first, first_of_node = rank() == 0, int(os.environ.get("LOCAL_RANK", "0")) == 0
    problem = None
    for turn in (first, first_of_node and not first, not first and not first_of_node):
        if turn:
            problem = ops.build_problem("cpu_adam")
        barrier()
    return next(filter(None, gather_objects(problem)), None)


class Construction:
    """Builds a model for the engine: under ZeRO-3 every parameter is sharded when it is created."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.sharded = settings["zero_optimization"]["stage"] == 3
        self.settings = settings

    @contextmanager
    def context(self) -> Iterator[None]:
        """Context in which new modules are sharded (ZeRO-3), or not.

        The number format follows from the settings: DeepSpeed 0.19 misreads an explicit dtype on CPU. Rotary
        frequencies are kept in fp32, which zero.Init alone would make in the model's format.
        """
        if not self.sharded:
            yield
            return
        with prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=self.settings):
            yield

    @contextmanager
    def known_to_peft(self) -> Iterator[None]:
        """Context in which peft gathers the sharded weights that it reads, such as base weights for DoRA's norms.

        peft detects ZeRO-3 through transformers, which keeps a weak reference to the settings.
        """
        settings = HfDeepSpeedConfig(self.settings) if self.sharded else None
        try:
            yield
        finally:
            del settings
            unset_hf_deepspeed_config()

    def write(self, parameter: nn.Parameter, read: Callable[[], Tensor] | None) -> None:
        """Fills one parameter from the reader's tensor; called for the same parameters in order on all ranks.

        Only one whole parameter exists at a time, so memory is limited to the shards plus that parameter.
        """
        with gathered([parameter], modifier_rank=0), torch.no_grad():
            if read is not None:
                parameter.data.copy_(read())
            elif not _is_partitioned(parameter):
                raise RuntimeError("every rank reads for itself when parameters are not sharded")


@contextmanager
def release_freed_memory() -> Iterator[None]:
    """Context, for loading, in which freed blocks of 1 MiB and more are returned to the system.

    glibc otherwise raises that threshold when large blocks are freed and keeps them in its heap, and a rank's peak
    grows to twice its shard (measured by `benchmarks/load_memory.py`). Afterwards the threshold is set to the end of
    glibc's own adjustment, 32 MiB (twice that for trimming), so that training reuses its memory. With other C
    libraries nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    mmap_threshold, trim_threshold = -3, -1  # of malloc.h
    if mallopt is not None:
        mallopt(mmap_threshold, 2**20)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(mmap_threshold, 2**25)
            mallopt(trim_threshold, 2**26)


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
    """Context in which the parameters are whole on all ranks; changes by rank `modifier_rank` are kept."""
    sharded = [parameter for parameter in parameters if _is_partitioned(parameter)]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank, enabled=bool(sharded)):
        yield


@contextmanager
def refusing(raw: Mapping[str, Any]) -> Iterator[None]:
    """Context for building an engine: DeepSpeed's errors about the run file's `deepspeed:` become ConfigErrors."""
    try:
        yield
    except (
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:
        if not raw:
            raise
        text = " ".join(str(error).split())
        raise ConfigError(f"deepspeed: refused by DeepSpeed: {type(error).__name__}: {text}") from error


class Engine:
    """A model with its optimiser under DeepSpeed."""

    def __init__(self, model: PreTrainedModel, config: RunConfig, settings: dict[str, Any], world_size: int) -> None:
        self.world_size = world_size
        self.sharded = settings["zero_optimization"]["stage"] == 3
        self._accumulated = False  # there are gradients of a step that is neither applied nor dropped
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
        groups = _parameter_groups(model, config.optimizer.weight_decay)
        with engine_state.zero_optimizer(), refusing(config.deepspeed):
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, model_parameters=groups, config=settings
            )
        if self.sharded:
            self._optimizer.flatten = _flattened
        for name, buffer in buffers.items():  # bf16 without sharding would cast rotary frequencies too
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, buffer.to(device()))

    @property
    def module(self) -> PreTrainedModel:
        module: PreTrainedModel = self._engine.module
        return module

    @property
    def device(self) -> torch.device:
        return device()

    def begin_micro_batch(self, last: bool) -> None:
        """Called before each training forward; the backward of the last one ends the accumulation of gradients."""
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(last)

    def forward(self, **inputs: Any) -> Any:
        """Runs one forward pass; all ranks must run the same number, with the same modules."""
        heartbeat.forward()
        return self._engine(**inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context for forward passes without gradients and dropout (probe, held-out loss)."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def backward(self, loss_share: Tensor) -> None:
        """Accumulates gradients of a share of the step's loss (see `scaling.step_loss_share`).

        If the share is NaN or infinite, so are its gradients, and `step` raises; its own may be finite, as where a
        label has a probability of 0. Nothing waits for the device to find that out.
        """
        heartbeat.phase("backward")
        self._accumulated = True
        factor = torch.where(torch.isfinite(loss_share.detach()), float(self.world_size), math.nan)
        self._engine.backward(loss_share * factor.to(loss_share.dtype))

    def step(self, learning_rate: float) -> Tensor:
        """Clips gradients, updates the weights, and returns the gradient norm before clipping, on its device.

        DeepSpeed waits for the device once, before the update, to read whether the norm is finite (ZeRO-1 and 2 in bf16
        twice: first whether each gradient is); so `was_step_applied` is free. Reading the norm here would wait for the
        update too.

        Raises:
            NonFiniteUpdate: the gradient holds a NaN or an infinity; nothing was updated.
        """
        heartbeat.phase("update")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._accumulated = False
        norm = self._engine.get_global_grad_norm()
        norm = torch.as_tensor(0.0 if norm is None else norm)
        if not self._engine.was_step_applied():
            raise NonFiniteUpdate(f"gradient norm {norm.item()}")
        return norm

    def drop_update(self) -> None:
        """Discards the step's gradients; after a `step` that raised NonFiniteUpdate there are none left.

        Called on all ranks. Moments and weights are unchanged: DeepSpeed is given a NaN gradient norm, for which it
        drops the update itself.
        """
        if not self._accumulated:
            return
        name = "_get_norm_groups" if self.sharded else "scaled_global_norm"
        invalid = torch.tensor(float("nan"))
        setattr(self._optimizer, name, lambda *_, **__: [invalid] if self.sharded else invalid)
        level = deepspeed.utils.logger.level
        deepspeed.utils.logger.setLevel(logging.ERROR)  # it would warn of gradients that are not finite
        try:
            self._engine.step()
        finally:
            deepspeed.utils.logger.setLevel(level)
            delattr(self._optimizer, name)  # restores the method
        self._accumulated = False
        if self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed applied an update that was to be dropped")

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole fp32 gradients by parameter name, after the last backward and before `step`: for tests."""
        return {
            name: gradient.detach().float().cpu().clone()
            for name, parameter in self.module.named_parameters()
            if (gradient := deepspeed.utils.safe_get_full_grad(parameter)) is not None
        }

    def take_state(self, directory: Path, copy: bool = True) -> list[tuple[Path, Any]]:
        """This rank's shards of weights and optimiser state, in host memory, with their paths below `directory`.

        Args:
            copy: False if they are written before the next step, so that ranks on CPUs need no second copy.
        """
        return engine_state.take_state(self._engine, directory, copy)

    def load_state(self, directory: Path, universal: bool = False) -> None:
        """Loads weights and optimiser state of a checkpoint of the same number of ranks, or of a universal one."""
        engine_state.load_state(self._engine, directory, universal)

    def destroy(self) -> None:
        """Releases hooks and buffers, so that an export needs no memory beside the engine's."""
        self._engine.destroy()
        # A cached method of DeepSpeed 0.19.8 refers to the modules of every ZeRO-3 engine, and they to the optimizer.
        self._optimizer.optimizer.state.clear()
        vars(self._optimizer).clear()
        gc.collect()


def _flattened(tensors: Sequence[Tensor]) -> Tensor:
    """One flat tensor: a view if the tensors follow each other in memory, as the gradients of ZeRO-3 do, else a copy.

    DeepSpeed itself always copies, which takes 4 bytes for each of a rank's weights during the update.
    """
    first, elements = tensors[0], 0
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not tensor.is_contiguous() or tensor.storage_offset() != first.storage_offset() + elements:
            return torch.cat([each.reshape(-1) for each in tensors])
        elements += tensor.numel()
    return first.as_strided((elements,), (1,))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay for matrices, and without for biases and norms."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            (decayed if dimensions > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
