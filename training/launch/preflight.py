"""Before anything costly: who is here, what every rank sees, and whether they fit together. On every start.

In: ranks that were started, and their store. Out: a process group, and a line (a table for several nodes) in the log;
or one line that names the rank and host that is missing or does not fit. Next: `preflight_report.py` judges.

Two parts. Through the store, before any collective call: a rank that never comes would hang one, and ranks with
different software may. Then, in the new process group: clocks, and how fast each node exchanges data.
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

from training.distributed import gather_objects
from training.errors import ConfigError
from training.launch.preflight_report import Measured, Report, broken, doubtful, missing, numbered, summary
from training.provenance import versions

if TYPE_CHECKING:
    from torch.distributed import TCPStore

log = logging.getLogger(__name__)
COME_SECONDS = 300.0  # until the last rank has come
READ_SECONDS = 5.0
POLL_SECONDS = 0.05
VERDICT_SECONDS = 60.0  # more than rank 0 needs when all have come
EXCHANGED_BYTES = 4 * 2**20
ROUNDS = (1, 2, 4)  # how far away the partner is


class RanksMissing(Exception):
    """Ranks that did not come in time, by number and node."""


def join(output_dir: Path | None, timeout: timedelta) -> None:
    """Make this process one of the run's ranks, once all have come and fit together. RANK and so on say which.

    Args:
        timeout: of collective calls later on.

    Raises:
        RanksMissing: naming who did not come; ConfigError: naming who does not fit, and why. The same on every rank.
    """
    started = time.perf_counter()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(rank)
    mine = _report(rank, output_dir)
    waiting = time.perf_counter()
    reports = _roll_call(store, mine, world_size)
    started += time.perf_counter() - waiting  # for the last rank to come, which is no cost of ours
    if (problem := broken(reports)) is not None:
        if rank == 0:
            _let_all_read(store, world_size)
        raise ConfigError(f"preflight: {problem}")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    group_store = dist.PrefixStore(f"{_prefix()}/group", store)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=group_store, rank=rank, world_size=world_size, timeout=timeout,
        device_id=device if on_gpu and world_size > 1 else None,  # as DeepSpeed does it
    )  # fmt: skip
    measured: list[Measured] = gather_objects(_measure(reports, rank, device))
    if rank > 0:
        return
    for warning in doubtful(reports, measured):
        log.warning("preflight: %s", warning)
    for line in summary(reports, measured, time.perf_counter() - started):
        log.info("%s", line)


def _store(rank: int) -> TCPStore:
    """Where all ranks meet: held by the launcher (ours, torchrun), or by rank 0 (srun, deepspeed)."""
    held_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(
            host, port, is_master=rank == 0 and not held_by_launcher, wait_for_workers=False, multi_tenant=True,
            timeout=timedelta(seconds=COME_SECONDS),
        )  # fmt: skip
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise RanksMissing(
            f"{socket.gethostname()}: nobody answers at {host}:{port} (MASTER_ADDR, MASTER_PORT) for "
            f"{COME_SECONDS:.0f} s: {why}"
        ) from None


def _report(rank: int, output_dir: Path | None) -> Report:
    device, memory, problem = "cpu", 0.0, None
    if torch.cuda.is_available():
        local_rank, seen = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank < seen:
            properties = torch.cuda.get_device_properties(local_rank)
            device, memory = properties.name, properties.total_memory / 2**30
        else:
            device, problem = "none", f"is the node's rank {local_rank} from 0, but it sees {seen} GPUs; start fewer"
    free = shutil.disk_usage(_existing(output_dir)).free / 2**30 if output_dir is not None else None
    node = int(os.environ.get("GROUP_RANK", -1))
    return Report(rank, node, socket.gethostname(), device, memory, problem, versions(), free)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _ranks_per_node() -> int:
    ours, deepspeeds = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("LOCAL_SIZE")
    return int(ours or deepspeeds or os.environ["WORLD_SIZE"])


def _roll_call(store: TCPStore, mine: Report, world_size: int) -> list[Report]:
    """Every rank's report, in rank order, once all have come; rank 0 waits for them, the others for its word."""
    prefix = f"{_prefix()}/preflight"
    store.set(f"{prefix}/{mine.rank}", json.dumps(asdict(mine)))
    keys = [f"{prefix}/{rank}" for rank in range(world_size)]
    if mine.rank > 0:
        if not _come(store, [f"{prefix}/all"], COME_SECONDS + VERDICT_SECONDS):
            raise RanksMissing(f"{mine.at}: rank 0 has not come, or is gone")
        verdict = json.loads(store.get(f"{prefix}/all"))
        store.add(f"{prefix}/read", 1)
        if isinstance(verdict, str):
            raise RanksMissing(verdict)
        return numbered([Report(**report) for report in verdict])
    if not _come(store, keys, COME_SECONDS):
        came = [rank for rank, key in enumerate(keys) if store.check([key])]
        absent = missing(came, world_size, _ranks_per_node())
        text = f"{absent} did not come in {COME_SECONDS:.0f} s; {len(came)} of {world_size} ranks are here"
        store.set(f"{prefix}/all", json.dumps(text))
        _let_all_read(store, len(came))
        raise RanksMissing(text)
    reports = [json.loads(store.get(key)) for key in keys]
    store.set(f"{prefix}/all", json.dumps(reports))
    return numbered([Report(**report) for report in reports])


def _come(store: TCPStore, keys: Sequence[str], seconds: float) -> bool:
    """Whether all keys are there within that time. Not by the store's own waiting, which holds up signals."""
    until = time.monotonic() + seconds
    try:
        while not store.check(list(keys)):
            if time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)
    except RuntimeError:  # who held the store is gone
        return False
    return True


def _let_all_read(store: TCPStore, ranks: int) -> None:
    """Rank 0, before it ends: it may hold the store that the others have yet to read."""
    until = time.monotonic() + READ_SECONDS
    while store.add(f"{_prefix()}/preflight/read", 0) < ranks - 1 and time.monotonic() < until:
        time.sleep(POLL_SECONDS)


def _prefix() -> str:
    """Of this start's keys: torchrun's store outlives its restarts."""
    return f"crosslift/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _measure(reports: Sequence[Report], rank: int, device: torch.device) -> Measured:
    """After a barrier, the clock; then how fast an all-reduce is, and an exchange with another rank of this kind."""
    dist.barrier()
    clock = time.time()
    leaders = [min(each.rank for each in reports if each.node == node) for node in sorted({r.node for r in reports})]
    members = leaders if len(leaders) > 1 else [report.rank for report in reports]
    together, best = _all_reduce(len(reports), device), None
    for distance in ROUNDS:
        if distance < len(members):
            dist.barrier()  # rounds do not overlap
            if rank in members:
                rate = _exchange(members, members.index(rank), distance, device)
                best = max(best or 0.0, rate)
    return Measured(clock, together, best)


def _all_reduce(ranks: int, device: torch.device) -> float | None:
    """GiB a second that each link carries, `2 (n-1) / n` times the tensor's bytes, as all-reduces are compared."""
    if ranks == 1:
        return None
    tensor = torch.zeros(EXCHANGED_BYTES // 4, device=device)
    seconds = _fastest(lambda: dist.all_reduce(tensor), device)
    return 2 * (ranks - 1) / ranks * EXCHANGED_BYTES / seconds / 2**30


def _exchange(members: Sequence[int], place: int, distance: int, device: torch.device) -> float:
    """GiB a second, sending to one partner while receiving from another.

    A slow node slows its partners of one round; over several rounds, a good node has a good partner in one of them.
    """
    sent = torch.zeros(EXCHANGED_BYTES // 4, device=device)
    received = torch.empty_like(sent)
    to, source = (members[(place + offset) % len(members)] for offset in (distance, -distance))

    def exchange() -> None:
        ways = [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)]
        for work in dist.batch_isend_irecv(ways):
            work.wait()

    return EXCHANGED_BYTES / _fastest(exchange, device) / 2**30


def _fastest(communicate: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of three; the first one makes the connection."""
    seconds = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        communicate()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds
