"""batching/packer.py, chat.py: each token once, samples separate, labels at their predictions, within the budget.

Properties over random units; every expectation is computed token by token, without the packer's arithmetic.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from data_pipeline.batching.batch import ChatBatch, SampleUnit
from data_pipeline.batching.chat import ChatCollator
from data_pipeline.batching.packer import Packer
from data_pipeline.records import ChatSample

LAYOUTS: tuple[Literal["packed", "padded"], ...] = ("packed", "padded")
PAD = 99_999  # not a token id of any sample
LONGEST, BUDGET = 24, 100
SEEDS = range(25)


class Maker:
    """Random samples whose token ids are all different, so that any token can be traced."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.tokens = self.samples = 0

    def sample(self, length: int | None = None, labelled: bool = True) -> ChatSample:
        """Kind "untrained": words of answers that are not trained on."""
        length = length or int(self.random.integers(1, LONGEST + 1))
        kinds = self.random.choice(["content", "template", "untrained", "answer", "end"], size=length)
        labels = np.isin(kinds, ["answer", "end"]) & labelled
        self.tokens += length
        self.samples += 1
        return ChatSample(
            id=f"sample-{self.samples}",
            group=int(self.random.integers(1, 2**60)),
            content_hash=int(self.random.integers(1, 2**60)),
            language=int(self.random.integers(3)),
            response_language=int(self.random.integers(3)),
            input_ids=np.arange(self.tokens - length, self.tokens, dtype=np.int32),
            labels=labels,
            content=(kinds == "content") & (np.arange(length) > 0),
            answer=np.isin(kinds, ["untrained", "answer"]) & labelled,
        )

    def contrast_set(self, n_pairs: int, longest: int = 8) -> SampleUnit:
        samples = [self.sample(int(self.random.integers(1, longest + 1))) for _ in range(2 * n_pairs)]
        places = self.random.permutation(2 * n_pairs).reshape(-1, 2).tolist()
        return SampleUnit(tuple(samples), tuple((a, b) for a, b in places))

    def units(self) -> list[SampleUnit]:
        """Single samples, some of them label-free, contrast sets, and a unit without samples."""
        singles = [SampleUnit((self.sample(labelled=self.random.random() < 0.8),)) for _ in range(12)]
        sets = [self.contrast_set(int(self.random.integers(1, 4))) for _ in range(self.random.integers(4))]
        units = [*singles, *sets, SampleUnit(())]
        return [units[i] for i in self.random.permutation(len(units))]


def packer(layout: Literal["packed", "padded"], budget: int = BUDGET, row: int = LONGEST) -> Packer:
    return Packer(layout, micro_batch_tokens=budget, row_tokens=row, collator=ChatCollator(PAD))


def by_id(units: Sequence[SampleUnit]) -> dict[str, ChatSample]:
    samples = [sample for unit in units for sample in unit.samples]
    return {sample.id: sample for sample in samples if isinstance(sample, ChatSample)}


def parts_of(part: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of every field of a batch and of its targets."""
    for spec in fields(part):
        value = getattr(part, spec.name)
        if spec.name in ("targets", "tokens", "pairs") and is_dataclass(value):
            yield from parts_of(value)
        else:
            yield spec.name, value


def tokens_of(batch: ChatBatch) -> Iterator[tuple[int, int, str, int]]:
    """(row, column, sample id, place in the sample) of every token that is not padding."""
    place: Counter[int] = Counter()
    for row in range(batch.input_ids.shape[0]):
        for column in range(batch.input_ids.shape[1]):
            segment = int(batch.targets.segment_ids[row, column])
            if segment >= 0:
                yield row, column, batch.sample_ids[segment], place[segment]
                place[segment] += 1


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Literal["packed", "padded"]:
    return request.param


@pytest.mark.parametrize("seed", SEEDS)
def test_every_token_of_every_sample_is_there_exactly_once(layout: Literal["packed", "padded"], seed: int) -> None:
    units = Maker(seed).units()
    samples = by_id(units)
    seen: Counter[int] = Counter()
    for batch in packer(layout).pack(units):
        assert batch.targets.n_segments == len(batch.sample_ids)
        for row, column, name, place in tokens_of(batch):
            token = int(batch.input_ids[row, column])
            assert token == samples[name].input_ids[place], "in the sample's own order"
            seen[token] += 1
    assert seen == Counter(range(sum(map(len, samples.values()))))


@pytest.mark.parametrize("seed", SEEDS)
def test_each_token_has_the_position_and_language_of_its_sample(layout: Literal["packed", "padded"], seed: int) -> None:
    """Positions restart in each sample; languages are the question's and the answer's."""
    units = Maker(seed).units()
    samples = by_id(units)
    for batch in packer(layout).pack(units):
        for row, column, name, place in tokens_of(batch):
            sample = samples[name]
            assert batch.position_ids[row, column] == place
            answered = sample.labels[place] or sample.answer[place]
            expected = sample.response_language if answered else sample.language
            assert batch.targets.languages[row, column] == expected
            assert batch.targets.content[row, column] == bool(sample.content[place])
            own_words = sample.content[place] or (sample.answer[place] and sample.language == sample.response_language)
            assert batch.targets.vector_languages[row, column] == (sample.language if own_words else -1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sample_is_contiguous_in_one_row(layout: Literal["packed", "padded"], seed: int) -> None:
    for batch in packer(layout).pack(Maker(seed).units()):
        last: dict[str, tuple[int, int]] = {}
        for row, column, name, _ in tokens_of(batch):
            assert last.get(name, (row, column - 1)) == (row, column - 1)
            last[name] = (row, column)
        rows = [row for row, _ in last.values()]
        assert layout == "packed" or len(set(rows)) == len(rows), "padded: one sample a row"


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_belongs_to_no_sample(layout: Literal["packed", "padded"], seed: int) -> None:
    """It is at the end of rows, has no language or content, and its positions start at 0."""
    for batch in packer(layout).pack(Maker(seed).units()):
        for row in range(batch.input_ids.shape[0]):
            padding = np.flatnonzero(batch.targets.segment_ids[row].numpy() == -1)
            width = batch.input_ids.shape[1]
            assert padding.tolist() == list(range(width - len(padding), width))
            assert batch.position_ids[row, padding].tolist() == list(range(len(padding)))
            assert set(batch.input_ids[row, padding].tolist()) <= {PAD}
            assert set(batch.targets.languages[row, padding].tolist()) <= {-1}
            assert set(batch.targets.vector_languages[row, padding].tolist()) <= {-1}
            assert not batch.targets.content[row, padding].any()
        assert (batch.targets.segment_ids >= 0).any(dim=1).all(), "no row is only padding"


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_padded_layout_has_an_attention_mask(seed: int) -> None:
    units = Maker(seed).units()
    for batch in packer("packed").pack(units):
        assert batch.attention_mask is None
    for batch in packer("padded").pack(units):
        assert batch.attention_mask is not None
        assert batch.attention_mask.dtype == torch.int64
        assert torch.equal(batch.attention_mask.bool(), batch.targets.segment_ids >= 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_are_predicted_from_the_token_before(layout: Literal["packed", "padded"], seed: int) -> None:
    """At each flat position the label is the next token of the same sample; every label occurs."""
    units = Maker(seed).units()
    samples = by_id(units)
    expected = Counter(
        int(sample.input_ids[place])
        for sample in samples.values()
        for place in range(1, len(sample))  # no position predicts a first token
        if sample.labels[place]
    )
    found: Counter[int] = Counter()
    for batch in packer(layout).pack(units):
        width = batch.input_ids.shape[1]
        labels = zip(
            batch.targets.tokens.positions.tolist(), batch.targets.tokens.ids.tolist(), batch.label_languages.tolist(),
            batch.label_weights.tolist(), strict=True,
        )  # fmt: skip
        for position, label, language, weight in labels:
            if not weight:
                assert (position, label, len(batch.targets.tokens.ids)) == (0, 0, 1), "a stand-in is the only label"
                continue
            row, column = divmod(position, width)
            assert weight == 1
            assert batch.input_ids[row, column + 1] == label
            assert batch.targets.segment_ids[row, column] == batch.targets.segment_ids[row, column + 1] >= 0
            assert language == samples[batch.sample_ids[batch.targets.segment_ids[row, column]]].language
            found[label] += 1
    assert found == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_a_micro_batch_stays_within_the_budget(layout: Literal["packed", "padded"], seed: int) -> None:
    units = Maker(seed).units()
    batches = packer(layout).pack(units)
    for batch in batches:
        assert batch.input_ids.numel() <= BUDGET
        assert batch.input_ids.shape[1] <= LONGEST
    total = sum(map(len, by_id(units).values()))
    assert len(batches) <= 3 * total / BUDGET + 1, "micro-batches are well filled"


@pytest.mark.parametrize("row", [BUDGET, 10 * BUDGET])
def test_one_long_row_holds_a_whole_micro_batch(row: int) -> None:
    """As for varlen attention; a row is never longer than the micro-batch."""
    units = [SampleUnit((each,)) for each in (Maker(0).sample(10) for _ in range(20))]
    batches = packer("packed", row=row).pack(units)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, 100), (1, 100)]


@pytest.mark.parametrize("seed", SEEDS)
def test_units_stay_whole_and_pairs_point_to_their_samples(layout: Literal["packed", "padded"], seed: int) -> None:
    units = Maker(seed).units()
    batches = packer(layout).pack(units)
    placed = [unit for batch in batches for unit in batch.units]
    assert Counter(map(id, placed)) == Counter(id(unit) for unit in units if unit.samples)
    for batch in batches:
        ids = sorted(sample.id for unit in batch.units for sample in unit.samples)
        assert sorted(batch.sample_ids) == ids
        found: dict[int, list[tuple[str, str]]] = {}
        pairs = batch.targets.pairs
        columns = zip(
            *(each.tolist() for each in (pairs.segments, pairs.sets, pairs.groups, pairs.contents)), strict=True
        )
        samples = by_id(units)
        for (dominant, other), number, group, contents in columns:
            first, second = batch.sample_ids[dominant], batch.sample_ids[other]
            found.setdefault(number, []).append((first, second))
            assert group == samples[first].group
            assert contents == [samples[first].content_hash, samples[second].content_hash]
        expected = [[(unit.samples[a].id, unit.samples[b].id) for a, b in unit.pairs] for unit in batch.units]
        assert sorted(found.values()) == sorted(pairs for pairs in expected if pairs), "one set number a unit"


@pytest.mark.parametrize("seed", SEEDS)
def test_both_layouts_hold_the_same_samples_and_labels(seed: int) -> None:
    units = Maker(seed).units()
    packed, padded = (packer(layout).pack(units) for layout in LAYOUTS)

    def contents(batches: list[ChatBatch]) -> tuple[list[str], list[int], int]:
        labels = [label for batch in batches for label in batch.targets.tokens.ids[batch.label_weights > 0].tolist()]
        names = [name for batch in batches for name in batch.sample_ids]
        return sorted(names), sorted(labels), sum(len(batch.targets.pairs.segments) for batch in batches)

    assert contents(packed) == contents(padded)
    assert len(packed) <= len(padded)


def test_the_same_units_are_packed_the_same_way(layout: Literal["packed", "padded"]) -> None:
    units = Maker(4).units()
    for one, other in zip(packer(layout).pack(units), packer(layout).pack(units), strict=True):
        for (name, first), (_, second) in zip(parts_of(one), parts_of(other), strict=True):
            assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second, name


def test_a_contrast_set_above_the_budget_gets_its_own_micro_batch(
    layout: Literal["packed", "padded"], caplog: pytest.LogCaptureFixture
) -> None:
    maker = Maker(0)
    large = SampleUnit(tuple(maker.sample(20) for _ in range(6)), ((0, 1), (2, 3), (4, 5)))
    small = [SampleUnit((maker.sample(20),)) for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        batches = packer(layout).pack([*small, large])
    assert [len(batch.units) for batch in batches] == [1, 3]
    assert batches[0].units == (large,)
    assert caplog.messages == [
        f"a contrast set takes 120 tokens {layout}, above micro_batch_tokens (100); it runs alone"
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_alone_equals_the_size_of_a_micro_batch_of_that_unit_only(
    seed: int, layout: Literal["packed", "padded"]
) -> None:
    maker, make = Maker(seed), packer(layout)
    for n_pairs in (1, 3, 8):
        unit = maker.contrast_set(n_pairs, longest=20)
        (batch,) = make.pack([unit])
        assert make.tokens_alone([len(sample) for sample in unit.samples]) == batch.input_ids.numel()


def test_a_micro_batch_without_labels_has_one_label_of_weight_0(layout: Literal["packed", "padded"]) -> None:
    (batch,) = packer(layout).pack([SampleUnit((Maker(0).sample(9, labelled=False),))])
    assert (batch.targets.tokens.positions.tolist(), batch.label_weights.tolist()) == ([0], [0.0])
    assert batch.targets.tokens.ids.tolist() == batch.label_languages.tolist() == [0]
    assert batch.label_weights.dtype == torch.float32


def test_nothing_to_pack_gives_no_micro_batch(layout: Literal["packed", "padded"]) -> None:
    assert packer(layout).pack([]) == packer(layout).pack([SampleUnit(())]) == []


def test_an_idle_micro_batch_is_one_padding_token(layout: Literal["packed", "padded"]) -> None:
    """It has the dtypes and dimensions of any other, so that the same graph runs, and adds nothing to the loss."""
    idle = packer(layout).idle()
    (busy,) = packer(layout).pack([Maker(0).contrast_set(1)])
    assert (idle.input_ids.tolist(), idle.position_ids.tolist()) == ([[PAD]], [[0]])
    assert (
        idle.targets.segment_ids.tolist()
        == idle.targets.languages.tolist()
        == idle.targets.vector_languages.tolist()
        == [[-1]]
    )
    assert not idle.targets.content.any()
    pairs = idle.targets.pairs
    assert idle.label_weights.tolist() == [0.0]
    assert (idle.targets.n_segments, idle.sample_ids, idle.units) == (1, (), ())
    assert [tuple(each.shape) for each in (pairs.segments, pairs.sets, pairs.groups, pairs.contents)] == [
        (0, 2), (0,), (0,), (0, 2)
    ]  # fmt: skip
    for (name, one), (_, other) in zip(parts_of(idle), parts_of(busy), strict=True):
        if isinstance(other, torch.Tensor):
            assert (one.dtype, one.ndim) == (other.dtype, other.ndim), name
    if layout == "padded":
        assert idle.attention_mask is not None
        assert idle.attention_mask.tolist() == [[1]], "attention over masked tokens only gives NaN"


def test_to_moves_every_tensor_and_nothing_else() -> None:
    (batch,) = packer("padded").pack([Maker(0).contrast_set(2)])
    moved = batch.to(torch.device("meta"))
    for (name, value), (_, other) in zip(parts_of(batch), parts_of(moved), strict=True):
        if isinstance(value, torch.Tensor):
            assert other.device.type == "meta", name
        else:
            assert other is value


def test_a_label_on_the_first_token_is_left_out() -> None:
    sample = replace(Maker(0).sample(3), labels=np.array([True, False, True]))
    (batch,) = packer("packed").pack([SampleUnit((sample,))])
    assert batch.targets.tokens.positions.tolist() == [1]
    assert batch.targets.tokens.ids.tolist() == [int(sample.input_ids[2])]
