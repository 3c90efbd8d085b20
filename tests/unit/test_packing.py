"""packing.py: every token once, samples apart from each other, labels where they are predicted, within the budget.

Properties over random units; every expectation is computed token by token, without the packer's arithmetic.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Literal

import numpy as np
import pytest
import torch

from data_pipeline.packing import MicroBatch, Packer, TokenizedUnit
from data_pipeline.records import TokenizedSample

LAYOUTS: tuple[Literal["packed", "padded"], ...] = ("packed", "padded")
PAD = 99_999  # no sample holds it
LONGEST, BUDGET = 24, 100
SEEDS = range(25)


class Maker:
    """Random samples whose token ids are all different, so that any token can be traced."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.tokens = self.samples = 0

    def sample(self, length: int | None = None, labelled: bool = True) -> TokenizedSample:
        """Of kind "untrained" are words of answers that are only read."""
        length = length or int(self.random.integers(1, LONGEST + 1))
        kinds = self.random.choice(["content", "template", "untrained", "answer", "end"], size=length)
        labels = np.isin(kinds, ["answer", "end"]) & labelled
        self.tokens += length
        self.samples += 1
        return TokenizedSample(
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

    def contrast_set(self, n_pairs: int, longest: int = 8) -> TokenizedUnit:
        samples = [self.sample(int(self.random.integers(1, longest + 1))) for _ in range(2 * n_pairs)]
        places = self.random.permutation(2 * n_pairs).reshape(-1, 2).tolist()
        return TokenizedUnit(tuple(samples), tuple((a, b) for a, b in places))

    def units(self) -> list[TokenizedUnit]:
        """Single samples, some of them label-free, contrast sets, and a unit that lost all its samples."""
        singles = [TokenizedUnit((self.sample(labelled=self.random.random() < 0.8),)) for _ in range(12)]
        sets = [self.contrast_set(int(self.random.integers(1, 4))) for _ in range(self.random.integers(4))]
        units = [*singles, *sets, TokenizedUnit(())]
        return [units[i] for i in self.random.permutation(len(units))]


def packer(layout: Literal["packed", "padded"], budget: int = BUDGET, row: int = LONGEST) -> Packer:
    return Packer(layout, micro_batch_tokens=budget, row_tokens=row, pad_id=PAD)


def by_id(units: Sequence[TokenizedUnit]) -> dict[str, TokenizedSample]:
    return {sample.id: sample for unit in units for sample in unit.samples}


def tokens_of(batch: MicroBatch) -> Iterator[tuple[int, int, str, int]]:
    """(row, column, sample id, place in the sample) of every token that is not padding."""
    place: Counter[int] = Counter()
    for row in range(batch.input_ids.shape[0]):
        for column in range(batch.input_ids.shape[1]):
            segment = int(batch.segment_ids[row, column])
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
        assert batch.n_segments == len(batch.sample_ids)
        for row, column, name, place in tokens_of(batch):
            token = int(batch.input_ids[row, column])
            assert token == samples[name].input_ids[place], "in the sample's own order"
            seen[token] += 1
    assert seen == Counter(range(sum(map(len, samples.values()))))


@pytest.mark.parametrize("seed", SEEDS)
def test_each_token_says_whose_it_is(layout: Literal["packed", "padded"], seed: int) -> None:
    """Positions restart in each sample; languages are the question's and the answer's."""
    units = Maker(seed).units()
    samples = by_id(units)
    for batch in packer(layout).pack(units):
        for row, column, name, place in tokens_of(batch):
            sample = samples[name]
            assert batch.position_ids[row, column] == place
            answered = sample.labels[place] or sample.answer[place]
            spoken = sample.response_language if answered else sample.language
            assert batch.languages[row, column] == spoken
            assert batch.content[row, column] == bool(sample.content[place])
            own_words = sample.content[place] or (sample.answer[place] and sample.language == sample.response_language)
            assert batch.vector_languages[row, column] == (sample.language if own_words else -1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sample_lies_in_one_piece(layout: Literal["packed", "padded"], seed: int) -> None:
    for batch in packer(layout).pack(Maker(seed).units()):
        last: dict[str, tuple[int, int]] = {}
        for row, column, name, _ in tokens_of(batch):
            assert last.get(name, (row, column - 1)) == (row, column - 1)
            last[name] = (row, column)
        rows = [row for row, _ in last.values()]
        assert layout == "packed" or len(set(rows)) == len(rows), "padded: one sample a row"


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_belongs_to_nobody(layout: Literal["packed", "padded"], seed: int) -> None:
    """At the end of rows, without language or content, with positions of its own that restart."""
    for batch in packer(layout).pack(Maker(seed).units()):
        for row in range(batch.input_ids.shape[0]):
            padding = np.flatnonzero(batch.segment_ids[row].numpy() == -1)
            width = batch.input_ids.shape[1]
            assert padding.tolist() == list(range(width - len(padding), width))
            assert batch.position_ids[row, padding].tolist() == list(range(len(padding)))
            assert set(batch.input_ids[row, padding].tolist()) <= {PAD}
            assert set(batch.languages[row, padding].tolist()) <= {-1}
            assert set(batch.vector_languages[row, padding].tolist()) <= {-1}
            assert not batch.content[row, padding].any()
        assert (batch.segment_ids >= 0).any(dim=1).all(), "no row is padding alone"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_of_the_padded_layout_alone(seed: int) -> None:
    units = Maker(seed).units()
    for batch in packer("packed").pack(units):
        assert batch.attention_mask is None
    for batch in packer("padded").pack(units):
        assert batch.attention_mask is not None
        assert batch.attention_mask.dtype == torch.int64
        assert torch.equal(batch.attention_mask.bool(), batch.segment_ids >= 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_are_predicted_from_the_token_before(layout: Literal["packed", "padded"], seed: int) -> None:
    """Walk the flat positions: the next token of the same sample is the label, and none is forgotten."""
    units = Maker(seed).units()
    samples = by_id(units)
    expected = Counter(
        int(sample.input_ids[place])
        for sample in samples.values()
        for place in range(1, len(sample))  # nothing could predict a first token
        if sample.labels[place]
    )
    found: Counter[int] = Counter()
    for batch in packer(layout).pack(units):
        width = batch.input_ids.shape[1]
        labels = zip(
            batch.label_positions.tolist(), batch.label_ids.tolist(), batch.label_languages.tolist(),
            batch.label_weights.tolist(), strict=True,
        )  # fmt: skip
        for position, label, language, weight in labels:
            if not weight:
                assert (position, label, len(batch.label_ids)) == (0, 0, 1), "a stand-in stands alone"
                continue
            row, column = divmod(position, width)
            assert weight == 1
            assert batch.input_ids[row, column + 1] == label
            assert batch.segment_ids[row, column] == batch.segment_ids[row, column + 1] >= 0
            assert language == samples[batch.sample_ids[batch.segment_ids[row, column]]].language
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
    assert len(batches) <= 3 * total / BUDGET + 1, "and is well filled"


@pytest.mark.parametrize("row", [BUDGET, 10 * BUDGET])
def test_one_long_row_holds_a_whole_micro_batch(row: int) -> None:
    """As varlen attention takes it; a row is never longer than the micro-batch."""
    units = [TokenizedUnit((each,)) for each in (Maker(0).sample(10) for _ in range(20))]
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
        columns = zip(
            batch.pairs.tolist(), batch.pair_sets.tolist(), batch.pair_groups.tolist(), batch.pair_contents.tolist(),
            strict=True,
        )  # fmt: skip
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

    def contents(batches: list[MicroBatch]) -> tuple[list[str], list[int], int]:
        labels = [label for batch in batches for label in batch.label_ids[batch.label_weights > 0].tolist()]
        names = [name for batch in batches for name in batch.sample_ids]
        return sorted(names), sorted(labels), sum(len(batch.pairs) for batch in batches)

    assert contents(packed) == contents(padded)
    assert len(packed) <= len(padded)


def test_packing_is_a_function_of_its_units(layout: Literal["packed", "padded"]) -> None:
    units = Maker(4).units()
    for one, other in zip(packer(layout).pack(units), packer(layout).pack(units), strict=True):
        for spec in fields(MicroBatch):
            first, second = getattr(one, spec.name), getattr(other, spec.name)
            assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_a_contrast_set_above_the_budget_runs_all_the_same(
    layout: Literal["packed", "padded"], caplog: pytest.LogCaptureFixture
) -> None:
    maker = Maker(0)
    large = TokenizedUnit(tuple(maker.sample(20) for _ in range(6)), ((0, 1), (2, 3), (4, 5)))
    small = [TokenizedUnit((maker.sample(20),)) for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        batches = packer(layout).pack([*small, large])
    assert [len(batch.units) for batch in batches] == [1, 3]
    assert batches[0].units == (large,)
    assert caplog.messages == [
        f"a contrast set takes 120 tokens {layout}, above micro_batch_tokens (100); it runs alone"
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_alone_are_those_of_a_micro_batch_of_its_own(seed: int, layout: Literal["packed", "padded"]) -> None:
    maker, make = Maker(seed), packer(layout)
    for n_pairs in (1, 3, 8):
        unit = maker.contrast_set(n_pairs, longest=20)
        (batch,) = make.pack([unit])
        assert make.tokens_alone([len(sample) for sample in unit.samples]) == batch.input_ids.numel()


def test_a_micro_batch_without_labels_has_a_stand_in_of_no_weight(layout: Literal["packed", "padded"]) -> None:
    (batch,) = packer(layout).pack([TokenizedUnit((Maker(0).sample(9, labelled=False),))])
    assert (batch.label_positions.tolist(), batch.label_weights.tolist()) == ([0], [0.0])
    assert batch.label_ids.tolist() == batch.label_languages.tolist() == [0]
    assert batch.label_weights.dtype == torch.float32


def test_nothing_to_pack(layout: Literal["packed", "padded"]) -> None:
    assert packer(layout).pack([]) == packer(layout).pack([TokenizedUnit(())]) == []


def test_an_idle_micro_batch_is_one_token_of_nobody(layout: Literal["packed", "padded"]) -> None:
    """The same kinds of tensors as any other, so that the same graph runs; nothing in it counts."""
    idle = packer(layout).idle()
    (busy,) = packer(layout).pack([Maker(0).contrast_set(1)])
    assert (idle.input_ids.tolist(), idle.position_ids.tolist()) == ([[PAD]], [[0]])
    assert idle.segment_ids.tolist() == idle.languages.tolist() == idle.vector_languages.tolist() == [[-1]]
    assert not idle.content.any()
    assert idle.label_weights.tolist() == [0.0]
    assert (idle.n_segments, idle.sample_ids, idle.units) == (1, (), ())
    assert [tuple(each.shape) for each in (idle.pairs, idle.pair_sets, idle.pair_groups, idle.pair_contents)] == [
        (0, 2), (0,), (0,), (0, 2)
    ]  # fmt: skip
    for spec in fields(MicroBatch):
        one, other = getattr(idle, spec.name), getattr(busy, spec.name)
        if isinstance(other, torch.Tensor):
            assert (one.dtype, one.ndim) == (other.dtype, other.ndim), spec.name
    if layout == "padded":
        assert idle.attention_mask is not None
        assert idle.attention_mask.tolist() == [[1]], "a row of nothing but masked tokens gives NaN"


def test_to_moves_every_tensor_and_nothing_else() -> None:
    (batch,) = packer("padded").pack([Maker(0).contrast_set(2)])
    moved = batch.to(torch.device("meta"))
    for spec in fields(MicroBatch):
        value = getattr(batch, spec.name)
        if isinstance(value, torch.Tensor):
            assert getattr(moved, spec.name).device.type == "meta", spec.name
        else:
            assert getattr(moved, spec.name) is value


def test_a_label_on_the_first_token_is_left_out() -> None:
    sample = replace(Maker(0).sample(3), labels=np.array([True, False, True]))
    (batch,) = packer("packed").pack([TokenizedUnit((sample,))])
    assert batch.label_positions.tolist() == [1]
    assert batch.label_ids.tolist() == [int(sample.input_ids[2])]
