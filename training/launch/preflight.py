"""Preflight: before anything expensive starts, check that all ranks are present and that their nodes match.

Two parts. First through the store, before any collective call: a missing rank would block one, and so may ranks with
different software. Then in the new process group: clocks, and the bandwidth of each node. Both run at every start;
rank 0 logs one line, or a table for several nodes. `preflight_report.py` evaluates the results.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from training.distributed import gather_objects, open_cpu_group
from training.errors import ConfigError
from training.launch.preflight_report import (
    Measurement,
    RankReport,
    find_mismatch,
    find_warnings,
    missing_ranks,
    summary,
    with_node_numbers,
)
from training.provenance import versions

if TYPE_CHECKING:
    from torch.distributed import TCPStore

log = logging.getLogger(__name__)
JOIN_TIMEOUT_S = 300.0  # until the last rank has joined
READ_TIMEOUT_S = 5.0
POLL_S = 0.05
ANSWER_TIMEOUT_S = 60.0  # for rank 0 to answer once all ranks have joined
MESSAGE_BYTES = 4 * 2**20
DISTANCES = (1, 2, 4)  # to the partner of each exchange round


class RanksMissing(Exception):
    """Ranks that did not join in time, by number and node."""


def join(output_dir: Path | None, timeout: timedelta) -> None:
    """Initialise the process group once all ranks have joined and match. Reads RANK, WORLD_SIZE and so on.

    Args:
        timeout: of later collective calls.

    Raises:
        RanksMissing: naming the ranks that did not join.
        ConfigError: naming the rank that does not match, and why. Both are the same on every rank.
    """
    started = time.perf_counter()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _connect(rank)
    own = _own_report(rank, output_dir)
    waiting = time.perf_counter()
    reports = _exchange_reports(store, own, world_size)
    started += time.perf_counter() - waiting  # do not count the wait for the last rank
    if (mismatch := find_mismatch(reports)) is not None:
        if rank == 0:
            _wait_for_readers(store, world_size)
        raise ConfigError(f"preflight: {mismatch}")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    group_store = dist.PrefixStore(f"{_prefix()}/group", store)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=group_store, rank=rank, world_size=world_size, timeout=timeout,
        device_id=device if on_gpu and world_size > 1 else None,  # connects NCCL at once instead of at the first call
    )  # fmt: skip
    open_cpu_group(timeout)
    measurements: list[Measurement] = gather_objects(_measure(reports, rank, device))
    if rank > 0:
        return
    for warning in find_warnings(reports, measurements):
        log.warning("preflight: %s", warning)
    for line in summary(reports, measurements, time.perf_counter() - started):
        log.info("%s", line)


def _connect(rank: int) -> TCPStore:
    """Connect to the store of all ranks; the launcher holds it (crosslift's, torchrun), or rank 0 (srun, others)."""
    held_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(
            host, port, is_master=rank == 0 and not held_by_launcher, wait_for_workers=False, multi_tenant=True,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
        )  # fmt: skip
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise RanksMissing(
            f"{socket.gethostname()}: no answer from {host}:{port} (MASTER_ADDR, MASTER_PORT) in "
            f"{JOIN_TIMEOUT_S:.0f} s: {why}"
        ) from None


def _own_report(rank: int, output_dir: Path | None) -> RankReport:
    device, memory, problem = "cpu", 0.0, None
    if torch.cuda.is_available():
        local_rank, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank < visible:
            properties = torch.cuda.get_device_properties(local_rank)
            device, memory = properties.name, properties.total_memory / 2**30
        else:
            device, problem = "none", f"has local rank {local_rank}, but sees {visible} GPUs; start fewer ranks"
    free = None
    if output_dir is not None:
        path = output_dir.absolute()
        existing = next(each for each in (path, *path.parents) if each.exists())
        free = shutil.disk_usage(existing).free / 2**30
    node = int(os.environ.get("GROUP_RANK", -1))
    return RankReport(rank, node, socket.gethostname(), device, memory, problem, versions(), free)


def _exchange_reports(store: TCPStore, own: RankReport, world_size: int) -> list[RankReport]:
    """The reports of all ranks in rank order. Rank 0 waits for all of them; the others wait for its answer."""
    prefix = f"{_prefix()}/preflight"
    store.set(f"{prefix}/{own.rank}", json.dumps(asdict(own)))
    keys = [f"{prefix}/{rank}" for rank in range(world_size)]
    if own.rank > 0:
        if not _wait_for_keys(store, [f"{prefix}/all"], JOIN_TIMEOUT_S + ANSWER_TIMEOUT_S):
            raise RanksMissing(f"{own.name}: rank 0 did not join, or has ended")
        answer = json.loads(store.get(f"{prefix}/all"))
        store.add(f"{prefix}/read", 1)
        if isinstance(answer, str):
            raise RanksMissing(answer)
    elif not _wait_for_keys(store, keys, JOIN_TIMEOUT_S):
        joined = [rank for rank, key in enumerate(keys) if store.check([key])]
        # From crosslift's launcher and torchrun, or from other launchers.
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
        absent = missing_ranks(joined, world_size, per_node)
        text = f"{absent} did not join within {JOIN_TIMEOUT_S:.0f} s; {len(joined)} of {world_size} ranks joined"
        store.set(f"{prefix}/all", json.dumps(text))
        _wait_for_readers(store, len(joined))
        raise RanksMissing(text)
    else:
        answer = [json.loads(store.get(key)) for key in keys]
        store.set(f"{prefix}/all", json.dumps(answer))
    return with_node_numbers([RankReport(**report) for report in answer])


def _wait_for_keys(store: TCPStore, keys: Sequence[str], seconds: float) -> bool:
    """Whether all keys appear within that time. Polls, because the store's own waiting blocks signals."""
    until = time.monotonic() + seconds
    try:
        while not store.check(list(keys)):
            if time.monotonic() > until:
                return False
            time.sleep(POLL_S)
    except RuntimeError:  # the process that held the store has ended
        return False
    return True


def _wait_for_readers(store: TCPStore, ranks: int) -> None:
    """On rank 0, before it ends: it may hold the store from which the others still have to read the answer."""
    until = time.monotonic() + READ_TIMEOUT_S
    while store.add(f"{_prefix()}/preflight/read", 0) < ranks - 1 and time.monotonic() < until:
        time.sleep(POLL_S)


def _prefix() -> str:
    """Prefix of this start's keys: torchrun's store outlives its restarts."""
    return f"crosslift/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _measure(reports: Sequence[RankReport], rank: int, device: torch.device) -> Measurement:
    """The clock right after a barrier, then the bandwidth of an all-reduce and of exchanges with another node."""
    dist.barrier()
    clock = time.time()
    leaders = [min(each.rank for each in reports if each.node == node) for node in sorted({r.node for r in reports})]
    members = leaders if len(leaders) > 1 else [report.rank for report in reports]
    all_reduce, best = _all_reduce_rate(len(reports), device), None
    for distance in DISTANCES:
        if distance < len(members):
            dist.barrier()  # rounds must not overlap
            if rank in members:
                rate = _exchange_rate(members, members.index(rank), distance, device)
                best = max(best or 0.0, rate)
    return Measurement(clock, all_reduce, best)


def _all_reduce_rate(ranks: int, device: torch.device) -> float | None:
    """Bus bandwidth in GiB/s, `2 (n-1) / n` times the tensor's size per second; None for a single rank."""
    if ranks == 1:
        return None
    tensor = torch.zeros(MESSAGE_BYTES // 4, device=device)
    seconds = _fastest(lambda: dist.all_reduce(tensor), device)
    return 2 * (ranks - 1) / ranks * MESSAGE_BYTES / seconds / 2**30


def _exchange_rate(members: Sequence[int], index: int, distance: int, device: torch.device) -> float:
    """GiB/s of sending to one partner while receiving from another.

    A slow node slows down its partners of a round; over several rounds, a fast node has a fast partner at least once.
    """
    outgoing = torch.zeros(MESSAGE_BYTES // 4, device=device)
    incoming = torch.empty_like(outgoing)
    target, source = (members[(index + offset) % len(members)] for offset in (distance, -distance))

    def exchange() -> None:
        operations = [dist.P2POp(dist.isend, outgoing, target), dist.P2POp(dist.irecv, incoming, source)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return MESSAGE_BYTES / _fastest(exchange, device) / 2**30


def _fastest(communicate: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of three calls; the first one sets up the connection."""
    seconds = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        communicate()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds
