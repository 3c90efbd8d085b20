"""loader.py: ranks split a step without loss, an empty slot moves no other sample, steps are in order."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steps import load, load_on_ranks, sets_of
from transformers import AutoTokenizer

from data_pipeline.batching.batch import ChatBatch
from data_pipeline.batching.chat import ChatCollator
from data_pipeline.batching.grid import Grid
from data_pipeline.batching.packer import Packer
from data_pipeline.config import Overlong
from data_pipeline.loader import Loader, Scan, Step, ThisRank, fixed_batches, no_slots
from data_pipeline.order.mixture import Pairing, Quotas
from data_pipeline.order.pairing import PlannedPairing
from data_pipeline.order.plan import Planner, Slot
from data_pipeline.reader import Outcome, Reader
from data_pipeline.records import BadRow, ChatSample, DataError
from data_pipeline.sources.index import DataIndex, build_index
from data_pipeline.text.chat import Chat
from data_pipeline.text.stage import ChatStage

STEPS = 12
SLOTS = 16
Name = tuple[str, int]  # (id, language) names a sample of the corpus


@pytest.fixture(scope="session")
def reader(prepared_run: Any) -> Reader:
    config, prepared = prepared_run.config, prepared_run.prepared
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    return reader_of(prepared.index, Chat(tokenizer, config.data.template, config.data.languages), 96)


def reader_of(index: DataIndex, chat: Chat, longest: int, overlong: Overlong = "drop") -> Reader:
    return Reader(index, ChatStage(chat, longest, overlong))


def chat_of(reader: Reader) -> Chat:
    assert isinstance(reader.stage, ChatStage)
    return reader.stage.chat


def read(reader: Reader, row: int) -> ChatSample | None:
    sample = reader.read(reader.alone(row))
    assert sample is None or isinstance(sample, ChatSample)
    return sample


@pytest.fixture
def make(reader: Reader) -> Callable[..., Loader]:
    """`make(this_rank, ...)`: one rank's loader; everything else is the same each time."""

    def loader(
        this_rank: ThisRank | None = None,
        reader: Reader = reader,
        pairing: Pairing = "fill",
        workers: int = 1,
        budget: int = 768,
    ) -> Loader:
        index = reader.index
        quotas = Quotas({"en": 0.3, "de": 0.3, "sw": 0.2, "zh": 0.2}, index.languages, 1000)
        planner = Planner(index, quotas, PlannedPairing(0, pairing, set_size=3), SLOTS, 7, [0.5] * 4)
        return Loader(reader, planner, Packer(Grid("packed", budget, 96), ChatCollator(3)), this_rank, workers)

    return loader


def samples_of(step: Step) -> list[ChatSample]:
    found = [sample for batch in step.micro_batches for sample in batch.samples]
    return [sample for sample in found if isinstance(sample, ChatSample)]


def names_of(*steps: Step) -> Counter[Name]:
    return Counter((sample.id, sample.language) for step in steps for sample in samples_of(step))


def pairs_of(*steps: Step) -> Counter[tuple[Name, Name]]:
    """Of one step's ranks, from the micro-batches: which samples are in each pair."""
    return Counter(pair for pairs in sets_of(steps) for pair in pairs)


def same(one: Step, other: Step) -> bool:
    return [batch.input_ids.tolist() for batch in one.micro_batches] == [
        batch.input_ids.tolist() for batch in other.micro_batches
    ] and (one.step, one.counts) == (other.step, other.counts)


@pytest.mark.parametrize("pairing", ["none", "reuse", "fill"])
@pytest.mark.parametrize(("world_size", "per_node"), [(2, 2), (3, 3), (4, 2), (6, 2), (7, 3)])
def test_a_step_is_the_same_for_any_number_of_ranks(
    make: Callable[..., Loader], pairing: Pairing, world_size: int, per_node: int
) -> None:
    """Samples, contrast sets and counts; sets lie on several ranks. The smaller budget gives several micro-steps."""
    straddling = 0
    for number in range(STEPS):
        whole = load(make(pairing=pairing), number)
        for budget in (768, 384):
            on_rank = partial(make, pairing=pairing, budget=budget)
            shares = load_on_ranks(on_rank, world_size, number, per_node)
            assert names_of(*shares) == names_of(whole)
            assert sorted(map(sorted, sets_of(shares))) == sorted(map(sorted, sets_of([whole])))
            assert pairs_of(*shares) == pairs_of(whole)
            assert len({len(share.micro_batches) for share in shares}) == 1
            for share in shares:
                assert counts_of(share) == counts_of(whole)
                straddling += sum(any(batch.targets.contrast.received_from) for batch in share.micro_batches
                                  if batch.targets.contrast is not None)  # fmt: skip
    assert (straddling > 0) == (pairing != "none")


def counts_of(step: Step) -> list[Any]:
    return [step.counts, step.tokens.tolist(), step.labels.tolist(), step.slots.tolist(), step.unusable, step.overlong,
            step.fingerprint, step.dropped_pairs]  # fmt: skip


def test_each_pairing_gives_all_slots_and_its_pairs(make: Callable[..., Loader]) -> None:
    """`none`: the plan's slots and no pair; `reuse`: as many samples, with pairs; `fill`: more samples and pairs."""
    steps = {pairing: [load(make(pairing=pairing), t) for t in range(STEPS)] for pairing in ("none", "reuse", "fill")}
    counts = {name: (names_of(*each).total(), sum(pairs_of(t).total() for t in each)) for name, each in steps.items()}
    assert counts["none"] == (SLOTS * STEPS, 0)
    assert counts["reuse"][0] == SLOTS * STEPS
    assert 0 < counts["reuse"][1] < counts["fill"][1]
    assert counts["fill"][0] - SLOTS * STEPS == counts["fill"][1] - counts["reuse"][1], (
        "one fill for each additional pair"
    )
    for pairing, each in steps.items():
        for step in each:
            assert step.counts["pairs"] == pairs_of(step).total()
            assert all(a[0] == b[0] and a[1] == 0 != b[1] for a, b in pairs_of(step)), "(dominant, translation)"
            labelled = sum(bool(sample.labels.any()) for sample in samples_of(step))
            assert labelled == SLOTS, f"{pairing}: fills have no label"


def test_counts_are_those_of_the_micro_batches(make: Callable[..., Loader]) -> None:
    for number in range(STEPS):
        step = load(make(), number)
        tokens, labels = [0] * 4, 0
        for sample in samples_of(step):
            tokens[sample.language] += len(sample)
        for batch in step.micro_batches:
            labels += int(batch.label_weights.sum())
        assert step.tokens.tolist() == tokens
        assert step.counts["label_tokens"] == step.labels.sum() == labels > 0
        languages = [language for batch in step.micro_batches for language in batch.label_languages.tolist()]
        assert step.labels.tolist() == [languages.count(language) for language in range(4)]
        assert sum(int((batch.targets.segment_ids >= 0).sum()) for batch in step.micro_batches) == sum(tokens)
        assert (step.step, step.bad_rows, step.unusable, step.overlong) == (number, (), 0, 0)


def test_every_rank_reports_the_pairs_that_the_plan_dropped(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make().planner.step(3)
    before = load_on_ranks(make, 2, 3)
    assert [step.dropped_pairs for step in before] == [0, 0]
    monkeypatch.setattr(Planner, "step", lambda planner, step: replace(plan, sets=plan.sets[1:], dropped_pairs=2))
    after = load_on_ranks(make, 2, 3)
    assert [step.dropped_pairs for step in after] == [2, 2]
    assert pairs_of(*after).total() == pairs_of(*before).total() - len(plan.sets[0])


def test_steps_of_different_samples_have_different_fingerprints(make: Callable[..., Loader]) -> None:
    fingerprints = [load(make(), number).fingerprint for number in range(STEPS)]
    assert len(set(fingerprints)) == STEPS
    assert max(fingerprints) < 2**53, "a float holds it exactly"


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_fingerprint_is_exact_whatever_the_number_of_samples(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """Hashes of almost 2^63, of which two already exceed 64 bits, are added as integers without a limit are."""

    def large(sample: ChatSample) -> int:
        return 2**63 - 1 - sample.group % 10**6

    monkeypatch.setattr(ChatSample, "fingerprint", large)
    for number in range(STEPS):
        shares = load_on_ranks(make, world_size, number)
        expected = sum(large(sample) for share in shares for sample in samples_of(share)) % 2**53
        assert [share.fingerprint for share in shares] == [expected] * world_size


def test_a_step_depends_on_its_number_alone(make: Callable[..., Loader]) -> None:
    forwards = [load(make(), number) for number in range(4)]
    loader = make()
    backwards = [load(loader, number) for number in reversed(range(4))][::-1]
    assert all(map(same, forwards, backwards))


# --- overlong and unreadable samples leave their slots empty


def kept_pairs(pairs: Counter[tuple[Name, Name]], dropped: set[Name]) -> Counter[tuple[Name, Name]]:
    return Counter({pair: count for pair, count in pairs.items() if not dropped & set(pair)})


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_overlong_sample_leaves_its_slot_empty(make: Callable[..., Loader], reader: Reader, world_size: int) -> None:
    limit = 50
    short = reader_of(reader.index, chat_of(reader), limit)
    left_out = lost_pairs = 0
    for number in range(STEPS):
        whole, *_ = load_on_ranks(make, 1, number)
        cut = load_on_ranks(partial(make, reader=short), world_size, number)
        fits = Counter((s.id, s.language) for s in samples_of(whole) if len(s) <= limit)
        assert names_of(*cut) == fits
        # a fill is shorter than the same sample with its answer, so a pair that is expected to be dropped may stay
        long = {(s.id, s.language) for s in samples_of(whole) if len(s) > limit}
        assert pairs_of(*cut) >= kept_pairs(pairs_of(whole), long)
        assert set(pairs_of(*cut)) <= set(pairs_of(whole))
        for share in cut:
            assert share.overlong == names_of(whole).total() - fits.total()
            assert share.counts["pairs"] == pairs_of(*cut).total()
        left_out += cut[0].overlong
        lost_pairs += whole.counts["pairs"] - cut[0].counts["pairs"]
    assert left_out > 10
    assert lost_pairs > 3


def test_a_truncated_sample_fills_its_slot_and_keeps_its_pair(make: Callable[..., Loader], reader: Reader) -> None:
    """With `truncate`: every slot and every pair of the plan; answers are whole, samples that fit are unchanged."""
    limit = 50
    short = reader_of(reader.index, chat_of(reader), limit, "truncate")
    truncated = 0
    for number in range(STEPS):
        whole, cut = load(make(), number), load(make(reader=short), number)
        assert names_of(cut) == names_of(whole)
        assert pairs_of(cut) == pairs_of(whole)
        assert (cut.overlong, cut.counts["label_tokens"]) == (0, whole.counts["label_tokens"])
        before = {(s.id, s.language, bool(s.labels.any())): s for s in samples_of(whole)}
        for sample in samples_of(cut):
            same = before[sample.id, sample.language, bool(sample.labels.any())]
            assert len(sample) <= limit
            assert sample.truncated == (len(same) > limit)
            assert sample.input_ids[sample.labels].tolist() == same.input_ids[same.labels].tolist()
            if not sample.truncated:
                assert sample.input_ids.tolist() == same.input_ids.tolist()
        labelled = [sample for sample in samples_of(cut) if sample.labels.any()]
        assert cut.slots.sum(axis=1).tolist() == [SLOTS, sum(sample.truncated for sample in labelled), 0, 0]
        truncated += sum(sample.truncated for sample in samples_of(cut))
    assert truncated > 10


def test_with_overlong_error_an_overlong_row_is_named_with_its_length(reader: Reader) -> None:
    row = int(reader.index.rows(0)[1])
    length = reader.length(row)
    with pytest.raises(DataError) as refusal:
        read(reader_of(reader.index, chat_of(reader), length - 1, "error"), row)
    assert str(refusal.value) == (
        f"{reader.index.record(row).origin}: {length} tokens, data.sequence_length is {length - 1}; shorten the row, "
        "raise data.sequence_length, or set data.overlong to drop or truncate"
    )
    assert read(reader_of(reader.index, chat_of(reader), length, "error"), row) is not None


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_a_sample_whose_answer_alone_is_too_long_is_left_out(reader: Reader, overlong: Overlong) -> None:
    row = int(reader.index.rows(0)[1])
    answer = int(chat_of(reader).tokenize(reader.index.record(row)).labels.sum())
    assert read(reader_of(reader.index, chat_of(reader), answer, overlong), row) is None


@pytest.mark.parametrize("world_size", [1, 3])
def test_filled_and_empty_slots_are_counted_by_language(
    make: Callable[..., Loader], reader: Reader, world_size: int
) -> None:
    """Filled and empty slots are the planned ones; label-free fills are not slots. Every rank knows those of all."""
    broken = broken_reader(reader, set(range(0, len(reader.index), 9)), longest=50)
    total = no_slots(4)
    for number in range(STEPS):
        shares = load_on_ranks(partial(make, reader=broken), world_size, number)
        slots = shares[0].slots
        assert all(np.array_equal(share.slots, slots) for share in shares)
        planned = Counter(slot.language for slot in make().planner.step(number).slots if slot.labelled)
        filled, truncated, overlong, unusable = slots
        assert (filled + overlong + unusable).tolist() == [planned[language] for language in range(4)]
        labelled = [s for share in shares for s in samples_of(share) if s.labels.any()]
        assert filled.tolist() == [sum(s.language == language for s in labelled) for language in range(4)]
        assert not truncated.any()
        total += slots
    assert (total.sum(axis=1)[[0, 2, 3]] > 5).all()


@dataclass(frozen=True)
class BrokenReader(Reader):
    """A reader for which the rows in `broken` are bad."""

    broken: frozenset[int] = frozenset()

    def read_many(self, slots: Sequence[Slot]) -> list[Outcome]:
        return [
            BadRow(f"file.jsonl:{slot.row}", "the tokenizer cannot round-trip it") if slot.row in self.broken else read
            for slot, read in zip(slots, super().read_many(slots), strict=True)
        ]


def broken_reader(reader: Reader, broken: set[int], longest: int = 96) -> Reader:
    return BrokenReader(reader.index, ChatStage(chat_of(reader), longest), broken=frozenset(broken))


def test_a_row_that_is_bad_when_read_leaves_its_slot_empty(make: Callable[..., Loader], reader: Reader) -> None:
    broken = set(range(0, len(reader.index), 9))
    dropped = {(reader.index.record(row).id, int(reader.index.language[row])) for row in broken}
    empty = lost_pairs = 0
    for number in range(STEPS):
        whole, torn = load(make(), number), load(make(reader=broken_reader(reader, broken)), number)
        left = Counter({name: count for name, count in names_of(whole).items() if name not in dropped})
        assert names_of(torn) == left
        assert pairs_of(torn) == kept_pairs(pairs_of(whole), dropped)
        assert len(torn.bad_rows) == names_of(whole).total() - left.total()
        assert all(row.reason == "the tokenizer cannot round-trip it" for row in torn.bad_rows)
        assert torn.counts["pairs"] == pairs_of(torn).total()
        empty += len(torn.bad_rows)
        lost_pairs += whole.counts["pairs"] - torn.counts["pairs"]
    assert empty > 10
    assert lost_pairs > 3


def broken_corpus(corpus: Path, folder: Path, line: int) -> Path:
    """The corpus with one torn line in German."""
    shutil.copytree(corpus, folder)
    lines = (folder / "de.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines[line - 1] = lines[line - 1][:20] + "\n"
    (folder / "de.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_a_broken_line_moves_no_other_slot(
    make: Callable[..., Loader], reader: Reader, prepared_run: Any, corpus: Path, tmp_path: Path
) -> None:
    data = prepared_run.config.data
    folder = broken_corpus(corpus, tmp_path / "data", line=18)
    index: DataIndex = build_index(data.sources, data.languages, folder, tmp_path / "index", seed=3, max_bad_rows=1)
    torn_reader = reader_of(index, chat_of(reader), 96)
    bad_rows: list[BadRow] = []
    dropped = ("item-17", 1)
    for number in range(STEPS):
        whole, torn = (load(make(reader=each, pairing="none"), number) for each in (reader, torn_reader))
        assert names_of(torn) == names_of(whole) - Counter({dropped: names_of(whole)[dropped]})
        bad_rows += torn.bad_rows
    assert bad_rows, "the broken row was read"
    assert all(str(row).startswith(f"{folder / 'de.jsonl'}:18: not valid JSON") for row in bad_rows)
    plan = make(reader=torn_reader, pairing="none").planner
    slots = [slot for number in range(STEPS) for slot in plan.step(number).slots]
    assert sum(bool(index.bad[slot.row]) for slot in slots) == len(bad_rows)


@pytest.mark.parametrize("pairing", ["reuse", "fill"])
def test_a_broken_line_is_in_no_pair_and_changes_only_dominant_slots(
    make: Callable[..., Loader],
    reader: Reader,
    prepared_run: Any,
    corpus: Path,
    tmp_path: Path,
    pairing: Pairing,
) -> None:
    """Dominant slots take other items instead of the broken one; all other slots keep their rows."""
    data = prepared_run.config.data
    folder = broken_corpus(corpus, tmp_path / "data", line=18)
    index = build_index(data.sources, data.languages, folder, tmp_path / "index", seed=3, max_bad_rows=1)
    whole, torn = (
        make(reader=each, pairing=pairing).planner for each in (reader, reader_of(index, chat_of(reader), 96))
    )
    changed = 0
    for number in range(4 * STEPS):
        before, after = ([slot for slot in each.step(number).slots if slot.labelled] for each in (whole, torn))
        assert [(slot.number, slot.language) for slot in before] == [(slot.number, slot.language) for slot in after]
        others = [(a.row, b.row) for a, b in zip(before, after, strict=True) if a.language != 0]
        assert all(a == b for a, b in others)
        changed += sum(a.row != b.row for a, b in zip(before, after, strict=True))
        plan = torn.step(number)
        in_pairs = {row for pairs in plan.sets for row in plan.rows[pairs].ravel().tolist()}
        assert not in_pairs & set(np.flatnonzero(index.bad).tolist())
    assert changed > 0


# --- workers


@pytest.mark.parametrize("workers", [1, 3])
def test_steps_come_in_order_from_any_start(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Workers finish out of order; not more than `workers` + 1 steps are made ahead of the one handed out."""
    loader = make(workers=workers)
    expected = [load(loader, number) for number in range(3, 11)]
    begun: dict[str, list[int]] = {"scan": [], "load": []}
    scan, load_scanned = loader.scan, loader.load

    def slow_scan(step: int) -> Scan:
        begun["scan"].append(step)
        time.sleep(0.02 if step % 2 else 0.0)
        return scan(step)

    def slow_load(scanned: Scan, measures: Any) -> Step:
        begun["load"].append(scanned.plan.step)
        time.sleep(0.02 if scanned.plan.step % 2 else 0.0)
        return load_scanned(scanned, measures)

    monkeypatch.setattr(loader, "scan", slow_scan)
    monkeypatch.setattr(loader, "load", slow_load)
    got = []
    for step in loader.steps(3, 11):
        assert max(begun["load"]) <= step.step + workers
        assert max(begun["scan"]) <= step.step + 2 * workers + 1
        got.append(step)
    assert all(map(same, got, expected))
    assert [step.step for step in got] == list(range(3, 11))
    assert sorted(begun["scan"]) == sorted(begun["load"]) == list(range(3, 11)), "each is made once, none beyond"


def test_measures_are_summed_in_the_order_of_the_steps(make: Callable[..., Loader]) -> None:
    """In the calling thread, once a step: ranks that iterate alike make the same collective calls."""
    summed, threads = [], set()

    def noted(measures: Any) -> Any:
        summed.append(measures.copy())
        threads.add(threading.current_thread())
        return measures

    loader = make(ThisRank(sum=noted), workers=3)
    steps = [step.step for step in loader.steps(2, 9)]
    assert threads == {threading.current_thread()}
    assert [each.tolist() for each in summed] == [loader.scan(step).measures.tolist() for step in steps]


def test_a_rank_knows_what_it_waited_for_its_own_work(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for the sum over ranks, in which it waits for the others."""

    def slow(measures: Any) -> Any:
        time.sleep(0.2)
        return measures

    loader = make(ThisRank(sum=slow))
    scan = loader.scan
    for step in loader.steps(0, 3):
        assert loader.waited < 0.2, step.step
    monkeypatch.setattr(loader, "scan", lambda step: (time.sleep(0.3), scan(step))[1])
    next(loader.steps(0, 3))
    assert loader.waited > 0.25


def test_an_empty_range_has_no_steps(make: Callable[..., Loader]) -> None:
    assert list(make().steps(5, 5)) == []


@pytest.mark.parametrize("part", ["scan", "load"])
def test_an_error_of_the_data_is_raised_at_its_own_step(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """After the same number of sums as on ranks without the error."""
    loader = make(workers=2)
    read_many, failing = loader.reader.read_many, loader.planner.step(3).slot(0)

    def reading(reader: Reader, slots: Sequence[Slot]) -> list[Outcome]:
        if failing in slots:
            raise DataError("the file has changed")
        return read_many(slots)

    if part == "scan":
        monkeypatch.setattr(Reader, "read_many", reading)
    else:
        monkeypatch.setattr(loader, "_own_samples", lambda scan, *_: reading(loader.reader, [scan.plan.slot(0)]))
        monkeypatch.setattr(loader, "_batch", lambda *_: loader.packer.idle())
    steps = loader.steps(0, 9)
    assert [next(steps).step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="the file has changed"):
        next(steps)


def test_a_sample_that_two_ranks_read_differently_is_an_error(make: Callable[..., Loader], reader: Reader) -> None:
    """Its length would not be the one that the ranks have distributed."""
    scan = make().scan(0)
    scan.samples.pop(0)  # type: ignore[attr-defined]
    loader = make(reader=reader_of(reader.index, chat_of(reader), 10))
    with pytest.raises(DataError, match=r"jsonl:\d+: read differently by two ranks; do all see the same file"):
        loader.load(scan, scan.measures)
    assert load(make(), 0).counts == make().load(scan, scan.measures).counts


def test_stopping_early_leaves_no_thread(make: Callable[..., Loader]) -> None:
    for _ in make(workers=2).steps(0, 1000):
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


# --- fixed sets


@pytest.mark.parametrize("n_samples", [0, 1, 3, 25])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_get_equally_many_fixed_batches_that_cover_all_samples(
    make: Callable[..., Loader], reader: Reader, n_samples: int, world_size: int
) -> None:
    rows = np.linspace(0, len(reader.index) - 1, n_samples).astype(int).tolist()
    samples = [sample for row in rows if (sample := read(reader, row)) is not None]
    assert len(samples) == n_samples
    packer = make().packer
    ranks = [ThisRank(rank, world_size, world_size) for rank in range(world_size)]
    shares: list[list[ChatBatch]] = [fixed_batches(samples, packer, each) for each in ranks]
    assert len({len(share) for share in shares}) == 1
    seen = Counter((s.id, s.language) for share in shares for batch in share for s in batch.samples)
    assert seen == Counter((sample.id, sample.language) for sample in samples)
    idle = [batch for share in shares for batch in share if not batch.samples]
    assert all(batch.label_weights.sum() == 0 and (batch.targets.languages == -1).all() for batch in idle)


def test_read_applies_the_length_limit(reader: Reader) -> None:
    """A sample of exactly `sequence_length` tokens is taken, a longer one is not."""
    sample = read(reader, 0)
    assert sample is not None
    exact = reader_of(reader.index, chat_of(reader), len(sample))
    assert read(exact, 0) is not None
    assert read(reader_of(reader.index, chat_of(reader), len(sample) - 1), 0) is None


def test_labels_are_checked_when_a_sample_is_read(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong mask stops the run instead of training on it; a label-free sample has nothing to check."""
    tokenize = chat_of(reader).tokenize_all

    def last_without_end(records: Any, labelled: Any) -> list[Any]:
        *others, sample = tokenize(records, labelled)
        labels = sample.labels.copy()
        labels[-1] = False
        return [*others, replace(sample, labels=labels)]

    monkeypatch.setattr(chat_of(reader), "tokenize_all", last_without_end)
    for rows in ([0], [1, 2, 3, 0]):
        with pytest.raises(Exception, match="label mask") as refusal:
            reader.read_many([reader.alone(row) for row in rows])
        assert not isinstance(refusal.value, BadRow)
    sample = reader.read(replace(reader.alone(0), labelled=False))
    assert sample is not None
    assert not sample.labels.any()


def test_the_corpus_meets_the_assumptions_of_these_tests(corpus: Path, reader: Reader) -> None:
    """Parallel, and with samples both above and below the limit that the tests set."""
    ids = [[json.loads(line)["id"] for line in file.read_text().splitlines()] for file in corpus.glob("*.jsonl")]
    assert len(ids) == 4
    assert all(each == ids[0] for each in ids)
    lengths = [len(chat_of(reader).tokenize(reader.index.record(row))) for row in range(len(reader.index))]
    assert min(lengths) < 20
    assert 50 < max(lengths) <= 96
