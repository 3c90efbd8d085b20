"""XTREME's text formats: quotes, line ends, byte order marks, erased labels, and bad lines named by number."""

import csv
from pathlib import Path

import pytest
from xtreme_files import by_csv_writer, question, squad, tagged, tsv, write, xnli

from data_pipeline.records import DataError
from data_pipeline.xtreme.items import NO_WORD
from data_pipeline.xtreme.lines import (
    PAWS,
    TEXTS_LABEL,
    TEXTS_LABEL_HEADER,
    TRANSLATED,
    read_pairs,
    read_soft,
    read_tagged,
    read_texts,
    read_words,
    read_xnli,
)
from data_pipeline.xtreme.squad import read_gold, read_translated, repeated_id
from data_pipeline.xtreme.tasks import TASKS

XNLI, PAWSX, PANX, UDPOS = (TASKS[name] for name in ("xnli", "pawsx", "panx", "udpos"))
TEXTS = [
    ("A dog runs.", "It moves.", "entailment"),
    ('He said "hi" and left.', '"', "neutral"),
    ('"Quoted" at the start', 'ends "quoted"', "contradiction"),
    ('"all of it"', "犬が走る。\u2028と\x0bか\u00a0", "entailment"),  # characters that are not line ends
]


def pairs(file: Path) -> list[tuple[str, str, str | None]]:
    return [(pair.text_a, pair.text_b, pair.label) for pair in read_pairs(file, XNLI, TEXTS_LABEL)]


def stripped(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(a.strip(), b.strip(), label) for a, b, label in rows]


def message(file: Path, reader: object, *arguments: object) -> str:
    with pytest.raises(DataError) as error:
        list(reader(file, *arguments))  # type: ignore[operator]
    text = str(error.value)
    assert "\n" not in text
    assert str(file) in text
    return text.replace(str(file), "FILE")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "END", "ENDEND"])
def test_line_ends_and_byte_order_marks_are_ignored(tmp_path: Path, end: str, mark: str, last: str) -> None:
    lines = end.join("\t".join(row) for row in TEXTS)
    file = write(tmp_path / "dev-en.tsv", mark + lines + last.replace("END", end))
    assert pairs(file) == stripped(TEXTS)


def test_an_unbalanced_quote_does_not_join_lines(tmp_path: Path) -> None:
    rows = [('"The start of a quote', "that goes on", "neutral"), ("and on", 'and ends here"', "entailment")] * 3
    assert pairs(tsv(tmp_path / "a.tsv", rows)) == rows
    with open(tmp_path / "a.tsv", encoding="utf-8", newline="") as stream:
        assert len(list(csv.reader(stream, delimiter="\t"))) < len(rows)  # the csv module joins lines


def test_quoting_of_a_csv_writer_is_removed(tmp_path: Path) -> None:
    written = by_csv_writer(tmp_path / "a.tsv", TEXTS)
    assert b'""hi""' in written.read_bytes()
    assert pairs(written) == stripped(TEXTS)
    plain = [row for row in TEXTS if '"' not in row[0] + row[1]]
    assert pairs(by_csv_writer(tmp_path / "b.tsv", plain)) == plain


def test_one_unquoted_field_means_that_no_csv_writer_quoted_the_file(tmp_path: Path) -> None:
    rows = [('"He ""said"" so"', "b", "neutral"), ('"all of it"', "b", "neutral")]
    assert pairs(tsv(tmp_path / "a.tsv", rows)) == rows
    assert pairs(tsv(tmp_path / "b.tsv", rows[:1])) == [('He "said" so', "b", "neutral")]


def test_bad_lines_are_named(tmp_path: Path) -> None:
    good = "a\tb\tneutral\n"
    cases = {
        good + "a\tb\tc\tneutral\n": "FILE:2: 4 columns; there must be 3: text, text, label",
        good + "a\n": "FILE:2: 1 columns",
        good + "\n" + good: "FILE:2: 1 columns",
        good + "a\tb\tmaybe\n": "FILE:2: label 'maybe' is not one of xnli's: contradiction, entailment, neutral",
    }
    for text, expected in cases.items():
        assert expected in message(write(tmp_path / "a.tsv", text), read_pairs, XNLI, TEXTS_LABEL)
    (tmp_path / "a.tsv").write_bytes(good.encode() + b"a\xff\tb\tneutral\n")
    assert message(tmp_path / "a.tsv", read_pairs, XNLI, TEXTS_LABEL) == "FILE:2: not UTF-8 (byte 2 of the line)"
    assert "FILE: cannot be read" in message(tmp_path / "none.tsv", read_pairs, XNLI, TEXTS_LABEL)


def test_header_lines_are_recognised(tmp_path: Path) -> None:
    rows = [("a", "b", "contradictory"), ("c", "d", "neutral")]
    for header in ([], [("premise", "hypo", "label")]):
        found = list(read_pairs(tsv(tmp_path / "a.tsv", [*header, *rows]), XNLI, TEXTS_LABEL_HEADER))
        assert [(pair.index, pair.text_a, pair.label) for pair in found] == [
            (0, "a", "contradiction"),
            (1, "c", "neutral"),
        ]
    (pair,) = read_pairs(tsv(tmp_path / "b.tsv", [("id", "s1", "s2", "label"), (7, "a", "b", 1)]), PAWSX, PAWS)
    assert (pair.name, pair.text_a, pair.text_b, pair.label) == ("7", "a", "b", "1")


def test_bad_lines_of_the_bucket_become_empty_and_keep_their_place(tmp_path: Path) -> None:
    rows = [("a", "b", "x", "y", "0"), ("a", "b", "x", "y", "a sentence"), ("a", "b"), ("c", "d", "z", "w", "1")]
    found = list(read_pairs(tsv(tmp_path / "a.tsv", rows), PAWSX, TRANSLATED))
    assert [(pair.index, pair.text_a, pair.original) for pair in found] == [
        (0, "x", ("a", "b")),
        (1, "", None),
        (2, "", None),
        (3, "z", ("c", "d")),
    ]


def test_xnli_lines_of_one_language_are_read(tmp_path: Path) -> None:
    rows = [("en", "neutral", "a", "b"), ("de", "neutral", "ä", 'ein "'), ("en", "contradictory", "c", "d")]
    file = xnli(tmp_path / "xnli.dev.tsv", rows)
    found = list(read_xnli(file, XNLI, "en"))
    assert [(pair.index, pair.text_a, pair.label) for pair in found] == [(0, "a", "neutral"), (1, "c", "contradiction")]
    assert found[1].place == f"{file}:4"
    english = xnli(tmp_path / "back.tsv", [("en", label, f"en {a}", b) for _, label, a, b in rows])
    assert [pair.text_a for pair in read_xnli(english, XNLI, "de", file)] == ["en ä"]
    short = xnli(tmp_path / "short.tsv", rows[:2])
    assert message(short, read_xnli, XNLI, "de", file).startswith("FILE:4: missing, but")
    text = file.read_text(encoding="utf-8")
    write(file, text.replace("gold_label", "label"))
    assert "FILE:1: no column 'gold_label'" in message(file, read_xnli, XNLI, "en")
    write(file, text + "en\tneutral\n")
    assert "FILE:5: 2 columns, but the header has 9" in message(file, read_xnli, XNLI, "en")


SENTENCES = [[("Anna", "B-PER"), ("lebt", "O")], [('"', "O"), ("Ulm", "B-LOC")]]


@pytest.mark.parametrize("cut", [0, 1, 2])  # one blank line at the end, no blank line, no line end
def test_sentences_and_tags_are_read_in_order(tmp_path: Path, cut: int) -> None:
    file = tagged(tmp_path / "a.tsv", SENTENCES)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - cut])
    found = list(read_tagged(file, PANX))
    assert [(s.index, s.words, s.tags) for s in found] == [
        (0, ("Anna", "lebt"), ("B-PER", "O")),
        (1, ('"', "Ulm"), ("O", "B-LOC")),
    ]
    assert [s.place for s in found] == [f"{file}:1", f"{file}:4"]
    file.write_bytes(b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n"))
    assert [(s.words, s.tags) for s in read_tagged(file, PANX)] == [(s.words, s.tags) for s in found]


def test_empty_words_keep_their_tags(tmp_path: Path) -> None:
    file = tagged(tmp_path / "a.tsv", [[("", "O"), ("\u00a0", "B-LOC"), ("x", "O")]])
    (sentence,) = read_tagged(file, PANX)
    assert sentence.words == (NO_WORD, NO_WORD, "x")
    assert sentence.tags == ("O", "B-LOC", "O")


def test_erased_tags_and_empty_sentences_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "Anna\nlebt\n\n\nUlm\n")
    found = list(read_tagged(file, PANX))
    assert [(s.index, s.words, s.tags) for s in found] == [
        (0, ("Anna", "lebt"), None),
        (1, (), None),
        (2, ("Ulm",), None),
    ]
    assert [s.words for s in read_words(tagged(tmp_path / "b.tsv", SENTENCES))] == [("Anna", "lebt"), ('"', "Ulm")]


def test_bad_tags_are_named(tmp_path: Path) -> None:
    cases = {
        "a\tO\nb\n": "FILE:2: no tag",
        "a\tO\n\nb\tB-MISC\n": "FILE:3: tag 'B-MISC' is not one of panx's",
        "a\tO\nb\tc\tO\n": "FILE:2: 3 columns; a line is WORD<tab>TAG",
    }
    for text, expected in cases.items():
        assert expected in message(write(tmp_path / "a.tsv", text), read_tagged, PANX)


def test_soft_tags_are_in_the_tasks_label_order(tmp_path: Path) -> None:
    order = tuple(reversed(PANX.labels))
    labels = write(tmp_path / "labels.txt", "\n".join(order) + "\n\n")
    soft = ["0.004", "0.5", "0.5", "0", "0", "0", "0"]  # sums to 1.004: printed with few digits
    file = tagged(tmp_path / "de.txt", [[("Anna", ";".join(soft))]])
    (sentence,) = read_soft(file, PANX, labels)
    assert sentence.soft_tags is not None
    assert sentence.soft_tags[0] == pytest.approx([float(value) / 1.004 for value in reversed(soft)])
    assert sum(sentence.soft_tags[0]) == pytest.approx(1, abs=1e-12)
    (plain,) = read_soft(file, PANX, tmp_path / "none.txt")
    assert plain.soft_tags is not None
    assert plain.soft_tags[0][0] == pytest.approx(0.004 / 1.004)
    write(labels, "O\nB-PER\n")
    with pytest.raises(DataError, match=r"labels.txt: must name each label of panx once"):
        list(read_soft(file, PANX, labels))


def test_bad_soft_tags_are_named(tmp_path: Path) -> None:
    good = ";".join(["1"] + ["0"] * 6)
    cases = {
        "0.5;0.5": "FILE:2: 2 probabilities, but there are 7 labels",
        "3.1;-2;0;0;0;0;0": "FILE:2: not probabilities (they sum to 1.1)",
        "2;-1;0;0;0;0;0": "FILE:2: not probabilities (they sum to 1)",
        "nan;0;0;0;0;0;0": "FILE:2: not probabilities",
        "O": "FILE:2: not numbers",
    }
    for cell, expected in cases.items():
        file = tagged(tmp_path / "a.txt", [[("a", good), ("b", cell)]])
        assert expected in message(file, read_soft, PANX, tmp_path / "labels.txt")


def test_only_trailing_lines_of_texts_may_be_empty(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / "a", "\ufeffeins \r\nzwei\r\n\r\n")) == ["eins", "zwei"]
    assert message(write(tmp_path / "a", "eins\n\nzwei\n"), read_texts) == "FILE:2: empty; each line is one sentence"


CONTEXT = "Ulm liegt an der Donau 🙂 in Ulm."


def test_questions_and_answers_are_read(tmp_path: Path) -> None:
    qas = [question("q1", "Wo?", ("an der Donau", 10), ("Ulm", 28)), question("q2", "Was?", ("", 0))]
    file = squad(tmp_path / "a.json", (CONTEXT, qas), ("Zwei", [question("q1", "Wie?", ("Zwei", 0))]))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    found = list(read_gold(file))
    assert [(q.index, q.id, q.question, q.answers) for q in found] == [
        (0, "q1", "Wo?", (("an der Donau", 10), ("Ulm", 28))),
        (1, "q2", "Was?", ()),
        (2, "q1#2", "Wie?", (("Zwei", 0),)),
    ]
    assert repeated_id(found) == "q1"
    assert repeated_id(found[:2]) is None


@pytest.mark.parametrize("start", [11, -1, 500])
def test_answers_that_are_not_at_their_place_are_marked_as_misplaced(tmp_path: Path, start: int) -> None:
    qas = [question("q1", "Wo?", ("Ulm", 0)), question("q2", "Wo?", ("an der Donau", start), ("Ulm", 28))]
    file = squad(tmp_path / "a.json", (CONTEXT, qas))
    whole, moved = read_gold(file)
    assert (whole.misplaced, moved.answers) == (None, (("Ulm", 28),))  # `prepare` counts or refuses it
    expected = f"{file}: question q2: answer 'an der Donau' is not at character {start} of the context"
    assert moved.misplaced is not None
    assert moved.misplaced.startswith(expected)
    assert [q.answers for q in read_translated(file)] == [
        (("Ulm", 0),),
        (("Ulm", 28),),
    ]  # translations: without misplaced answers


def test_bad_json_is_named(tmp_path: Path) -> None:
    number = '{"data": [{"paragraphs": [{"context": 1, "qas": [{"id": 1, "question": "a", "answers": []}]}]}]}'
    for text in ("{", "[]", '{"data": [{"paragraphs": [{"qas": []}]}]}', number):
        assert "FILE: not SQuAD's JSON" in message(write(tmp_path / "a.json", text), read_gold)
