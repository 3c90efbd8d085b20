"""What the preflight makes of the ranks' reports: what breaks a run, what a person should know, what is printed.

In: a report and measurements of every rank. Out: text. Pure. Next: `preflight.py` raises or logs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

CLOCK_SECONDS = 5.0
SLOW_SHARE = 0.5  # of the median node's bandwidth
LOW_DISK_GIB = 1.0
ALIKE = ("torch", "deepspeed", "crosslift")  # what differs here breaks a run; python and transformers may only


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank sees."""

    rank: int
    node: int  # -1: its launcher did not say
    host: str
    device: str  # "cpu", or the GPU's name
    memory_gib: float  # of the GPU; 0 for a CPU
    problem: str | None  # why its device cannot be used
    versions: dict[str, str]
    disk_gib: float | None  # free at output_dir; None where there is none

    @property
    def at(self) -> str:
        """For messages."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What the process group shows of one rank."""

    clock: float  # unix seconds, taken by all at the same moment
    all_reduce: float | None  # GiB a second of all ranks together; None for one rank
    gib_per_second: float | None  # best exchange with another node (one node: another rank); None for who took no part


def numbered(reports: Sequence[Report]) -> list[Report]:
    """Nodes that no launcher has numbered are told apart by their host names."""
    hosts = list(dict.fromkeys(report.host for report in reports))
    return [replace(report, node=hosts.index(report.host)) if report.node < 0 else report for report in reports]


def broken(reports: Sequence[Report]) -> str | None:
    """What no run can go on with, naming the rank and host; None where all is well."""
    for report in reports:
        if report.problem is not None:
            return f"{report.at}: {report.problem}"
    for name in ALIKE:
        if odd := _odd(reports, [report.versions.get(name, "none") for report in reports]):
            report, has, usual = odd
            return f"{report.at} has {name} {has}, the others {usual}; every node needs the same"
    if odd := _odd(reports, ["cpu" if report.device == "cpu" else "a GPU" for report in reports]):
        report, has, usual = odd
        return f"{report.at} sees {'no GPU' if has == 'cpu' else has}, the others {'none' if usual == 'cpu' else usual}"
    return None


def doubtful(reports: Sequence[Report], measured: Sequence[Measured]) -> list[str]:
    """What a run may go on with, but a person should know of."""
    lines = []
    for name in ("python", "transformers"):
        if odd := _odd(reports, [report.versions.get(name, "none") for report in reports]):
            lines.append(f"{odd[0].at} has {name} {odd[1]}, the others {odd[2]}")
    if odd := _odd(reports, [f"{report.device} with {report.memory_gib:.0f} GiB" for report in reports]):
        lines.append(f"{odd[0].at} has {odd[1]}, the others {odd[2]}: all run at the slowest one's speed")
    middle = sorted(each.clock for each in measured)[len(measured) // 2]
    for host, report, each in _once_a_host(reports, measured):
        if abs(each.clock - middle) > CLOCK_SECONDS:
            lines.append(f"the clock of {host} is {each.clock - middle:+.0f} s off: logs will not be in order")
        if report.disk_gib is not None and report.disk_gib < LOW_DISK_GIB:
            lines.append(f"{host} has {report.disk_gib:.2f} GiB free at output_dir")
    rates = sorted(each.gib_per_second for each in measured if each.gib_per_second is not None)
    for report, each in zip(reports, measured, strict=True):
        usual = rates[len(rates) // 2] if len(rates) > 2 else 0.0  # of two, none can be told to be the slow one
        if each.gib_per_second is not None and each.gib_per_second < SLOW_SHARE * usual:
            rate = f"{each.gib_per_second:.2f} GiB/s, the median is {usual:.2f} GiB/s"
            lines.append(f"{report.host} (node {report.node}) exchanges {rate}")
    return lines


def summary(reports: Sequence[Report], measured: Sequence[Measured], seconds: float) -> list[str]:
    """One line, or for several nodes a table with a line a node."""
    first = reports[0]
    device = first.device if first.device == "cpu" else f"{first.device} {first.memory_gib:.0f} GiB"
    software = " ".join(f"{name} {first.versions[name]}" for name in ALIKE if name in first.versions)
    nodes = sorted({report.node for report in reports})
    where = first.host if len(nodes) == 1 else f"{len(nodes)} nodes"
    ranks = "1 rank" if len(reports) == 1 else f"{len(reports)} ranks"
    lines = [f"preflight: {ranks} on {where}, {device}, {software} ({seconds:.1f} s)"]
    if (rate := measured[0].all_reduce) is not None:
        lines[0] += f", all-reduce {rate:.2f} GiB/s"
    if len(nodes) == 1:
        return lines
    lines.append(f"{'node':>4}  {'host':<24} {'ranks':<11} {'disk, GiB':>10} {'GiB/s':>7} {'clock, s':>9}")
    for node in nodes:
        here = [(report, each) for report, each in zip(reports, measured, strict=True) if report.node == node]
        report, each = here[0]
        numbers = f"{report.rank}-{here[-1][0].rank}" if len(here) > 1 else str(report.rank)
        disk = "-" if report.disk_gib is None else f"{report.disk_gib:,.0f}"
        lines.append(
            f"{node:>4}  {report.host:<24} {numbers:<11} {disk:>10} {each.gib_per_second or 0:>7.2f} "
            f"{each.clock - measured[0].clock:>+9.2f}"
        )
    return lines


def missing(came: Sequence[int], world_size: int, ranks_per_node: int) -> str:
    """Who is not among `came`: whole nodes as nodes."""
    absent = sorted(set(range(world_size)) - set(came))
    by_node: dict[int, list[int]] = {}
    for rank in absent:
        by_node.setdefault(rank // ranks_per_node, []).append(rank)
    parts = [
        f"node {node} (ranks {ranks[0]} to {ranks[-1]})" if len(ranks) == ranks_per_node > 1
        else f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))} of node {node}"
        for node, ranks in by_node.items()
    ]  # fmt: skip
    return ", ".join(parts)


def _odd(reports: Sequence[Report], values: Sequence[Any]) -> tuple[Report, Any, Any] | None:
    """The first rank whose value is not the most common one, its value, and that one."""
    usual = Counter(values).most_common(1)[0][0]
    return next(((report, value, usual) for report, value in zip(reports, values, strict=True) if value != usual), None)


def _once_a_host(reports: Sequence[Report], measured: Sequence[Measured]) -> list[tuple[str, Report, Measured]]:
    seen: dict[str, tuple[str, Report, Measured]] = {}
    for report, each in zip(reports, measured, strict=True):
        seen.setdefault(report.host, (report.host, report, each))
    return list(seen.values())
