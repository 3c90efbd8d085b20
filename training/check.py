"""What can be known before a run, and a look at its data: `crosslift check`, `data inspect`, `data plan`.

In: a RunConfig. Out: lines for people, or JSON objects. Nothing is trained; only one process is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from data_pipeline.chat import describe
from data_pipeline.plan import assign
from training.assembly import DataParts, assemble_data
from training.config import RunConfig
from training.prepare import Prepared, prepare, sample_rows

COUNTED_STEPS = 64
# Bytes a parameter, sharded over ranks: weights, gradients (bf16: with an fp32 accumulator), Adam's two
# moments, and under bf16 the fp32 master weights.
STATE_BYTES = {"fp32": 4 + 4 + 8, "bf16": 2 + 2 + 4 + 8 + 4}


def check_run(config: RunConfig) -> Iterator[str]:
    """Lines about everything that a run rests on; raises what the run would have raised."""
    prepared = prepare(config)
    yield from _rows(config, prepared)
    data = assemble_data(config, prepared)
    yield f"layout: {data.packer.layout}, rows of up to {data.packer.row_tokens} tokens"
    yield _pairs(data, config)
    yield from _model(config, prepared)
    yield "one sample a language, its label mask checked:"
    yield from _samples(data, config, 1)
    yield "ready to train"


def inspect_data(config: RunConfig, samples: int) -> Iterator[str]:
    """`samples` decoded samples a language, label and content marked."""
    prepared = prepare(config)
    yield from _rows(config, prepared)
    yield from _samples(assemble_data(config, prepared), config, samples)


def plan_lines(config: RunConfig, steps: range, world_size: int) -> Iterator[dict[str, Any]]:
    """One JSON-ready object a micro-batch: step, rank, micro_batch, ids, languages. Reads and packs for real."""
    data = assemble_data(config, prepare(config))
    for step in steps:
        for rank in range(world_size):
            loaded = data.loader(config, rank, world_size).load(step)
            for number, micro_batch in enumerate(loaded.micro_batches):
                samples = [sample for unit in micro_batch.units for sample in unit.samples]
                yield {
                    "step": step,
                    "rank": rank,
                    "micro_batch": number,
                    "ids": [sample.id for sample in samples],
                    "languages": [config.data.languages[sample.language] for sample in samples],
                }


def _rows(config: RunConfig, prepared: Prepared) -> Iterator[str]:
    index = prepared.index
    yield f"{'language':<10}{'training rows':>15}{'held out':>10}"
    for number, language in enumerate(index.languages):
        yield f"{language:<10}{len(index.rows(number)):>15,}{len(index.rows(number, heldout=True)):>10,}"
    if index.bad_rows:
        origin, reason = index.bad_rows[0]
        yield f"unusable rows: {len(index.bad_rows)}, such as {origin}: {reason}"


def _pairs(data: DataParts, config: RunConfig) -> str:
    steps = [data.planner.step(step) for step in range(min(config.max_steps, COUNTED_STEPS))]
    sets = [len(unit.pairs) for plan in steps for unit in plan.units if unit.pairs]
    dropped = sum(plan.dropped_pairs for plan in steps)
    balance = [sum(unit.cost for unit in share) for share in assign(steps[0], 1)]
    return (
        f"first {len(steps)} steps: {sum(sets) / len(steps):.1f} pairs a step, in {len(sets) / len(steps):.1f} "
        f"contrast sets (plain SFT cuts none), {dropped} pairs dropped for identical content, "
        f"about {balance[0]:.0f} tokens a step"
    )


def _model(config: RunConfig, prepared: Prepared) -> Iterator[str]:
    from transformers import AutoModelForCausalLM

    from modeling.layers import decoder_layers
    from modeling.loading import load_config, resolve_directory
    from training.launch import visible_gpus

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(resolve_directory(prepared.model_dir)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    state = parameters * STATE_BYTES[config.precision] / 2**30
    yield f"model: {parameters / 1e6:.1f}M parameters, {len(decoder_layers(model))} layers, {config.precision}"
    ranks = ", ".join(f"{state / n:.2f} on {n}" for n in (max(visible_gpus(), 1), 2, 8))
    yield (
        f"memory for weights, gradients and optimiser under ZeRO-{config.zero_stage}: {state:.2f} GiB in all; "
        f"GiB a rank where everything is sharded: {ranks} (activations come on top)"
    )


def _samples(data: DataParts, config: RunConfig, samples: int) -> Iterator[str]:
    for number, language in enumerate(config.data.languages):
        for row in sample_rows(data.index, number, samples, config.seed):
            sample = data.reader.read(row)
            origin = data.index.record(row).origin
            if sample is None:
                yield f"--- {language}  {origin}: longer than data.sequence_length, left out"
            else:
                yield f"--- {language}  {origin}  {len(sample)} tokens, {int(sample.labels.sum())} labels"
                yield describe(sample, data.tokenizer)
