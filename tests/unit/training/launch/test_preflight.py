"""The preflight: comparison of rank reports, and real processes that join over a real TCPStore."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "distributed"))

from ranks import SOURCE, environment, run_ranks

from training.launch.preflight_report import (
    Measurement,
    RankReport,
    find_mismatch,
    find_warnings,
    missing_ranks,
    summary,
    with_node_numbers,
)

SOFTWARE = {
    "python": "3.11.2",
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "crosslift": "0.1.0",
}
GPU = {"device": "NVIDIA H100", "memory_gib": 79.6}


def report(rank: int, node: int | None = None, **changes: object) -> RankReport:
    at = rank // 2 if node is None else node
    return replace(RankReport(rank, at, f"n{at}", "cpu", 0.0, None, SOFTWARE, 100.0), **changes)


def four(odd: int = 0, **changes: object) -> list[RankReport]:
    """Four ranks on two nodes; the changes are rank `odd`'s."""
    return [report(rank, **(changes if rank == odd else {})) for rank in range(4)]


def measured(*rates: float | None, clock: float = 1000.0) -> list[Measurement]:
    return [Measurement(clock, 0.5, rate) for rate in rates]


EVEN = measured(1.0, None, 1.0, None)


def test_matching_ranks_may_start() -> None:
    assert find_mismatch(four()) is None
    assert find_warnings(four(), EVEN) == []


@pytest.mark.parametrize("name", ["torch", "deepspeed", "crosslift"])
def test_a_rank_with_another_version_is_refused_and_named(name: str) -> None:
    reports = four(3, versions={**SOFTWARE, name: "9.9"})
    assert (
        find_mismatch(reports) == f"rank 3 on n1 has {name} 9.9, the others {SOFTWARE[name]}; every node needs the same"
    )
    absent = {each: version for each, version in SOFTWARE.items() if each != name}
    assert f"rank 3 on n1 has {name} none" in str(find_mismatch(four(3, versions=absent)))


@pytest.mark.parametrize("name", ["python", "transformers"])
def test_another_version_of_python_or_transformers_is_a_warning(name: str) -> None:
    reports = four(2, versions={**SOFTWARE, name: "9.9"})
    assert find_mismatch(reports) is None
    assert find_warnings(reports, EVEN) == [f"rank 2 on n1 has {name} 9.9, the others {SOFTWARE[name]}"]


def test_a_rank_without_its_gpu_is_named() -> None:
    reports = [replace(each, **GPU) for each in four()]
    assert find_mismatch(reports) is None
    reports[2] = replace(reports[2], device="cpu", memory_gib=0.0)
    assert find_mismatch(reports) == "rank 2 on n1 sees no GPU, the others a GPU"
    assert find_mismatch(four(1, problem="sees no device")) == "rank 1 on n0: sees no device"


def test_another_kind_of_gpu_is_a_warning() -> None:
    reports = [replace(each, **GPU) for each in four()]
    reports[1] = replace(reports[1], memory_gib=39.4)
    assert find_mismatch(reports) is None
    (line,) = find_warnings(reports, EVEN)
    assert line.startswith("rank 1 on n0 has NVIDIA H100 with 39 GiB, the others NVIDIA H100 with 80 GiB: all run")


@pytest.mark.parametrize(
    ("offset", "expected"), [(4.9, []), (-6.0, ["the clock of n1 is off by -6 s: logs will not be in order"])]
)
def test_clocks_are_compared(offset: float, expected: list[str]) -> None:
    times = [replace(each, clock=1000.0 + (offset if rank in (2, 3) else 0)) for rank, each in enumerate(EVEN)]
    assert find_warnings([*four(), report(4, node=2)], [*times, Measurement(1000.0, 0.5, 1.0)]) == expected


def test_a_slow_node_is_named_but_not_its_neighbours() -> None:
    reports = [report(rank, node=rank) for rank in range(5)]
    assert find_warnings(reports, measured(1.0, 0.9, 0.4, 1.1, 1.0)) == [
        "n2 (node 2) exchanges data at 0.40 GiB/s, the median is 1.00 GiB/s"
    ]
    assert find_warnings(reports[:2], measured(1.0, 0.1)) == []  # of two nodes, it is unknown which one is slow


def test_a_full_disk_is_reported_once_per_host() -> None:
    reports = [replace(each, disk_gib=0.5) if each.node == 1 else each for each in four()]
    assert find_warnings(reports, EVEN) == ["n1 has 0.50 GiB free at output_dir"]


def test_the_summary_is_one_line_for_one_node_and_a_table_for_several() -> None:
    two = [report(0), report(1)]
    assert summary(two, measured(0.5, 0.5), 0.24) == [
        "preflight: 2 ranks on n0, cpu, torch 2.13.0 deepspeed 0.19.8 crosslift 0.1.0 (0.2 s), all-reduce 0.50 GiB/s"
    ]
    (alone,) = summary(two[:1], [Measurement(1000.0, None, None)], 0.1)
    assert alone.startswith("preflight: 1 rank on n0, cpu")
    assert "all-reduce" not in alone
    head, names, _, *rows = summary(four(), EVEN, 1.0)
    assert head.startswith("preflight: 4 ranks on 2 nodes, cpu")
    assert names.split() == ["node", "host", "ranks", "disk,", "GiB", "GiB/s", "clock,", "s"]
    assert [row.split() for row in rows] == [
        ["0", "n0", "0-1", "100", "1.00", "+0.00"], ["1", "n1", "2-3", "100", "1.00", "+0.00"]
    ]  # fmt: skip


def test_nodes_without_a_number_are_numbered_by_host() -> None:
    reports = [report(rank, host=f"h{rank // 2}", node=-1) for rank in range(4)]
    assert [each.node for each in with_node_numbers(reports)] == [0, 0, 1, 1]
    assert with_node_numbers(four()) == four()


@pytest.mark.parametrize(
    ("joined", "named"),
    [
        ([0, 1, 2, 3], "node 2 (ranks 4 to 5)"),
        ([0, 2, 3, 4, 5], "rank 1 of node 0"),
        ([0], "rank 1 of node 0, node 1 (ranks 2 to 3), node 2 (ranks 4 to 5)"),
    ],
)
def test_missing_ranks_are_named_by_node(joined: list[int], named: str) -> None:
    assert missing_ranks(joined, 6, 2) == named


# --- real ranks that only run the preflight

JOIN = """
    import logging, os, sys
    from datetime import timedelta
    from pathlib import Path
    from training.launch import preflight
    from training.errors import ConfigError
    rank = int(os.environ["RANK"])
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    {before}
    try:
        preflight.join(Path.cwd(), timedelta(seconds=60))
    except (ConfigError, preflight.RanksMissing) as error:
        print(type(error).__name__, error)
        os._exit(9)  # not a status of a finished run, which a launcher treats differently
    import torch
    import torch.distributed as dist
    from training import distributed
    mine, used, all_reduce = [2**53 + 1, -7 * rank, 2**63 - 1], [], dist.all_reduce
    dist.all_reduce = lambda tensor, group=None: (used.append(group), all_reduce(tensor, group=group))
    for backend in "gloo", "nccl":  # the CPU's sum needs no other group, or one beside NCCL's
        dist.get_backend = lambda *_: backend
        distributed.open_cpu_group(timedelta(seconds=60))
        assert (distributed._cpu_group is None) == (backend == "gloo")
        assert distributed.cpu_sum(mine).tolist() == [2**54 + 2, -7, -2], "modulo 2^64"
        assert distributed.gather_objects(rank) == [0, 1]
        distributed.barrier()
    assert mine == [2**53 + 1, -7 * rank, 2**63 - 1]
    assert used == [None, distributed._cpu_group]
    assert dist.distributed_c10d._world.pg_map[distributed._cpu_group][0] == "gloo"
    from training.loop.straggler import StragglerMonitor
    torch.manual_seed(0)
    monitor = StragglerMonitor(4, torch.device("cpu"))
    if rank == 1:
        product = torch.mm
        torch.mm = lambda *each: [product(*each) for _ in range(20)]
    found = [monitor.after_step(done, waited=0.25 * rank) for done in range(1, 13)]
    assert found[0] == found[4] == {{}}
    print(found[11]["ranks/slowest"], found[11]["ranks/slowdown"] > 3, found[11]["ranks/data_wait_seconds_max"])
    reference = torch.Generator().manual_seed(0)
    assert torch.rand(1).item() == torch.rand(1, generator=reference).item(), "the probe drew a random number"
"""


def join_program(before: str = "") -> list[str]:
    return ["-c", textwrap.dedent(JOIN).format(before=before)]


def test_two_real_ranks_join_within_two_seconds_and_the_straggler_is_named() -> None:
    results = run_ranks(join_program(), 2, timeout=60)
    assert [each.returncode for each in results] == [0, 0], results[1].stderr[-2000:]
    lines = results[0].stderr.splitlines()
    (line,) = [line for line in lines if line.startswith("preflight: 2 ranks on")]
    assert float(line.rpartition("(")[2].partition(" s)")[0]) < 2
    assert float(line.rpartition(" GiB/s")[0].rpartition(" ")[2]) > 0
    assert [each.stdout for each in results] == ["1.0 True 0.25\n"] * 2
    (warning,) = [line for line in lines if "rank 1 on" in line]
    assert warning.startswith("step 12: rank 1 on ")
    assert "times as slowly as the median rank" in warning
    assert "rank 1 on" not in results[1].stderr


def test_a_rank_with_another_torch_is_refused_before_any_collective_call() -> None:
    before = "preflight.versions = lambda: {'torch': '2.0' if rank else '1.0'}"
    results = run_ranks(join_program(before), 2, timeout=60)
    assert [each.returncode for each in results] == [9, 9], results[1].stderr[-2000:]
    texts = {each.stdout for each in results}
    assert len(texts) == 1
    assert texts.pop().startswith("ConfigError preflight: rank")


def test_a_rank_that_never_joins_is_named_by_all_the_others(tmp_path: Path) -> None:
    """Three ranks of one launcher, one of which hangs before the preflight."""
    before = "preflight.JOIN_TIMEOUT_S = 3.0\nif rank == 1: import time; time.sleep(60)"
    started = time.monotonic()
    code = textwrap.dedent(JOIN).format(before=before)
    program = f"""
        import sys
        from pathlib import Path
        from training.launch import launcher
        from training.launch.status_exchange import NodePlace
        launcher.FAILURE_GRACE_S = 2.0
        sys.exit(launcher.Launcher(NodePlace(), [sys.executable, "-c", {code!r}], 3, Path({str(tmp_path)!r})).run())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment(), cwd=SOURCE, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    assert time.monotonic() - started < 45
    line = "RanksMissing rank 1 of node 0 did not join within 3 s; 2 of 3 ranks joined"
    assert done.stdout.splitlines() == [line] * 2
