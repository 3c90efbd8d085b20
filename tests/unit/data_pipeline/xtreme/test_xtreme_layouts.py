"""Each layout of XTREME's files gives the same canonical rows; erased labels and missing files are reported."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from xtreme_files import by_csv_writer, question, squad, tagged, tsv, write, xnli

from data_pipeline.records import DataError
from data_pipeline.tasks.rows import read_task_file
from data_pipeline.xtreme.items import is_empty, is_left_out, to_row
from data_pipeline.xtreme.layouts import detect_layout, find_source, read_items, tatoeba_pairs
from data_pipeline.xtreme.prepare import PrepareOptions, prepare_task
from data_pipeline.xtreme.tasks import TASKS, xtreme_task

PAIRS = [('He said "hi".', "He spoke.", "entailment"), ("A", "B", "neutral"), ("C", "D", "contradiction")]
CONTEXT = "  Ulm liegt an der Donau."
SQUAD = (CONTEXT, [question("5733be", "Wo liegt Ulm?", ("an der Donau", 12))])
TAGGED = [[("Anna", "B-PER"), ("lebt", "O")], [("Ulm", "B-LOC")]]
POS = [[("Im", "ADP"), ("Haus", "NOUN")]]
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))


def rows(
    task: str, split: Any, language: str, folder: Path, layout: str = "auto", allow_unlabelled_test: bool = False
) -> Rows:
    """The rows of a split, as `prepare_task` writes them; this way also where it would not read a training split."""
    of = xtreme_task(task)
    source = find_source(of, split, language, folder, detect_layout(of, folder, layout))
    assert source is not None
    items = [item for item in read_items(of, split, source, allow_unlabelled_test) if not is_empty(item)]
    found = [to_row(of, split, language, item) for item in items if not is_left_out(item)]
    if TASKS[task].kind != "retrieval":  # the reader of the task accepts the rows
        kind: Any = TASKS[task].kind
        file = write(folder.parent / "read-back.jsonl", "".join(json.dumps(row) + "\n" for row in found))
        assert [record.id for record in read_task_file(file, kind)] == [row["id"] for row in found]
    return found


def failure(*arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        rows(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_download(folder: Path, erased: bool) -> None:
    """The files of XTREME's script. `erased`: without test labels, as it writes them; else with the authors' labels."""
    kept = [pair[:2] for pair in PAIRS] if erased else PAIRS
    by_csv_writer(folder / "xnli/train-en.tsv", PAIRS)
    by_csv_writer(folder / "xnli/dev-de.tsv", PAIRS)
    by_csv_writer(folder / "xnli/test-de.tsv", kept)
    by_csv_writer(folder / "pawsx/dev-ja.tsv", [("a", "b", "1")])
    for task, sentences in (("panx", TAGGED), ("udpos", POS)):
        for split in ("train", "dev", "test"):
            only_words = [[word[:1] for word in sentence] for sentence in sentences]
            tagged(folder / task / f"{split}-de.tsv", only_words if erased and split == "test" else sentences)
    blank = (CONTEXT, [question("5733be", "Wo liegt Ulm?", ("", 0))])
    test = blank if erased else SQUAD
    for name in ("train", "dev"):
        squad(folder / f"squad/{name}-v1.1.json", SQUAD)
    squad(folder / "xquad/xquad.de.json", test)
    squad(folder / "mlqa/MLQA_V1/dev/dev-context-de-question-de.json", SQUAD)
    squad(folder / "mlqa/MLQA_V1/test/test-context-de-question-de.json", test)
    squad(folder / "tydiqa/tydiqa-goldp-v1.1-train/tydiqa.goldp.en.train.json", SQUAD)
    squad(folder / "tydiqa/tydiqa-goldp-v1.1-dev/tydiqa.goldp.fi.dev.json", test)
    write(folder / "tatoeba/de-en.de", "Zwei.\nEins.\n")
    write(folder / "tatoeba/de-en.en", "One.\nTwo.\n")
    for split in ("dev", "test"):
        tsv(folder / f"bucc2018/de-en.{split}.de", [("de-000000001", "Eins."), ("de-000000002", "Zwei.")])
        tsv(folder / f"bucc2018/de-en.{split}.en", [("en-000000009", "Two.")])


PAIR_ROW = {"text_a": 'He said "hi".', "text_b": "He spoke.", "label": "entailment"}
QA_ROW = {
    "question": "Wo liegt Ulm?",
    "context": CONTEXT,
    "answers": [{"text": "an der Donau", "answer_start": 12}],
}
EXPECTED = [  # task, split, language, first row without id and group, rows
    ("xnli", "train", "en", {"language": "en", **PAIR_ROW}, 3),
    ("xnli", "dev", "de", {"language": "de", **PAIR_ROW}, 3),
    ("xnli", "test", "de", {"language": "de", **PAIR_ROW}, 3),
    ("pawsx", "dev", "ja", {"language": "ja", "text_a": "a", "text_b": "b", "label": "1"}, 1),
    ("panx", "train", "de", {"text": "Anna lebt", "words": ["Anna", "lebt"], "tags": ["B-PER", "O"]}, 2),
    ("panx", "test", "de", {"text": "Anna lebt", "words": ["Anna", "lebt"], "tags": ["B-PER", "O"]}, 2),
    ("udpos", "dev", "de", {"text": "Im Haus", "words": ["Im", "Haus"], "tags": ["ADP", "NOUN"]}, 1),
    ("xquad", "train", "en", {"language": "en", **QA_ROW}, 1),
    ("xquad", "dev", "en", {"language": "en", **QA_ROW}, 1),
    ("xquad", "test", "de", {"language": "de", **QA_ROW}, 1),
    ("mlqa", "dev", "de", {"language": "de", **QA_ROW}, 1),
    ("mlqa", "test", "de", {"language": "de", **QA_ROW}, 1),
    ("tydiqa", "train", "en", {"language": "en", **QA_ROW}, 1),
    ("tydiqa", "test", "fi", {"language": "fi", **QA_ROW}, 1),
]


@pytest.mark.parametrize(("task", "split", "language", "row", "n_rows"), EXPECTED)
def test_the_download_layout_gives_the_canonical_rows(
    tmp_path: Path, task: str, split: str, language: str, row: dict[str, Any], n_rows: int
) -> None:
    write_download(tmp_path / "data", erased=False)
    found = rows(task, split, language, tmp_path / "data")
    assert len(found) == n_rows
    first = {"language": language, **row}
    assert {name: value for name, value in found[0].items() if name not in ("id", "group")} == first
    assert len({row["id"] for row in found}) == n_rows


@pytest.mark.parametrize("task", ["xnli", "panx", "udpos", "xquad", "mlqa", "tydiqa"])
def test_erased_test_labels_are_refused_unless_allowed(tmp_path: Path, task: str) -> None:
    write_download(tmp_path / "data", erased=True)
    language = "fi" if task == "tydiqa" else "de"
    refused = failure(task, "test", language, tmp_path / "data")
    assert "the test labels of" in refused
    assert "are erased, as XTREME's download script leaves them" in refused
    found = rows(task, "test", language, tmp_path / "data", allow_unlabelled_test=True)
    assert found
    for row in found:
        assert not row.get("label")
        assert "tags" not in row
        assert not row.get("answers")


def test_placeholder_labels_count_as_erased(tmp_path: Path) -> None:
    """XTREME's own processors read erased files as all "neutral", "0" or "O"."""
    by_csv_writer(tmp_path / "d/xnli/test-de.tsv", [(f"a{n}", "b", "neutral") for n in range(10)])
    tagged(tmp_path / "d/panx/test-de.tsv", [[("Anna", "O"), ("lebt", "O")]] * 10)
    for task in ("xnli", "panx"):
        assert "are erased" in failure(task, "test", "de", tmp_path / "d")
    by_csv_writer(tmp_path / "d/xnli/test-de.tsv", [(f"a{n}", "b", "neutral") for n in range(9)])
    assert len(rows("xnli", "test", "de", tmp_path / "d")) == 9


def test_a_file_with_only_some_labels_is_refused(tmp_path: Path) -> None:
    file = tsv(tmp_path / "d/xnli/test-de.tsv", [("a", "b", "neutral"), ("a", "b")])
    for allowed in (False, True):
        assert f"{file}:2: has no label" in failure("xnli", "test", "de", tmp_path / "d", allow_unlabelled_test=allowed)
    file = tsv(tmp_path / "d/xnli/dev-de.tsv", [("a", "b", "neutral"), ("a", "b")])
    assert f"{file}:2: no label; only test rows may lack one" in failure("xnli", "dev", "de", tmp_path / "d")
    squad(tmp_path / "d/mlqa/MLQA_V1/test/test-context-de-question-de.json", SQUAD, SQUAD)
    assert "question 5733be: the id is repeated" in failure("mlqa", "test", "de", tmp_path / "d")


def test_rows_of_one_item_share_their_group(tmp_path: Path) -> None:
    """Items that are parallel by line or id have one group in all languages; others do not."""
    for language in ("de", "en"):
        by_csv_writer(tmp_path / f"d/xnli/dev-{language}.tsv", PAIRS)
        tagged(tmp_path / f"d/panx/dev-{language}.tsv", TAGGED)
        squad(tmp_path / f"d/xquad/xquad.{language}.json", SQUAD)
    squad(tmp_path / "d/tydiqa/tydiqa-goldp-v1.1-train/tydiqa.goldp.en.train.json", SQUAD)
    squad(tmp_path / "d/tydiqa/tydiqa-goldp-v1.1-train/tydiqa.goldp.fi.train.json", SQUAD)
    squad(tmp_path / "d/tydiqa/tydiqa-goldp-v1.1-dev/tydiqa.goldp.fi.dev.json", SQUAD)

    def groups(task: str, split: str, language: str) -> list[str]:
        return [row["group"] for row in rows(task, split, language, tmp_path / "d")]

    assert groups("xnli", "dev", "de") == groups("xnli", "dev", "en") == [f"xnli-dev-{n}" for n in range(3)]
    assert groups("xquad", "test", "de") == groups("xquad", "test", "en") == ["xquad-test-5733be"]
    assert groups("panx", "dev", "de") != groups("panx", "dev", "en")
    assert groups("tydiqa", "train", "en") != groups("tydiqa", "train", "fi")


def test_a_folder_of_one_task_alone_is_read(tmp_path: Path) -> None:
    squad(tmp_path / "d/xquad.de.json", SQUAD)
    assert [row["question"] for row in rows("xquad", "test", "de", tmp_path / "d")] == ["Wo liegt Ulm?"]


def test_tatoeba_files_give_sentences_and_pairs(tmp_path: Path) -> None:
    source, english = ["Zwei.", "Hallo! ", "Eins.", "Hallo?"], ["Two.", "Hello.", "One.", "Hello."]
    write(tmp_path / "laser/tatoeba.deu-eng.deu", "\n".join(source) + "\n")
    write(tmp_path / "laser/tatoeba.deu-eng.eng", "\r\n".join(english) + "\r\n")
    pairs = tatoeba_pairs(tmp_path / "laser", "de")
    assert pairs == (["Zwei.", "Hallo!", "Eins.", "Hallo?"], ["Hello.", "Hello.", "One.", "Two."], [1, 3, 2, 0])
    found = rows("tatoeba", "test", "de", tmp_path / "laser")
    assert [(row["text"], row["translation"]) for row in found] == [
        (text.strip(), other) for text, other in zip(source, english, strict=True)
    ]
    write_download(tmp_path / "data", erased=True)  # English lines are sorted, so the pairs are unknown
    assert tatoeba_pairs(tmp_path / "data", "de") == (["Zwei.", "Eins."], ["One.", "Two."], None)
    assert "are erased" in failure("tatoeba", "test", "de", tmp_path / "data")
    found = rows("tatoeba", "test", "de", tmp_path / "data", allow_unlabelled_test=True)
    assert [("translation" in row, row["text"]) for row in found] == [(False, "Zwei."), (False, "Eins.")]
    write(tmp_path / "laser/tatoeba.deu-eng.eng", "One.\n")
    with pytest.raises(DataError, match=r"deu-eng.eng: 1 sentences, but .*deu-eng.deu has 4"):
        tatoeba_pairs(tmp_path / "laser", "de")


def test_bucc_files_give_sentences(tmp_path: Path) -> None:
    write_download(tmp_path / "data", erased=True)
    found = rows("bucc2018", "dev", "de", tmp_path / "data")
    assert [(row["id"], row["language"], row["text"]) for row in found] == [
        ("de-000000001", "de", "Eins."),
        ("de-000000002", "de", "Zwei."),
        ("en-000000009", "en", "Two."),
    ]
    assert len(rows("bucc2018", "test", "de", tmp_path / "data")) == 3  # it has no labels that could be erased
    file = write(tmp_path / "data/bucc2018/de-en.dev.en", "en-000000009\n")
    assert f"{file}:1: not two columns; a line is ID<tab>SENTENCE" in failure(
        "bucc2018", "dev", "de", tmp_path / "data"
    )


CONLLU = """# sent_id = a-1
# text = Im Haus "ging's"
1-2\tIm\t_\t_\t_\t_\t_\t_\t_\t_
1\tIn\tin\tADP\t_\t_\t3\tcase\t_\t_
2\tdem\tder\tDET\t_\t_\t3\tdet\t_\t_
3\tHaus\tHaus\tNOUN\t_\t_\t0\troot\t_\t_
4\t"\t"\tPUNCT\t_\t_\t3\tpunct\t_\t_
4.1\tging\tgehen\tVERB\t_\t_\t_\t_\t_\t_

# sent_id = a-2
1\t_\t_\tNOUN\t_\t_\t0\troot\t_\t_
2\t.\t.\tPUNCT\t_\t_\t1\tpunct\t_\t_

# text = Ja
1\tJa\tja\tINTJ\t_\t_\t0\troot\t_\t_
"""


def test_conllu_files_give_words_and_tags(tmp_path: Path) -> None:
    write(tmp_path / "d/UD_B/de_b-ud-dev.conllu", "\ufeff" + CONLLU.replace("\n", "\r\n") + "\r\n\r\n")
    write(tmp_path / "d/UD_A/de_a-ud-dev.conllu", "1\tNein\tnein\tINTJ\t_\t_\t0\troot\t_\t_\n")
    write(tmp_path / "d/UD_B/en_b-ud-dev.conllu", CONLLU)
    found = rows("udpos", "dev", "de", tmp_path / "d")
    assert [(row["id"], row["text"], row["words"], row["tags"]) for row in found] == [
        ("udpos-dev-de-0", "Nein", ["Nein"], ["INTJ"]),  # treebanks by name
        ("udpos-dev-de-1", 'Im Haus "ging\'s"', ["In", "dem", "Haus", '"'], ["ADP", "DET", "NOUN", "PUNCT"]),
        ("udpos-dev-de-3", "Ja", ["Ja"], ["INTJ"]),  # the sentence between them has its words withheld
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2\tx\tx\tNOUN\t_\t_\t0\troot\t_\t_", "1: word '2', but the next one is 1"),
        ("1\tx\tx\tNOMEN\t_\t_\t0\troot\t_\t_", "1: tag 'NOMEN' is not one of udpos's"),
        ("1\tx\tx\tNOUN", "1: 4 columns; CoNLL-U has ten"),
    ],
)
def test_bad_conllu_lines_are_named(tmp_path: Path, line: str, expected: str) -> None:
    file = write(tmp_path / "d/de_a-ud-dev.conllu", line + "\n")
    assert f"{file}:{expected}" in failure("udpos", "dev", "de", tmp_path / "d")


def parquet(folder: Path, config: str, split: str, values: Rows, tags: str = "", names: tuple[str, ...] = ()) -> None:
    """A configuration's file as on the hub; `tags`: a column of class indices with these `names`."""
    import datasets

    file = folder / config / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not tags:
        pq.write_table(pa.Table.from_pylist(values), file)
        return
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            tags: datasets.Sequence(datasets.ClassLabel(names=list(names))),
        }
    )
    datasets.Dataset.from_list(values, features=features).to_parquet(str(file))


def hub_answers(text: str, start: int) -> dict[str, Any]:
    return {"text": [text], "answer_start": [start]}


def test_hub_datasets_give_the_canonical_rows(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    a, b, label = PAIRS[0]
    xnli_rows = [{"language": code, "sentence1": a, "sentence2": b, "gold_label": label} for code in ("de", "en", "de")]
    parquet(folder, "XNLI", "test", xnli_rows)
    parquet(folder, "PAWS-X.de", "validation", [{"sentence1": "a", "sentence2": "b", "label": "1"}])
    names = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
    parquet(folder, "PAN-X.de", "test", [{"tokens": ["Anna", "lebt"], "ner_tags": [1, 0]}], "ner_tags", names)
    parquet(folder, "udpos.German", "train", [{"tokens": ["Im", "Haus"], "pos_tags": ["ADP", "NOUN"]}])
    qa = {"id": "5733be", "context": CONTEXT, "question": "Wo liegt Ulm?"}
    parquet(folder, "SQuAD", "train", [{**qa, "answers": hub_answers("an der Donau", 12)}])
    parquet(folder, "XQuAD.de", "validation", [{**qa, "answers": [{"text": "an der Donau", "answer_start": 12}]}])
    parquet(folder, "MLQA.de.de", "validation", [{**qa, "answers": hub_answers("an der Donau", 12)}])
    moved = {"context": "Ulm und Ulm.", "question": "Wo?"}  # its context began with two spaces
    tydiqa = [{**moved, "id": f"{name}-12-0", "answers": hub_answers("Ulm", 10)} for name in ("english", "finnish")]
    parquet(folder, "tydiqa", "validation", tydiqa)
    pair = {"source_sentence": "Zwei.\n", "target_sentence": "Two.\n", "source_lang": "deu", "target_lang": "eng"}
    parquet(folder, "tatoeba.deu", "validation", [pair])

    def first(task: str, split: str, language: str) -> dict[str, Any]:
        row = rows(task, split, language, folder, "hub")[0]
        return {name: value for name, value in row.items() if name not in ("id", "group", "language")}

    assert detect_layout(TASKS["xnli"], folder) == "hub"
    assert len(rows("xnli", "test", "de", folder)) == 2
    assert first("xnli", "test", "de") == PAIR_ROW
    assert first("pawsx", "dev", "de") == {"text_a": "a", "text_b": "b", "label": "1"}
    assert first("panx", "test", "de") == {"text": "Anna lebt", "words": ["Anna", "lebt"], "tags": ["B-PER", "O"]}
    assert first("udpos", "train", "de")["tags"] == ["ADP", "NOUN"]
    assert first("xquad", "train", "en") == first("xquad", "test", "de") == first("mlqa", "dev", "de") == QA_ROW
    assert first("tydiqa", "test", "fi")["answers"] == [{"text": "Ulm", "answer_start": 8}]
    assert [row["id"] for row in rows("tydiqa", "test", "fi", folder, "hub")] == ["finnish-12-0"]
    assert first("tatoeba", "test", "de") == {"text": "Zwei.", "translation": "Two."}
    assert tatoeba_pairs(folder, "de", "hub") == (["Zwei."], ["Two."], [0])
    without: Any = (("train", "xnli", "en"), ("dev", "tydiqa", "en"), ("dev", "udpos", "th"))
    for split, task, language in without:
        assert find_source(TASKS[task], split, language, folder, "hub") is None


def test_bad_hub_rows_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    parquet(folder, "udpos.German", "test", [{"tokens": ["Im"], "pos_tags": [3]}])  # class indices without names
    assert "udpos.German[test]:1: label '3' is not one of udpos's" in failure("udpos", "test", "de", folder, "hub")
    parquet(folder, "PAN-X.de", "test", [{"words": ["Im"], "ner_tags": ["O"]}])
    assert "PAN-X.de[test]: no column 'tokens'; the columns are 'words', 'ner_tags'" in failure(
        "panx", "test", "de", folder, "hub"
    )
    qa = {"id": "1", "context": "Ulm.", "question": "Wo?", "answers": hub_answers("Bonn", 0)}
    parquet(folder, "MLQA.de.de", "test", [qa])
    only = PrepareOptions(languages=["de"], layout="hub", splits={"test": "test"})
    with pytest.raises(DataError, match="question 1: answer 'Bonn' is not near character 0"):
        prepare_task("mlqa", folder, tmp_path / "rows", only)


def test_the_authors_layout_gives_the_canonical_rows(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    xnli(folder / "xnli/XNLI-1.0/xnli.test.tsv", [("de", label, a, b) for a, b, label in PAIRS])
    tsv(folder / "xnli/XNLI-MT-1.0/multinli/multinli.train.en.tsv", [("premise", "hypo", "label"), *PAIRS])
    tsv(folder / "pawsx/de/dev_2k.tsv", [("id", "sentence1", "sentence2", "label"), (1, "a", "b", 0)])
    tagged(folder / "panx/de/test.tsv", TAGGED)
    for name in ("squad/train-v1.1", "xquad/test/xquad.de", "mlqa/dev/dev-context-de-question-de"):
        squad(folder / f"{name}.json", SQUAD)
    squad(folder / "tydiqa/dev/tydiqa.fi.dev.json", SQUAD)
    squad(folder / "tydiqa/translate-train/tydiqa.translate.train.en-en.json", SQUAD)
    for task, split, language in (
        ("xquad", "train", "en"), ("xquad", "dev", "de"), ("xquad", "test", "de"), ("mlqa", "dev", "de"),
        ("tydiqa", "train", "en"), ("tydiqa", "dev", "fi"), ("tydiqa", "test", "fi"),
    ):  # fmt: skip
        (row,) = rows(task, split, language, folder, "xmixup")
        assert {name: row[name] for name in QA_ROW} == QA_ROW
    assert detect_layout(TASKS["xnli"], folder) == "xmixup"
    for split, language in (("train", "en"), ("test", "de")):
        assert [row["label"] for row in rows("xnli", split, language, folder)] == [pair[2] for pair in PAIRS]
    assert rows("pawsx", "dev", "de", folder)[0]["text_a"] == "a"
    assert rows("panx", "test", "de", folder)[1]["tags"] == ["B-LOC"]
    assert find_source(TASKS["xquad"], "dev", "el", folder, "xmixup") is None


def test_missing_and_ambiguous_files_and_unknown_names_are_refused(tmp_path: Path) -> None:
    write_download(tmp_path / "data", erased=False)
    xnli(tmp_path / "data/xnli/XNLI-1.0/xnli.test.tsv", [("de", "neutral", "a", "b")])
    assert failure("xnli", "test", "de", tmp_path / "data") == (
        f"{tmp_path}/data: has files of xnli in the layouts download and xmixup; give one of them as the layout"
    )
    assert len(rows("xnli", "test", "de", tmp_path / "data", "download")) == 3
    (tmp_path / "empty").mkdir()
    nothing = failure("udpos", "test", "de", tmp_path / "empty")
    for example in ("test-af.tsv (download)", "udpos/af/test.tsv (xmixup)", "-ud-test.conllu (conllu)", "(hub)"):
        assert example in nothing
    assert "no such folder; for the dataset google/xtreme give layout hub" in failure(
        "xnli", "test", "de", "google/xtreme"
    )
    assert "layout 'tfds' is not one of auto, download" in failure("xnli", "test", "de", tmp_path, "tfds")
    with pytest.raises(DataError, match="xnli: language 'ja' is not one of its languages"):
        prepare_task("xnli", tmp_path / "data", tmp_path / "rows", PrepareOptions(languages=["ja"], layout="download"))
    assert "task 'xcopa' is not one of XTREME's" in failure("xcopa", "test", "et", tmp_path)
