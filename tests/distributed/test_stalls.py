"""A stalled rank ends the run with its name, step, phase and stack; a slow one does not. With real ranks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ports import free_port
from ranks import SOURCE, environment
from tiny_run import RANK_ITEMS, write_data

PROGRAM = str(Path(__file__).with_name("stalls.py"))
HOST = socket.gethostname()
STALL_SECONDS = 6.0  # more than one slow step of `stalls.py`, less than all of them


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("stalls") / "data", RANK_ITEMS)


def start_node(fault: str, data: Path, output: Path, place: str, nproc: int) -> subprocess.Popen[str]:
    command = [sys.executable, PROGRAM, fault, str(data), str(output)]
    program = f"""
        import sys
        from pathlib import Path
        from training.launch.launcher import Launcher
        from training.launch.status_exchange import NodePlace
        sys.exit(Launcher({place}, {command!r}, {nproc}, Path({str(output)!r}), {STALL_SECONDS}).run())
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment(), cwd=SOURCE, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def printed(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=150)[1]
    finally:
        process.kill()


def test_an_endless_loop_is_detected_and_slow_steps_before_it_are_not(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    node = start_node("loop", data, output, "NodePlace()", 2)
    text = printed(node)
    assert node.returncode == 1, text[-3000:]
    report = text[text.index("crosslift: ") :].splitlines()
    assert report[0].startswith(f"crosslift: rank 1 on {HOST} is stalled: no heartbeat for ")
    assert "; step 5, phase 'waiting for data', process " in report[0]
    assert report[0].endswith(" is running")
    assert report[1].endswith("in loop_forever")
    assert report[2].endswith("in stalling")
    assert report[-1] == f"    all stacks: {output}/logs/rank-00001.log and the other ranks' logs"
    evidence = json.loads((output / "logs" / "stall-node-0.json").read_text())
    assert [(each["rank"], each["step"], each["phase"]) for each in evidence] == [
        (0, 4, "all-reduce"), (1, 4, "waiting for data")
    ]  # fmt: skip
    for rank, function in ((0, "in all_reduce"), (1, "in loop_forever")):
        log = (output / "logs" / f"rank-{rank:05d}.log").read_text()
        assert log.index("all threads:") < log.rindex(function)
    assert "rank 1 on" in (output / "logs" / "run.log").read_text()
    last = json.loads((output / "logs" / "events.jsonl").read_text().splitlines()[-1])
    assert (last["rank"], last["level"], last["step"]) == (None, "CRITICAL", 5)


def test_a_stopped_rank_is_reported_on_its_own_node(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    rendezvous = f"127.0.0.1:{free_port()}"
    nodes = [start_node("stop", data, output, f"NodePlace(2, {node}, {rendezvous!r})", 1) for node in range(2)]
    texts = [printed(node) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], "\n".join(texts)[-3000:]
    (line,) = [line for line in texts[1].splitlines() if "is stalled" in line]
    assert line.startswith(f"crosslift: rank 1 on {HOST} is stalled")
    assert "step 5, phase 'waiting for data'" in line
    assert line.endswith(" is stopped")
    assert "in stalling" in texts[1]
    assert "is stalled" not in texts[0]
    assert "killed" not in texts[0] + texts[1]
    for node in range(2):
        (evidence,) = json.loads((output / "logs" / f"stall-node-{node}.json").read_text())
        assert evidence["rank"] == node
