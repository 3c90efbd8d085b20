"""tasks/stage.py, masking.py, order/pairing.py: partners, windows and masks, for any number of ranks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_encoders import WORDS, unigram
from steps import load, load_on_ranks
from tokenizers.normalizers import Replace

from data_pipeline.batching.grid import Grid
from data_pipeline.batching.packer import Packer
from data_pipeline.batching.tasks import TaskCollator
from data_pipeline.config import Overlong, SourceConfig
from data_pipeline.loader import Loader, Step, ThisRank, fixed_batches
from data_pipeline.order.mixture import Quotas
from data_pipeline.order.pairing import Partners, PlannedPairing, gold_probability
from data_pipeline.order.plan import Planner, Slot
from data_pipeline.reader import Outcome, Reader
from data_pipeline.records import BadRow, DataError, stable_hash
from data_pipeline.sources.index import build_index
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.masking import mask_tokens
from data_pipeline.tasks.sample import TaskSample
from data_pipeline.tasks.stage import TaskStage
from data_pipeline.tasks.tokenize import TaskTokenizer

LANGUAGES = ("en", "th", "bn")
EN, TH, BN = range(3)
ITEMS = 12
SLOTS = 12
STEPS = 8
TASKS = {
    "classification": TaskConfig(kind="classification", labels=("no", "yes")),
    "tagging": TaskConfig(kind="tagging", labels=("N", "V", "O"), doc_stride=20),
    "qa": TaskConfig(kind="qa", doc_stride=25, max_question_length=12),
    "text": TaskConfig(kind="text", mask_probability=0.2),
}


def words(language: str, item: int) -> list[str]:
    """The words of an item: different for each; long items take several windows."""
    own = WORDS[language]
    return [own[(item + n) % len(own)] for n in range(4 + 5 * (item % 4))] + [str(item)]


def soft(item: int, number: int) -> list[float]:
    share = (item + number) % 5 / 5
    return [share, 1 - share, 0.0]


def row(kind: str, language: str, item: int, back: bool = True) -> dict[str, Any]:
    """A row of the canonical columns; English has gold labels, the others those of translations."""
    own, english = words(language, item), words("en", item)
    values: dict[str, Any] = {"id": f"i{item}", "group": f"g{item}", "language": language}
    if kind == "classification":
        values |= {"text_a": " ".join(own), "label": ("no", "yes")[item % 2]}
        extra: dict[str, Any] = {"back_text_a": "after " + " ".join(english)}
    elif kind == "tagging":
        if language == "en":
            values |= {"words": own, "tags": ["NVO"[(item + n) % 3] for n in range(len(own))]}
        else:
            values |= {"words": own, "soft_tags": [soft(item, n) for n in range(len(own))]}
        extra = {"back_words": ["after", *english]}
    elif kind == "qa":
        context = " ".join(own)
        values |= {"question": own[0], "context": context, "answers": [answer(context, own)]}
        text = "after " + " ".join(english)
        extra = {"back_question": english[0], "back_context": text, "back_answers": [answer(text, english)]}
    else:
        values |= {"text": " ".join(own)}
        extra = {}
    return values | (extra if back and language != "en" else {})


def answer(context: str, own: list[str]) -> dict[str, Any]:
    return {"text": own[-2], "answer_start": context.rindex(own[-2])}


def write(folder: Path, kind: str, rows: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """One file: every item in English, Thai and Bengali; without Thai item 3's back-translation and English item 5."""
    if rows is None:
        rows = [
            row(kind, language, item, back=(language, item) != ("th", 3))
            for language in LANGUAGES
            for item in range(ITEMS)
            if (language, item) != ("en", 5)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return rows


Make = Callable[..., Reader]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a reader; arguments that are not given have fixed defaults."""

    def reader(
        kind: str,
        rows: list[dict[str, Any]] | None = None,
        paired: bool | None = None,
        schedule: float | None = None,
        length: int = 60,
        seed: int = 5,
        languages: tuple[str, ...] = LANGUAGES,
        overlong: Overlong = "truncate",
        **options: Any,
    ) -> Reader:
        rows = write(tmp_path / kind, kind, rows)
        columns = {name: name for each in rows for name in each}
        task = TASKS[kind]
        source = SourceConfig(name="rows", files="rows.jsonl", columns=columns)
        index = build_index([source], languages, tmp_path / kind, tmp_path / "index", task=task, **options)
        stage = TaskStage(TaskTokenizer(unigram(), task, length), overlong)
        with_partner = kind != "text" if paired is None else paired
        partners = Partners(index, languages.index("en"), schedule, seed) if with_partner else None
        return Reader(index, stage, seed, partners)

    return reader


def tokenizer_of(reader: Reader) -> TaskTokenizer:
    assert isinstance(reader.stage, TaskStage)
    return reader.stage.tokenizer


def read(reader: Reader, row: int, step: int) -> TaskSample:
    """A row as it is read at a step."""
    sample = reader.read(reader.alone(row, step))
    assert isinstance(sample, TaskSample)
    return sample


def gold(reader: Reader, step: int) -> bool:
    assert reader.partners is not None
    return reader.partners.gold(step)


def numbers(reader: Reader) -> dict[tuple[str, str], int]:
    """(language, id) -> row of the index."""
    records = {
        number: reader.index.record(number) for number in range(len(reader.index)) if not reader.index.bad[number]
    }
    return {(record.language, record.id): number for number, record in records.items()}


def step_that(reader: Reader, wanted: bool) -> int:
    return next(step for step in range(1000) if gold(reader, step) is wanted)


def text_of(reader: Reader, side: Any) -> str:
    """The tokens of the texts, joined."""
    ids = side.input_ids[side.content].tolist()
    return "".join(tokenizer_of(reader).tokenizer.convert_ids_to_tokens(ids)).replace("▁", "")


# --- scheduled sampling


@pytest.mark.parametrize("k", [1.0, 10.0, 1000.0, 2000.0])
def test_the_probability_of_gold_sources_is_the_papers(k: float) -> None:
    for step in (0, 1, 5, 100, 500, 2000, 7000):
        try:
            expected = k / (k + math.exp(step / k))
        except OverflowError:
            expected = 0.0
        assert gold_probability(step, k) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert gold_probability(10**9, k) == 0
    assert gold_probability(0, k) == pytest.approx(k / (k + 1))


def test_steps_are_gold_with_that_probability(make: Make) -> None:
    """Each step's draw against the formula, one by one, and the share of gold in a thousand steps."""
    reader = make("classification", schedule=200.0, seed=9)
    expected, mean, variance = [], 0.0, 0.0
    for step in range(3000):
        p = 200 / (200 + math.exp(step / 200))
        expected.append(stable_hash(9, "source", step) < p * 2**63)
        mean, variance = mean + p, variance + p * (1 - p)
    assert [gold(reader, step) for step in range(3000)] == expected
    assert abs(sum(expected) - mean) < 4 * math.sqrt(variance)
    other = make("classification", schedule=200.0, seed=10)
    assert [gold(other, step) for step in range(3000)] != expected
    assert all(gold(make("classification", schedule=None), step) for step in (0, 10**6))
    assert not any(gold(make("classification", schedule=5.0), step) for step in (10**4, 10**6))


# --- pairs


@pytest.mark.parametrize("kind", ["classification", "tagging", "qa"])
@pytest.mark.parametrize("gold", [True, False])
def test_a_sample_is_paired_with_the_kind_of_source_drawn_for_the_step(make: Make, kind: str, gold: bool) -> None:
    reader = make(kind, schedule=3.0, length=400)
    step, rows = step_that(reader, gold), numbers(reader)
    for item in range(ITEMS):
        sample = read(reader, rows["bn", f"i{item}"], step)
        assert sample.source is not None
        is_gold = gold and item != 5  # there is no English item 5, so the back-translation is used
        assert (sample.source.is_gold, sample.source.is_itself, sample.source.language) == (is_gold, False, EN)
        joined = "".join(words("en", item))
        if kind == "qa":
            joined = words("en", item)[0] + ("" if is_gold else "after") + joined
        elif not is_gold:
            joined = "after" + joined
        assert text_of(reader, sample.source.side) == joined
        assert sample.source.counts == (is_gold or kind == "classification")
        assert (sample.id, sample.language, sample.group) == (f"i{item}", BN, stable_hash(f"g{item}"))
    lacking = read(reader, rows["th", "i3"], step)
    assert (lacking.source.is_gold, lacking.source.is_itself) == (True, False), (
        "no back-translation, so the gold source"
    )
    assert lacking.source.counts == (gold or kind == "classification")


@pytest.mark.parametrize("kind", ["classification", "tagging", "qa"])
def test_a_text_without_a_partner_is_its_own_source(make: Make, kind: str) -> None:
    """So are English texts, unless they have a back-translation."""
    rows = [row(kind, language, item) for language in LANGUAGES for item in range(3)]
    rows.append(row(kind, "bn", 7, back=False))
    back = {name: value for name, value in row(kind, "bn", 2).items() if name.startswith("back_")}
    rows[2] |= back
    reader = make(kind, rows, schedule=3.0)
    for gold in (True, False):
        step, found = step_that(reader, gold), numbers(reader)
        for language, item in (("en", 0), ("en", 1), ("bn", 7)):
            sample = read(reader, found[language, f"i{item}"], step)
            assert (sample.source.is_itself, sample.source.is_gold) == (True, True)
            assert sample.source is not None
            assert sample.source.side.input_ids.tolist() == sample.target.input_ids.tolist()
            assert sample.source.language == sample.language
            assert sample.source.counts == (gold or kind == "classification")
        english = read(reader, found["en", "i2"], step)
        assert (english.source.is_itself, english.source.is_gold, english.source.language) == (False, False, EN)
        assert english.source is not None
        assert "after" in text_of(reader, english.source.side)


def test_an_unpaired_sample_has_no_source(make: Make) -> None:
    sample = read(make("classification", paired=False), 20, 3)
    assert sample.source is None


def test_classes_are_one_hot_on_both_sides(make: Make) -> None:
    reader = make("classification", schedule=3.0)
    for step in (step_that(reader, True), step_that(reader, False)):
        for (_, name), number in numbers(reader).items():
            sample = read(reader, number, step)
            expected = [[1.0, 0.0], [0.0, 1.0]][int(name[1:]) % 2]
            assert sample.source.labels is not None
            for labels in (sample.target_labels, sample.source.labels):
                assert labels.classes is not None
                assert labels.classes.tolist() == [expected]


def test_tags_are_those_of_the_words_in_the_window(make: Make) -> None:
    reader = make("tagging", schedule=None, length=30)
    later = 0
    for (language, name), number in numbers(reader).items():
        item = int(name[1:])
        for step in range(4):
            sample = read(reader, number, step)
            first, stop = sample.target.words
            later += first > 0
            hard = [np.eye(3)["NVO".index("NVO"[(item + n) % 3])] for n in range(first, stop)]
            expected = hard if language == "en" else [soft(item, n) for n in range(first, stop)]
            assert sample.target_labels.classes == pytest.approx(np.array(expected), abs=1e-6)
            assert sample.source is not None
            assert sample.source.labels is not None
            begin, end = sample.source.side.words
            if language == "en" or item != 5:
                gold = [np.eye(3)[(item + n) % 3] for n in range(begin, end)]
                assert sample.source.labels.classes == pytest.approx(np.array(gold))
            else:
                assert sample.source.labels.classes is not None
                assert sample.source.labels.classes.tolist() == [[0.0] * 3] * (end - begin)
    assert later > 10


def test_soft_tags_take_precedence_on_the_target_and_tags_on_the_source(make: Make) -> None:
    both = {"tags": ["N", "V"], "soft_tags": [[0.5, 0.5, 0.001], [0.0, 0.2, 0.8]]}
    rows = [{"id": code, "group": "g", "language": code, "words": [code, "old"], **both} for code in LANGUAGES]
    reader = make("tagging", rows)
    for number in range(3):
        sample = read(reader, number, 0)
        assert sample.target_labels.classes is not None
        assert sample.target_labels.classes.sum(axis=1) == pytest.approx([1, 1], abs=1e-6)
        assert sample.target_labels.classes == pytest.approx(
            np.array([[0.4995, 0.4995, 0.001], [0, 0.2, 0.8]]), abs=1e-5
        )
        assert sample.source.labels is not None
        assert sample.source.labels.classes is not None
        assert sample.source.labels.classes.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_an_answer_without_token_is_a_bad_row(make: Make) -> None:
    """Characters that the tokenizer drops cannot be learned; the error has file, line and reason."""
    rows = [row("qa", language, item) for language in LANGUAGES for item in range(2)]
    rows[3] |= {"context": "the old \u3000 bridge", "answers": [{"text": "\u3000 bridge", "answer_start": 8}]}
    rows[4] |= {"context": "old \u200b bridge", "answers": [{"text": "\u200b", "answer_start": 4}]}
    reader = make("qa", rows)
    assert read(reader, 3, 0).target.span is not None
    tokenizer_of(reader)._backend.normalizer = Replace("\u200b", "")
    with pytest.raises(BadRow, match=r"rows\.jsonl:5: no token covers the answer"):
        read(reader, 4, 0)
    found = reader.readable([3, 4, 5])
    assert found.rows == [3, 5]
    (bad,) = found.bad
    assert str(bad).endswith("rows.jsonl:5: no token covers the answer"), "which check --all-rows reports"


# --- windows


def drawn(reader: Reader, language: str, name: str, step: int, n: int) -> int:
    return stable_hash("window", reader.seed, step, language, name) % n


@pytest.mark.parametrize("kind", ["tagging", "qa", "text"])
def test_each_step_draws_one_of_all_windows(make: Make, kind: str) -> None:
    reader = make(kind, paired=False, length=46 if kind == "qa" else 30)
    several = 0
    for (language, name), number in numbers(reader).items():
        windows = tokenizer_of(reader).windows(reader.index.record(number).example)
        seen = set()
        for step in range(30):
            sample = read(reader, number, step)
            expected = windows[drawn(reader, language, name, step, len(windows))]
            assert (sample.target.words, sample.target.span) == (expected.words, expected.span)
            if kind == "text":
                labels = sample.target_labels
                whole = sample.target.input_ids.copy()
                whole[labels.positions] = labels.ids
                assert whole.tolist() == expected.input_ids.tolist()
            else:
                assert sample.target.input_ids.tolist() == expected.input_ids.tolist()
            seen.add(tuple(expected.input_ids.tolist()))
        several += len(windows) > 1
        assert len(seen) == min(len(windows), len(seen))
        if len(windows) <= 3:
            assert len(seen) == len(windows), "each is drawn"
    assert several > 5


def test_answers_are_in_the_windows_of_both_sides(make: Make) -> None:
    """If the target's window holds its answer, so does the source's; else the source's has the same index."""
    reader = make("qa", schedule=3.0, length=46)
    holding = other = 0
    for gold in (True, False):
        step = step_that(reader, gold)
        for (language, name), number in numbers(reader).items():
            if language == "en":
                continue
            record = reader.index.record(number)
            sample = read(reader, number, step)
            assert sample.source is not None
            gold_row = reader.index.translation(number, EN)
            use_gold = gold_row >= 0 and (gold or record.back is None)
            example = reader.index.record(gold_row).example if use_gold else record.back
            assert example is not None
            sources = list(tokenizer_of(reader).windows(example))
            targets = tokenizer_of(reader).windows(record.example)
            chosen = drawn(reader, language, name, step, len(targets))
            if sample.target.span != (0, 0):
                with_answer = [n for n, side in enumerate(sources) if side.span != (0, 0)]
                assert with_answer
                expected = sources[min(with_answer, key=lambda n, chosen=chosen: (abs(n - chosen), n))]
                holding += len(sources) > 1
            else:
                expected = sources[min(chosen, len(sources) - 1)]
                other += len(sources) > 1
            assert sample.source.side.input_ids.tolist() == expected.input_ids.tolist()
            assert sample.source.side.span == expected.span
    assert holding > 5
    assert other > 5


def test_the_sources_window_is_at_the_same_part_of_the_sentence(make: Make) -> None:
    reader = make("tagging", length=24)
    moved = 0
    for (language, _), number in numbers(reader).items():
        gold_row = reader.index.translation(number, EN)
        if language == "en" or gold_row < 0:
            continue
        sources = list(tokenizer_of(reader).windows(reader.index.record(gold_row).example))
        n_target = len(reader.index.record(number).example.texts)
        n_source = len(reader.index.record(gold_row).example.texts)
        for step in range(6):
            sample = read(reader, number, step)
            assert sample.source is not None
            middle = sum(sample.target.words) / 2 / n_target
            distances = [abs(sum(side.words) / 2 / n_source - middle) for side in sources]
            assert sample.source.side.words == sources[distances.index(min(distances))].words
            moved += sample.source.side.words[0] > 0
    assert moved > 10


# --- masks


def test_masks_are_drawn_by_step_and_sample(make: Make) -> None:
    reader, again = make("text", seed=1), make("text", seed=1)
    other_seed = make("text", seed=2)

    def masked(each: Reader, number: int, step: int) -> tuple[Any, ...]:
        sample = read(each, number, step)
        assert sample.target_labels.positions is not None
        return sample.target.input_ids.tolist(), sample.target_labels.positions.tolist()

    for number in range(0, len(reader.index), 5):
        assert masked(reader, number, 4) == masked(again, number, 4)
    assert [masked(reader, n, 4) for n in range(9)] != [masked(reader, n, 5) for n in range(9)]
    assert [masked(reader, n, 4) for n in range(9)] != [masked(other_seed, n, 4) for n in range(9)]


def test_masking_has_the_proportions_of_bert() -> None:
    """Proportions over many texts; special tokens are never masked; replacements are ordinary tokens."""
    ordinary = np.arange(10, 500, dtype=np.int32)
    content = np.array([False] + [True] * 80 + [False, False] + [True] * 40 + [False])
    ids = np.where(content, 600, 2).astype(np.int32)
    outcomes: Counter[str] = Counter()
    replaced = Counter[int]()
    n_tokens = 0
    for seed in range(400):
        masked, positions = mask_tokens(ids, content, 0.15, 4, ordinary, seed)
        again = mask_tokens(ids, content, 0.15, 4, ordinary, seed)
        assert masked.tolist() == again[0].tolist()
        assert content[positions].all()
        assert positions.tolist() == sorted(set(positions.tolist()))
        untouched = np.ones(len(ids), bool)
        untouched[positions] = False
        assert (masked[untouched] == ids[untouched]).all()
        for value in masked[positions].tolist():
            outcomes["mask" if value == 4 else "same" if value == 600 else "other"] += 1
            if value not in (4, 600):
                assert value in ordinary
                replaced[value] += 1
        n_tokens += int(content.sum())
    total = outcomes.total()
    assert total / n_tokens == pytest.approx(0.15, abs=0.006)
    assert outcomes["mask"] / total == pytest.approx(0.8, abs=0.015)
    assert outcomes["other"] / total == pytest.approx(0.1, abs=0.012)
    assert outcomes["same"] / total == pytest.approx(0.1, abs=0.012)
    assert len(replaced) > 300, "from the whole vocabulary"
    assert (ids[content] == 600).all(), "the input is unchanged"


def test_at_least_one_token_is_masked() -> None:
    content = np.array([False, True, True, False])
    ids = np.array([0, 7, 8, 2], np.int32)
    chosen = Counter(
        int(position) for seed in range(200) for position in mask_tokens(ids, content, 1e-9, 4, ids[1:3], seed)[1]
    )
    assert chosen.total() == 200
    assert set(chosen) == {1, 2}


def test_masking_uses_the_mask_token_and_no_other_special_token(make: Make) -> None:
    reader = make("text", length=40)
    hf = tokenizer_of(reader).tokenizer
    masked = 0
    for number in range(len(reader.index)):
        sample = read(reader, number, 0)
        special = np.isin(sample.target.input_ids, [hf.cls_token_id, hf.sep_token_id, hf.pad_token_id])
        assert special.tolist() == (~sample.target.content).tolist(), "none is inserted, none is masked"
        masked += int((sample.target.input_ids == hf.mask_token_id).sum())
    assert masked > len(reader.index)


# --- steps


def loader(reader: Reader, this_rank: ThisRank | None = None, workers: int = 1) -> Loader:
    quotas = Quotas({"en": 0.3, "th": 0.3, "bn": 0.4}, LANGUAGES, 1000)
    pairing = PlannedPairing(EN, partners=reader.partners)
    planner = Planner(reader.index, quotas, pairing, SLOTS, reader.seed, [0.5] * 3)
    tokenizer = tokenizer_of(reader)
    collator = TaskCollator(1, tokenizer.config, reader.partners is not None, tokenizer.has_token_types)
    return Loader(reader, planner, Packer(Grid("padded", 300, 300, collator.sides), collator), this_rank, workers)


def samples_of(step: Step) -> list[TaskSample]:
    found = [sample for batch in step.micro_batches for sample in batch.samples]
    return [sample for sample in found if isinstance(sample, TaskSample)]


def labels_of(batch: Any) -> list[Any]:
    """Classes, spans and token ids: (N, ...), or None where the task has none."""
    labels = batch.targets.labels
    return [getattr(labels, name, None) for name in ("classes", "spans", "ids")]


def contents(*steps: Step) -> Counter[tuple[Any, ...]]:
    """Every sample of the steps, with its tokens on both sides and its labels."""
    found: Counter[tuple[Any, ...]] = Counter()
    for step in steps:
        for batch in step.micro_batches:
            n = len(batch.sample_ids)
            for number, (name, sample) in enumerate(zip(batch.sample_ids, batch.samples, strict=True)):
                parts: list[Any] = [name, *(language for language, _ in sample.tokens_by_language())]
                for each in [number, number + n] if batch.targets.n_pairs else [number]:
                    mask, units = batch.attention_mask[each].bool(), batch.targets.label_rows == each
                    parts.append(tuple(batch.input_ids[each][mask].tolist()))
                    parts += [tuple(batch.label_weights[units].tolist()), tuple(batch.label_languages[units].tolist())]
                    for field in labels_of(batch):
                        parts.append(None if field is None else str(field[units].tolist()))
                found[tuple(parts)] += 1
    return found


@pytest.mark.parametrize("kind", ["classification", "tagging", "qa", "text"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_has_the_same_samples_for_any_world_size(make: Make, kind: str, world_size: int) -> None:
    """Samples, sources, windows, masks and labels: the same set, and the same choice of sources on every rank."""
    readers = [make(kind, schedule=3.0, length=46) for _ in range(world_size + 1)]
    alone = loader(readers[0])
    golds = set()
    for number in range(STEPS):
        whole = load(alone, number)
        shares = load_on_ranks(lambda this: loader(readers[1 + this.rank], this), world_size, number)
        assert contents(*shares) == contents(whole)
        assert contents(whole).total() == SLOTS
        is_gold = alone.reader.partners is None or gold(alone.reader, number)
        assert {batch.targets.gold for share in (whole, *shares) for batch in share.micro_batches} == {is_gold}
        for share in shares:
            assert (share.fingerprint, share.counts) == (whole.fingerprint, whole.counts), (
                "every rank knows those of all"
            )
            for field in ("tokens", "labels", "slots"):
                assert np.array_equal(getattr(share, field), getattr(whole, field))
        assert len({len(share.micro_batches) for share in shares}) == 1
        golds.add(is_gold)
    assert golds == ({True} if kind == "text" else {True, False})


def test_a_step_holds_the_slots_of_its_plan(make: Make) -> None:
    each = loader(make("classification", schedule=3.0))
    for number in range(STEPS):
        planned = Counter(each.reader.index.record(slot.row).id for slot in each.planner.step(number).slots)
        found = Counter(name for batch in load(each, number).micro_batches for name in batch.sample_ids)
        assert found == planned


@pytest.mark.parametrize("kind", ["classification", "tagging", "qa", "text"])
def test_counts_are_those_of_the_samples(make: Make, kind: str) -> None:
    """Compared with samples that are read one by one."""
    reader = make(kind, schedule=3.0, length=46)
    for number in range(STEPS):
        step = load(loader(reader), number)
        samples = [read(reader, slot.row, number) for slot in loader(reader).planner.step(number).slots]

        def units(labels: Any) -> int:
            found = labels.positions if labels.classes is None else labels.classes
            return 1 if found is None else len(found)

        tokens, labels, slots = [0] * 3, [0] * 3, [0] * 3
        for sample in samples:
            slots[sample.language] += 1
            labels[sample.language] += units(sample.target_labels)
            tokens[sample.language] += len(sample.target)
            if sample.source is not None:
                tokens[sample.source.language] += len(sample.source.side)
        assert step.counts == {
            "target_labels": sum(units(sample.target_labels) for sample in samples),
            "source_labels": sum(units(s.source.labels) for s in samples if s.source is not None and s.source.counts),
            "pairs": 0 if kind == "text" else len(samples),
        }
        assert (step.tokens.tolist(), step.labels.tolist()) == (tokens, labels)
        assert step.slots[0].tolist() == slots
        masks = sum(int(batch.attention_mask.sum()) for batch in step.micro_batches)
        assert masks == sum(tokens)
        assert (step.step, step.bad_rows, step.overlong) == (number, (), 0)


def test_a_row_that_cannot_be_read_leaves_its_slot_empty(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make("classification")
    whole = [load(loader(reader), number) for number in range(STEPS)]
    original_read = Reader.read_many

    def broken(reader: Reader, slots: Sequence[Slot]) -> list[Outcome]:
        return [
            BadRow(f"rows.jsonl:{slot.row + 1}", "the tokenizer has no token for the answer")
            if slot.row % 5 == 0
            else read
            for slot, read in zip(slots, original_read(reader, slots), strict=True)
        ]

    unreadable = [reader.index.record(number) for number in range(0, len(reader.index), 5)]
    monkeypatch.setattr(Reader, "read_many", broken)
    empty = 0
    for number, before in enumerate(whole):
        step = load(loader(reader), number)
        expected = Counter(
            (record.id, record.language)
            for slot in loader(reader).planner.step(number).slots
            if (record := reader.index.record(slot.row)) not in unreadable
        )
        found = Counter(
            (name, LANGUAGES[sample.language])
            for batch in step.micro_batches
            for name, sample in zip(batch.sample_ids, batch.samples, strict=True)
        )
        assert found == expected
        assert contents(step) <= contents(before), "other samples are unchanged"
        assert len(step.bad_rows) == SLOTS - found.total()
        empty += len(step.bad_rows)
    assert empty > 5


def test_overlong_classification_texts_are_truncated_dropped_or_an_error(make: Make) -> None:
    """`truncate`, a task's default, fills every slot; `drop` leaves the truncated ones empty."""
    cut, dropped = make("classification", length=20), make("classification", length=20, overlong="drop")
    lost = 0
    for number in range(STEPS):
        whole, less = load(loader(cut), number), load(loader(dropped), number)
        filled, truncated, overlong, unusable = whole.slots
        assert filled.sum() == SLOTS
        assert not overlong.any()
        assert less.slots.tolist() == [(filled - truncated).tolist(), [0] * 3, truncated.tolist(), unusable.tolist()]
        assert less.overlong == truncated.sum()
        assert contents(less) <= contents(whole)
        assert contents(less).total() == SLOTS - less.overlong
        lost += less.overlong
    assert lost > 5
    row = next(row for row in range(len(cut.index)) if cut.length(row) > 20)
    with pytest.raises(
        DataError, match=rf"rows.jsonl:\d+: {cut.length(row)} tokens, data.sequence_length is 20; shorten"
    ):
        read(make("classification", length=20, overlong="error"), row, 0)


@pytest.mark.parametrize("kind", ["tagging", "qa", "text"])
def test_texts_that_are_read_in_windows_are_never_overlong(make: Make, kind: str) -> None:
    reader = make(kind)
    assert any(len(tokenizer_of(reader).windows(reader.index.record(row).example)) > 1 for row in range(ITEMS))
    assert {reader.length(row) for row in range(len(reader.index))} == {0}
    assert all(load(loader(reader), number).slots[1:].sum() == 0 for number in range(STEPS))


def test_a_bad_line_leaves_only_its_own_slots_empty(make: Make) -> None:
    rows = [row("tagging", language, item) for language in LANGUAGES for item in range(ITEMS)]
    whole = [load(loader(make("tagging", rows)), number) for number in range(STEPS)]
    damaged = [dict(each) for each in rows]
    damaged[ITEMS + 4]["soft_tags"] = damaged[ITEMS + 4]["soft_tags"][:-1]
    with pytest.raises(DataError, match=r"rows\.jsonl:17: 'soft_tags' has \d+ entries; there are \d+ words; max_bad_r"):
        make("tagging", damaged)
    reader = make("tagging", damaged, max_bad_rows=1)
    lines: list[BadRow] = []
    for number in range(STEPS):
        step = load(loader(reader), number)
        lines += step.bad_rows
        assert contents(step) <= contents(whole[number])
        assert contents(step).total() == SLOTS - len(step.bad_rows)
    assert lines
    assert all("rows.jsonl:17: 'soft_tags' has" in str(line) for line in lines)


@pytest.mark.parametrize("workers", [1, 3])
def test_steps_come_in_order_from_any_start(make: Make, workers: int) -> None:
    each = loader(make("tagging", schedule=3.0), workers=workers)
    got = list(each.steps(3, 9))
    assert [step.step for step in got] == list(range(3, 9))
    for step in got:
        again = load(loader(make("tagging", schedule=3.0)), step.step)
        assert all(
            torch.equal(one.input_ids, other.input_ids)
            for one, other in zip(step.micro_batches, again.micro_batches, strict=True)
        )


def test_the_fingerprint_differs_for_other_samples_and_other_sources(make: Make) -> None:
    reader = make("classification", schedule=3.0)
    prints = [load(loader(reader), number).fingerprint for number in range(STEPS)]
    assert len(set(prints)) == STEPS
    assert max(prints) < 2**53, "a float holds it exactly"
    always = make("classification", schedule=None)
    for number in range(STEPS):
        same = load(loader(always), number).fingerprint == prints[number]
        assert same == gold(reader, number)


@pytest.mark.parametrize("n_samples", [0, 1, 7])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_fixed_set_gives_every_rank_the_same_number_of_batches(make: Make, n_samples: int, world_size: int) -> None:
    reader = make("tagging", schedule=3.0)
    samples = reader.readable(range(n_samples)).samples
    packer = loader(reader).packer
    shares = [fixed_batches(samples, packer, ThisRank(rank, world_size, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    found = Counter(name for share in shares for batch in share for name in batch.sample_ids)
    assert found == Counter(sample.id for sample in samples)
    assert all(batch.label_weights.sum() == 0 for share in shares for batch in share if not batch.sample_ids)
