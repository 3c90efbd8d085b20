"""Translations share the group of their original, fill `back_*`, and are refused if they do not match."""

from pathlib import Path
from typing import Any

import pytest
from xtreme_files import by_csv_writer, jsonl, question, squad, tagged, tsv, write, xnli

from data_pipeline.records import DataError
from data_pipeline.tasks.rows import read_task_file
from data_pipeline.xtreme.prepare import PrepareOptions, prepare_task
from data_pipeline.xtreme.tasks import TASKS

TRAIN = [("One.", "Two.", "neutral"), ("", "Empty.", "neutral"), ('"Three"', "Four.", "contradictory")]
GERMAN = [("Eins.", "Zwei.", "neutral"), ("", "Leer.", "neutral"), ('"Drei"', "Vier.", "contradictory")]
BACK = [("One!", "Two!", "neutral"), ("", "", "neutral"), ("", "Four!", "contradictory")]
DEV = [("de", "neutral", "Fünf.", "Sechs."), ("fr", "entailment", "Sept.", "Huit.")]
HEADER = ("premise", "hypo", "label")
SOFT = ["1;0;0;0;0;0;0", "0;0;0;0;0;0.25;0.75"]
Rows = list[dict[str, Any]]


def prepared(task: str, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Rows]]:
    """The counts, and the rows by "split/language"; the reader of the task accepts them all."""
    output = folder.parent / "output"
    counts = prepare_task(task, folder, output, PrepareOptions(**options))
    found = {}
    for file in sorted(output.glob("*/*.jsonl")):
        found[f"{file.parent.name}/{file.stem}"] = jsonl(file)
        kind: Any = TASKS[task].kind
        assert len(list(read_task_file(file, kind))) == counts[file.parent.name][file.stem]
    return counts, found


def refused(task: str, folder: Path, **options: Any) -> str:
    output = folder.parent / "output"
    with pytest.raises(DataError) as error:
        prepare_task(task, folder, output, PrepareOptions(**options))
    assert not output.exists()
    assert list(folder.parent.glob(".*")) == []  # no temporary file is left
    assert "\n" not in str(error.value)
    return str(error.value)


def write_authors_xnli(folder: Path) -> None:
    base = folder / "xnli"
    tsv(base / "XNLI-MT-1.0/multinli/multinli.train.en.tsv", [HEADER, *TRAIN])
    tsv(base / "XNLI-MT-1.0/multinli/multinli.train.de.tsv", [HEADER, *GERMAN])
    tsv(base / "translate-train-en/multinli.train.de-en.tsv", [HEADER, *BACK])
    xnli(base / "XNLI-1.0/xnli.dev.tsv", DEV)
    xnli(base / "XNLI-1.0/xnli.test.tsv", DEV)
    xnli(base / "translate-dev/xnli.dev.tsv", [("en", label, f"{a} (en)", b) for _, label, a, b in DEV])
    tsv(base / "translate-test/test.de.tsv", [("Five.", "Six.", "neutral")])


def test_the_authors_xnli_translations_are_matched(tmp_path: Path) -> None:
    write_authors_xnli(tmp_path / "data")
    counts, rows = prepared("xnli", tmp_path / "data", languages=["de", "fr"])
    english = [("xnli-train-0", "One.", "Two.", "neutral"), ("xnli-train-2", '"Three"', "Four.", "contradiction")]
    assert [(r["group"], r["text_a"], r["text_b"], r["label"]) for r in rows["train/en"]] == english
    first, third = rows["train/de"]
    assert (first["group"], first["language"], first["text_a"], first["label"]) == (
        "xnli-train-0",
        "de",
        "Eins.",
        "neutral",
    )
    assert (first["back_text_a"], first["back_text_b"]) == ("One!", "Two!")
    assert (third["group"], third["text_a"], "back_text_a" in third) == ("xnli-train-2", '"Drei"', False)
    assert rows["dev/de"][0]["back_text_a"] == "Fünf. (en)"
    assert rows["dev/fr"][0]["back_text_a"] == "Sept. (en)"
    assert (rows["test/de"][0]["back_text_a"], rows["test/de"][0]["back_text_b"]) == ("Five.", "Six.")
    assert "back_text_a" not in rows["test/fr"][0]
    assert counts == {
        "train": {"en": 2, "de": 2},
        "dev": {"de": 1, "fr": 1},
        "test": {"de": 1, "fr": 1},
        "skipped": {
            "train": {
                "en": {"empty text": 1},
                "de": {"empty text": 1, "back-translation missing or empty (row kept)": 1},
            }
        },
        "missing": {"train": ["fr"]},
        "layout": "xmixup",
    }


@pytest.mark.parametrize(
    ("file", "rows", "expected"),
    [
        (
            "XNLI-MT-1.0/multinli/multinli.train.de.tsv",
            [HEADER, *GERMAN[:2]],
            "{0}: 2 items, but {1}/XNLI-MT-1.0/multinli/multinli.train.en.tsv has 3: no match for"
            " {1}/XNLI-MT-1.0/multinli/multinli.train.en.tsv:4",
        ),
        (
            "translate-train-en/multinli.train.de-en.tsv",
            [HEADER, *BACK, *BACK],
            "XNLI-MT-1.0/multinli/multinli.train.de.tsv: 3 items, but {0} has 6: no match for {0}:5",
        ),
        (
            "XNLI-MT-1.0/multinli/multinli.train.de.tsv",
            [HEADER, GERMAN[0], ("a", "b", "entailment"), GERMAN[2]],
            "{0}:3: label 'entailment', but {1}/XNLI-MT-1.0/multinli/multinli.train.en.tsv:3 has 'neutral'",
        ),
        ("translate-test/test.de.tsv", [("Five.", "Six.", "entailment")], "{0}:1: label 'entailment', but"),
        ("translate-test/test.de.tsv", [("Five.", "Six.", "neutral")] * 2, "has 2: no match for {0}:2"),
    ],
)
def test_pairs_that_do_not_match_are_refused(tmp_path: Path, file: str, rows: Rows, expected: str) -> None:
    write_authors_xnli(tmp_path / "data")
    tsv(tmp_path / "data/xnli" / file, rows)  # type: ignore[arg-type]
    message = refused("xnli", tmp_path / "data", languages=["de"])
    assert expected.format(tmp_path / "data/xnli" / file, tmp_path / "data/xnli") in message


PAWS_HEADER = ("id", "sentence1", "sentence2", "label")


def write_authors_pawsx(folder: Path, back_ids: tuple[int, int] = (7, 9)) -> None:
    base = folder / "pawsx"
    tsv(base / "en/train.tsv", [PAWS_HEADER, (1, "a", "b", 0), (2, "c", "d", 1)])
    tsv(base / "de/translated_train.tsv", [PAWS_HEADER, (1, "ä", "b", 0), (2, "c", "d", 1)])
    tsv(base / "translate-train-en/translated_train.de-en.tsv", [PAWS_HEADER, (1, "ae", "be", 0), (2, "ce", "de", 1)])
    for split in ("dev", "test"):
        tsv(base / f"de/{split}_2k.tsv", [PAWS_HEADER, (7, "x", "y", 1), (9, "z", "w", 0)])
    dev = [(back_ids[0], "x (en)", "y (en)", 1), (back_ids[1], "z (en)", "w (en)", 0)]
    tsv(base / "translate-dev/dev_2k.de.tsv", [PAWS_HEADER, *dev])
    tsv(base / "translate-test/test-de-en-translated.tsv", [("x!", "y!", 1), ("z!", "w!", 0)])


def test_the_authors_pawsx_translations_are_matched(tmp_path: Path) -> None:
    write_authors_pawsx(tmp_path / "data")
    counts, rows = prepared("pawsx", tmp_path / "data", languages=["de"])
    assert (counts["train"], counts["skipped"]) == ({"en": 2, "de": 2}, {})
    assert [row["group"] for row in rows["train/de"]] == [row["group"] for row in rows["train/en"]]
    assert [row["back_text_b"] for row in rows["train/de"]] == ["be", "de"]
    assert [row["back_text_a"] for row in rows["dev/de"]] == ["x (en)", "z (en)"]
    assert [row["back_text_b"] for row in rows["test/de"]] == ["y!", "w!"]


def test_different_ids_are_refused(tmp_path: Path) -> None:
    write_authors_pawsx(tmp_path / "data", back_ids=(7, 8))
    base = tmp_path / "data/pawsx"
    assert refused("pawsx", tmp_path / "data", languages=["de"]).startswith(
        f"{base}/translate-dev/dev_2k.de.tsv:3: id '8', but {base}/de/dev_2k.tsv:3 has '9'"
    )


def write_authors_panx(folder: Path) -> None:
    base = folder / "panx"
    tagged(base / "en/train.tsv", [[("Anna", "B-PER"), ("lives", "O")], [("Ulm", "B-LOC")]])
    tagged(base / "translate-train-logits/de.txt", [[("Anna", SOFT[1]), ("lebt", SOFT[0])], [("Ulm", SOFT[0])]])
    tagged(base / "translate-train-en-token/de.txt", [[("Anna", "O"), ("lives", "O"), ("here", "O")], []])
    tagged(base / "de/test.tsv", [[("Anna", "B-PER")]])
    tagged(base / "translate-test-token/de.txt", [[("Ann",), ("!",)]])


def test_the_authors_tagging_translations_are_matched(tmp_path: Path) -> None:
    write_authors_panx(tmp_path / "data")
    counts, rows = prepared("panx", tmp_path / "data", languages=["de"], splits={"train": "train", "test": "test"})
    first, second = rows["train/de"]
    assert [row["group"] for row in rows["train/de"]] == [row["group"] for row in rows["train/en"]]
    assert first["words"] == ["Anna", "lebt"]
    assert first["soft_tags"][0] == [0, 0, 0, 0, 0, 0.25, 0.75]
    assert "tags" not in first
    assert first["back_words"] == ["Anna", "lives", "here"]
    assert "back_words" not in second
    assert counts["skipped"] == {"train": {"de": {"back-translation missing or empty (row kept)": 1}}}
    assert rows["test/de"][0]["back_words"] == ["Ann", "!"]


def test_trailing_blank_lines_are_not_sentences(tmp_path: Path) -> None:
    write_authors_panx(tmp_path / "data")
    for name in ("en/train.tsv", "translate-train-logits/de.txt", "translate-train-en-token/de.txt"):
        file = tmp_path / "data/panx" / name
        file.write_bytes(file.read_bytes() + b"\n\n")
    counts, rows = prepared("panx", tmp_path / "data", languages=["de"], splits={"train": "train"})
    assert (counts["train"], len(rows["train/de"])) == ({"en": 2, "de": 2}, 2)


def test_sentences_that_do_not_match_are_refused(tmp_path: Path) -> None:
    write_authors_panx(tmp_path / "data")
    base = tmp_path / "data/panx"
    tagged(base / "translate-train-logits/de.txt", [[("Anna", SOFT[1])]])
    message = refused("panx", tmp_path / "data", languages=["de"], splits={"train": "train"})
    assert message.startswith(f"{base}/translate-train-logits/de.txt: 1 items, but {base}/en/train.tsv has 2")
    assert f"no match for {base}/en/train.tsv:4" in message


CONTEXT = "Ulm lies on the Danube."
Q1, Q2 = question("q1", "Where?", ("on the Danube", 9)), question("q2", "What?", ("Ulm", 0))
GERMAN_CONTEXT = "Ulm liegt an der Donau."
D1, D2 = question("q1", "Wo?", ("an der Donau", 10)), question("q2", "Was?", ("Ulm", -1))


def write_authors_qa(folder: Path) -> None:
    squad(folder / "squad/train-v1.1.json", (CONTEXT, [Q1, Q2]))
    squad(folder / "squad/translate-train/squad.translate.train.en-de.json", (GERMAN_CONTEXT, [D2, D1]))
    back = question("q1", "Where is it?", ("the Danube", 12))
    squad(folder / "squad/translate-train-en/squad.translate.train.en-de-en.json", ("Ulm is at the Danube.", [back]))
    squad(folder / "xquad/test/xquad.de.json", (GERMAN_CONTEXT, [D1]))
    english = question("q1", "Where is Ulm?", ("", 0))
    squad(folder / "xquad/translate-test/xquad.translate.test.de-en.json", ("Ulm is there.", [english]))


def test_the_authors_questions_are_matched(tmp_path: Path) -> None:
    write_authors_qa(tmp_path / "data")
    counts, rows = prepared("xquad", tmp_path / "data", languages=["de"], splits={"train": "train", "test": "test"})
    assert (counts["train"], counts["skipped"]) == (
        {"en": 2, "de": 1},
        {"train": {"de": {"answer not in the context": 1}}},
    )
    (row,) = rows["train/de"]
    assert row["group"] == rows["train/en"][0]["group"] == "xquad-train-q1"
    assert (row["back_question"], row["back_context"]) == ("Where is it?", "Ulm is at the Danube.")
    assert "back_answers" not in row  # it is at 10, not at 12
    (row,) = rows["test/de"]
    assert (row["back_question"], row["back_context"]) == ("Where is Ulm?", "Ulm is there.")


def test_answers_of_back_translations_are_read(tmp_path: Path) -> None:
    write_authors_qa(tmp_path / "data")
    back = question("q1", "Where is it?", ("the Danube", 10))
    file = tmp_path / "data/squad/translate-train-en/squad.translate.train.en-de-en.json"
    squad(file, ("Ulm is at the Danube.", [back]))
    _, rows = prepared("mlqa", tmp_path / "data", languages=["de"], layout="xmixup", splits={"train": "train"})
    assert rows["train/de"][0]["back_answers"] == [{"text": "the Danube", "answer_start": 10}]


def test_questions_that_do_not_match_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"languages": ["de"], "splits": {"train": "train", "test": "test"}}
    write_authors_qa(tmp_path / "data")
    file = squad(
        tmp_path / "data/squad/translate-train/squad.translate.train.en-de.json",
        (GERMAN_CONTEXT, [D1, question("q3", "Wann?", ("Ulm", 0))]),
    )
    train = f"{tmp_path}/data/squad/train-v1.1.json"
    assert refused("xquad", tmp_path / "data", **options).startswith(f"{train}: no question 'q3', which {file} has")
    write_authors_qa(tmp_path / "data")
    file = squad(tmp_path / "data/xquad/translate-test/xquad.translate.test.de-en.json", (CONTEXT, [Q2]))
    gold = f"{tmp_path}/data/xquad/test/xquad.de.json"
    assert refused("xquad", tmp_path / "data", **options).startswith(f"{file}: no question 'q1', which {gold} has")
    write_authors_qa(tmp_path / "data")
    file = squad(
        tmp_path / "data/squad/translate-train-en/squad.translate.train.en-de-en.json",
        (CONTEXT, [question("other", "Where?", ("Ulm", 0))]),
    )
    assert refused("xquad", tmp_path / "data", **options).startswith(f"{file}: no question 'q2'")


def write_tydiqa(folder: Path, english: list[str], german: list[str]) -> None:
    """`german`: ids of the translations. TyDiQA has no German, so their file is named as Finnish."""
    for name, ids in (("tydiqa-goldp-v1.1-train/tydiqa.goldp.en.train", english),):
        qas = [question(id, f"Q{n}?", ("Ulm", 0)) for n, id in enumerate(ids)]
        squad(folder / f"data/tydiqa/{name}.json", (CONTEXT, qas))
    qas = [question(id, f"K{n}?", ("Ulm", 0)) for n, id in enumerate(german)]
    squad(folder / "mt/TyDiQA-GoldP/translate-train/tydiqa.translate.train.en-fi.json", (GERMAN_CONTEXT, qas))


def test_repeated_ids_are_matched_by_place(tmp_path: Path) -> None:
    """XTREME's script cuts TyDiQA's training ids to their last number."""
    options: dict[str, Any] = {"languages": ["fi"], "splits": {"train": "train"}, "translations": tmp_path / "mt"}
    options["layout"] = "download"
    write_tydiqa(tmp_path, ["1", "0", "1"], ["english-5-1", "english-7-0", "english-9-1"])
    _, rows = prepared("tydiqa", tmp_path / "data", **options)
    assert [(row["group"], row["question"]) for row in rows["train/fi"]] == [
        (row["group"], row["question"].replace("Q", "K")) for row in rows["train/en"]
    ]
    assert len({row["group"] for row in rows["train/en"]}) == 3
    for translated, expected in (
        (["1", "0"], "has 2; id '1' is given to several questions"),
        (["1", "1", "0"], "question 0: is at the place of question"),
    ):
        other = tmp_path / translated[1]
        write_tydiqa(other, ["1", "0", "1"], translated)
        assert expected in refused("tydiqa", other / "data", **options | {"translations": other / "mt"})


BUCKET = [  # not in the order of the English file, in which one pair occurs twice
    ("Four.", "Five.", "Vier.", "Fünf.", "neutral"),
    ("One.", 'He said ""Two"".', "Eins.", "Zwei.", "contradictory"),
    ("One.", "Two.", "Eins!", "Zwei!", "neutral"),
    ("One.", "Two.", "Eins?", "Zwei?", "neutral"),
]


def write_bucket(folder: Path, extra: int) -> None:
    english = [("One.", 'He said "Two".', "contradiction"), ("One.", "Two.", "neutral"), ("Four.", "Five.", "neutral")]
    english += [("One.", "Two.", "neutral")] + [(f"a{n}", "b", "neutral") for n in range(20)]
    by_csv_writer(folder / "data/xnli/train-en.tsv", english)
    more = [(f"a{n}", "b", f"ä{n}", "b", "neutral") for n in range(20)]
    lost = [(f"gone {n}", "b", "weg", "b", "neutral") for n in range(extra)]
    bad = [("a", "b", "c", "d", "not a label")]
    tsv(folder / "mt/XNLI/translate-train/en-de-translated.tsv", BUCKET + more + lost + bad)
    by_csv_writer(folder / "data/xnli/test-de.tsv", [(f"T{n}", "b", "neutral") for n in range(3)])
    test = [(f"T{n}", "b", f"E{n}", "b (en)", "neutral") for n in range(3)]
    tsv(folder / "mt/XNLI/translate-test/test-de-en-translated.tsv", test)


def test_the_buckets_pairs_are_matched_by_text(tmp_path: Path) -> None:
    write_bucket(tmp_path, extra=1)
    counts, rows = prepared("xnli", tmp_path / "data", languages=["de"], translations=tmp_path / "mt")
    assert [(row["group"], row["text_a"]) for row in rows["train/de"][:4]] == [
        ("xnli-train-2", "Vier."),
        ("xnli-train-0", "Eins."),
        ("xnli-train-1", "Eins!"),
        ("xnli-train-3", "Eins?"),  # the same English pair a second time
    ]
    assert counts["skipped"] == {"train": {"de": {"no such English original": 1, "empty text": 1}}}
    assert [row["back_text_a"] for row in rows["test/de"]] == ["E0", "E1", "E2"]


def test_a_bucket_with_other_originals_is_refused(tmp_path: Path) -> None:
    write_bucket(tmp_path, extra=9)
    message = refused("xnli", tmp_path / "data", languages=["de"], translations=tmp_path / "mt")
    file = tmp_path / "mt/XNLI/translate-train/en-de-translated.tsv"
    assert message.startswith(f"{file}:25: its original is not in {tmp_path}/data/xnli/train-en.tsv")
    assert "those of 9 of 33 lines" in message
    write_bucket(tmp_path, extra=0)
    file = tsv(
        tmp_path / "mt/XNLI/translate-test/test-de-en-translated.tsv",
        [(f"T{n}", "b", f"E{n}", "b (en)", "neutral") for n in (1, 2, 0)],
    )
    message = refused("xnli", tmp_path / "data", languages=["de"], translations=tmp_path / "mt")
    assert message.startswith(
        f"{file}:1: is a translation of another text than {tmp_path}/data/xnli/test-de.tsv has at this place"
    )


def test_the_buckets_questions_are_matched(tmp_path: Path) -> None:
    squad(tmp_path / "data/squad/train-v1.1.json", (CONTEXT, [Q1, Q2]))
    squad(tmp_path / "data/mlqa/MLQA_V1/test/test-context-de-question-de.json", (GERMAN_CONTEXT, [D1]))
    squad(tmp_path / "mt/SQuAD/translate-train/squad.translate.train.en-de.json", (GERMAN_CONTEXT, [D1, D2]))
    squad(tmp_path / "mt/MLQA/translate-test/mlqa.translate.test.de-en.json", (CONTEXT, [Q1]))
    counts, rows = prepared(
        "mlqa",
        tmp_path / "data",
        languages=["de"],
        translations=tmp_path / "mt",
        splits={"train": "train", "test": "test"},
    )
    assert counts["train"] == {"en": 2, "de": 1}
    assert rows["test/de"][0]["back_context"] == CONTEXT


def test_folders_without_matching_translations_are_refused(tmp_path: Path) -> None:
    write_bucket(tmp_path, extra=0)
    write(tmp_path / "other/README", "")
    message = refused("xnli", tmp_path / "data", languages=["de"], translations=tmp_path / "other")
    assert message.startswith(f"{tmp_path}/other: no translation of the requested files of xnli")
    (tmp_path / "data/xnli/train-en.tsv").unlink()
    message = refused("xnli", tmp_path / "data", languages=["de"], translations=tmp_path / "mt")
    assert "translates xnli's English training items, which are missing" in message
