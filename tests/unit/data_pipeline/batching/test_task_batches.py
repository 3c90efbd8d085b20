"""batching/tasks.py: each sample once, within the budget, targets and sources aligned, label units at their tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_encoders import TOKENIZERS, WORDS, sentence

from data_pipeline.batching.batch import TagTargets, TaskBatch
from data_pipeline.batching.grid import Grid
from data_pipeline.batching.packer import Packer
from data_pipeline.batching.tasks import TaskCollator
from data_pipeline.loader import ThisRank, fixed_batches
from data_pipeline.records import Example, Sample
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.sample import SideLabels, SourceSide, TaskSample
from data_pipeline.tasks.tokenize import EncodedSide, TaskTokenizer

KINDS = ("classification", "tagging", "qa", "text")
PAIRED = [(kind, paired) for kind in KINDS for paired in (False, True) if not (kind == "text" and paired)]
LANGUAGES = tuple(WORDS)
CLASSES = 3
PAD = 77  # not a token id of any tokenizer
GOLD = 0.5  # share of gold sources


def config_of(kind: str, pooling: str = "mean") -> TaskConfig:
    if kind == "qa":
        return TaskConfig(kind="qa", doc_stride=20, max_question_length=10)
    labels = ("a", "b", "c") if kind in ("classification", "tagging") else ()
    return TaskConfig(kind=kind, labels=labels, **({"word_pooling": pooling} if kind == "tagging" else {}))


def side(tokenizer: TaskTokenizer, rng: random.Random) -> tuple[EncodedSide, SideLabels]:
    """One window of a random text, with random labels."""
    kind, language = tokenizer.config.kind, rng.choice(LANGUAGES)
    if kind == "tagging":
        example = Example(tuple(rng.choices(WORDS[language], k=rng.randint(1, 30))))
    elif kind == "qa":
        context = " ".join([sentence(language)] * rng.randint(1, 3))
        example = Example((sentence("en"), context), answers=((context[-9:], len(context) - 9),))
    else:
        example = Example((sentence(language)[: rng.randint(1, 60)],))
    windows = tokenizer.windows(example)
    encoded = windows[rng.randrange(len(windows))]
    n_units = {"classification": 1, "tagging": encoded.words[1] - encoded.words[0]}.get(kind, 0)
    rows = np.random.default_rng(rng.randrange(10**6)).random((n_units, CLASSES)).astype(np.float32)
    if n_units:
        return encoded, SideLabels(classes=rows)
    if kind == "qa":
        return encoded, SideLabels()
    positions = np.array(sorted(rng.sample(range(1, len(encoded) - 1), k=min(3, len(encoded) - 2))), np.int32)
    return encoded, SideLabels(positions=positions, ids=encoded.input_ids[positions])


def samples_of(tokenizer: TaskTokenizer, n: int, paired: bool, seed: int = 0, gold: bool = True) -> list[TaskSample]:
    rng = random.Random(seed)
    samples = []
    for number in range(n):
        target, source = side(tokenizer, rng), side(tokenizer, rng)
        counts = rng.random() < GOLD
        samples.append(
            TaskSample(
                id=f"s{number}", language=1 + number % 4, group=number, target=target[0], target_labels=target[1],
                source=SourceSide(*source, language=0, is_gold=counts, counts=counts) if paired else None, gold=gold,
            )
        )  # fmt: skip
    return samples


def packer_of(tokenizer: TaskTokenizer, paired: bool, budget: int, has_token_types: bool) -> Packer:
    collator = TaskCollator(PAD, tokenizer.config, paired, has_token_types)
    return Packer(Grid("padded", budget, budget, collator.sides), collator)


def pack(packer: Packer, samples: Sequence[Sample]) -> list[TaskBatch]:
    """The micro-batches of the only rank."""
    return fixed_batches(samples, packer, ThisRank())


def make(kind: str, paired: bool, budget: int = 300, name: str = "wordpiece", pooling: str = "mean") -> Any:
    tokenizer = TaskTokenizer(TOKENIZERS[name](), config_of(kind, pooling), 60)
    return tokenizer, packer_of(tokenizer, paired, budget, tokenizer.has_token_types)


def rows_of(batch: TaskBatch, samples: Sequence[TaskSample]) -> list[tuple[EncodedSide, SideLabels, TaskSample, bool]]:
    """The expected content of each row of a batch, by sample id."""
    by_id = {sample.id: sample for sample in samples}
    chosen = [by_id[name] for name in batch.sample_ids]
    rows = [(sample.target, sample.target_labels, sample, False) for sample in chosen]
    if batch.targets.n_pairs:
        rows += [(s.source.side, s.source.labels, s, True) for s in chosen if s.source is not None]
    return rows


@pytest.mark.parametrize(("kind", "paired"), PAIRED)
@pytest.mark.parametrize("budget", [60, 130, 500, 100_000])
def test_every_sample_once_and_within_the_budget(kind: str, paired: bool, budget: int) -> None:
    """A sample of the greatest length, of which both sides have a row, is within the smallest budget."""
    sides = 2 if paired else 1
    budget = max(budget, sides * 60)
    tokenizer, packer = make(kind, paired, budget)
    samples = samples_of(tokenizer, 40, paired)
    batches = pack(packer, samples)
    assert sorted(name for batch in batches for name in batch.sample_ids) == sorted(sample.id for sample in samples)
    for batch in batches:
        n_rows, length = batch.input_ids.shape
        assert n_rows == sides * len(batch.sample_ids)
        assert batch.targets.n_pairs == (len(batch.sample_ids) if paired else 0)
        assert n_rows * length <= budget
        assert length == int(batch.attention_mask.sum(dim=1).max()), "no column is only padding"
    if budget == 100_000:
        assert len(batches) == 1
    longest = [batch.input_ids.shape[1] for batch in batches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize(("kind", "paired"), PAIRED)
@pytest.mark.parametrize("name", ["wordpiece", "unigram"])
def test_rows_hold_their_tokens_and_nothing_else(kind: str, paired: bool, name: str) -> None:
    tokenizer, packer = make(kind, paired, 400, name)
    samples = samples_of(tokenizer, 25, paired, seed=1)
    for batch in pack(packer, samples):
        assert (batch.token_type_ids is None) == (name == "unigram")
        assert [sample.id for sample in batch.samples] == list(batch.sample_ids)
        for row, (encoded, *_) in enumerate(rows_of(batch, samples)):
            n = len(encoded)
            assert batch.input_ids[row, :n].tolist() == encoded.input_ids.tolist()
            assert (batch.input_ids[row, n:] == PAD).all()
            assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
            if batch.token_type_ids is not None:
                assert batch.token_type_ids[row, :n].tolist() == encoded.token_type_ids.tolist()
                assert (batch.token_type_ids[row, n:] == 0).all()


@pytest.mark.parametrize(("kind", "paired"), PAIRED)
@pytest.mark.parametrize("gold", [True, False])
def test_label_units_are_those_of_their_rows(kind: str, paired: bool, gold: bool) -> None:
    """They equal those built from one sample after another."""
    tokenizer, packer = make(kind, paired)
    samples = samples_of(tokenizer, 30, paired, seed=2, gold=gold)
    for batch in pack(packer, samples):
        assert batch.targets.gold is gold
        expected: list[tuple[Any, ...]] = []
        for row, (encoded, labels, sample, is_source) in enumerate(rows_of(batch, samples)):
            weight = 1.0 if not is_source or (sample.source is not None and sample.source.counts) else 0.0
            common = (row, weight, sample.language, is_source)
            if kind == "text":
                assert labels.positions is not None
                for position in labels.positions.tolist():
                    flat = row * batch.input_ids.shape[1] + position
                    expected.append((*common, (flat, int(encoded.input_ids[position]))))
            elif kind == "qa":
                expected.append((*common, encoded.span))
            else:
                assert labels.classes is not None
                expected += [(*common, tuple(probabilities)) for probabilities in labels.classes.tolist()]
        all_labels: Any = batch.targets.labels
        if kind == "text":
            values: Any = torch.stack([all_labels.positions, all_labels.ids], dim=1)
        else:
            values = all_labels.spans if kind == "qa" else all_labels.classes
        found = zip(
            batch.targets.label_rows.tolist(), batch.label_weights.tolist(), batch.label_languages.tolist(),
            batch.targets.label_is_source.tolist(), map(tuple, values.tolist()), strict=True,
        )  # fmt: skip
        assert list(found) == expected


@pytest.mark.parametrize(("kind", "paired"), PAIRED)
def test_a_samples_counts_are_the_label_units_of_its_rows(kind: str, paired: bool) -> None:
    """Of sources those that count; every sample with a source is a pair."""
    tokenizer, packer = make(kind, paired)
    for batch in pack(packer, samples_of(tokenizer, 30, paired, seed=4)):
        n = len(batch.samples)
        weights, rows, is_source = batch.label_weights, batch.targets.label_rows, batch.targets.label_is_source
        for number, sample in enumerate(batch.samples):
            of_rows = [weights[rows == each].sum().item() for each in (number, number + n)]
            assert not is_source[rows == number].any()
            assert is_source[rows == number + n].all()
            assert sample.counts() == {
                "target_labels": of_rows[0], "source_labels": of_rows[1] if paired else 0, "pairs": int(paired)
            }  # fmt: skip
            assert set(sample.counts()) == set(packer.collator.counts)


def test_classification_and_qa_have_one_label_unit_per_row() -> None:
    for kind in ("classification", "qa"):
        tokenizer, packer = make(kind, True)
        for batch in pack(packer, samples_of(tokenizer, 9, True)):
            assert batch.targets.label_rows.tolist() == list(range(len(batch.input_ids)))


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", ["wordpiece", "unigram"])
def test_tokens_point_at_their_words(pooling: str, paired: bool, name: str) -> None:
    """Compared with a slow loop over rows, words and tokens, also for windows that begin at a later word."""
    tokenizer, packer = make("tagging", paired, 500, name, pooling)
    samples = samples_of(tokenizer, 30, paired, seed=3)
    later = 0
    for batch in pack(packer, samples):
        expected = torch.full_like(batch.input_ids, -1)
        unit = 0
        for row, (encoded, _, _, _) in enumerate(rows_of(batch, samples)):
            later += encoded.words[0] > 0
            for word in range(*encoded.words):
                tokens = [t for t in range(len(encoded)) if encoded.word_of_token[t] == word]
                assert tokens
                for token in tokens if pooling == "mean" else tokens[:1]:
                    expected[row, token] = unit
                unit += 1
        labels = batch.targets.labels
        assert isinstance(labels, TagTargets)
        assert torch.equal(labels.token_word, expected)
        assert unit == len(batch.label_weights)
    assert later > 3


@pytest.mark.parametrize(("kind", "paired"), PAIRED)
def test_an_idle_batch_has_the_same_fields_and_no_label(kind: str, paired: bool) -> None:
    tokenizer, packer = make(kind, paired)
    idle, real = packer.idle(), pack(packer, samples_of(tokenizer, 3, paired))[0]
    assert idle.input_ids.tolist() == [[PAD]] * (2 if paired else 1)
    assert idle.attention_mask is not None
    assert (idle.attention_mask == 1).all()
    assert (idle.targets.n_pairs, idle.sample_ids, idle.samples) == (int(paired), (), ())
    assert idle.label_weights.sum() == 0
    assert len(idle.label_weights) == len(idle.input_ids)
    for one, other in ((idle, real), (idle.targets, real.targets), (idle.targets.labels, real.targets.labels)):
        for name in one.__dataclass_fields__:
            own, busy = getattr(one, name), getattr(other, name)
            assert type(own) is type(busy)
            if isinstance(own, torch.Tensor):
                assert (own.dtype, own.ndim) == (busy.dtype, busy.ndim), name
                if name not in ("input_ids", "attention_mask", "token_type_ids", "token_word"):
                    assert len(own) == len(idle.label_weights)
    labels: Any = idle.targets.labels
    if kind == "tagging":
        assert labels.token_word.tolist() == [[number] for number in range(len(idle.input_ids))]
    if kind in ("tagging", "classification"):
        assert labels.classes.shape == (len(idle.input_ids), CLASSES)
    assert pack(packer, []) == []


def test_packing_is_a_pure_function() -> None:
    tokenizer, packer = make("tagging", True)
    samples = samples_of(tokenizer, 30, True)
    first, second = pack(packer, samples), pack(packer, list(samples))
    assert [batch.sample_ids for batch in first] == [batch.sample_ids for batch in second]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_samples_without_source_cannot_be_pairs() -> None:
    tokenizer, packer = make("classification", True)
    with pytest.raises(ValueError, match="s0 has no source, and samples are paired"):
        pack(packer, samples_of(tokenizer, 1, paired=False))


def test_to_moves_every_tensor() -> None:
    tokenizer, packer = make("tagging", True)
    batch = pack(packer, samples_of(tokenizer, 3, True))[0]
    moved = batch.to(torch.device("meta"))
    for part in (moved, moved.targets, moved.targets.labels):
        for name in part.__dataclass_fields__:
            value = getattr(part, name)
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta"
    assert moved.sample_ids == batch.sample_ids
