"""`crosslift check`, `data inspect` and `data plan`: all checks that are possible before a run, and views of its data.

Nothing is trained; one process is enough.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.batching.batch import BatchShape
from data_pipeline.batching.micro_steps import Balance, Spread
from data_pipeline.console import table
from data_pipeline.loader import Scan, ThisRank
from data_pipeline.order.plan import Planner
from data_pipeline.records import BadRow, Split
from data_pipeline.sources.index import DataIndex
from modeling.weights.untrusted import read_tokenizer
from training.assembly import (
    COST_SAMPLES,
    DataParts,
    assemble_data,
    build_reader,
    check_contrast_sets,
    fingerprint,
    pair_and_set_warnings,
)
from training.checkpoints.search import newest_seen
from training.checks.data_report import LOOKED_AT, contamination, mixture_table
from training.checks.forecast import OWN_SPEED, GivenSpeed, time_lines
from training.checks.front import check_model, check_model_files, check_start, check_starting_model
from training.checks.pairs import show_pairs
from training.checks.quantised import missing_for_quantised
from training.checks.survey import by_reason, survey, without_limit
from training.config import DataConfig, RunConfig
from training.distributed import visible_gpus
from training.engine.memory import GIB, Ranks, memory_estimate, memory_savings
from training.errors import ConfigError
from training.loop.resume import permitted, schedule_change
from training.objectives.base import ObjectiveConfig
from training.run_folder.lock import make_folder, running_in
from training.run_folder.prepare import Prepared, prepare_read_only, sample_rows
from training.tracking.config import tracking_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTED_STEPS = 64
BALANCE_SLOTS = 2_048  # slots on which the balance of ranks is measured
UNBALANCED = 1.25  # largest over mean cost of a rank, above which `check` warns


def check_run(
    config: RunConfig,
    *,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    nproc_per_node: int | None = None,
    gpu_memory_gib: float | None = None,
    accept_changes: bool = False,
    all_rows: bool = False,
    speed: GivenSpeed = OWN_SPEED,
) -> Iterator[str]:
    """Lines about everything that a run depends on.

    Args:
        gpus_per_node: by default the GPUs that are visible here, or 1; 0: ranks on CPUs.
        nproc_per_node: ranks per node; by default one per GPU, or 1.
        gpu_memory_gib: the GPU memory that the run must fit into.
        all_rows: read and tokenise every row, not only a sample of each language.
        speed: from which the run's time is computed.

    Raises:
        ConfigError: the run needs more than `gpu_memory_gib`; `speed` is of something else. Also any error
            that the run itself would raise.
    """
    if gpu_memory_gib is not None and not 0 < gpu_memory_gib < math.inf:
        raise ConfigError(f"--gpu-memory {gpu_memory_gib:g}: must be a number of GiB above 0")
    check_start(config)
    check_model_files(config)
    with prepare_read_only(without_limit(config) if all_rows else config) as prepared:
        check_starting_model(config.model, config.data, config.objective, prepared)
        yield from _rows(prepared.index)
        if all_rows:
            tokenizer = read_tokenizer(prepared.tokenizer_dir)
            yield from survey(config.data, build_reader(config, prepared.index, tokenizer))
        data = assemble_data(config, prepared)
        if not all_rows and config.data.max_bad_rows:
            yield from _unusable(data)
        yield f"layout: {data.packer.layout}, rows of up to {data.packer.grid.longest_row} tokens"
        if config.data.mixture.pairing != "none":
            yield _pairs(data.planner, config.max_steps)
        yield from show_pairs(config.data, config.objective, config.max_steps, data.index, data.planner)
        yield from (f"warning: {line}" for line in pair_and_set_warnings(config, data))
        gpus = gpus_per_node if gpus_per_node is not None else max(visible_gpus(), 1)
        per_node = nproc_per_node or gpus or 1
        ranks = Ranks(nodes * per_node, per_node, on_gpus=gpus > 0)
        check_contrast_sets(config, data.planner, data.packer.grid, ranks.total, ranks.per_node)
        yield from balance_lines(config, data, ranks)
        yield from _model(config, prepared, data, ranks, gpu_memory_gib)
        yield from mixture_table(config.data, config.max_steps, data, None if all_rows else LOOKED_AT)
        yield "one sample of each language, its labels checked:"
        yield from _samples(data, 1)
        tracking = config.tracking
        yield (
            str(tracking_target(tracking, config.output_dir)) if tracking.enabled else "MLflow: off (tracking.enabled)"
        )
        done = yield from _start(config, prepared, accept_changes)
        if done < config.max_steps:
            yield from time_lines(config, data.planner, ranks, config.max_steps - done, speed)
            yield "ready to train"


def _start(config: RunConfig, prepared: Prepared, accept_changes: bool) -> Generator[str, None, int]:
    """What `train` would find in the run's folder; returns the steps that are done. Raises its ConfigErrors."""
    make_folder(config.output_dir)
    if (holder := running_in(config.output_dir)) is not None:
        yield f"output_dir: {config.output_dir} is in use by {holder}: until it ends, train is refused"
    path = newest_seen(config.output_dir, config.checkpoint.local_dir)
    if path is None:
        return 0
    state = permitted(path, config, prepared, fingerprint(prepared), accept_changes)
    if change := schedule_change(state, config):
        yield change
    if state.step == config.max_steps:
        yield f"{path}: the run is finished: nothing is left to train"
    else:
        yield f"{path}: resumes from step {state.step} of {config.max_steps}"
    return state.step


def inspect_data(config: RunConfig, samples: int) -> Iterator[str]:
    """`samples` decoded samples per language, with labels and content marked."""
    with prepare_read_only(config) as prepared:
        yield from _rows(prepared.index)
        yield from _samples(assemble_data(config, prepared), samples)


def plan_lines(
    config: RunConfig, steps: range, world_size: int, per_node: int | None = None
) -> Iterator[dict[str, Any]]:
    """One JSON-ready object per micro-batch: step, micro_step, rank, ids, languages. Rows are read and distributed."""
    with prepare_read_only(config) as prepared:
        yield from _planned(assemble_data(config, prepared), steps, world_size, per_node)


def _planned(data: DataParts, steps: range, world_size: int, per_node: int | None) -> Iterator[dict[str, Any]]:
    for step in steps:
        scan, spread = _spread(data, step, world_size, per_node)
        for number, micro_step in enumerate(spread.micro_steps(scan.plan.sets)):
            for rank, share in enumerate(micro_step.shares(world_size)):
                samples = [scan.samples[position] for position in share.tolist()]
                yield {
                    "step": step,
                    "micro_step": number,
                    "rank": rank,
                    "ids": [sample.id for sample in samples],
                    "languages": [data.index.languages[sample.language] for sample in samples],
                }


def _spread(data: DataParts, step: int, world_size: int, per_node: int | None) -> tuple[Scan, Spread]:
    """All samples of a step, and their distribution over ranks."""
    loader = data.loader()
    scan = loader.scan(step)
    if scan.error is not None:
        raise scan.error
    return scan, loader.spread(loader.table(scan.measures), ThisRank(0, world_size, per_node))


def balance_lines(config: RunConfig, data: DataParts, ranks: Ranks) -> Iterator[str]:
    """How evenly the first steps occupy the ranks, with warnings."""
    n_steps = min(config.max_steps, max(BALANCE_SLOTS // config.data.slots_per_step, 1))
    total = Balance()
    for step in range(n_steps):
        scan, spread = _spread(data, step, ranks.total, ranks.per_node)
        total += Balance.of(spread.micro_steps(scan.plan.sets), spread)
    micro_steps = total.micro_batches / ranks.total / n_steps
    yield (
        f"on {ranks.total} ranks, over the first {n_steps} steps: {micro_steps:.1f} micro-batches a rank and step; "
        f"largest over mean cost of a rank {total.ratio:.2f}; packing efficiency {total.packing_efficiency:.0%} (no "
        f"padding is 100%); idle micro-batches {total.idle_share:.0%}"
    )
    if total.ratio > UNBALANCED:
        yield (
            f"warning: the ranks wait {1 - 1 / total.ratio:.0%} of the time for the one with the most tokens; raise "
            f"data.slots_per_step ({config.data.slots_per_step}, {config.data.slots_per_step / ranks.total:.1f} a rank)"
            " or take fewer ranks"
        )


def _rows(index: DataIndex) -> Iterator[str]:
    splits = {"training rows": Split.TRAIN, "held out": Split.HELD_OUT, "parallel corpus": Split.PARALLEL}
    if Split.PARALLEL not in index.split:
        del splits["parallel corpus"]
    rows = [
        (language, *(f"{len(index.rows(number, split)):,}" for split in splits.values()))
        for number, language in enumerate(index.languages)
    ]
    yield from table(["language", *splits], rows).splitlines()
    if index.bad_rows:
        origin, reason = index.bad_rows[0]
        yield f"unusable rows: {len(index.bad_rows)}, such as {origin}: {reason}"
    yield from contamination(index)


def _unusable(data: DataParts) -> Iterator[str]:
    """Unusable rows among the first ones; more than `data.max_bad_rows` have been refused already."""
    languages = range(len(data.index.languages))
    rows = [row for each in languages for row in sample_rows(data.index, each, COST_SAMPLES, data.reader.seed)]
    if bad := data.reader.readable(rows).bad:
        yield f"of the first {COST_SAMPLES} rows of each language (crosslift check --all-rows reads all):"
        yield from by_reason(bad)


def _pairs(planner: Planner, max_steps: int) -> str:
    steps = [planner.step(step) for step in range(min(max_steps, COUNTED_STEPS))]
    sets = [len(pairs) for plan in steps for pairs in plan.sets]
    dropped = sum(plan.dropped_pairs for plan in steps)
    return (
        f"first {len(steps)} steps: {sum(sets) / len(steps):.1f} pairs a step, in {len(sets) / len(steps):.1f} "
        f"contrast sets (plain SFT has none), {dropped} pairs in no set (identical texts, or "
        "a language with too few probe samples), "
        f"about {steps[0].costs.sum():.0f} tokens a step"
    )


def _model(
    config: RunConfig,
    prepared: Prepared,
    data: DataParts,
    ranks: Ranks,
    gpu_memory_gib: float | None,
) -> Iterator[str]:
    from modeling.adapters import add_adapters
    from modeling.architectures import ARCHITECTURE_OF, auto_class
    from modeling.layers import decoder_layers, position_limit
    from modeling.loading import load_config, resolve_attention, resolve_directory
    from modeling.module_calls import check_module_calls
    from modeling.quantisation.linear import dense_elements, quantised_blocks
    from training.checks.activations import count_activations
    from training.engine.engine import DTYPES

    head = ARCHITECTURE_OF[config.data.kind]
    model_config = load_config(resolve_directory(prepared.model_dir), head)
    check_module_calls(model_config, head, ranks.total)
    attention = resolve_attention(config.model.attention, model_config, head)
    dtype = DTYPES[config.precision]

    def make() -> PreTrainedModel:
        made: PreTrainedModel = auto_class(head).from_config(model_config, attn_implementation=attention)
        return made

    with torch.device("meta"), quantised_blocks(make, config.model.quantise, dtype):
        model = make()
        model.tie_weights()
        layers = len(decoder_layers(model))
        check_model(config.data, config.objective, model)
        limit, longest = position_limit(model), config.data.sequence_length
        if (lora := config.model.lora) is not None:
            add_adapters(model, lora, config.seed)
    parameters = dense_elements(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapted = f", {trained / 1e6:.1f}M of them trained" if lora is not None else ""
    about = f"{layers} layers, {config.precision}, attention {attention}"
    quantised = f", linear layers of blocks in {config.model.quantise}" if config.model.quantise else ""
    yield f"model: {parameters / 1e6:.1f}M parameters{adapted}, {about}{quantised}"
    if (lacking := missing_for_quantised(config.model)) is not None:
        yield f"warning: {lacking}"
    if limit is not None and longest > limit:
        yield (
            f"warning: data.sequence_length is {longest}, but the model was made for {limit} positions "
            "(max_position_embeddings in its config.json)"
        )
    shape = largest_batch(config.data, config.objective, data, ranks.total)
    yield (
        f"largest micro-batch: {shape.rows} rows of {shape.row_tokens} tokens"
        + (f", {shape.labels} of them labels" if shape.labels else "")
        + (", layers recomputed in backward" if config.gradient_checkpointing else "")
    )
    blank = data.packer.collator.blank
    kept = count_activations(config, model_config, attention, dtype, shape, blank)  # type: ignore[arg-type]
    estimate = memory_estimate(config, model, kept, ranks)
    yield from estimate.table()
    if gpu_memory_gib is not None and estimate.gpu_bytes > gpu_memory_gib * GIB:
        savings = memory_savings(config, model, kept, ranks)
        named = ", ".join(f"{change} ({peak / GIB:.1f})" for change, peak in savings) or "none; use a smaller model"
        raise ConfigError(
            f"a GPU of {gpu_memory_gib:g} GiB is too small: {estimate.gpu_bytes / GIB:.1f} GiB are needed; "
            f"changes that need less, with their GiB: {named}"
        )


def largest_batch(data: DataConfig, objective: ObjectiveConfig, parts: DataParts, ranks: int) -> BatchShape:
    """The largest micro-batch that a rank can get.

    Its number of labels and samples is estimated from the first samples of every language: by the language with the
    most labels per token, and by the one with the shortest samples.
    """
    share, length, reader = 0.0, float(data.sequence_length), parts.reader
    for language in range(len(data.languages)):
        samples = reader.readable(sample_rows(parts.index, language, COST_SAMPLES, reader.seed)).samples
        tokens = sum(map(len, samples))
        if tokens:
            share = max(share, sum(sample.n_labels for sample in samples) / tokens)
            length = min(length, tokens / len(samples))
    row = parts.packer.grid.longest_row if parts.packer.layout == "packed" else data.sequence_length
    pairing = objective.pairing()
    sides = 2 if pairing.with_partner or data.mixture.pairing != "none" else 1
    of_corpus = 2 * data.pairs.per_step if data.pairs is not None and objective.pairing().needed else 0
    most = (-(-data.slots_per_step // ranks) * sides + -(-of_corpus // ranks)) * data.sequence_length  # of a rank
    rows = max(min(data.micro_batch_tokens, most) // row, 1)
    if pairing.with_partner:
        rows = max(rows // 2, 1) * 2
    segments = max(int(rows * row / length), 1)
    pairs = segments // 2 if pairing.set_size is not None else 0
    return BatchShape(rows, row, int(rows * row * share), segments, pairs)


def _samples(data: DataParts, samples: int) -> Iterator[str]:
    """Samples of each language, decoded, with their labels."""
    reader = data.reader
    for number, language in enumerate(data.index.languages):
        for row in sample_rows(data.index, number, samples, reader.seed):
            origin = data.index.origin(row)
            try:
                sample = reader.read(reader.alone(row))
                length = reader.length(row)
            except BadRow as bad:  # there may be `data.max_bad_rows` of them
                yield f"--- {language}  {bad}: unusable, left out"
                continue
            if sample is None:
                yield f"--- {language}  {origin}: {length} tokens, above data.sequence_length: left out"
                continue
            header, *lines = reader.stage.describe(sample, length)
            yield f"--- {language}  {origin}  {header}"
            yield from lines
