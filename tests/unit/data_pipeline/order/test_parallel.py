"""The parallel corpus: its files, its pairs of a step, and how they are read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import ITEMS, LANGUAGES, PreparedRun, run_values, write_data, write_parallel

from data_pipeline.config import SourceConfig
from data_pipeline.order.mixture import PairSharesConfig
from data_pipeline.order.parallel import ParallelPairs
from data_pipeline.reader import Reader
from data_pipeline.records import ChatSample, DataError, Split
from data_pipeline.sources.index import DataIndex, build_index
from training.assembly import DataParts, assemble_data, text_stage
from training.check import largest_batch
from training.checks.inputs import missing_inputs
from training.checks.pairs import show_pairs
from training.run_file import validate
from training.run_folder.prepare import Prepared, open_index

COLUMNS = {"id": "id", "language": "language", "prompt": "question", "completion": "answer"}
PER_STEP = 6


def corpus_of(folder: Path, *pairs: SourceConfig) -> DataIndex:
    problems = SourceConfig(name="problems", files="*.jsonl", columns=COLUMNS)  # type: ignore[arg-type]
    return build_index([problems], LANGUAGES, folder, folder / "index", pairs=pairs, heldout_items=4)


def lines(files: dict[str, str], **changes: Any) -> SourceConfig:
    return SourceConfig(**{"name": "sentences", "files": files, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_data(tmp_path)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("parallel"))
    write_parallel(folder)
    return folder


def parts_of(data_dir: Path, prepared: PreparedRun, **changes: Any) -> tuple[Any, DataParts]:
    """The data side of a run with the corpus, with the tokenizer and model of the tiny run."""
    pairs = {"sources": [{"name": "sentences", "files": {code: f"{code}.txt" for code in LANGUAGES}}]}
    values = run_values(
        data_dir, prepared.config.output_dir, **{"data.pairs": {**pairs, "per_step": PER_STEP}, **changes}
    )
    config = validate(values, "test")
    index = open_index(config, data_dir / "index")
    return config, assemble_data(config, Prepared(index, prepared.prepared.tokenizer_dir, prepared.prepared.model_dir))


def test_line_i_of_every_file_is_one_item_and_no_training_row(folder: Path) -> None:
    files = write_parallel(folder)
    sentences = (folder / "de.txt").read_text(encoding="utf-8").splitlines()
    (folder / "de.txt").write_text("\n".join([*sentences[:3], "", " ", *sentences[5:]]) + "\n", encoding="utf-8")
    index, plain = corpus_of(folder, lines(files)), corpus_of(folder)
    for language, code in enumerate(LANGUAGES):
        rows = index.rows(language, Split.PARALLEL)
        assert len(rows) == ITEMS - 2 * (code == "de")
        for split in (Split.TRAIN, Split.HELD_OUT):
            assert len(index.rows(language, split)) == len(plain.rows(language, split)) > 0
        for row, english in zip(rows.tolist(), index.translations(rows, 0).tolist(), strict=True):
            number = int(index.record(row).origin.rpartition(":")[2])
            assert index.record(english).origin.endswith(f"en.txt:{number}")
            assert index.record(row).user_text == (folder / f"{code}.txt").read_text("utf-8").splitlines()[number - 1]
    assert index.fingerprint.keys() - plain.fingerprint.keys() == {
        "pairs sentences", *(f"{code}.txt" for code in LANGUAGES)
    }  # fmt: skip


def test_rows_of_a_table_are_paired_by_their_group(folder: Path) -> None:
    rows = [{"item": f"{i}", "text": f"{code} {i}"} for i in range(3) for code in ("en", "sw")]
    (folder / "news").mkdir()
    for code in ("en", "sw"):
        own = [json.dumps(row) for row in rows if row["text"].startswith(code)]
        (folder / "news" / f"{code}.jsonl").write_text("\n".join(own if code == "en" else own[::-1][:2]))
    files = {code: f"news/{code}.jsonl" for code in ("en", "sw")}
    index = corpus_of(folder, lines(files, format="jsonl", columns={"group": "item", "text": "text"}))
    pairs = ParallelPairs(index, 0, PairSharesConfig(), 2, seed=1)
    assert pairs.counts.tolist() == [0, 0, 2, 0]
    found = {tuple(index.record(int(row)).user_text for row in pair) for pair in pairs.step(0)[0]}
    assert found == {("en 1", "sw 1"), ("en 2", "sw 2")}


def test_pairs_are_visited_once_an_epoch_in_their_shares(folder: Path) -> None:
    files = write_parallel(folder)
    short = (folder / "sw.txt").read_text(encoding="utf-8").splitlines()
    (folder / "sw.txt").write_text("\n".join([*short[:20], *[""] * 20]) + "\n", encoding="utf-8")
    index = corpus_of(folder, lines(files))
    weights = {"de": 2.0, "sw": 1.0, "zh": 1.0}
    pairs = ParallelPairs(index, 0, PairSharesConfig(strategy="explicit", weights=weights), 8, seed=5)
    assert pairs.counts.tolist() == [0, ITEMS, 20, ITEMS]
    steps = [pairs.step(t) for t in range(20)]
    assert Counter(np.concatenate([languages for _, languages in steps]).tolist()) == {1: 80, 2: 40, 3: 40}
    for rows, languages in steps:
        assert (index.language[rows[:, 0]] == 0).all()
        assert (index.language[rows[:, 1]] == languages).all()
        assert (index.group[rows[:, 0]] == index.group[rows[:, 1]]).all()
    german = [row for rows, languages in steps for row in rows[languages == 1, 1].tolist()]
    assert sorted(german[:ITEMS]) == sorted(german[ITEMS:]) == index.rows(1, Split.PARALLEL).tolist()
    assert german[:ITEMS] != german[ITEMS:]
    again = ParallelPairs(index, 0, PairSharesConfig(strategy="explicit", weights=weights), 8, seed=5)
    assert (again.step(13)[0] == steps[13][0]).all()  # without the steps before


def test_a_step_has_the_slots_of_a_run_without_a_corpus_and_sets_of_their_own(
    data_dir: Path, prepared_run: PreparedRun
) -> None:
    _, with_corpus = parts_of(data_dir, prepared_run)
    _, without = parts_of(data_dir, prepared_run, **{"data.pairs": None})
    for t in range(4):
        plan, plain = with_corpus.planner.step(t), without.planner.step(t)
        own, corpus = plan.sets[: len(plain.sets)], plan.sets[len(plain.sets) :]
        assert [pairs.tolist() for pairs in own] == [pairs.tolist() for pairs in plain.sets]
        assert [len(pairs) for pairs in corpus] == [2, 2, 2]
        members = np.sort(np.concatenate(corpus).ravel())
        assert members.tolist() == list(range(len(plain), len(plan)))
        for position in members.tolist():
            slot = plan.slot(position)
            assert not slot.labelled
            assert with_corpus.index.split[slot.row] == Split.PARALLEL
            assert with_corpus.index.language[slot.row] == slot.language
    (step,) = with_corpus.loader().steps(0, 1)
    (plain_step,) = without.loader().steps(0, 1)
    assert step.counts == {**plain_step.counts, "pairs": plain_step.counts["pairs"] + PER_STEP}
    assert step.slots.tolist() == plain_step.slots.tolist()
    samples = [sample for batch in step.micro_batches for sample in batch.samples]
    parallel = [sample for sample in samples if isinstance(sample, ChatSample) and sample.parallel]
    assert len(parallel) == 2 * PER_STEP
    assert not any(sample.labels.any() or sample.answer.any() for sample in parallel)
    assert all(sample.content.any() for sample in parallel)


def test_a_sentence_of_the_corpus_counts_towards_no_language_vector(data_dir: Path, prepared_run: PreparedRun) -> None:
    _, parts = parts_of(data_dir, prepared_run)
    assert len(parts.probe) == 2 * len(LANGUAGES)
    assert {len(samples) for samples in parts.probe} == {16}
    batch = parts.packer.batch([sample for samples in parts.probe for sample in samples])
    parallel = batch.targets.segment_parallel[batch.targets.segment_ids.clamp(min=0)]
    content = batch.targets.content
    assert (batch.targets.vector_languages[parallel & content] == -1).all()
    assert (batch.targets.vector_languages[~parallel & content] >= 0).all()
    assert (batch.targets.languages[parallel & content] >= 0).all()  # it is shifted by its language


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
def test_a_pair_with_a_side_that_is_too_long_is_left_out_and_never_cut(
    data_dir: Path, prepared_run: PreparedRun, overlong: str
) -> None:
    config, parts = parts_of(data_dir, prepared_run, **{"data.overlong": overlong})
    rows = parts.index.rows(1, Split.PARALLEL).tolist()
    lengths = [length for length in parts.reader.lengths(rows) if isinstance(length, int)]
    longest = sorted(lengths)[len(lengths) // 2]
    pairs = config.data.pairs.model_copy(update={"longest": longest})
    data = config.data.model_copy(update={"pairs": pairs})
    reader = Reader(parts.index, text_stage(data, parts.tokenizer), parts.reader.seed)
    found = reader.read_many([reader.alone(row) for row in rows])
    assert [sample is not None for sample in found] == [length <= longest for length in lengths]
    assert not any(sample.truncated for sample in found if isinstance(sample, ChatSample))
    training = parts.index.rows(1).tolist()
    assert all(isinstance(sample, ChatSample) for sample in reader.read_many([reader.alone(row) for row in training]))


def test_a_pair_of_identical_texts_is_in_no_set_and_counted(
    data_dir: Path, tmp_path: Path, prepared_run: PreparedRun
) -> None:
    folder = write_data(tmp_path)
    write_parallel(folder)
    (folder / "sw.txt").write_text((folder / "en.txt").read_text(encoding="utf-8"), encoding="utf-8")
    _, parts = parts_of(folder, prepared_run)
    _, whole = parts_of(data_dir, prepared_run)
    plan, expected = parts.planner.step(0), whole.planner.step(0)
    assert plan.dropped_pairs == expected.dropped_pairs + 2  # a third of the six
    assert len(plan) == len(expected) - 4


def test_check_shows_two_pairs_of_the_corpus_beside_two_of_the_rows(data_dir: Path, prepared_run: PreparedRun) -> None:
    config, data = parts_of(data_dir, prepared_run)
    shown = list(show_pairs(config.data, config.objective, config.max_steps, data.index, data.planner))[1:]
    heads = [line.partition("item")[0] for line in shown[::3]]
    assert heads == ["--- a pair of "] * 2 + ["--- a pair of the parallel corpus, "] * 2
    for english, other in zip(shown[7::3], shown[8::3], strict=True):
        code, place = other.split()[:2]
        number = place.rpartition(":")[2]
        for language, line in (("en", english), (code, other)):
            text = (data_dir / f"{language}.txt").read_text("utf-8").splitlines()[int(number) - 1]
            assert line == f"{language}  {data_dir}/{language}.txt:{number}  '{language}:{number}': {text}"
    assert len({other.split()[0] for other in shown[8::3]}) == 2, "of two languages"


def test_check_counts_the_corpus_in_a_micro_batch_only_where_it_is_read(
    data_dir: Path, prepared_run: PreparedRun
) -> None:
    found = {}
    for objective in ("shifcon", "sft"):
        changes = {} if objective == "shifcon" else {"objective": {"name": "sft"}}
        for pairs in (True, False):
            config, parts = parts_of(data_dir, prepared_run, **changes, **({} if pairs else {"data.pairs": None}))
            found[objective, pairs] = largest_batch(config.data, config.objective, parts, ranks=8).tokens
    assert found["shifcon", True] > found["shifcon", False]
    assert found["sft", True] == found["sft", False]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"per_step": 0}, "data.pairs.per_step"),
    ({"sources": [{"name": "s", "files": {"xx": "en.txt"}}]}, "source 's' has the language 'xx'"),
    ({"sources": [{"name": "problems", "files": {"en": "en.txt"}}]}, "two sources have the name 'problems'"),
    ({"sources": [{"name": "s", "files": "*.jsonl", "columns": COLUMNS}]}, "needs the column 'text'"),
    ({"sources": [{"name": "s", "files": {"en": "en.txt"}, "language": "en"}]}, "names each file's language"),
    ({"mixture": {"strategy": "explicit", "weights": {"xx": 1}}}, "'pairs.mixture.weights' names 'xx'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_in_the_section_are_named(
    data_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    pairs = {"sources": [{"name": "s", "files": {"en": "en.txt", "sw": "sw.txt"}}], "per_step": 4, **change}
    with pytest.raises(Exception, match=message):
        validate(run_values(data_dir, tmp_path / "run", **{"data.pairs": pairs}), "test")


def test_a_missing_file_is_named_with_its_key(data_dir: Path, tmp_path: Path) -> None:
    pairs = {"sources": [{"name": "s", "files": {"en": "en.txt", "sw": "gone.txt"}}], "per_step": 4}
    values = run_values(data_dir, tmp_path / "run", **{"data.pairs": pairs})
    assert list(missing_inputs(values)) == [f"data.pairs.sources.0.files: no file matches {data_dir}/gone.txt"]


def test_files_that_do_not_match_line_by_line_are_refused(folder: Path) -> None:
    files = write_parallel(folder)
    (folder / "zh.txt").write_text("一\n二\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"zh\.txt: 2 lines, but .*\.txt has 40; in source 'sentences' line i"):
        corpus_of(folder, lines(files))


def test_a_corpus_without_pairs_is_refused(folder: Path) -> None:
    files = write_parallel(folder)
    index = corpus_of(folder, lines({"de": files["de"], "sw": files["sw"]}))
    with pytest.raises(DataError, match=r"data\.pairs: no text has a translation into 'en'"):
        ParallelPairs(index, 0, PairSharesConfig(), 4, seed=1)
    whole = corpus_of(folder, lines({"en": files["en"], "sw": files["sw"]}))
    weights = PairSharesConfig(strategy="explicit", weights={"sw": 1, "zh": 1})
    with pytest.raises(DataError, match=r"data\.pairs\.mixture: language 'zh' has no pairs"):
        ParallelPairs(whole, 0, weights, 4, seed=1)
