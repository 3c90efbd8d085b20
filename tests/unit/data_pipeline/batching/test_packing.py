"""batching/packer.py, chat.py: each token once, samples separate, labels at their predictions, within the budget.

Properties over random steps; every expectation is computed token by token, without the packer's arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from steps import exchanged, load, load_on_ranks, sets_of

from data_pipeline.batching.batch import ChatBatch, ContrastSets
from data_pipeline.batching.chat import ChatCollator
from data_pipeline.batching.grid import Grid
from data_pipeline.batching.packer import Packer
from data_pipeline.loader import Loader, ThisRank, fixed_batches
from data_pipeline.order.plan import StepPlan
from data_pipeline.records import ChatSample, DataError

LAYOUTS: tuple[Literal["packed", "padded"], ...] = ("packed", "padded")
PAD = 99_999  # not a token id of any sample
LONGEST, BUDGET = 24, 100
SEEDS = range(25)


@dataclass(frozen=True)
class Samples:
    """The samples of a step by position, None where a sample is too long, and its contrast sets."""

    samples: list[ChatSample | None]
    sets: list[list[tuple[int, int]]]

    def plan(self) -> StepPlan:
        n = len(self.samples)
        groups, contents = np.zeros((2, n), np.int64)
        for position, sample in enumerate(self.samples):
            if sample is not None:
                groups[position], contents[position] = sample.group, sample.content_hash
        return StepPlan(
            step=0, rows=np.arange(n), languages=np.zeros(n, np.int64), groups=groups, contents=contents,
            costs=np.ones(n), n_slots=n, sets=tuple(np.array(pairs) for pairs in self.sets), dropped_pairs=0, seed=0,
        )  # fmt: skip

    def loader(self, packer: Packer, this_rank: ThisRank | None = None) -> Loader:
        """Loads these samples as the step of every number."""
        reader: Any = SimpleNamespace(
            index=SimpleNamespace(languages=("en", "de", "sw")),
            read_many=lambda slots: [self.samples[slot.row] for slot in slots],
        )
        planner: Any = SimpleNamespace(step=lambda _: self.plan(), has_sets=True)
        return Loader(reader, planner, packer, this_rank)

    def pack(self, packer: Packer) -> list[ChatBatch]:
        """The micro-batches of the only rank."""
        return list(load(self.loader(packer), 0).micro_batches)


def of(*samples: ChatSample) -> Samples:
    return Samples(list(samples), [])


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

    def contrast_set(self, n_pairs: int, longest: int = 8) -> Samples:
        """One set of random pairs of these samples."""
        samples = [self.sample(int(self.random.integers(1, longest + 1))) for _ in range(2 * n_pairs)]
        places = self.random.permutation(2 * n_pairs).reshape(-1, 2).tolist()
        return Samples(list(samples), [[(a, b) for a, b in places]])

    def step(self) -> Samples:
        """Single samples, some of them label-free, contrast sets, and a slot without sample, in random order."""
        samples: list[ChatSample | None] = [None]
        samples += [self.sample(labelled=self.random.random() < 0.8) for _ in range(12)]
        sets = []
        for _ in range(self.random.integers(4)):
            made = self.contrast_set(int(self.random.integers(1, 4)))
            sets.append([(len(samples) + a, len(samples) + b) for a, b in made.sets[0]])
            samples += made.samples
        place = self.random.permutation(len(samples)).tolist()  # the new place of each
        ordered = [sample for _, sample in sorted(zip(place, samples, strict=True), key=lambda each: each[0])]
        return Samples(ordered, [[(place[a], place[b]) for a, b in pairs] for pairs in sets])


def packer(layout: Literal["packed", "padded"], budget: int = BUDGET, row: int | None = LONGEST) -> Packer:
    return Packer(Grid(layout, budget, row), ChatCollator(PAD))


def by_id(step: Samples) -> dict[str, ChatSample]:
    return {sample.id: sample for sample in step.samples if sample is not None}


def parts_of(part: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of every field of a batch and of its targets."""
    for spec in fields(part):
        value = getattr(part, spec.name)
        if spec.name in ("targets", "tokens", "contrast") and is_dataclass(value):
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
    step = Maker(seed).step()
    samples = by_id(step)
    seen: Counter[int] = Counter()
    for batch in step.pack(packer(layout)):
        assert batch.targets.n_segments == len(batch.sample_ids)
        for row, column, name, place in tokens_of(batch):
            token = int(batch.input_ids[row, column])
            assert token == samples[name].input_ids[place], "in the sample's own order"
            seen[token] += 1
    assert seen == Counter(range(sum(map(len, samples.values()))))


@pytest.mark.parametrize("seed", SEEDS)
def test_each_token_has_the_position_and_language_of_its_sample(layout: Literal["packed", "padded"], seed: int) -> None:
    """Positions restart in each sample; languages are the question's and the answer's."""
    step = Maker(seed).step()
    samples = by_id(step)
    for batch in step.pack(packer(layout)):
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
    for batch in Maker(seed).step().pack(packer(layout)):
        last: dict[str, tuple[int, int]] = {}
        for row, column, name, _ in tokens_of(batch):
            assert last.get(name, (row, column - 1)) == (row, column - 1)
            last[name] = (row, column)
        rows = [row for row, _ in last.values()]
        assert layout == "packed" or len(set(rows)) == len(rows), "padded: one sample a row"


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_belongs_to_no_sample(layout: Literal["packed", "padded"], seed: int) -> None:
    """It is at the end of rows, has no language or content, and its positions start at 0."""
    for batch in Maker(seed).step().pack(packer(layout)):
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
    step = Maker(seed).step()
    for batch in step.pack(packer("packed")):
        assert batch.attention_mask is None
    for batch in step.pack(packer("padded")):
        assert batch.attention_mask is not None
        assert batch.attention_mask.dtype == torch.int64
        assert torch.equal(batch.attention_mask.bool(), batch.targets.segment_ids >= 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_are_predicted_from_the_token_before(layout: Literal["packed", "padded"], seed: int) -> None:
    """At each flat position the label is the next token of the same sample; every label occurs."""
    step = Maker(seed).step()
    samples = by_id(step)
    expected = Counter(
        int(sample.input_ids[place])
        for sample in samples.values()
        for place in range(1, len(sample))  # no position predicts a first token
        if sample.labels[place]
    )
    found: Counter[int] = Counter()
    for batch in step.pack(packer(layout)):
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
    step = Maker(seed).step()
    batches = step.pack(packer(layout))
    for batch in batches:
        assert batch.input_ids.numel() <= BUDGET
        assert batch.input_ids.shape[1] <= LONGEST
    total = sum(map(len, by_id(step).values()))
    assert len(batches) <= 3 * total / BUDGET + 1, "micro-batches are well filled"


@pytest.mark.parametrize("row", [BUDGET, None])
def test_one_long_row_holds_a_whole_micro_batch(row: int | None) -> None:
    """As for varlen attention (None); a row is never longer than the micro-batch."""
    maker = Maker(0)
    step = of(*(maker.sample(10) for _ in range(20)))
    batches = step.pack(packer("packed", row=row))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, 100), (1, 100)]


@pytest.mark.parametrize("seed", SEEDS)
def test_sets_stay_whole_and_pairs_point_to_their_samples(layout: Literal["packed", "padded"], seed: int) -> None:
    """On one rank, where all members are its own, and on three; every sample is in one micro-batch."""
    step = Maker(seed).step()
    names = [None if sample is None else sample.id for sample in step.samples]
    expected = sorted([(names[a], names[b]) for a, b in pairs] for pairs in step.sets)
    for world_size in (1, 3):
        shares = load_on_ranks(partial(step.loader, packer(layout)), world_size, 0)
        found = [[(one[0], other[0]) for one, other in pairs] for pairs in sets_of(shares)]
        assert sorted(found) == expected
        batches = [batch for share in shares for batch in share.micro_batches]
        assert Counter(name for batch in batches for name in batch.sample_ids) == Counter(list(by_id(step)))
        for batch in batches:
            assert [sample.id for sample in batch.samples] == list(batch.sample_ids)
            contrast = batch.targets.contrast
            if contrast is not None:
                assert sorted(set(contrast.own.tolist())) == sorted(contrast.own.tolist())
                assert all(batch.sample_ids[segment] in str(expected) for segment in contrast.own.tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_pairs_of_one_item_or_text_are_no_candidates(seed: int) -> None:
    """From the samples of the micro-batch, by their own items and texts."""
    step = Maker(seed).step()
    for pairs in step.sets:
        (a, b), (c, d), *_ = [*pairs, *pairs]
        for (one, other), key in zip(((a, c), (b, d)), ("group", "content_hash"), strict=True):
            value = getattr(step.samples[one], key)
            step.samples[other] = replace(step.samples[other], **{key: value})  # type: ignore[type-var]
    samples = by_id(step)
    for batch in step.pack(packer("packed")):
        contrast = batch.targets.contrast
        if contrast is None:
            continue
        members = [samples[batch.sample_ids[segment]] for segment in contrast.own.tolist()]
        for pairs, excluded in zip(contrast.pairs.tolist(), contrast.excluded.tolist(), strict=True):
            real = [pair for place, pair in enumerate(pairs) if place == 0 or pair != [0, 0]]
            for i, (a, b) in enumerate(real):
                for j, (c, d) in enumerate(real):
                    texts = [{members[each].content_hash for each in pair} for pair in ((a, b), (c, d))]
                    same = members[a].group == members[c].group or bool(texts[0] & texts[1])
                    assert excluded[i][j] == (same and i != j)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_layouts_hold_the_same_samples_and_labels(seed: int) -> None:
    step = Maker(seed).step()
    packed, padded = (step.pack(packer(layout)) for layout in LAYOUTS)

    def contents(batches: list[ChatBatch]) -> tuple[list[str], list[int], int]:
        labels = [label for batch in batches for label in batch.targets.tokens.ids[batch.label_weights > 0].tolist()]
        names = [name for batch in batches for name in batch.sample_ids]
        sets = [batch.targets.contrast for batch in batches]
        return sorted(names), sorted(labels), sum(len(each.own) // 2 for each in sets if each is not None)

    assert contents(packed) == contents(padded)
    assert len(packed) <= len(padded)


def test_the_same_samples_are_packed_the_same_way(layout: Literal["packed", "padded"]) -> None:
    step = Maker(4).step()
    for one, other in zip(step.pack(packer(layout)), step.pack(packer(layout)), strict=True):
        for (name, first), (_, second) in zip(parts_of(one), parts_of(other), strict=True):
            assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second, name


def test_a_contrast_set_above_the_budget_is_refused(layout: Literal["packed", "padded"]) -> None:
    """120 tokens on one rank; on two ranks it is 60 on each, and is packed."""
    maker = Maker(0)
    samples = [maker.sample(20) for _ in range(9)]
    step = Samples(list(samples), [[(0, 1), (2, 3), (4, 5)]])
    with pytest.raises(DataError, match=rf"tokens is 100, but a contrast set of 3 pairs takes 120 tokens {layout}; "):
        step.pack(packer(layout, row=20))
    assert len(step.pack(packer(layout, budget=120, row=20))) == 2
    shares = load_on_ranks(partial(step.loader, packer(layout, row=20)), 2, 0)
    assert sorted(len(batch.samples) for share in shares for batch in share.micro_batches) == [4, 5]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_tokens_that_a_set_needs_are_those_of_its_micro_batch(
    seed: int, layout: Literal["packed", "padded"]
) -> None:
    """With a micro-step to itself, on the rank with most; several packed rows are counted as whole ones."""
    maker, make = Maker(seed), packer(layout, budget=20 * LONGEST)
    for n_pairs in (1, 3, 8):
        step = maker.contrast_set(n_pairs, longest=20)
        for world_size in (1, 2):
            loader = step.loader(make)
            spread = loader.spread(loader.table(loader.scan(0).measures), ThisRank(0, world_size, per_node=2))
            (pairs,) = step.plan().sets
            shares = load_on_ranks(partial(step.loader, make), world_size, 0, per_node=2)
            shapes = [tuple(share.micro_batches[0].input_ids.shape) for share in shares]
            assert spread.tokens_needed(pairs) == max(
                rows * (LONGEST if layout == "packed" and rows > 1 else length) for rows, length in shapes
            )


def test_a_micro_batch_without_labels_has_one_label_of_weight_0(layout: Literal["packed", "padded"]) -> None:
    (batch,) = of(Maker(0).sample(9, labelled=False)).pack(packer(layout))
    assert (batch.targets.tokens.positions.tolist(), batch.label_weights.tolist()) == ([0], [0.0])
    assert batch.targets.tokens.ids.tolist() == batch.label_languages.tolist() == [0]
    assert batch.label_weights.dtype == torch.float32


@pytest.mark.parametrize("seed", SEEDS)
def test_a_samples_counts_are_the_labels_of_its_micro_batch(layout: Literal["packed", "padded"], seed: int) -> None:
    maker = Maker(seed)
    for sample in [maker.sample(labelled=number % 4 > 0) for number in range(8)]:
        batch = packer(layout).batch([sample])
        assert sample.counts() == {"label_tokens": int(batch.label_weights.sum())}
        assert tuple(sample.counts()) == ChatCollator.counts


def test_nothing_to_pack_gives_no_micro_batch(layout: Literal["packed", "padded"]) -> None:
    """A fixed set has none; a step, in which every rank runs one, has an idle one."""
    assert fixed_batches([], packer(layout), ThisRank()) == []
    (idle,) = Samples([None, None], [[(1, 0)]]).pack(packer(layout))
    assert (idle.samples, idle.targets.contrast) == ((), None)


def test_an_idle_micro_batch_is_one_padding_token(layout: Literal["packed", "padded"]) -> None:
    """It has the dtypes and dimensions of any other, so that the same graph runs, and adds nothing to the loss."""
    maker = Maker(0)
    idle, busy = packer(layout).idle(), packer(layout).batch([maker.sample(), maker.sample()])
    assert (idle.input_ids.tolist(), idle.position_ids.tolist()) == ([[PAD]], [[0]])
    assert (
        idle.targets.segment_ids.tolist()
        == idle.targets.languages.tolist()
        == idle.targets.vector_languages.tolist()
        == [[-1]]
    )
    assert not idle.targets.content.any()
    assert idle.label_weights.tolist() == [0.0]
    assert (idle.targets.n_segments, idle.sample_ids, idle.samples) == (1, (), ())
    assert idle.targets.contrast is busy.targets.contrast is None
    for (name, one), (_, other) in zip(parts_of(idle), parts_of(busy), strict=True):
        if isinstance(other, torch.Tensor):
            assert (one.dtype, one.ndim) == (other.dtype, other.ndim), name
    if layout == "padded":
        assert idle.attention_mask is not None
        assert idle.attention_mask.tolist() == [[1]], "attention over masked tokens only gives NaN"


def test_an_idle_micro_batch_beside_contrast_sets_has_an_empty_one(layout: Literal["packed", "padded"]) -> None:
    """A pair on two ranks of three: the third exchanges nothing, in tensors of the same dtypes and dimensions."""
    shares = load_on_ranks(partial(Maker(0).contrast_set(1).loader, packer(layout)), 3, 0)
    batches = [batch for share in shares for batch in share.micro_batches]
    (idle,) = [batch for batch in batches if not batch.samples]
    busy = next(batch for batch in batches if batch.samples)
    contrast = idle.targets.contrast
    assert isinstance(contrast, ContrastSets)
    assert (contrast.sent_to, contrast.received_from) == ((0, 0, 0), (0, 0, 0))
    assert [tuple(each.shape) for each in (contrast.own, contrast.sent, contrast.pairs, contrast.excluded)] == [
        (0,), (0,), (0, 0, 2), (0, 0, 0)
    ]  # fmt: skip
    assert contrast.is_reported.tolist() == []
    assert [] in exchanged(batches, [batch.sample_ids for batch in batches])
    for (name, one), (_, other) in zip(parts_of(idle), parts_of(busy), strict=True):
        if isinstance(other, torch.Tensor):
            assert (one.dtype, one.ndim) == (other.dtype, other.ndim), name


def test_to_moves_every_tensor_and_nothing_else() -> None:
    (batch,) = Maker(0).contrast_set(2).pack(packer("padded"))
    moved = batch.to(torch.device("meta"))
    for (name, value), (_, other) in zip(parts_of(batch), parts_of(moved), strict=True):
        if isinstance(value, torch.Tensor):
            assert other.device.type == "meta", name
        else:
            assert other is value


def test_a_label_on_the_first_token_is_left_out() -> None:
    sample = replace(Maker(0).sample(3), labels=np.array([True, False, True]))
    (batch,) = of(sample).pack(packer("packed"))
    assert batch.targets.tokens.positions.tolist() == [1]
    assert batch.targets.tokens.ids.tolist() == [int(sample.input_ids[2])]
