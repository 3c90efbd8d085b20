"""benchmarks/gpu.py: its FLOPs by hand, a trial on CPUs, and what it writes where there is no GPU or no time."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from ranks import checked, run_ranks

from benchmarks import gpu
from benchmarks.flops import ModelShape, model_shape
from benchmarks.gpu import CASES
from benchmarks.gpu_report import CURVES, summary

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=100, tie_word_embeddings=True,
)  # fmt: skip
NO_GPU = not torch.cuda.is_available()


def hand_count(lengths: list[int], labels: int) -> float:
    """Multiplications and additions of `CONFIG`, one product after the other; a backward pass does each twice."""
    total = 0
    for _layer in range(3):
        for length in lengths:
            for token in range(length):
                for inputs, outputs in ((32, 64), (32, 32), (32, 32), (64, 32), (32, 48), (32, 48), (48, 32)):
                    total += 2 * inputs * outputs  # q, k, v, o, gate, up, down
                for _head in range(4):
                    for _key in range(token + 1):
                        total += 2 * 16 + 2 * 16  # the score of a key; its value's part of the answer
    for _label in range(labels):
        total += 2 * 32 * 100
    return 3.0 * total


def test_the_flops_of_a_step_are_those_counted_by_hand() -> None:
    with torch.device("meta"):
        shape = model_shape(LlamaForCausalLM(CONFIG))
    assert shape == ModelShape(3, 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48, 64, 32, 100)
    for lengths, labels in (([7], 3), ([7, 4, 1], 0), ([12, 5], 17)):
        assert shape.step_flops(lengths, labels) == hand_count(lengths, labels)


def test_the_flops_of_the_matrices_are_those_that_torch_counts() -> None:
    """Forward and backward of one sample, all of whose tokens are labels; torch counts attention without its mask."""
    model = LlamaForCausalLM(CONFIG)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(9)[None]).logits.sum().backward()
    of_matrices = sum(
        flops for operation, flops in counter.get_flop_counts()["Global"].items() if str(operation) == "aten.mm"
    )
    shape = model_shape(model)
    attention = shape.step_flops([9], 0) - 9 * shape.step_flops([1], 0) + 9 * 6 * 3 * 64 * 2
    assert of_matrices == shape.step_flops([9], 9) - attention


def test_mfu_is_flops_per_second_of_the_median_window_over_the_peak() -> None:
    """The first window is left out."""
    window = {"steps": 2, "waited": 0.5, "tokens": 1000, "flops": 3e12}
    windows = [{**window, "seconds": seconds} for seconds in (60.0, 2.0, 3.0, 4.0)]
    found = summary({"windows": windows, "ranks": 2}, peak_tflops=10)
    assert found["steps"] == 6
    assert (found["seconds_a_step"], found["tokens_per_second"]) == (1.5, pytest.approx(1000 / 3))
    assert found["mfu"] == pytest.approx(3e12 / 3 / (2 * 10e12))
    assert found["waited_share"] == pytest.approx(1.5 / 9)
    assert summary({"windows": windows[:1], "ranks": 2}, 10) == {"reason": "only 1 windows of steps were done in time"}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks of ShifCon and the two curves, on CPUs."""
    folder = tmp_path_factory.mktemp("gpu")

    def start_ranks(name: str, work: Path, options: argparse.Namespace, deadline: float) -> None:
        program = gpu.rank_program(name, work, options, deadline)
        checked(run_ranks(program, 1 if name in CURVES else options.nproc))

    arguments = [
        "--cpu", "--nproc", "2", "--size", "tiny", "--curve-size", "tiny", "--slots", "16", "--curve-slots", "8",
        "--steps", "4", "--window", "2", "--curve-steps", "6", "--micro-batch-tokens", "2048",
        "--json", str(folder / "figures.json"), "--markdown", str(folder / "table.md"),
        "--cases", "ShifCon, sdpa", "ShifCon, flash-attn varlen", *CURVES,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "start_ranks", start_ranks)
        gpu.main(arguments)
    figures: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return {**figures, "table": (folder / "table.md").read_text()}


def test_a_trial_measures_every_rank_and_compares_memory_with_the_estimate(trial: dict[str, Any]) -> None:
    found = trial["cases"]["ShifCon, sdpa"]
    assert (found["ranks"], found["precision"], found["attention"]) == (2, "bf16", "sdpa")
    assert [window["steps"] for window in found["windows"]] == [2, 2, 2]
    assert found["summary"]["steps"] == 4
    for window in found["windows"]:  # twice some 16 to 32 samples of 60 to 200 tokens on both ranks together
        assert 2 * 16 * 60 < window["tokens"] < 2 * 32 * 210
        assert 0 < window["label_tokens"] < window["tokens"]
        linear = 6 * 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) * window["tokens"]
        assert linear < window["flops"] < 100 * linear
        assert 0 <= window["waited"] < window["seconds"]
    assert found["memory"]["process"] > 2**28
    assert found["memory"]["estimate"] > 2**30


def test_a_trial_shows_the_loss_curve_against_fp32(trial: dict[str, Any]) -> None:
    here, there = (trial["cases"][name] for name in CURVES)
    assert (here["precision"], there["precision"]) == ("bf16", "fp32")
    losses = [[window["loss"] for window in each["windows"]] for each in (here, there)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[1][0] > losses[1][-1]
    assert "Loss curve of 6 steps against fp32 on CPU: from " in trial["table"]


def test_the_table_names_hardware_versions_command_and_what_is_not_measured(trial: dict[str, Any]) -> None:
    lines = trial["table"].splitlines()
    assert lines[0].startswith("`python -m benchmarks.gpu --cpu --nproc 2 ")
    assert f"torch {torch.__version__}" in lines[0]
    assert "peak taken as 790 TFLOP/s" in lines[0]
    assert "| ShifCon, flash-attn varlen | not measured: needs a GPU | | | | | | |" in lines
    (row,) = [line.split(" | ") for line in lines if line.startswith("| ShifCon, sdpa")]
    assert len(row) == 8
    assert float(row[3].replace(",", "")) > 0


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_and_the_files_say_so(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "figures.json"), "--markdown", str(tmp_path / "table.md")]
    gpu.main([*files, "--budget", "1"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["cases"] == {name: {"reason": "no GPU"} for name in (*CASES, *CURVES)}
    assert (tmp_path / "table.md").read_text().count("not measured: no GPU") == len(CASES) + len(CURVES)
    assert "Loss curve against fp32 on CPU: not measured." in (tmp_path / "table.md").read_text()


def test_a_case_is_ended_with_the_budget(tmp_path: Path) -> None:
    options = gpu.parser_of().parse_args(["--cpu"])
    options.own = ["--cpu"]
    began = time.monotonic()
    assert gpu.start_ranks("SFT, sdpa", tmp_path, options, time.time() + 1) == "out of time"
    assert time.monotonic() - began < 20
    running = [each for each in Path("/proc").iterdir() if each.name.isdigit() and int(each.name) != os.getpid()]
    for each in running:
        try:
            assert str(tmp_path).encode() not in (each / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
    found = dict(gpu.run_cases(tmp_path, options, time.time() - 1))
    assert found["SFT, sdpa"] == found["curve bf16"] == {"reason": "out of time"}
