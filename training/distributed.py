"""Ranks, reductions over ranks, seeds, and the check that all ranks run the same modules."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.records import stable_hash
from training.launch.heartbeat import heartbeat

CPU = "cpu"
END_OF_FORWARD = "(end of the forward pass)"
_cpu_group: dist.ProcessGroup | None = None  # None: the default group, if that is gloo


class RanksDisagree(Exception):
    """Ranks are about to run different modules, which would deadlock ZeRO-3."""


def rank() -> int:
    """This process's rank; 0 outside a distributed run."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def visible_gpus() -> int:
    """Number of GPUs that this process may use."""
    return torch.cuda.device_count()


def placement() -> dict[str, str]:
    """The number of ranks and the kind of their device (`CPU`, or a GPU's name), as tags of the run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
    return {"ranks": str(world_size()), "device": device}


def all_sum(values: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Element-wise sum over ranks, fp64, on CPU; `values` are unchanged."""
    total = torch.as_tensor(values, dtype=torch.float64).to(device, copy=True)
    if dist.is_initialized():
        heartbeat.phase("all-reduce")
        dist.all_reduce(total)
    return total.cpu()


@contextmanager
def evaluation_group() -> Iterator[None]:
    """Context with a process group if `torchrun` started this process: NCCL on GPUs, else gloo; without DeepSpeed."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def open_cpu_group(timeout: timedelta) -> None:
    """Adds a gloo group of all ranks to a default group of another backend, whose calls would wait for the device.

    Called on all ranks after `init_process_group`; `dist.destroy_process_group()` ends both.
    """
    global _cpu_group
    gloo = dist.get_backend() == "gloo"
    _cpu_group = None if gloo else dist.new_group(backend="gloo", timeout=timeout, group_desc="cpu")


def cpu_sum(values: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Exact element-wise sum of integers over ranks, modulo 2^64; the device is not waited for."""
    total = torch.from_numpy(np.array(values, np.int64))
    if dist.is_initialized():
        heartbeat.phase("all-reduce")
        dist.all_reduce(total, group=_cpu_group)
    return total.numpy()


def exchange_rows(rows: Tensor, sent: Tensor, sent_to: Sequence[int], received_from: Sequence[int]) -> Tensor:
    """This rank's rows, followed by those that the other ranks send it. Only its own rows have gradients.

    Called on all ranks alike, between the forward and the backward pass; the backward pass has no collective call.

    Args:
        rows: (M, ...) on the device.
        sent: (sum of sent_to,) int64: numbers of the rows to send, rank after rank.
        sent_to: (ranks,) how many of them to each rank.
        received_from: (ranks,) how many rows each rank sends.

    Returns:
        (M + sum of received_from, ...).
    """
    received = rows.new_empty((sum(received_from), *rows.shape[1:]))
    if dist.is_initialized():
        heartbeat.phase("exchanging states")
        dist.all_to_all_single(received, rows.detach()[sent], list(received_from), list(sent_to))
    return torch.cat([rows, received])


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, over the CPU; for rare events, not for every step."""
    if not dist.is_initialized():
        return [value]
    heartbeat.phase("gathering from all ranks")
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


def barrier() -> None:
    """Wait for all ranks, on the CPU."""
    if dist.is_initialized():
        heartbeat.phase("waiting for all ranks")
        dist.barrier(group=_cpu_group)


def seed_step(seed: int, step: int) -> None:
    """Seeds dropout from (seed, step, rank), so that no random state has to be saved."""
    torch.manual_seed(stable_hash(seed, "dropout", step, rank()))


@contextmanager
def same_modules_on_every_rank(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which every module call is compared across ranks before it runs, as ZeRO-3 deadlocks if they differ.

    Used for the first training forward only. The comparison precedes the module's own collective calls, so a rank
    that skips a module is reported instead of causing a deadlock; its hooks run before the model's other hooks.

    Raises:
        RanksDisagree: names the ranks and the modules they are about to run.
    """
    calls = 0

    def compare(name: str) -> None:
        nonlocal calls
        calls += 1
        mine = torch.tensor([stable_hash(name)], dtype=torch.int64, device=device)
        bounds = torch.cat([mine, -mine])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        if bounds[0] != -bounds[1]:
            raise RanksDisagree(_who_differs(gather_objects(name), calls))

    names = {module: name for name, module in model.named_modules() if name}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: compare(names[module]), prepend=True) for module in names
    ]
    try:
        yield
        compare(END_OF_FORWARD)
    finally:
        for hook in hooks:
            hook.remove()


def _who_differs(names: Sequence[str], call: int) -> str:
    usual, votes = Counter(names).most_common(1)[0]
    odd = [f"rank {number} runs {name!r}" for number, name in enumerate(names) if name != usual]
    rest = f"rank {names.index(usual)}" if votes == 1 or len(names) == 2 else f"the other {votes} ranks"
    return f"ranks differ at module call {call} of the forward pass: {', '.join(odd)}, {rest} runs {usual!r}"
