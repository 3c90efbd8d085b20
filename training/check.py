"""What can be known before a run, and a look at its data: `crosslift check`, `data inspect`, `data plan`.

In: a RunConfig. Out: lines for people, or JSON objects. Nothing is trained; only one process is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from data_pipeline.chat import describe
from data_pipeline.loader import RankStep
from data_pipeline.packing import MicroBatch, Packer
from data_pipeline.plan import assign
from data_pipeline.tasks.batches import SideLabels, TaskBatch
from data_pipeline.tasks.reader import TaskReader, TaskStep
from data_pipeline.tasks.tokenize import EncodedSide
from training.assembly import DataParts, assemble_data, check_model
from training.config import RunConfig
from training.prepare import Prepared, architecture, prepare, sample_rows

COUNTED_STEPS = 64
# Bytes a parameter, sharded over ranks: weights, gradients (bf16: with an fp32 accumulator), Adam's two
# moments, and under bf16 the fp32 master weights.
STATE_BYTES = {"fp32": 4 + 4 + 8, "bf16": 2 + 2 + 4 + 8 + 4}


def check_run(config: RunConfig) -> Iterator[str]:
    """Lines about everything that a run rests on; raises what the run would have raised."""
    prepared = prepare(config)
    yield from _rows(config, prepared)
    data = assemble_data(config, prepared)
    if isinstance(data.packer, Packer):
        yield f"layout: {data.packer.layout}, rows of up to {data.packer.row_tokens} tokens"
        yield _pairs(data, config)
    yield from _model(config, prepared)
    yield "one sample a language, its labels checked:"
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
            loaded: RankStep | TaskStep = data.loader(config, rank, world_size).load(step)
            batches: Sequence[MicroBatch | TaskBatch] = loaded.micro_batches
            for number, micro_batch in enumerate(batches):
                ids, languages = _contents(micro_batch)
                yield {
                    "step": step,
                    "rank": rank,
                    "micro_batch": number,
                    "ids": ids,
                    "languages": [config.data.languages[language] for language in languages],
                }


def _contents(batch: MicroBatch | TaskBatch) -> tuple[list[str], list[int]]:
    """Ids and languages of a micro-batch's samples."""
    if isinstance(batch, TaskBatch):
        return list(batch.sample_ids), batch.row_languages[: len(batch.sample_ids)].tolist()
    samples = [sample for unit in batch.units for sample in unit.samples]
    return [sample.id for sample in samples], [sample.language for sample in samples]


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
    from modeling.architectures import auto_class
    from modeling.layers import decoder_layers
    from modeling.loading import load_config, resolve_directory
    from modeling.lora import add_adapters
    from training.engine import DTYPES
    from training.launch import visible_gpus

    with torch.device("meta"):
        head = architecture(config)
        model = auto_class(head).from_config(load_config(resolve_directory(prepared.model_dir), head))
        layers = len(decoder_layers(model))
        check_model(config, model)
        if (lora := config.model.lora) is not None:
            add_adapters(model, lora.rank, lora.alpha, lora.dropout, lora.targets, config.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen_bytes = (parameters - trained) * DTYPES[config.precision].itemsize
    state = (trained * STATE_BYTES[config.precision] + frozen_bytes) / 2**30
    adapted = f", {trained / 1e6:.1f}M of them trained" if lora is not None else ""
    yield f"model: {parameters / 1e6:.1f}M parameters{adapted}, {layers} layers, {config.precision}"
    ranks = ", ".join(f"{state / n:.2f} on {n}" for n in (max(visible_gpus(), 1), 2, 8))
    yield (
        f"memory for weights, gradients and optimiser under ZeRO-{config.zero_stage}: {state:.2f} GiB in all; "
        f"GiB a rank where everything is sharded: {ranks} (activations come on top)"
    )


def _samples(data: DataParts, config: RunConfig, samples: int) -> Iterator[str]:
    for number, language in enumerate(config.data.languages):
        for row in sample_rows(data.index, number, samples, config.seed):
            if isinstance(data.reader, TaskReader):
                yield from _task_sample(data.reader, row, language)
                continue
            sample = data.reader.read(row)
            origin = data.index.record(row).origin
            if sample is None:
                yield f"--- {language}  {origin}: longer than data.sequence_length, left out"
            else:
                yield f"--- {language}  {origin}  {len(sample)} tokens, {int(sample.labels.sum())} labels"
                yield describe(sample, data.tokenizer)


def _task_sample(reader: TaskReader, row: int, language: str) -> Iterator[str]:
    """An encoder's sample as it is read for the first step: both sides decoded, with their labels."""
    sample = reader.read(row, step=0)
    yield f"--- {language}  {reader.index.task_record(row).origin}  {len(sample)} tokens"
    yield f"target: {_decoded(reader, sample.target, sample.target_labels)}"
    if sample.source is not None and sample.source_labels is not None:
        kind = "itself" if sample.unpaired else "gold" if sample.source_is_gold else "back-translation"
        yield f"source ({kind}): {_decoded(reader, sample.source, sample.source_labels)}"


def _decoded(reader: TaskReader, side: EncodedSide, labels: SideLabels) -> str:
    decode, names = reader.tokenizer.tokenizer.decode, reader.tokenizer.config.labels
    text = decode(side.input_ids)
    if labels.classes is not None:
        best = [
            names[each] if row.any() else "-"
            for each, row in zip(labels.classes.argmax(1), labels.classes, strict=True)
        ]
        return f"{text}  ->  {' '.join(best)}"
    if labels.ids is not None:
        return f"{text}  ->  {decode(labels.ids)}"
    if side.span is None or side.span == (0, 0):
        return f"{text}  ->  (no answer in this window)"
    return f"{text}  ->  {decode(side.input_ids[side.span[0] : side.span[1] + 1])}"
