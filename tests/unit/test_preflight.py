"""What the preflight makes of reports, and its roll call with real processes over a real store."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from ranks import SOURCE, environment, run_ranks

from training.launch.preflight_report import Measured, Report, broken, doubtful, missing, numbered, summary

SOFTWARE = {
    "python": "3.11.2",
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "crosslift": "0.1.0",
}
GPU = {"device": "NVIDIA H100", "memory_gib": 79.6}


def report(rank: int, node: int | None = None, **changes: object) -> Report:
    at = rank // 2 if node is None else node
    return replace(Report(rank, at, f"n{at}", "cpu", 0.0, None, SOFTWARE, 100.0), **changes)


def four(odd: int = 0, **changes: object) -> list[Report]:
    """Four ranks on two nodes; the changes are rank `odd`'s."""
    return [report(rank, **(changes if rank == odd else {})) for rank in range(4)]


def measured(*rates: float | None, clock: float = 1000.0) -> list[Measured]:
    return [Measured(clock, 0.5, rate) for rate in rates]


EVEN = measured(1.0, None, 1.0, None)


def test_ranks_that_are_alike_may_start() -> None:
    assert broken(four()) is None
    assert doubtful(four(), EVEN) == []


@pytest.mark.parametrize("name", ["torch", "deepspeed", "crosslift"])
def test_another_version_breaks_a_run_and_is_named(name: str) -> None:
    reports = four(3, versions={**SOFTWARE, name: "9.9"})
    assert broken(reports) == f"rank 3 on n1 has {name} 9.9, the others {SOFTWARE[name]}; every node needs the same"
    absent = {each: version for each, version in SOFTWARE.items() if each != name}
    assert f"rank 3 on n1 has {name} none" in str(broken(four(3, versions=absent)))


@pytest.mark.parametrize("name", ["python", "transformers"])
def test_what_may_differ_is_a_warning(name: str) -> None:
    reports = four(2, versions={**SOFTWARE, name: "9.9"})
    assert broken(reports) is None
    assert doubtful(reports, EVEN) == [f"rank 2 on n1 has {name} 9.9, the others {SOFTWARE[name]}"]


def test_a_node_without_its_gpu_is_named() -> None:
    reports = [replace(each, **GPU) for each in four()]
    assert broken(reports) is None
    reports[2] = replace(reports[2], device="cpu", memory_gib=0.0)
    assert broken(reports) == "rank 2 on n1 sees no GPU, the others a GPU"
    assert broken(four(1, problem="sees nothing")) == "rank 1 on n0: sees nothing"


def test_another_kind_of_gpu_is_a_warning() -> None:
    reports = [replace(each, **GPU) for each in four()]
    reports[1] = replace(reports[1], memory_gib=39.4)
    assert broken(reports) is None
    (line,) = doubtful(reports, EVEN)
    assert line.startswith("rank 1 on n0 has NVIDIA H100 with 39 GiB, the others NVIDIA H100 with 80 GiB: all run")


@pytest.mark.parametrize(
    ("off", "said"), [(4.9, []), (-6.0, ["the clock of n1 is -6 s off: logs will not be in order"])]
)
def test_clocks_are_compared(off: float, said: list[str]) -> None:
    times = [replace(each, clock=1000.0 + (off if rank in (2, 3) else 0)) for rank, each in enumerate(EVEN)]
    assert doubtful([*four(), report(4, node=2)], [*times, Measured(1000.0, 0.5, 1.0)]) == said


def test_a_slow_node_is_told_from_its_neighbours() -> None:
    reports = [report(rank, node=rank) for rank in range(5)]
    assert doubtful(reports, measured(1.0, 0.9, 0.4, 1.1, 1.0)) == [
        "n2 (node 2) exchanges 0.40 GiB/s, the median is 1.00 GiB/s"
    ]
    assert doubtful(reports[:2], measured(1.0, 0.1)) == []  # of two, which one?


def test_a_full_disk_is_said_once_a_host() -> None:
    reports = [replace(each, disk_gib=0.5) if each.node == 1 else each for each in four()]
    assert doubtful(reports, EVEN) == ["n1 has 0.50 GiB free at output_dir"]


def test_one_line_for_one_node_a_table_for_more() -> None:
    two = [report(0), report(1)]
    assert summary(two, measured(0.5, 0.5), 0.24) == [
        "preflight: 2 ranks on n0, cpu, torch 2.13.0 deepspeed 0.19.8 crosslift 0.1.0 (0.2 s), all-reduce 0.50 GiB/s"
    ]
    (alone,) = summary(two[:1], [Measured(1000.0, None, None)], 0.1)
    assert alone.startswith("preflight: 1 rank on n0, cpu")
    assert "all-reduce" not in alone
    head, names, *rows = summary(four(), EVEN, 1.0)
    assert head.startswith("preflight: 4 ranks on 2 nodes, cpu")
    assert names.split() == ["node", "host", "ranks", "disk,", "GiB", "GiB/s", "clock,", "s"]
    assert [row.split() for row in rows] == [
        ["0", "n0", "0-1", "100", "1.00", "+0.00"], ["1", "n1", "2-3", "100", "1.00", "+0.00"]
    ]  # fmt: skip


def test_nodes_that_nobody_numbered_go_by_their_hosts() -> None:
    reports = [report(rank, host=f"h{rank // 2}", node=-1) for rank in range(4)]
    assert [each.node for each in numbered(reports)] == [0, 0, 1, 1]
    assert numbered(four()) == four()


@pytest.mark.parametrize(
    ("came", "said"),
    [
        ([0, 1, 2, 3], "node 2 (ranks 4 to 5)"),
        ([0, 2, 3, 4, 5], "rank 1 of node 0"),
        ([0], "rank 1 of node 0, node 1 (ranks 2 to 3), node 2 (ranks 4 to 5)"),
    ],
)
def test_who_is_missing_is_named_by_node(came: list[int], said: str) -> None:
    assert missing(came, 6, 2) == said


# --- real ranks, which only do the preflight

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
        os._exit(9)  # neither of the statuses of a finished run: the launcher knows those
    import torch
    from training.loop.straggler import Stragglers
    from training.launch.watchdog import WatchdogConfig
    torch.manual_seed(0)
    slow = Stragglers(WatchdogConfig(straggler_every=4), torch.device("cpu"))
    if rank == 1:
        product = torch.mm
        torch.mm = lambda *each: [product(*each) for _ in range(20)]
    told = [slow.after(done, waited=0.25 * rank) for done in range(1, 13)]
    assert told[0] == told[4] == {{}}
    print(told[11]["ranks/slowest"], told[11]["ranks/slowdown"] > 3, told[11]["ranks/data_wait_seconds_max"])
    reference = torch.Generator().manual_seed(0)
    assert torch.rand(1).item() == torch.rand(1, generator=reference).item(), "the probe drew a random number"
"""


def join_program(before: str = "") -> list[str]:
    return ["-c", textwrap.dedent(JOIN).format(before=before)]


def test_two_real_ranks_join_within_two_seconds_and_the_slow_one_is_named() -> None:
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


def test_a_rank_that_never_comes_is_named_by_all_the_others(tmp_path: Path) -> None:
    """Our launcher, three ranks of which one hangs on its way."""
    before = "preflight.COME_SECONDS = 3.0\nif rank == 1: import time; time.sleep(60)"
    started = time.monotonic()
    code = textwrap.dedent(JOIN).format(before=before)
    program = f"""
        import sys
        from training.launch import launcher
        from training.launch.nodes import Nodes, Place
        launcher.FAILED_GRACE = 2.0
        sys.exit(launcher.Launcher(Nodes(Place()), [sys.executable, "-c", {code!r}], 3).run())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment(), cwd=SOURCE, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    assert time.monotonic() - started < 45
    line = "RanksMissing rank 1 of node 0 did not come in 3 s; 2 of 3 ranks are here"
    assert done.stdout.splitlines() == [line] * 2
