"""Planning at any size: CPU seconds a step to plan and to pack a rank's share, and how evenly ranks are occupied.

    python -m benchmarks.scale --json FILE --plot FILE

No ranks are started and no text is read: the index is simulated (rows, translations and lengths are functions of the
row's number), so a mixture may have 10^9 rows. Lengths are log-normal, as in GSM8K and its translations: 185 tokens on
average, a third of them labels. A step is planned, its samples are distributed over all ranks, and the rows and
contrast sets of one rank are made, as every rank does in the background for every step. The share of a step of one
second is what a run with such steps would spend on it.

Weak scaling has a number of samples a rank, strong scaling a number of slots a step. Sets have 16 pairs (`fill`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.ranks import machine
from data_pipeline.batching.contrast import contrast_sets
from data_pipeline.batching.grid import Grid
from data_pipeline.batching.micro_steps import Balance, Spread
from data_pipeline.console import table
from data_pipeline.order.mixture import Quotas
from data_pipeline.order.order import mix64
from data_pipeline.order.pairing import PlannedPairing
from data_pipeline.order.plan import Planner, StepPlan

Integers = npt.NDArray[np.int64]
RANKS = (1, 8, 64, 256, 1024)
RANKS_OF_A_NODE = 8
GRID = Grid("packed", micro_batch_tokens=16384, row_tokens=2048, label_cost=0.075)  # an 8B Llama's head
LABELS = 0.35  # of a labelled sample's tokens
SEED = 3


@dataclass(frozen=True)
class Case:
    """One size of a run."""

    name: str
    slots: int
    ranks: int
    languages: int
    rows: int  # of all languages


@dataclass(frozen=True)
class Result:
    """Means over the measured steps."""

    plan_seconds: float
    pack_seconds: float
    balance: float
    padding: float
    idle: float
    micro_steps: float


class Virtual:
    """An array whose values are computed from its indices."""

    def __init__(self, length: int, values: Callable[[Any], Any]) -> None:
        self._length, self._values = length, values

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, indices: Any) -> Any:
        return self._values(np.asarray(indices))


class SimulatedIndex:
    """What `Planner` reads of a `DataIndex`, for parallel items in all languages."""

    def __init__(self, n_languages: int, n_rows: int) -> None:
        self.languages = tuple(f"l{number}" for number in range(n_languages))
        self._items = n_rows // n_languages
        lengths = np.random.default_rng(SEED).lognormal(np.log(176), 0.32, 1 << 16).clip(40, 1500).astype(np.int64)
        self.group = Virtual(n_rows, lambda rows: rows % self._items)
        self.content = Virtual(n_rows, lambda rows: mix64(rows.astype(np.uint64)).astype(np.int64))
        self.n_bytes = Virtual(n_rows, lambda rows: lengths[mix64(rows.astype(np.uint64)) & np.uint64(0xFFFF)])
        self.bad = Virtual(n_rows, lambda rows: np.zeros(rows.shape, np.bool_))

    def rows(self, language: int) -> Virtual:
        return Virtual(self._items, lambda places: language * self._items + places)

    def translations(self, rows: Integers, language: int) -> Integers:
        return language * self._items + rows % self._items


def cases(largest: int) -> Iterator[Case]:
    """Weak and strong scaling, then languages and rows at the largest number of ranks."""
    ranks = [each for each in RANKS if each <= largest]
    for samples in (4, 16):
        yield from (Case(f"weak, {samples} a rank", samples * each, each, 20, 10**7) for each in ranks)
    for slots in (128, 1024):
        yield from (Case(f"strong, {slots:,} slots", slots, each, 20, 10**7) for each in ranks)
    for languages in (2, 1000):
        yield Case("languages", 16 * ranks[-1], ranks[-1], languages, 10**7)
    yield Case("rows", 16 * ranks[-1], ranks[-1], 1000, 10**9)


def measure(case: Case, steps: int) -> Result:
    """Plans, distributes and packs steps for the last rank; the balance is that of all ranks."""
    index: Any = SimulatedIndex(case.languages, case.rows)
    quotas = Quotas(dict.fromkeys(index.languages, 1.0), index.languages, 65536)
    planner = Planner(index, quotas, PlannedPairing(0, "fill", set_size=16), case.slots, SEED)
    rank, per_node = case.ranks - 1, min(case.ranks, RANKS_OF_A_NODE)
    planned, packed, n_micro_steps, total = [], [], 0, Balance()
    for step in range(steps):
        started = time.thread_time()
        plan = planner.step(step)
        planned.append(time.thread_time() - started)
        lengths, labels = _measures(plan)
        started = time.thread_time()
        spread = Spread(GRID, lengths, labels, case.ranks, per_node)
        micro_steps = spread.micro_steps(plan.sets)
        for micro_step in micro_steps:
            share = micro_step.share(rank)
            rows = GRID.rows(lengths[share].tolist())
            order = share[np.array([number for row in rows for number in row], np.int64)]
            contrast_sets(plan, micro_step, rank, case.ranks, order)
        packed.append(time.thread_time() - started)
        n_micro_steps += len(micro_steps)
        total += Balance.of(micro_steps, spread)
    return Result(
        float(np.median(planned)), float(np.median(packed)), total.ratio, 1 - total.packing_efficiency,
        total.idle_share, n_micro_steps / steps,
    )  # fmt: skip


def _measures(plan: StepPlan) -> tuple[Integers, Integers]:
    """Lengths and labels of the step's samples; fills have no answer."""
    lengths = plan.costs.astype(np.int64)
    labels = (LABELS * lengths).astype(np.int64)
    labels[plan.n_slots :] = 0
    lengths[plan.n_slots :] = ((1 - LABELS) * lengths[plan.n_slots :]).astype(np.int64)
    return lengths, labels


def lines(results: list[tuple[Case, Result]]) -> str:
    """The results as a table."""
    header = ["case", "ranks", "slots", "languages", "rows", "plan, ms", "pack, ms", "of 1 s", "balance", "padding",
              "idle", "micro-batches"]  # fmt: skip
    rows = [
        [
            case.name, f"{case.ranks:,}", f"{case.slots:,}", f"{case.languages:,}", f"{case.rows:.0e}",
            f"{1000 * found.plan_seconds:.1f}", f"{1000 * found.pack_seconds:.1f}",
            f"{found.plan_seconds + found.pack_seconds:.1%}", f"{found.balance:.3f}", f"{found.padding:.1%}",
            f"{found.idle:.1%}", f"{found.micro_steps:.1f}",
        ]
        for case, found in results
    ]  # fmt: skip
    return table(header, rows)


def plot(results: list[tuple[Case, Result]], file: Path) -> None:
    """Seconds and balance against the number of ranks, a line for each kind of scaling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    times, balances = figure.subplots(1, 2)
    for name in dict.fromkeys(case.name for case, _ in results if case.name.startswith(("weak", "strong"))):
        found = [(case.ranks, result) for case, result in results if case.name == name]
        ranks = [each for each, _ in found]
        times.plot(ranks, [1000 * (each.plan_seconds + each.pack_seconds) for _, each in found], marker="o", label=name)
        balances.plot(ranks, [100 * (each.balance - 1) for _, each in found], marker="o", label=name)
    times.axhline(50, color="grey", linestyle="--", label="5 % of a step of 1 s")
    times.set(ylabel="CPU time of a step, ms", title="Plan a step and pack a rank's share")
    balances.set(ylabel="largest cost of a rank above the mean, %", title="Balance (one rank: 0 %)")
    for axes in (times, balances):
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(RANKS, [f"{each:,}" for each in RANKS])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("ranks")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Planning and balance on simulated ranks, languages and rows.")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each case")
    parser.add_argument("--largest", type=int, default=RANKS[-1], help="most ranks")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--plot", type=Path, help="also draw them here (PNG)")
    arguments = parser.parse_args()
    results = [(case, measure(case, arguments.steps)) for case in cases(arguments.largest)]
    print(lines(results))
    if arguments.json:
        figures = [asdict(case) | asdict(found) for case, found in results]
        arguments.json.write_text(json.dumps({"machine": machine(1), "cases": figures}, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
