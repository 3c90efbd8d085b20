"""Evaluates the preflight: mismatches that stop a run, warnings, and the summary that is logged. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.console import table

MAX_CLOCK_OFFSET_S = 5.0
SLOW_SHARE = 0.5  # of the median bandwidth
LOW_DISK_GIB = 1.0
MUST_MATCH = ("torch", "deepspeed", "crosslift")  # packages whose versions must be equal
SHOULD_MATCH = ("python", "transformers")


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's view of its node."""

    rank: int
    node: int  # -1: not set by its launcher
    host: str
    device: str  # "cpu", or the GPU's name
    memory_gib: float  # of the GPU; 0 for a CPU
    problem: str | None  # why its device cannot be used
    versions: dict[str, str]
    disk_gib: float | None  # free at output_dir; None without one

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurements of one rank in the process group."""

    clock: float  # unix seconds, taken by all ranks at the same moment
    all_reduce: float | None  # GiB/s of all ranks together; None for a single rank
    exchange: float | None  # GiB/s, best exchange with another node (one node: another rank); None if not measured


def with_node_numbers(reports: Sequence[RankReport]) -> list[RankReport]:
    """The reports with nodes numbered by host name, unless the launcher has numbered them."""
    hosts = list(dict.fromkeys(report.host for report in reports))
    return [replace(report, node=hosts.index(report.host)) if report.node < 0 else report for report in reports]


def find_mismatch(reports: Sequence[RankReport]) -> str | None:
    """Why the ranks cannot run together, naming the rank and host; None if they can."""
    for report in reports:
        if report.problem is not None:
            return f"{report.name}: {report.problem}"
    for package in MUST_MATCH:
        if odd := _find_odd(reports, [report.versions.get(package, "none") for report in reports]):
            report, found, usual = odd
            return f"{report.name} has {package} {found}, the others {usual}; every node needs the same"
    if odd := _find_odd(reports, ["cpu" if report.device == "cpu" else "a GPU" for report in reports]):
        report, found, usual = odd
        seen = "no GPU" if found == "cpu" else found
        return f"{report.name} sees {seen}, the others {'none' if usual == 'cpu' else usual}"
    return None


def find_warnings(reports: Sequence[RankReport], measurements: Sequence[Measurement]) -> list[str]:
    """Differences that do not prevent a run, but that the user should know about."""
    lines = []
    for package in SHOULD_MATCH:
        if odd := _find_odd(reports, [report.versions.get(package, "none") for report in reports]):
            lines.append(f"{odd[0].name} has {package} {odd[1]}, the others {odd[2]}")
    if odd := _find_odd(reports, [f"{report.device} with {report.memory_gib:.0f} GiB" for report in reports]):
        lines.append(f"{odd[0].name} has {odd[1]}, the others {odd[2]}: all run at the speed of the slowest")
    median_clock = sorted(each.clock for each in measurements)[len(measurements) // 2]
    hosts: set[str] = set()
    for report, each in zip(reports, measurements, strict=True):
        if report.host in hosts:
            continue
        hosts.add(report.host)
        if abs(each.clock - median_clock) > MAX_CLOCK_OFFSET_S:
            lines.append(
                f"the clock of {report.host} is off by {each.clock - median_clock:+.0f} s: logs will not be in order"
            )
        if report.disk_gib is not None and report.disk_gib < LOW_DISK_GIB:
            lines.append(f"{report.host} has {report.disk_gib:.2f} GiB free at output_dir")
    rates = sorted(each.exchange for each in measurements if each.exchange is not None)
    median_rate = rates[len(rates) // 2] if len(rates) > 2 else 0.0  # of two, neither can be called slow
    for report, each in zip(reports, measurements, strict=True):
        if each.exchange is not None and each.exchange < SLOW_SHARE * median_rate:
            rate = f"{each.exchange:.2f} GiB/s, the median is {median_rate:.2f} GiB/s"
            lines.append(f"{report.host} (node {report.node}) exchanges data at {rate}")
    return lines


def summary(reports: Sequence[RankReport], measurements: Sequence[Measurement], seconds: float) -> list[str]:
    """One line; for several nodes also a table with a line per node."""
    first = reports[0]
    device = first.device if first.device == "cpu" else f"{first.device} {first.memory_gib:.0f} GiB"
    software = " ".join(f"{name} {first.versions[name]}" for name in MUST_MATCH if name in first.versions)
    nodes = sorted({report.node for report in reports})
    where = first.host if len(nodes) == 1 else f"{len(nodes)} nodes"
    ranks = "1 rank" if len(reports) == 1 else f"{len(reports)} ranks"
    lines = [f"preflight: {ranks} on {where}, {device}, {software} ({seconds:.1f} s)"]
    if (rate := measurements[0].all_reduce) is not None:
        lines[0] += f", all-reduce {rate:.2f} GiB/s"
    if len(nodes) == 1:
        return lines
    rows = []
    for node in nodes:
        here = [(report, each) for report, each in zip(reports, measurements, strict=True) if report.node == node]
        report, each = here[0]
        numbers = f"{report.rank}-{here[-1][0].rank}" if len(here) > 1 else str(report.rank)
        disk = "-" if report.disk_gib is None else f"{report.disk_gib:,.0f}"
        clock = f"{each.clock - measurements[0].clock:+.2f}"
        rows.append([node, report.host, numbers, disk, f"{each.exchange or 0:.2f}", clock])
    header = ["node", "host", "ranks", "disk, GiB", "GiB/s", "clock, s"]
    return [*lines, *table(header, rows, text=(1, 2)).splitlines()]


def missing_ranks(joined: Sequence[int], world_size: int, ranks_per_node: int) -> str:
    """The ranks that are not in `joined`, as text; complete nodes as one entry."""
    absent = sorted(set(range(world_size)) - set(joined))
    by_node: dict[int, list[int]] = {}
    for rank in absent:
        by_node.setdefault(rank // ranks_per_node, []).append(rank)
    parts = [
        f"node {node} (ranks {ranks[0]} to {ranks[-1]})" if len(ranks) == ranks_per_node > 1
        else f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))} of node {node}"
        for node, ranks in by_node.items()
    ]  # fmt: skip
    return ", ".join(parts)


def _find_odd(reports: Sequence[RankReport], values: Sequence[str]) -> tuple[RankReport, str, str] | None:
    """The first rank whose value is not the most common one, its value, and the most common one."""
    usual = Counter(values).most_common(1)[0][0]
    return next(((report, value, usual) for report, value in zip(reports, values, strict=True) if value != usual), None)
