"""Builds the parts of a run from its config, in the required order.

Data come first (their errors are cheap), then the layout check on a tiny model, then the architecture (sharded as it is
made), its weights (streamed), the objective's hooks, and DeepSpeed's engine last, so that the objective's hooks are
registered before the engine's own.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.batching.batch import Batch
from data_pipeline.batching.chat import ChatCollator
from data_pipeline.batching.grid import Grid
from data_pipeline.batching.micro_steps import Spread
from data_pipeline.batching.packer import Packer
from data_pipeline.batching.tasks import TaskCollator
from data_pipeline.loader import Loader, ThisRank, fixed_batches
from data_pipeline.order.mixture import Quotas, language_weights
from data_pipeline.order.pairing import Partners, PlannedPairing
from data_pipeline.order.parallel import ParallelPairs
from data_pipeline.order.plan import Planner, StepPlan
from data_pipeline.reader import Reader, TextStage, overlong_error
from data_pipeline.records import BadRow, DataError, Sample
from data_pipeline.sources.index import DataIndex
from data_pipeline.tasks.stage import TaskStage
from data_pipeline.tasks.tokenize import TaskTokenizer
from data_pipeline.text.chat import Chat
from data_pipeline.text.stage import ChatStage
from data_pipeline.text.tokenizer import tokenizer_hash
from modeling.adapters import add_adapters
from modeling.architectures import ARCHITECTURE_OF
from modeling.layers import label_cost
from modeling.layout import choose_layout
from modeling.loading import build_model, load_weights, resolve_attention, resolve_directory
from modeling.loading import load_config as load_model_config
from modeling.module_calls import check_module_calls
from modeling.weights.untrusted import read_tokenizer
from modeling.weights.weight_files import directory_hash
from training.checkpoints.search import newest_seen
from training.checks.front import check_model, check_vocabulary
from training.checks.pairs import pair_warnings, refuse_unpaired, set_warnings
from training.checks.survey import refuse_bad_rows
from training.config import DataConfig, RunConfig
from training.distributed import cpu_sum, gather_objects, rank, world_size
from training.engine.engine import DTYPES, Construction, Engine, deepspeed_settings, release_freed_memory
from training.errors import ConfigError
from training.launch.heartbeat import WAITING_FOR_DATA, heartbeat
from training.objectives.base import Objective, ObjectiveConfig, ObjectiveParts
from training.objectives.evaluation import HeldOut
from training.probe_set import probe_samples, too_few_samples, uses_corpus
from training.run_folder.date import with_date
from training.run_folder.prepare import Prepared, sample_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
COST_SAMPLES = 32  # rows per language on which tokens per byte are measured
SWITCH_INTERVAL_S = 2e-4  # how long the training thread waits for a loader's thread that runs Python code
CHECKED_STEPS = 64  # steps whose contrast sets are compared with the micro-batch budget at the start


@dataclass(frozen=True, slots=True)
class DataParts:
    """The data side of a run: needs no model weights."""

    index: DataIndex
    tokenizer: PreTrainedTokenizerBase
    reader: Reader
    planner: Planner
    packer: Packer
    # the objective's probe set by language, followed by that of the parallel corpus; empty if it has none
    probe: tuple[tuple[Sample, ...], ...]
    uncontrasted: frozenset[int]  # places in `probe` with too few samples to be in contrast sets
    fingerprint: dict[str, str]  # of data and tokenizer, which determine the tokens of each step

    def loader(self, this_rank: ThisRank | None = None, workers: int = 1) -> Loader:
        """The loader of a rank. Its threads give up the interpreter's lock after SWITCH_INTERVAL_S, by default 5 ms."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        return Loader(self.reader, self.planner, self.packer, this_rank, workers)

    def probe_batches(self, this_rank: ThisRank) -> list[Batch[Any]]:
        """A rank's micro-batches of the probe set, equal in number on all ranks."""
        return fixed_batches([sample for each in self.probe for sample in each], self.packer, this_rank)


@dataclass(frozen=True, slots=True)
class Run:
    """All parts of a run on one rank."""

    config: RunConfig
    data: DataParts
    loader: Loader
    objective: Objective
    engine: Engine
    heldout: HeldOut | None
    model_dir: Path  # the weights that the run started from
    base: dict[str, str] | None = None  # their directory and hash; None: from scratch


def assemble_data(config: RunConfig, prepared: Prepared) -> DataParts:
    """Tokenizer, reader, planner and packer; the start-up checks that need no weights.

    Raises:
        DataError, ConfigError: a wrong label mask, for example.
    """
    index = prepared.index
    refuse_unpaired(config.data, config.objective, index)
    tokenizer = read_tokenizer(prepared.tokenizer_dir)
    reader = build_reader(config, index, tokenizer)
    check_longest(reader)
    costs = tokens_per_byte(config.data, reader)
    parallel = uses_corpus(config.data, config.objective)
    probe = probe_samples(reader, config.objective.probe_size(), parallel=parallel)
    uncontrasted = too_few_samples(config.data, config.objective, probe)
    planner = build_planner(config.data, config.objective, reader, costs, uncontrasted)
    packer = build_packer(config.data, config.objective, config.model.attention, prepared.model_dir, tokenizer)
    return DataParts(index, tokenizer, reader, planner, packer, probe, uncontrasted, _fingerprint(index, tokenizer))


def build_reader(config: RunConfig, index: DataIndex, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """The reader of the run's rows."""
    data = config.data
    if data.task is None and data.template.name == "chat" and data.template.date is None:
        # `train` has set the date already; other commands use that of the run.
        newest = newest_seen(config.output_dir, config.checkpoint.local_dir)
        data = with_date(data, tokenizer, config.output_dir, newest)
    partners = build_partners(data, config.objective, index, config.seed)
    return Reader(index, text_stage(data, tokenizer), config.seed, partners)


def text_stage(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TextStage:
    """The text stage for the kind of rows."""
    if data.task is not None:
        return TaskStage(TaskTokenizer(tokenizer, data.task, data.sequence_length), data.overlong)
    longest = data.pairs.longest if data.pairs is not None else None
    return ChatStage(Chat(tokenizer, data.template, data.languages), data.sequence_length, data.overlong, longest)


def build_partners(data: DataConfig, objective: ObjectiveConfig, index: DataIndex, seed: int) -> Partners | None:
    """Chooses the partners of samples; None if the objective reads samples without partners."""
    rule = objective.pairing()
    if not rule.with_partner:
        return None
    return Partners(index, data.languages.index(data.dominant), rule.gold_schedule, seed)


def fingerprint(prepared: Prepared) -> dict[str, str]:
    """`DataParts.fingerprint`, without the rest."""
    return _fingerprint(prepared.index, read_tokenizer(prepared.tokenizer_dir))


def _fingerprint(index: DataIndex, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {**index.fingerprint, "tokenizer": tokenizer_hash(tokenizer)}


def assemble(config: RunConfig, prepared: Prepared) -> Run:
    """All parts of a run. Called on all ranks, with an initialised process group."""
    data, this = assemble_data(config, prepared), this_rank()
    check_contrast_sets(config, data.planner, data.packer.grid, this.world_size, this.per_node)
    for line in pair_and_set_warnings(config, data) if this.rank == 0 else ():
        log.warning("%s", line)
    settings = deepspeed_settings(config, this.world_size, in_run=True)
    directory = resolve_directory(prepared.model_dir)
    head = ARCHITECTURE_OF[config.data.kind]
    model_config = load_model_config(directory, head)
    check_vocabulary(data.tokenizer, prepared.tokenizer_dir, model_config.get_text_config().vocab_size)
    check_module_calls(model_config, head, this.world_size)
    model = starting_model(config, directory, settings)
    objective = build_objective(config.data, config.objective, model, data.tokenizer, data.probe_batches(this))
    engine = Engine(model, config, settings, this.world_size)
    heldout = HeldOut(data.reader, data.packer, config.evaluation, this) if config.evaluation.every else None
    base = {"directory": str(directory), "hash": directory_hash(directory)} if config.model.path is not None else None
    return Run(config, data, data.loader(this, config.data.workers), objective, engine, heldout, directory, base)


def pair_and_set_warnings(config: RunConfig, data: DataParts) -> Iterator[str]:
    """Warnings about the pairs of an objective that learns from them."""
    yield from pair_warnings(config.data, config.objective, data.index)
    yield from set_warnings(config.data, config.objective, config.max_steps, data.planner)
    languages = config.data.languages
    for number in sorted(data.uncontrasted):
        parallel, language = divmod(number, len(languages))
        where = " with pairs of data.pairs" if parallel else ""
        yield (
            f"language {languages[language]!r} takes no part in the contrastive loss{where}: it has "
            f"{len(data.probe[number])} usable probe samples, and {config.objective.pairing().min_probe_samples} are "
            "needed"
        )


def this_rank() -> ThisRank:
    """This process among the ranks of the run. Nodes count only if all have equally many ranks."""
    sizes = set(gather_objects(int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))))
    return ThisRank(rank(), world_size(), sizes.pop() if len(sizes) == 1 else None, _sum_while_loading)


def _sum_while_loading(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`cpu_sum` in the middle of waiting for data, so that a rank that hangs afterwards is reported as doing so."""
    total = cpu_sum(values)
    heartbeat.phase(WAITING_FOR_DATA)
    return total


def starting_model(config: RunConfig, directory: Path, settings: dict[str, Any]) -> PreTrainedModel:
    """The model of a directory with its weights, sharded as it is made and filled tensor by tensor (ZeRO-3)."""
    construction = Construction(settings)
    with release_freed_memory():
        model = build_model(
            directory, attention=config.model.attention, dtype=DTYPES[config.precision],
            gradient_checkpointing=config.gradient_checkpointing, construction=construction.context(),
            architecture=ARCHITECTURE_OF[config.data.kind], quantise=config.model.quantise,
        )  # fmt: skip
        check_model(config.data, config.objective, model)
        load_weights(model, directory, construction.write, is_reader=rank() == 0 or not construction.sharded)
    if (lora := config.model.lora) is not None:
        with construction.known_to_peft():
            add_adapters(model, lora, config.seed)
    return model


def build_objective(
    data: DataConfig,
    objective: ObjectiveConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: list[Batch[Any]],
) -> Objective:
    """The objective of a run; its hooks are placed on `model`, so this comes before the engine is made."""
    special_ids, parallel = tuple(tokenizer.all_special_ids), uses_corpus(data, objective)
    parts = ObjectiveParts(data.kind, data.languages, data.dominant, special_ids, probe, parallel)
    return objective.build(model, parts)


def build_planner(
    data: DataConfig,
    objective: ObjectiveConfig,
    reader: Reader,
    costs: list[float] | None,
    uncontrasted: frozenset[int] = frozenset(),
) -> Planner:
    """The planner of a run; `costs` are tokens per byte by language."""
    index = reader.index
    rows = {language: len(index.rows(number)) for number, language in enumerate(data.languages)}
    weights = language_weights(data.mixture, rows)
    pairing = PlannedPairing(
        dominant=data.languages.index(data.dominant),
        mode=data.mixture.pairing,
        set_size=objective.pairing().set_size,
        partners=reader.partners,
        uncontrasted=uncontrasted,
    )
    quotas = Quotas(weights, data.languages, data.mixture.period)
    corpus = None
    if data.pairs is not None and uses_corpus(data, objective):
        corpus = ParallelPairs(index, pairing.dominant, data.pairs.mixture, data.pairs.per_step, reader.seed)
    return Planner(index, quotas, pairing, data.slots_per_step, reader.seed, costs, corpus)


def build_packer(
    data: DataConfig, objective: ObjectiveConfig, attention: str, model_dir: str, tokenizer: PreTrainedTokenizerBase
) -> Packer:
    """The packer. With `data.layout: auto`, a check on a tiny model chooses the layout of conversations."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pad_id = int(pad or 0)
    budget, longest = data.micro_batch_tokens, data.sequence_length
    model_config = load_model_config(resolve_directory(model_dir), ARCHITECTURE_OF[data.kind])
    cost = label_cost(model_config, ARCHITECTURE_OF[data.kind]) if data.kind in ("chat", "text") else 0.0
    if data.task is not None:
        has_types = "token_type_ids" in tokenizer.model_input_names
        tasks = TaskCollator(pad_id, data.task, objective.pairing().with_partner, has_types)
        return Packer(Grid("padded", budget, longest, tasks.sides, cost), tasks)
    resolved = resolve_attention(attention, model_config)
    layout = choose_layout(model_config, resolved).layout if data.layout == "auto" else data.layout
    # Varlen attention takes one long row; without it a row costs its square, so rows stay short.
    row_tokens = None if resolved == "flash_attention_2" else longest
    return Packer(Grid(layout, budget, row_tokens, label_cost=cost), ChatCollator(pad_id))


def tokens_per_byte(data: DataConfig, reader: Reader) -> list[float]:
    """Tokens per byte of each language, measured on some of its rows; the plan's costs are based on it.

    Raises:
        DataError: more of them are unusable than `data.max_bad_rows`, or all of a language.
        ConfigError: all of a language are longer than `data.sequence_length`.
    """
    ratios = []
    bad: list[BadRow] = []
    for number, language in enumerate(data.languages):
        looked_at = sample_rows(reader.index, number, COST_SAMPLES, reader.seed)
        found = reader.readable(looked_at)
        bad += found.bad
        if looked_at and not found.samples:
            rest = len(looked_at) - len(found.bad)
            if found.bad:
                others = f", {rest} longer than data.sequence_length" if rest else ""
                raise DataError(
                    f"{found.bad[0]} (none of the {len(looked_at)} rows looked at in language {language!r} is usable: "
                    f"{len(found.bad)} such{others})"
                )
            raise ConfigError(
                f"data.sequence_length: {data.sequence_length} tokens hold none of the {len(looked_at)} samples "
                f"looked at in language {language!r}; raise it"
            )
        n_bytes = int(np.sum(reader.index.n_bytes[found.rows], dtype=np.int64))
        ratios.append(sum(len(sample) for sample in found.samples) / n_bytes if n_bytes else 1.0)
    refuse_bad_rows(
        bad,
        data.max_bad_rows,
        f" among the first {COST_SAMPLES} of each language; crosslift check --all-rows reads all",
    )
    return ratios


def check_longest(reader: Reader) -> None:
    """With `data.overlong: error`, checks the length of the rows with the most bytes of each language.

    Raises:
        DataError: one of them is too long, so that training would end at some step.
    """
    index, limit = reader.index, reader.stage.sequence_length
    for language in range(len(index.languages) if reader.stage.overlong == "error" else 0):
        rows = index.rows(language)
        usable = rows[~index.bad[rows]]
        longest = usable[np.argsort(-index.n_bytes[usable], kind="stable")[:COST_SAMPLES]].tolist()
        for row, length in zip(longest, reader.lengths(longest), strict=True):
            # an unusable row is counted and limited by max_bad_rows when training reads it
            if not isinstance(length, BadRow) and length > limit:
                raise overlong_error(index.origin(row), length, limit)


def check_contrast_sets(
    config: RunConfig, planner: Planner, grid: Grid, world_size: int, per_node: int | None = None
) -> None:
    """Refuses contrast sets that do not fit into one micro-step of this number of ranks, by estimated lengths."""
    largest, data, set_size = 0, config.data, config.objective.pairing().set_size
    if set_size is None or 2 * (2 * set_size - 1) <= world_size:  # at most one sample a rank
        return
    for step in range(min(config.max_steps, CHECKED_STEPS)):
        plan = planner.step(step)
        lengths = estimated_lengths(plan, data).round().astype(np.int64)
        spread = Spread(grid, lengths, np.zeros_like(lengths), world_size, per_node)
        kept = (pairs[(lengths[pairs] > 0).all(axis=1)] for pairs in plan.sets)
        largest = max([largest, *(spread.tokens_needed(pairs) for pairs in kept if len(pairs))])
    if largest > data.micro_batch_tokens:
        where = "" if world_size == 1 else f" on one of {world_size} ranks"
        raise ConfigError(
            f"data.micro_batch_tokens: {data.micro_batch_tokens}, but a contrast set takes about {largest} tokens "
            f"{grid.layout}{where} (a step's last set may hold nearly twice objective.contrastive.set_size pairs); set "
            f"data.micro_batch_tokens to {largest} or more, lower the set_size, or take more ranks"
        )


def estimated_lengths(plan: StepPlan, data: DataConfig) -> npt.NDArray[np.float64]:
    """(N,) estimated tokens of each sample of a step as read; 0 if it is too long and dropped."""
    longest = data.sequence_length if data.overlong == "truncate" else 0
    return np.where(plan.costs <= data.sequence_length, plan.costs, longest)
