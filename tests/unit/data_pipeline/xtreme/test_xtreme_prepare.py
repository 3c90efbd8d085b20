"""`prepare_task` writes everything or nothing, keeps an output of the same inputs, and refuses other folders."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from xtreme_files import jsonl, question, squad, tagged, tsv, write

from data_pipeline.records import DataError
from data_pipeline.xtreme import prepare
from data_pipeline.xtreme.prepare import PrepareOptions, prepare_task
from data_pipeline.xtreme.tasks import TASKS

PAIRS = [("a", "b", "neutral"), ("c", "d", "entailment")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """XNLI in the download layout: English train and dev, dev and test in German."""
    for name in ("train-en", "dev-en", "dev-de", "test-de"):
        tsv(tmp_path / f"data/xnli/{name}.tsv", PAIRS)
    return tmp_path / "data"


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: (file.read_bytes(), file.stat().st_ino) for name, file in found.items()}


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        prepare_task(*arguments, PrepareOptions(**options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_prepare_writes_files_and_counts(data: Path, tmp_path: Path) -> None:
    counts = prepare_task("xnli", data, tmp_path / "deep/output")
    others = [language for language in TASKS["xnli"].languages if language not in ("de", "en")]
    assert counts == {
        "train": {"en": 2},
        "dev": {"de": 2, "en": 2},
        "test": {"de": 2},
        "skipped": {},
        "missing": {"dev": others, "test": sorted([*others, "en"])},
        "layout": "download",
    }
    assert list(files(tmp_path / "deep/output")) == [
        "dev/de.jsonl", "dev/en.jsonl", "prepared.json", "test/de.jsonl", "train/en.jsonl",
    ]  # fmt: skip
    assert jsonl(tmp_path / "deep/output/test/de.jsonl")[1] == {
        "id": "xnli-test-1",
        "group": "xnli-test-1",
        "language": "de",
        "text_a": "c",
        "text_b": "d",
        "label": "entailment",
    }
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["output"]


def test_an_output_of_the_same_inputs_is_kept_and_another_one_refused(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    first = prepare_task("xnli", data, output)
    before = files(output)
    assert prepare_task("xnli", data, output) == first
    assert files(output) == before
    assert refused("xnli", data, output, languages=["de"]) == (
        f"{output}: was prepared from other files or options (different: languages or splits); "
        "name a new --output, or add --remake"
    )
    assert "different: allow_unlabelled_test" in refused("xnli", data, output, allow_unlabelled_test=True)
    status = (data / "xnli/dev-de.tsv").stat()
    os.utime(data / "xnli/dev-de.tsv", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert prepare_task("xnli", data, output) == first  # touched, but unchanged
    moved = data.with_name("moved")
    shutil.copytree(data, moved)
    assert prepare_task("xnli", moved, output) == first
    shutil.rmtree(moved)
    same_size = [("x", "b", "neutral"), *PAIRS[1:]]
    for changed in (PAIRS[:1], same_size):
        tsv(data / "xnli/dev-de.tsv", changed)
        os.utime(data / "xnli/dev-de.tsv", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert "different: content of dev/de: dev-de.tsv);" in refused("xnli", data, output)
    message = refused("xnli", data, output, remedy="name a new --output")
    assert message.endswith("dev-de.tsv); name a new --output")
    tsv(data / "xnli/dev-de.tsv", PAIRS[:1])
    assert files(output) == before
    assert prepare_task("xnli", data, output, PrepareOptions(remake=True))["dev"] == {"de": 1, "en": 2}
    assert len(jsonl(output / "dev/de.jsonl")) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "output"]


def test_files_of_others_are_not_touched(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "output/thesis.txt", "mine")
    for remake in (False, True):
        assert "output: exists and is not a prepared task; name a new folder" in refused(
            "xnli", data, tmp_path / "output", remake=remake
        )
    write(tmp_path / "output/prepared.json", "{}")
    assert "is not a prepared task" in refused("xnli", data, tmp_path / "output", remake=True)
    assert (tmp_path / "output/thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert prepare_task("xnli", data, tmp_path / "empty")["test"] == {"de": 2}


@pytest.mark.parametrize("before", [False, True])
def test_a_failure_leaves_the_output_unchanged(
    data: Path, tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    if before:
        prepare_task("xnli", data, output)
    kept = files(output) if before else {}
    tsv(data / "xnli/test-de.tsv", [*PAIRS, ("e", "f", "perhaps")])  # read last, when the other files are written
    assert "test-de.tsv:3: label 'perhaps'" in refused("xnli", data, output, remake=True)
    assert (files(output) if before else {}) == kept
    assert output.exists() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "output"][: 1 + before]

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_write_rows", full)
    tsv(data / "xnli/test-de.tsv", PAIRS[:1])
    assert refused("xnli", data, output, remake=True) == f"{output}: cannot be written (No space left on device)"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "output"][: 1 + before]


def test_languages_and_splits_can_be_chosen(data: Path, tmp_path: Path) -> None:
    number = iter(range(100))

    def prepared(**options: Any) -> dict[str, dict[str, int]]:
        counts = prepare_task("xnli", data, tmp_path / f"output-{next(number)}", PrepareOptions(**options))
        return {split: counts[split] for split in ("train", "dev", "test")}

    assert prepared(languages=["de"]) == {"train": {"en": 2}, "dev": {"de": 2}, "test": {"de": 2}}
    assert prepared(splits={"train": "dev", "test": "test"}) == {"train": {"en": 2}, "dev": {}, "test": {"de": 2}}
    assert jsonl(tmp_path / "output-1/train/en.jsonl")[0]["id"] == "xnli-dev-0"  # the id names the original split
    (data / "xnli/test-de.tsv").unlink()
    assert prepared(languages=["de", "en"])["test"] == {}  # not requested by name, and there is no file
    options: dict[str, Any] = {"languages": ["de", "fr"]}
    assert f"{data}/xnli/dev-fr.tsv: missing, and xnli's dev 'fr' is requested" in refused(
        "xnli", data, tmp_path / "o", **options
    )
    options = {"splits": {"test": "test"}}
    assert f"{data}: no file of xnli for test (read from test) in the layout download" in refused(
        "xnli", data, tmp_path / "o", **options
    )
    assert "splits: 'valid' is not one of train, dev, test" in refused(
        "xnli", data, tmp_path / "o", splits={"valid": "dev"}
    )
    assert refused("xnli", data, tmp_path / "o", splits={}) == "splits: names no split"
    assert "language 'xx' is not one of its languages" in refused("xnli", data, tmp_path / "o", languages=["xx"])
    assert not (tmp_path / "o").exists()


def test_erased_test_labels_are_refused_unless_allowed(data: Path, tmp_path: Path) -> None:
    tsv(data / "xnli/test-de.tsv", [pair[:2] for pair in PAIRS])
    assert "the test labels of xnli are erased" in refused("xnli", data, tmp_path / "output")
    counts = prepare_task("xnli", data, tmp_path / "output", PrepareOptions(allow_unlabelled_test=True))
    assert counts["test"] == {"de": 2}
    assert all("label" not in row for row in jsonl(tmp_path / "output/test/de.jsonl"))
    assert all("label" in row for row in jsonl(tmp_path / "output/dev/de.jsonl"))


def test_empty_items_are_left_out_refused_or_kept_by_split_and_task(data: Path, tmp_path: Path) -> None:
    tsv(data / "xnli/train-en.tsv", [*PAIRS, ("", "x", "neutral")])
    assert prepare_task("xnli", data, tmp_path / "a")["skipped"] == {"train": {"en": {"empty text": 1}}}
    file = tsv(data / "xnli/dev-de.tsv", [*PAIRS, ("", "x", "neutral")])
    assert f"{file}:3: empty text; each dev item must have some" in refused("xnli", data, tmp_path / "b")
    write(tmp_path / "panx/panx/test-de.tsv", "Ulm\tB-LOC\n\n\nlebt\tO\n")
    counts = prepare_task("panx", tmp_path / "panx", tmp_path / "c")
    # scorers count it too, so it keeps its place
    kept = {"test": {"de": {"empty sentence (row kept, so that lines match)": 1}}}
    assert (counts["test"], counts["skipped"]) == ({"de": 3}, kept)


def test_questions_with_misplaced_answers_are_counted_up_to_a_limit(tmp_path: Path) -> None:
    context = "Ulm liegt an der Donau."
    good, bad = question("1", "Wo?", ("Ulm", 0)), question("2", "Woran?", ("Donau", 3))
    both = question("3", "Was?", ("Donau", 1), ("Donau", 17))
    squad(tmp_path / "data/xquad/xquad.de.json", (context, [good]))
    for split, name in (("train", "squad/train-v1.1.json"), ("test", "xquad/xquad.de.json")):
        squad(tmp_path / "data" / name, (context, [good, bad, both]))
        message = refused("xquad", tmp_path / "data", tmp_path / "output", max_bad_rows=int(split == "train"))
        assert "answer 'Donau' is not at character" in message
        assert message.endswith("--max-bad-rows N leaves out up to N of a file and counts them")
    assert not (tmp_path / "output").exists()
    counts = prepare_task("xquad", tmp_path / "data", tmp_path / "output", PrepareOptions(max_bad_rows=2))
    assert counts["skipped"] == {
        "train": {"en": {"answer not at its offset": 2}}, "test": {"de": {"answer not at its offset": 2}}
    }  # fmt: skip
    for file in ("train/en", "test/de"):
        rows = jsonl(tmp_path / "output" / f"{file}.jsonl")
        assert [(row["id"], row["answers"][0]["answer_start"], len(row["answers"])) for row in rows] == [
            ("1", 0, 1), ("3", 17, 1)
        ]  # fmt: skip


def test_unanswerable_questions_are_left_out_and_counted(tmp_path: Path) -> None:
    context = "Ulm liegt an der Donau."
    questions = [
        question("1", "Wo?", ("Ulm", 0)),
        {**question("2", "Wer?"), "is_impossible": True, "plausible_answers": [{"text": "Ulm", "answer_start": 0}]},
        question("3", "Wann?"),
        {**question("4", "Wer?", ("Ulm", 0)), "is_impossible": True},
        {**question("5", "Was?", ("Donau", 17)), "is_impossible": False},
    ]
    for name in ("squad/train-v1.1.json", "squad/dev-v1.1.json", "xquad/xquad.de.json"):
        squad(tmp_path / "data" / name, (context, questions))
    counts = prepare_task("xquad", tmp_path / "data", tmp_path / "output")
    left = {"unanswerable question": 3}
    assert counts["skipped"] == {"train": {"en": left}, "dev": {"en": left}, "test": {"de": left}}
    for file in ("train/en", "dev/en", "test/de"):
        assert [row["id"] for row in jsonl(tmp_path / "output" / f"{file}.jsonl")] == ["1", "5"]
    squad(tmp_path / "data/squad/train-v1.1.json", (context, [question("3", "Wann?")]))
    assert "no question has an answer; only test rows may lack one" in refused(
        "xquad", tmp_path / "data", tmp_path / "b"
    )


def test_a_test_file_without_answers_counts_as_erased(tmp_path: Path) -> None:
    squad(tmp_path / "data/xquad/xquad.de.json", ("Ulm.", [question("1", "Wo?"), question("2", "Wer?", ("", 0))]))
    assert "the test labels of xquad are erased" in refused("xquad", tmp_path / "data", tmp_path / "output")
    counts = prepare_task("xquad", tmp_path / "data", tmp_path / "output", PrepareOptions(allow_unlabelled_test=True))
    assert (counts["test"], counts["skipped"]) == ({"de": 2}, {})


def test_every_task_can_be_prepared(tmp_path: Path) -> None:
    data = tmp_path / "data"
    context, qas = "Ulm.", [question("1", "Wo?", ("Ulm", 0))]
    tsv(data / "pawsx/test-de.tsv", [("a", "b", "1")])
    for task, tag in (("panx", "O"), ("udpos", "NOUN")):
        tagged(data / task / "test-de.tsv", [[("Haus", tag)]])
    squad(data / "squad/train-v1.1.json", (context, qas))
    squad(data / "xquad/xquad.de.json", (context, qas))
    squad(data / "mlqa/MLQA_V1/test/test-context-de-question-de.json", (context, qas))
    squad(data / "tydiqa/tydiqa-goldp-v1.1-dev/tydiqa.goldp.fi.dev.json", (context, qas))
    write(data / "tatoeba/tatoeba.deu-eng.deu", "Eins.\n")
    write(data / "tatoeba/tatoeba.deu-eng.eng", "One.\n")
    for side in ("de", "en"):
        tsv(data / f"bucc2018/de-en.test.{side}", [(f"{side}-1", "x")])
    for task in TASKS:
        if task != "xnli":
            counts = prepare_task(task, data, tmp_path / task)
            assert list(counts["test"].values()) == [2 if task == "bucc2018" else 1]
            assert list(counts["train"]) == (["en"] if task in ("xquad", "mlqa") else [])


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data/xquad.de.json", '{"data": [{"paragraphs": [{"context": "a\\ud83d", "qas": [{"id": "q",'
          ' "question": "b", "answers": [{"text": "a", "answer_start": 0}]}]}]}]}')  # fmt: skip
    assert refused("xquad", tmp_path / "data", tmp_path / "output") == (
        "row 'q' of test/de.jsonl: not text (half of a surrogate pair)"
    )
