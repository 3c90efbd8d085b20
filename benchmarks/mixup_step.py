"""Cost of X-Mixup: forward and backward on pairs, against two plain passes over the texts of both sides.

    python -m benchmarks.mixup_step [--json FILE]

One process, fp32. A pair is a target and its source. Plain: fine-tuning's forward and backward on the targets, then
on the sources, whose gradients add up. X-Mixup: one forward and backward on both, mixed at one layer, with both
task losses and the consistency. Rounds are interleaved, in alternating order, on the same texts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, XLMRobertaConfig

from benchmarks.ranks import machine
from data_pipeline.batching.batch import Batch, ClassTargets, TaskBatch, TaskTargets
from training.objectives.finetune import TaskFineTuning
from training.objectives.xmixup import XMixup, XMixupConfig

ROUNDS, PAIRS, TOKENS, CLASSES = 8, 16, 96, 3
MODELS = {"5M": (256, 6, 4), "22M": (384, 12, 6)}  # hidden, layers, heads
LIMIT = 1.15


@dataclass
class PlainEngine:
    """The part of an engine that objectives use, without DeepSpeed, for both sides of the ratio."""

    module: torch.nn.Module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def texts(rows: int, n_pairs: int, seed: int) -> TaskBatch:
    """Random token ids, with lengths from half a row to a whole one; `rows` is twice `n_pairs`, or unpaired."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (rows,), generator=generator)
    lengths[0] = TOKENS
    mask = (torch.arange(TOKENS)[None] < lengths[:, None]).long()
    ids = torch.randint(5, 2000, (rows, TOKENS), generator=generator) * mask + (1 - mask)
    classes = torch.randint(CLASSES, (n_pairs or rows,), generator=generator).repeat(2 if n_pairs else 1)
    numbers = torch.arange(rows)
    targets = TaskTargets(
        ClassTargets(torch.nn.functional.one_hot(classes, CLASSES).float()), n_pairs=n_pairs,
        label_is_source=numbers >= (n_pairs or rows), n_target_labels=n_pairs or rows, label_rows=numbers, gold=True,
    )  # fmt: skip
    return Batch(
        input_ids=ids, attention_mask=mask, label_weights=torch.ones(rows), label_languages=numbers * 0,
        targets=targets, samples=(),
    )  # fmt: skip


def measure(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """Seconds of every round, both ways."""
    config = XLMRobertaConfig(
        vocab_size=2000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=TOKENS + 2, num_labels=CLASSES, pad_token_id=1,
    )  # fmt: skip
    engines = {}
    for name in ("plain", "X-Mixup"):
        torch.manual_seed(0)
        engines[name] = PlainEngine(AutoModelForSequenceClassification.from_config(config).train())
    plain = TaskFineTuning()
    settings = XMixupConfig(name="xmixup", layer=layers // 2, alpha=0.4)
    mixed = XMixup(engines["X-Mixup"].module, "classification", settings, special_ids=(0, 1, 2))

    def two_plain(number: int) -> None:
        whole = texts(2 * PAIRS, PAIRS, number)
        for side in (slice(None, PAIRS), slice(PAIRS, None)):
            part = texts(PAIRS, 0, number)
            part.input_ids.copy_(whole.input_ids[side])
            part.attention_mask.copy_(whole.attention_mask[side])
            backward(plain.loss_terms(engines["plain"], part))

    def one_mixed(number: int) -> None:
        backward(mixed.loss_terms(engines["X-Mixup"], texts(2 * PAIRS, PAIRS, number)))

    ways: dict[str, Callable[[int], None]] = {"plain": two_plain, "X-Mixup": one_mixed}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name in sorted(ways, reverse=bool(number % 2)):
            engines[name].module.zero_grad(set_to_none=True)
            started = time.perf_counter()
            ways[name](number)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = [one / other for one, other in zip(seconds["X-Mixup"], seconds["plain"], strict=True)]
    parameters = sum(parameter.numel() for parameter in engines["plain"].module.parameters())
    return {"parameters": parameters, "layers": layers, "seconds": seconds, "ratios": ratios}


def backward(terms: Any) -> None:
    """Backward pass of the weighted mean of every term."""
    sum(term.weight * term.sum / PAIRS for term in terms.terms.values()).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    results = {name: measure(*size) for name, size in MODELS.items()}
    load = round(os.getloadavg()[0], 2)
    print(f"{PAIRS} pairs of up to {TOKENS} tokens, {ROUNDS} rounds, fp32, load average {load}\n")
    print("| model | two plain passes, s | X-Mixup, s | ratio: min, median, max | limit |\n|---|---|---|---|---|")
    for name, result in results.items():
        plain, mixed = (statistics.median(result["seconds"][way]) for way in ("plain", "X-Mixup"))
        low, middle, high = min(result["ratios"]), statistics.median(result["ratios"]), max(result["ratios"])
        size = f"{name}: {result['parameters'] / 1e6:.1f}M, {result['layers']} layers"
        print(f"| {size} | {plain:.3f} | {mixed:.3f} | {low:.2f}, {middle:.2f}, {high:.2f} | {LIMIT} |")
    if arguments.json is not None:
        content = {"machine": machine(1), "load_average": load, "pairs": PAIRS, "tokens": TOKENS, "models": results}
        arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
