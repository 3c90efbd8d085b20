"""The run's record loses no complete line, after a kill and on a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.errors import ConfigError
from training.tracking.run_record import RECORD_NAME, RunRecord, flatten, json_number, read_events

ROOT = Path(__file__).resolve().parents[4]


def test_a_cut_off_last_line_is_removed_and_a_complete_one_is_kept(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.append("metrics", step=1, values={"loss": 1.0})
    record.close()
    path = tmp_path / RECORD_NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"time": 5, "kind": "metr')
    assert [event["step"] for _, event in read_events(path)] == [1]
    RunRecord(tmp_path).append("metrics", step=2, values={"loss": 2.0})
    assert [event["step"] for _, event in read_events(path)] == [1, 2]

    path.write_bytes(whole + whole.rstrip(b"\n").replace(b'"step": 1', b'"step": 7'))
    RunRecord(tmp_path).append("metrics", step=8, values={"loss": 2.0})
    assert [event["step"] for _, event in read_events(path)] == [1, 7, 8]


def test_a_killed_process_loses_no_logged_line(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from training.tracking.tracker import *\n"
        "t = Tracker(Path(sys.argv[1]), TrackingConfig(enabled=False)); t.start({}, {}, None)\n"
        "for step in range(10**9):\n t.log(step, {'loss': 1.0}); print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = [int(process.stdout.readline()) for _ in range(500)]
    process.kill()
    printed += [int(line) for line in process.stdout if line.endswith("\n")]
    process.wait()
    steps = [event["step"] for _, event in read_events(tmp_path / RECORD_NAME) if event["kind"] == "metrics"]
    assert steps[: len(printed)] == printed


def test_damaged_lines_are_recognised(tmp_path: Path) -> None:
    good = '{"time": 1, "kind": "metrics", "step": 3, "values": {}}\n'
    bad = ['{"time": 1, "kind"\n', "\0\0\0\n", '{"time": 1, "kind": "metrics"}\n', '{"kind": []}\n', "7\n"]
    (tmp_path / RECORD_NAME).write_text(good + "".join(bad) + good)
    kinds = [event["kind"] for _, event in read_events(tmp_path / RECORD_NAME)]
    assert kinds == ["metrics", *["damaged"] * len(bad), "metrics"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1])
def test_every_value_survives_strict_json(tmp_path: Path, value: float) -> None:
    record = RunRecord(tmp_path)
    record.append("metrics", step=0, values={"x": json_number(value)})
    line = (tmp_path / RECORD_NAME).read_text()
    assert not any(word in line.replace('"NaN"', "").replace('Infinity"', "") for word in ("NaN", "Infinity"))
    back = float(json.loads(line)["values"]["x"])
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_lines_are_queued_while_the_disk_is_full_and_it_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord(tmp_path)
    record.append("metrics", step=1, values={})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:9]))  # a disk with nine bytes left
        record.append("metrics", step=2, values={})
        record.append("metrics", step=3, values={})
        assert [event["step"] for _, event in read_events(record.path)] == [1]
    record.append("metrics", step=4, values={})
    assert [event["step"] for _, event in read_events(record.path)] == [1, 2, 3, 4]
    times = [event["time"] for _, event in read_events(record.path)]
    assert times == sorted(times)
    record.close()
    assert capsys.readouterr().err.count("\n") == 1


def test_lines_that_a_full_disk_never_accepts_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.tracking.run_record.MAX_QUEUED_BYTES", 200)  # two or three such lines
    record = RunRecord(tmp_path)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for step in range(5):
            record.append("metrics", step=step, values={})
    record.append("metrics", step=5, values={})
    record.close()
    kept = [event["step"] for _, event in read_events(record.path)]
    assert kept[:2] == [0, 1]
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    assert f"{6 - len(kept)} lines are lost" in printed[1]


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunRecord(tmp_path / "file")


def test_a_nested_config_becomes_dotted_names() -> None:
    config = {"data": {"languages": ["en", "zh"], "size": None}, "deepspeed": {}, "steps": 3}
    assert flatten(config) == {
        "data.languages": '["en", "zh"]',
        "data.size": "None",
        "deepspeed": "{}",
        "steps": "3",
    }
