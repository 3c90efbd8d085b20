"""Program of a rank of the gradient tests: the same global batch in 1, 2 and 4 micro-batches per rank.

A cell is an objective at a step; rank 0 saves its gradients. X-Mixup has two cells: a step with gold sources and one
with back-translations. ShifCon has three: as distributed; with every sample on a rank drawn at random, no sample of the
middle micro-steps on the last rank; and with a row of a pair that is bad when it is read. With pairs of a parallel
corpus in addition, it is another objective here. Two ranks also run under
every ZeRO stage: they save the parameters after two updates, with and without a checkpoint in between, and the
gradients and losses of a capped head in chunks and from whole logits.

python gradient_cells.py DATA_DIR WORK_DIR OUTPUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_run import LANGUAGES, XMIXUP, rank_values
from torch import Tensor

from data_pipeline.batching.batch import ContrastSets
from data_pipeline.batching.grid import Grid
from data_pipeline.batching.micro_steps import MicroStep, Spread
from data_pipeline.batching.packer import Packer
from data_pipeline.loader import Loader, Step
from data_pipeline.reader import Reader
from data_pipeline.records import BadRow, DataError, Sample
from modeling.lm_head import chunked_losses
from modeling.lm_head.chunked_losses import LogitChange
from modeling.lm_head.label_head import LabelHead
from training.assembly import Run, assemble
from training.distributed import all_sum, barrier, rank, world_size
from training.engine.engine import gathered, process_group
from training.loop.trainer import Trainer
from training.objectives import contrast
from training.objectives.base import LossTerm
from training.run_file import validate
from training.run_folder.prepare import prepare

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"name": "sft"}},
    "shifcon": {},
    "shifcon-corpus": {
        "data.pairs": {
            "sources": [{"name": "sentences", "files": {code: f"{code}.txt" for code in LANGUAGES}}],
            "per_step": 20,
        },
    },
    # Larger weights than usual: otherwise attention is uniform and the learned ratio has almost no gradient.
    "xmixup": {**XMIXUP, "model.init.initializer_range": 0.3, "data.slots_per_step": 48},
}
STEP = 3
# cell: step; others have one, of the objective's name
STEPS = {
    "xmixup": {"xmixup": STEP, "xmixup-back": 5},
    "shifcon": {"shifcon": STEP, "shifcon-scattered": STEP, "shifcon-bad": STEP},
}
LEARNING_RATE = 1e-2
CHUNK = 7  # label positions
GEMMA = {
    "model_type": "gemma2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "final_logit_softcapping": 2.0, "initializer_range": 0.2,
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "tied": {"model.init": {**GEMMA, "tie_word_embeddings": True}},
    "untied": {"model.init": {**GEMMA, "tie_word_embeddings": False}},
}


@process_group(timeout_minutes=3)
def main() -> None:
    data_dir, work, output = (Path(argument) for argument in sys.argv[1:])
    for objective in OBJECTIVES:
        run = _run(data_dir, work, objective)
        for cell, step in STEPS.get(objective, {objective: STEP}).items():
            for micro_batches in (1, 2, 4):
                _cell(run, cell, step, micro_batches, output / f"{cell}-{micro_batches}")
        run.engine.destroy()
    for objective in ("shifcon", "shifcon-corpus") if world_size() == 1 else ():
        run = _run(data_dir, work, objective)
        _cell(run, f"{objective}-plain", STEP, 1, output / f"{objective}-plain-1")
        run.engine.destroy()
    if world_size() == 2:
        for objective in ("shifcon", "xmixup"):
            for stage in (1, 2, 3):
                _two_updates(data_dir, work, output, objective, stage)
        for head in HEADS:
            for stage in (1, 2, 3):
                _chunked_and_whole(data_dir, work, output, head, stage)


def _cell(run: Run, cell: str, step: int, micro_batches: int, output: Path) -> None:
    """The step's gradients as `output`.safetensors, and what it was made of as `output`.json."""
    trainer = Trainer(run, tracker=None)
    batch = _batch(trainer, cell, step, micro_batches)
    idle = all_sum([sum(not each.samples for each in batch.micro_batches)], run.engine.device)
    received = sum(sum(each.received_from) for each in _contrasts(batch))
    if cell.endswith("-plain"):
        (micro_batch,) = batch.micro_batches
        moments = _plain_moments(run)
        run.objective.normalisation = None  # type: ignore[attr-defined]
        contrast.contrastive_terms = partial(_plain_terms, run, step, micro_batch.samples, moments)  # type: ignore[assignment]
    sums = trainer.accumulate(step, batch)
    gradients = run.engine.full_gradients()
    assert gradients.keys() == dict(run.engine.module.named_parameters()).keys()
    norm = run.engine.step(learning_rate=0.0)  # clears the gradients, changes no weight
    terms = all_sum(sums.terms, run.engine.device).tolist()
    exchanged = all_sum([received], run.engine.device).item()
    if rank() == 0:
        save_file(gradients, output.with_suffix(".safetensors"))
        sets = len(run.data.planner.step(step).sets)
        facts = {
            **batch.counts,
            "norm": float(norm),
            "sets": sets,
            "idle": float(idle),
            "exchanged": exchanged,
            "terms": terms,
        }
        output.with_suffix(".json").write_text(json.dumps(facts))


def _pooled_alone(run: Run, sample: Sample) -> list[Tensor]:
    """The shifted, pooled states of a sample by itself: a tensor (H,) for each layer."""
    objective: Any = run.objective
    batch = run.data.packer.batch([sample])
    with torch.no_grad(), objective._shifting(batch), objective._pooled(batch) as pooled:
        run.engine.forward(**batch.model_inputs())
    return [states[0] for states in pooled]


def _plain_moments(run: Run) -> list[dict[tuple[int, bool], tuple[Tensor, Tensor]]]:
    """For each layer, by language and whether of the parallel corpus: the mean pooled state, and the dominant
    language's standard deviation.
    """
    languages = len(run.config.data.languages)
    dominant = run.config.data.languages.index(run.config.data.dominant)
    found = [[_pooled_alone(run, sample) for sample in samples] for samples in run.data.probe]
    layers = []
    for layer in range(len(found[0][0])):
        states = [torch.stack([each[layer] for each in of_language]) for of_language in found]
        of_layer = {}
        for place, each in enumerate(states):
            language = place % languages
            deviation = states[place - language + dominant].std(dim=0)
            of_layer[language, place >= languages] = (each.mean(dim=0), deviation)
        layers.append(of_layer)
    return layers


def _plain_terms(
    run: Run, step: int, samples: Sequence[Sample], moments: Any, raw: Sequence[Tensor], *_: Any
) -> tuple[dict[str, LossTerm], None]:
    """The terms by loops over the plan's pairs, on one rank that has all samples in one micro-batch."""
    pooled = []
    for states, of_layer in zip(raw, moments, strict=True):
        normalised = []
        for state, sample in zip(states, samples, strict=True):
            mean, deviation = of_layer[sample.language, sample.parallel]  # type: ignore[attr-defined]
            assert (deviation > 0.01 * deviation.median()).all()
            normalised.append((state - mean) / deviation)
        pooled.append(torch.stack(normalised))
    found = 0.0
    plan = run.data.planner.step(step)
    order = [(sample.id, sample.language, sample.n_labels > 0) for sample in samples]

    def segment(position: int) -> int:
        slot = plan.slot(position)
        return order.index((run.data.index.record(slot.row).id, slot.language, slot.labelled))

    loss, scale = torch.zeros(()), run.config.objective.contrastive.scale
    (states,) = pooled  # the area has one layer

    def similar(one: int, other: int) -> Tensor:
        return torch.cosine_similarity(states[segment(one)], states[segment(other)], dim=0)

    for pairs in plan.sets:
        for i, (dominant, other) in enumerate(pairs.tolist()):
            different = [
                j == i or (
                    plan.groups[pairs[j, 0]] != plan.groups[dominant]
                    and not set(plan.contents[pairs[j]]) & set(plan.contents[pairs[i]])
                )
                for j in range(len(pairs))
            ]  # fmt: skip
            candidates = [pair for pair, chosen in zip(pairs.tolist(), different, strict=True) if chosen]
            rows = torch.stack([similar(dominant, b) for _, b in candidates])
            columns = torch.stack([similar(a, other) for a, _ in candidates])
            pair = similar(dominant, other)
            loss = loss + ((scale * rows).logsumexp(0) + (scale * columns).logsumexp(0)) / 2 - scale * pair
            found += len(candidates) > 1 and float(pair) == float(columns.max())
    terms = {
        "contrastive": LossTerm(loss, "pairs", run.config.objective.contrastive.weight, loss),
        "retrieval": LossTerm(torch.tensor(found), "pairs", 0.0),
    }
    return terms, None


def _contrasts(batch: Step) -> list[ContrastSets]:
    found = [getattr(each.targets, "contrast", None) for each in batch.micro_batches]
    return [each for each in found if each is not None]


def _two_updates(data_dir: Path, work: Path, output: Path, objective: str, stage: int) -> None:
    run = _run(data_dir, work, objective, zero_stage=stage)
    assert run.engine._engine.zero_optimization_stage() == stage
    trainer = Trainer(run, tracker=None)
    batch = _batch(trainer, objective, STEP, micro_batches=2)
    saved = output / f"{objective}-stage-{stage}"
    for number, name in enumerate(("first", "second", "second-after-load")):
        if name == "second-after-load":
            run.engine.load_state(saved)
            # Dropped gradients must have no effect. Not STEP + 1: ShifCon's vectors are estimated before it.
            trainer.accumulate(STEP + 2, _batch(trainer, objective, STEP + 2, micro_batches=2))
            run.engine.drop_update()
        trainer.accumulate(STEP, batch)
        gradients = run.engine.full_gradients()
        run.engine.step(LEARNING_RATE)
        with gathered(run.engine.module.parameters()):
            parameters = {key: each.detach().clone() for key, each in run.engine.module.named_parameters()}
        assert gradients.keys() == parameters.keys()
        if rank() == 0:
            save_file(gradients, output / f"{saved.name}-{name}-gradients.safetensors")
            save_file(parameters, output / f"{saved.name}-{name}-parameters.safetensors")
        if number == 0:
            for path, state in run.engine.take_state(saved):
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(state, path)
            barrier()
    run.engine.destroy()


def _chunked_and_whole(data_dir: Path, work: Path, output: Path, head: str, stage: int) -> None:
    """Gradients and the loss of one step with losses in chunks of `CHUNK` positions, and from whole logits."""
    run = _run(data_dir, work, "sft", folder=head, zero_stage=stage, **HEADS[head])
    label_head: LabelHead = run.objective.head  # type: ignore[attr-defined]
    assert label_head.change == LogitChange(cap=2.0)
    chunked_losses.CHUNK_ELEMENTS, chunked_losses.CHUNK_POSITIONS = 1, CHUNK
    trainer = Trainer(run, tracker=None)
    batch = _batch(trainer, "sft", STEP, micro_batches=2)
    for name in ("chunked", "whole"):
        if name == "whole":
            label_head.change = None
        sums = trainer.accumulate(STEP, batch)
        gradients = {**run.engine.full_gradients(), "losses": all_sum(sums.losses, run.engine.device)}
        run.engine.drop_update()
        if rank() == 0:
            save_file(gradients, output / f"{head}-stage-{stage}-{name}.safetensors")
    run.engine.destroy()


def _run(data_dir: Path, work: Path, objective: str, folder: str = "", **changes: Any) -> Run:
    data = data_dir / "tasks" if objective == "xmixup" else data_dir
    config = validate(rank_values(data, work / (folder or objective), **OBJECTIVES[objective], **changes), "test")
    return assemble(config, prepare(config, rank()))


def _batch(trainer: Trainer, cell: str, step: int, micro_batches: int) -> Step:
    """The global batch of the step in that many micro-steps."""
    run = trainer.run
    run.objective.before_step(run.engine, step)
    reader = run.data.reader
    if cell == "shifcon-bad":
        plan = run.data.planner.step(step)
        reader = replace(reader, index=WithBadRow(reader.index, int(plan.rows[plan.sets[0][1, 1]])))
    grid = _grid_for(run, reader, step, micro_batches)
    loader = replace_loader(run.loader, reader, grid)
    micro_steps = Spread.micro_steps
    if cell == "shifcon-scattered":
        Spread.micro_steps = partialmethod(_scattered, n_steps=micro_batches)  # type: ignore[method-assign, assignment]
    (batch,) = loader.steps(step, step + 1)
    Spread.micro_steps = micro_steps  # type: ignore[method-assign]
    assert len(batch.micro_batches) == micro_batches, (len(batch.micro_batches), micro_batches)
    return batch


def replace_loader(loader: Loader, reader: Reader, grid: Grid) -> Loader:
    return Loader(reader, loader.planner, Packer(grid, loader.packer.collator), loader.this_rank)


def _grid_for(run: Run, reader: Reader, step: int, micro_batches: int) -> Grid:
    """A grid whose budget gives exactly that many micro-steps of this step, on this number of ranks."""
    own = run.loader.packer
    alone = replace_loader(run.data.loader(), reader, own.grid)
    scan = alone.scan(step)
    table = alone.table(scan.measures)
    budgets = [(rows * row, row) for row in (128, 112, 96, 80) for rows in range(len(scan.samples), 0, -1)]
    if own.layout == "padded":
        budgets = [(budget, own.grid.row_tokens) for budget in range(256, 2**14, 64)]
    for budget, row in budgets:
        grid = replace(own.grid, micro_batch_tokens=budget, row_tokens=row)
        spread = Spread(grid, table["row_length"], table["n_labels"], world_size(), world_size())
        with suppress(DataError):  # a set above the budget
            if len(spread.micro_steps(scan.plan.sets)) == micro_batches:
                return grid
    raise AssertionError(f"no budget gives {micro_batches} micro-steps")


def _scattered(spread: Spread, sets: Sequence[Any], n_steps: int) -> list[MicroStep]:
    """Samples on ranks drawn at random; of the middle micro-steps, the last rank has none."""
    draw = np.random.default_rng(0)
    in_sets = np.zeros(len(spread.lengths), np.bool_)
    in_sets[np.concatenate(sets).ravel()] = True
    found = []
    for number, (own_sets, singles) in enumerate(spread._groups(n_steps, sets, np.flatnonzero(~in_sets))):
        positions = np.sort(np.concatenate([*(pairs.ravel() for pairs in own_sets), singles]))
        middle = 0 < number < n_steps - 1 and spread.world_size > 1
        ranks = draw.integers(0, spread.world_size - middle, len(positions))
        found.append(MicroStep(positions, ranks, tuple(own_sets)))
    return found


class WithBadRow:
    """An index of which one row is bad when it is read."""

    def __init__(self, index: Any, row: int) -> None:
        self.index, self.row = index, row

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)

    def records(self, rows: Sequence[int]) -> list[Any]:
        read = zip(rows, self.index.records(rows), strict=True)
        return [BadRow("a row", "unusable") if row == self.row else record for row, record in read]


if __name__ == "__main__":
    main()
