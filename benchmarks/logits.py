"""Peak memory and time of a step with losses in chunks of label positions, beside the same step with whole logits.

    python -m benchmarks.logits --json FILE [--precision fp32 bf16] [--rounds 3]

A step is a forward and a backward pass of a random Llama of two layers whose head has the embedding's weight: almost
all of its time and memory is the head's. Every position predicts a token. Each step runs in a process of its own, and
the two kinds alternate. The peak is the kernel's high-water mark (VmHWM) from the start of the step, above the memory
at the start, which holds the weights, and above one gradient of every weight. CPU seconds are those of all threads:
other processes of a busy machine change them less than they change the time.

Goals: at most a quarter of the peak, and 1.05 times the time. 4,096 positions of 262,144 tokens need about 16 GiB.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.ranks import SOURCE, machine

KINDS = ("whole", "chunked")
GOALS = {"peak_bytes": 0.25, "seconds": 1.05}
ROW_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits", description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=4096, help="label positions, a multiple of 512")
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--hidden", type=int, default=640, help="a multiple of 64")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)  # a process of one step
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(step(options)))
        return
    found: dict[str, Any] = {}
    print(f"{options.positions:,} label positions, {options.vocabulary:,} tokens, hidden size {options.hidden:,}\n")
    print("| | peak GiB, whole | chunked | ratio | s, whole | chunked | ratio | CPU s, whole | chunked | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for precision in options.precision:
        steps: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind, made in steps.items():
                made.append(in_a_process(options, precision, kind))
        whole, chunked = (
            {what: statistics.median(each[what] for each in made) for what in made[0]} for made in steps.values()
        )
        assert abs(whole["loss"] - chunked["loss"]) < 1e-2 * abs(whole["loss"]), (whole, chunked)
        assert abs(whole["gradient_norm"] - chunked["gradient_norm"]) < 1e-2 * whole["gradient_norm"], (whole, chunked)
        ratios = {what: chunked[what] / whole[what] for what in ("peak_bytes", "seconds", "cpu_seconds")}
        cells = [
            f"{one / unit:.2f} | {other / unit:.2f} | {other / one:.2f}"
            for what, unit in (("peak_bytes", 2**30), ("seconds", 1), ("cpu_seconds", 1))
            for one, other in [(whole[what], chunked[what])]
        ]
        print(f"| {precision} | {' | '.join(cells)} |", flush=True)
        found[precision] = {"steps": steps, "ratios": ratios}
    for precision, each in found.items():
        for what, goal in GOALS.items():
            met = "met" if each["ratios"][what] <= goal else "missed"
            print(f"{precision}: {what} {each['ratios'][what]:.3f} of whole logits', goal {goal}: {met}")
    if options.json is not None:
        sizes = {name: getattr(options, name) for name in ("positions", "vocabulary", "hidden", "rounds")}
        result = {"machine": machine(1), "sizes": sizes, "goals": GOALS, "found": found}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def in_a_process(options: argparse.Namespace, precision: str, kind: str) -> dict[str, float]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("positions", "vocabulary", "hidden")]
    command = [sys.executable, "-m", "benchmarks.logits", "--kind", kind, "--precision", precision, *sizes]
    done = subprocess.run(command, cwd=SOURCE, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def step(options: argparse.Namespace) -> dict[str, float]:
    """One step's peak bytes and seconds, and its loss and gradient norm, which the kinds share."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from modeling.lm_head.head_check import build_label_head
    from modeling.lm_head.label_head import LabelHead

    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=2, num_attention_heads=options.hidden // 64, tie_word_embeddings=True,
        max_position_embeddings=ROW_TOKENS,
    )  # fmt: skip
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision[0]]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    head = build_label_head(model, "causal-lm") if options.kind == "chunked" else LabelHead(model)
    assert (head.change is not None) == (options.kind == "chunked")
    ids = torch.randint(options.vocabulary, (options.positions // ROW_TOKENS, ROW_TOKENS))
    positions, weights = torch.arange(ids.numel()), torch.ones(ids.numel())
    labels = torch.randint(options.vocabulary, (ids.numel(),))
    model(ids[:1, :8], use_cache=False).logits.sum().backward()  # allocates the libraries' buffers
    model.zero_grad()
    before = reset_peak()
    began, cpu = time.perf_counter(), time.process_time()
    losses = head.losses(lambda: model(ids, use_cache=False), positions, labels, weights)
    (losses.sum / len(labels)).backward()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    return {
        "peak_bytes": status("VmHWM") - before - sum(each.nbytes for each in gradients),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "loss": float(losses.sum.detach()) / len(labels),
        "gradient_norm": float(torch.stack([each.float().norm() for each in gradients]).norm()),
    }


def reset_peak() -> int:
    """Sets the kernel's high-water mark to the present memory, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
