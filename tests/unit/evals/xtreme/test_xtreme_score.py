"""Scores of folders: a small complete benchmark as XTREME's scorer scores it, missing languages, and every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest

from data_pipeline.records import DataError
from data_pipeline.xtreme.tasks import TASKS
from evals.errors import EvalError
from evals.xtreme.score import _SUMMATION_ORDER, score_directory, score_file, score_table

PHRASES = ["The Cat", "the cat's", "das Haus", "des Hauses", "الكتاب", "كتاب", "北京 2008", "北京", "của Việt"]
PHRASES += ["los años", "—"]


def pick(key: str, options):
    """One of `options`, the same on every machine."""
    return options[crc32(key.encode()) % len(options)]


def file_name(task: str, language: str) -> str:
    return f"{task}/test-{language}.{'json' if TASKS[task].kind == 'qa' else 'tsv'}"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    return file


def classification(labels: tuple[str, ...], key: str) -> tuple[str, str]:
    gold = [pick(f"{key}{i}", labels) for i in range(7)]
    ours = [label if pick(f"{key}{i}?", [1, 1, 0]) else pick(f"{key}{i}!", labels) for i, label in enumerate(gold)]
    return "".join(f"{label}\n" for label in gold), "".join(f"{label}\n" for label in ours)


def tagging(labels: tuple[str, ...], key: str) -> tuple[str, str]:
    few = [pick(f"{key}label{i}", labels) for i in range(4)]
    gold = [[pick(f"{key}{i}.{j}", few) for j in range(2 + i * 2)] for i in range(4)]
    ours = [
        [tag if pick(f"{key}{i}.{j}?", [1, 1, 1, 0]) else pick(f"{key}{i}.{j}!", labels) for j, tag in enumerate(tags)]
        for i, tags in enumerate(gold)
    ]
    as_text = ["\n\n".join("\n".join(sentence) for sentence in side) + "\n" for side in (gold, ours)]
    return as_text[0], as_text[1]


def qa(labels: tuple[str, ...], key: str) -> tuple[str, str]:
    paragraphs, ours = [], {}
    for i in range(2):
        questions = []
        for j in range(3):
            texts = [pick(f"{key}{i}.{j}.{k}", PHRASES) for k in range(1 + j % 2)]
            answers = [{"text": text, "answer_start": 0} for text in texts]
            questions.append({"id": f"{i}-{j}", "question": "?", "answers": answers})
            ours[f"{i}-{j}"] = f"{pick(f'{key}{i}.{j}?', ['', 'a ', 'la ', '2008 '])}{pick(f'{key}{i}.{j}.0', PHRASES)}"
            if not pick(f"{key}{i}.{j}!", [1, 1, 0]):
                ours[f"{i}-{j}"] = pick(f"{key}{i}{j}", PHRASES)
        paragraphs.append({"context": " ".join(PHRASES), "qas": questions})
    return json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}), json.dumps(ours)


def retrieval(labels: tuple[str, ...], key: str) -> tuple[str, str]:
    gold = [crc32(f"{key}{i}".encode()) % 1000 for i in range(9)]
    wrong = [crc32(f"{key}{i}!".encode()) % 9 for i in range(9)]
    ours = [gold[i] if pick(f"{key}{i}?", [1, 1, 0]) else wrong[i] for i in range(9)]
    if not key.startswith("bucc2018"):
        return "".join(f"{n}\n" for n in gold), "".join(f"{n}\n" for n in ours)
    return "".join(f"x-{n}\ten-{n}\n" for n in gold), "".join(f"x-{n}\ten-{n}\n" for n in [*ours, 4, 4])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of the nine tasks: `predictions` and `labels`."""
    root = tmp_path_factory.mktemp("xtreme")
    make_benchmark(root)
    return root


def make_benchmark(root: Path) -> None:
    makers = {"classification": classification, "tagging": tagging, "qa": qa, "retrieval": retrieval}
    for task in TASKS.values():
        for language in task.languages:
            gold, ours = makers[task.kind](task.labels, task.name + language)
            write(root / "labels" / file_name(task.name, language), gold)
            write(root / "predictions" / file_name(task.name, language), ours)


# Output of XTREME's evaluate.py, with seqeval 0.0.12, for these files: means over languages.
MEASURED = {
    "xnli": {"accuracy": 74.28571428571426},
    "pawsx": {"accuracy": 87.75510204081631},
    "panx": {"f1": 69.64833288562542, "precision": 68.68855688515131, "recall": 71.35306810277784},
    "udpos": {"f1": 73.37026249911911, "precision": 73.32801701222753, "recall": 73.6221186221186},
    "xquad": {"exact_match": 42.42424242424243, "f1": 59.595959595959606},
    "mlqa": {"exact_match": 38.095238095238095, "f1": 62.06349206349206},
    "tydiqa": {"exact_match": 37.03703703703704, "f1": 60.0},
    "bucc2018": {"f1": 78.50877192982455, "precision": 76.66666666666666, "recall": 80.55555555555556},
    "tatoeba": {"accuracy": 62.34567901234569},
}
MEASURED_GROUPS = {
    "classification": 81.02040816326529,
    "tagging": 71.50929769237226,
    "qa": 49.86932820266154,
    "retrieval": 70.42722547108512,
}
# Output of seqeval 1.2.2: F1 in its default mode and accuracy, means over languages.
MEASURED_BESIDE = {
    "udpos": {"f1_seqeval_1_2": 72.45076850030411, "token_accuracy": 76.36363636363636},
    "panx": {"f1_seqeval_1_2": 69.64833288562542, "token_accuracy": 78.0},
}


def scores_of(root: Path, **chosen):
    return score_directory(root / "predictions", root / "labels", **chosen)


@pytest.fixture
def some(whole: Path, tmp_path: Path) -> Path:
    """A copy of four small tasks, one of each kind, which a test may change."""
    for side in ("predictions", "labels"):
        for task in ("pawsx", "udpos", "mlqa", "bucc2018"):
            shutil.copytree(whole / side / task, tmp_path / side / task)
    return tmp_path


def test_every_average_equals_that_of_xtremes_scorer(whole: Path) -> None:
    scores = scores_of(whole)
    assert list(scores.tasks) == list(TASKS)
    for name, task in scores.tasks.items():
        # Pythons from 3.12 on add floats with less rounding.
        assert task.average == pytest.approx(MEASURED[name] | MEASURED_BESIDE.get(name, {}), rel=1e-14)
        assert list(task.languages) == list(TASKS[name].languages)
        official = [MEASURED[name][metric] for metric in TASKS[name].metrics]
        assert task.score == pytest.approx(sum(official) / len(official), rel=1e-14)
    assert scores.groups == pytest.approx(MEASURED_GROUPS, rel=1e-14)
    assert scores.all_task == pytest.approx(66.16909414015888, rel=1e-14)
    assert (scores.missing, scores.partial) == ((), ())
    assert scores.tasks["mlqa"].languages["ar"] == {"exact_match": 33.333333333333336, "f1": 73.33333333333334}
    assert scores.tasks["bucc2018"].languages["ru"]["f1"] == 88.88888888888889


def test_languages_are_added_in_the_scorers_order() -> None:
    for name, order in _SUMMATION_ORDER.items():
        assert sorted(order.split()) == sorted(TASKS[name].languages) or name == "tatoeba"
    assert set(TASKS["tatoeba"].languages) <= set(_SUMMATION_ORDER["tatoeba"].split())


def test_scores_are_written_as_plain_json(whole: Path) -> None:
    data = scores_of(whole).to_json()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == ["tasks", "groups", "all_task", "missing", "partial"]
    assert list(data["tasks"]["xquad"]) == ["languages", "average", "score", "missing", "partial"]
    assert data["tasks"]["xquad"]["missing"] == {}
    assert data["tasks"]["xquad"]["partial"] is False
    assert set(data["tasks"]["udpos"]["languages"]["zh"]) == {
        "f1", "precision", "recall", "token_accuracy", "f1_seqeval_1_2"
    }  # fmt: skip


def test_a_single_file_is_scored(whole: Path) -> None:
    files = [whole / side / "mlqa" / "test-ar.json" for side in ("predictions", "labels")]
    assert score_file("mlqa", "ar", *files) == scores_of(whole, tasks=["mlqa"]).tasks["mlqa"].languages["ar"]
    with pytest.raises(EvalError, match="mlqa has no language 'sw'; it has ar, de, en"):
        score_file("mlqa", "sw", *files)
    with pytest.raises(DataError, match="task 'xlni' is not one of XTREME's: xnli"):
        score_file("xlni", "de", *files)


def test_only_mlqa_removes_articles_of_each_language(tmp_path: Path) -> None:
    question = {"id": "a", "answers": [{"text": "Haus"}]}
    gold = write(tmp_path / "gold.json", squad(question, context="Das Haus."))
    ours = write(tmp_path / "ours.json", '{"a": "das Haus"}')
    assert score_file("mlqa", "de", ours, gold) == {"exact_match": 100, "f1": 100}
    assert score_file("xquad", "de", ours, gold) == pytest.approx({"exact_match": 0, "f1": 200 / 3})


def test_missing_languages_are_named_and_averages_marked_as_partial(some: Path) -> None:
    (some / "labels/udpos/test-yo.tsv").unlink()
    (some / "predictions/udpos/test-af.tsv").unlink()
    scores = scores_of(some)
    udpos = scores.tasks["udpos"]
    assert udpos.missing == {"af": "no predictions", "yo": "no labels"}
    assert udpos.partial
    f1 = [metrics["f1"] for metrics in udpos.languages.values()]
    assert len(f1) == 31
    assert udpos.average["f1"] == pytest.approx(sum(f1) / 31)
    assert not scores.tasks["pawsx"].partial
    assert scores.missing == ("xnli", "panx", "xquad", "tydiqa", "tatoeba")
    assert scores.partial == ("classification", "tagging", "qa", "retrieval", "all_task")
    assert scores.groups["tagging"] == udpos.score
    assert scores.all_task == pytest.approx(sum(task.score for task in scores.tasks.values()) / 4)


def test_a_missing_language_makes_its_group_and_the_total_partial(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy/predictions/xquad/test-el.json").unlink()
    scores = scores_of(tmp_path / "copy")
    assert (scores.missing, scores.partial) == ((), ("qa", "all_task"))


def test_only_requested_tasks_and_languages_are_scored(whole: Path) -> None:
    scores = scores_of(whole, tasks=["pawsx", "mlqa"], languages=["de", "ko"])
    assert {name: list(task.languages) for name, task in scores.tasks.items()} == {
        "pawsx": ["de", "ko"],
        "mlqa": ["de"],
    }
    assert scores.tasks["pawsx"].missing["fr"] == "not requested"
    assert scores.tasks["pawsx"].partial
    assert "xnli" in scores.missing


def test_the_table_shows_scores_means_and_notes(some: Path) -> None:
    for language in ("fr", "ru"):
        (some / f"predictions/bucc2018/test-{language}.tsv").unlink()
    scores = scores_of(some, tasks=["mlqa", "bucc2018"], languages=["de", "zh", "en"])
    assert score_table(scores) == (
        "      mlqa EM  mlqa F1  bucc2018\n"
        "----  -------  -------  --------\n"
        "de     16.67    52.22     73.68\n"
        "en     66.67    77.78         -\n"
        "zh     50.00    74.44     73.68\n"
        "mean   44.44*   68.15*    73.68*\n"
        "\n"
        "mlqa       56.30*\n"
        "bucc2018   73.68*\n"
        "qa         56.30*\n"
        "retrieval  73.68*\n"
        "all_task   64.99*\n"
        "* mlqa: not requested: ar, es, hi, vi\n"
        "* bucc2018: not requested: fr, ru\n"
        "* not scored: xnli, pawsx, panx, udpos, xquad, tydiqa, tatoeba"
    )


def test_a_complete_table_has_no_marks(whole: Path) -> None:
    table = score_table(scores_of(whole))
    assert "*" not in table
    assert table.endswith("retrieval       70.43\nall_task        66.17")


@pytest.mark.parametrize("task", ["pawsx", "udpos", "mlqa", "bucc2018"])
def test_line_ends_and_byte_order_marks_do_not_change_scores(some: Path, task: str) -> None:
    before = scores_of(some, tasks=[task]).to_json()
    for file in some.glob(f"*/{task}/*"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert scores_of(some, tasks=[task]).to_json() == before


@pytest.mark.parametrize(("ending", "other"), [("", "\n"), ("\n\n\n", "\n"), ("\n \n", "")])
def test_trailing_blank_lines_of_tags_do_not_change_scores(tmp_path: Path, ending: str, other: str) -> None:
    ours = write(tmp_path / "ours.tsv", "NOUN\nVERB\n\nX" + ending)
    gold = write(tmp_path / "gold.tsv", "NOUN\nVERB\n\nX" + other)
    assert score_file("udpos", "de", ours, gold)["f1"] == 100


def test_empty_sentences_count_if_both_files_have_them(tmp_path: Path) -> None:
    file = write(tmp_path / "tags.tsv", "\nX\n\n\nX\nNOUN\n")
    assert score_file("udpos", "de", file, file)["token_accuracy"] == 100


def test_questions_without_the_outer_object_are_read(some: Path) -> None:
    file = some / "labels/mlqa/test-de.json"
    before = scores_of(some).to_json()
    file.write_text(json.dumps(json.loads(file.read_text())["data"]))
    assert scores_of(some).to_json() == before


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """The one line with which two file contents are refused, without the folder's name."""

    def refuse(task: str, language: str, ours: str | bytes, gold: str | bytes) -> str:
        files = []
        for side, content in (("ours", ours), ("gold", gold)):
            files.append(tmp_path / side / file_name(task, language))
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            files[-1].write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(EvalError) as caught:
            score_file(task, language, *files)
        assert caught.value.exit_status == 2
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refuse


ERASED = "XTREME's download script erases test labels; take them from the original data"
QUESTION = {"id": "a", "question": "?", "answers": [{"text": "Paris", "answer_start": 3}]}


def squad(*questions: dict, context: str = "In Paris.") -> str:
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]})


@pytest.mark.parametrize(
    ("task", "gold", "n", "what"),
    [
        ("xnli", "neutral\n" * 20, 20, "all 20 labels are 'neutral'"),
        ("pawsx", "0\n" * 2000, 2000, "all 2000 labels are '0'"),
        ("panx", "O\nO\n\n" * 20, 20, "all tags of 20 sentences are 'O'"),
        ("udpos", "X\n\n" * 21, 21, "all tags of 21 sentences are 'X'"),
    ],
)
def test_gold_labels_that_are_all_the_same_count_as_erased(refusal, task: str, gold: str, n: int, what: str) -> None:
    assert refusal(task, "de", gold, gold) == f"gold/{task}/test-de.tsv: {what}; {ERASED}"


def test_predictions_may_be_all_the_same(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours.tsv", "0\n" * 20)
    gold = write(tmp_path / "gold.tsv", "0\n" * 19 + "1\n")
    assert score_file("pawsx", "de", ours, gold) == {"accuracy": 95.0}
    few = write(tmp_path / "few.tsv", "0\n" * 19)
    assert score_file("pawsx", "de", few, few) == {"accuracy": 100.0}


def test_files_without_their_label_column_are_refused(refusal) -> None:
    assert refusal("xnli", "de", "neutral\n", "Ein Satz.\tNoch einer, der viel weiter geht.\n") == (
        "gold/xnli/test-de.tsv:1: 'Ein Satz.\\tNoch einer, der viel weit... is not one of"
        f" contradiction, entailment, neutral ({ERASED})"
    )
    assert refusal("panx", "de", "O\n", "Berlin\n") == (
        f"gold/panx/test-de.tsv:1: 'Berlin' is not one of B-LOC, B-ORG, B-PER, I-LOC, I-ORG, I-PER, O ({ERASED})"
    )
    empty = {**QUESTION, "answers": [{"text": "", "answer_start": 0}]}
    assert refusal("xquad", "de", '{"a": ""}', squad(empty)) == (
        f"gold/xquad/test-de.json: the answer to 'a' is empty; {ERASED}"
    )


def test_a_different_number_of_lines_is_refused(refusal) -> None:
    assert refusal("pawsx", "de", "0\n1\n", "0\n1\n1\n") == (
        "ours/pawsx/test-de.tsv: 2 labels, but gold/pawsx/test-de.tsv has 3; both files need one for each test item"
    )
    assert refusal("tatoeba", "de", "0\n1\n2\n", "0\n1\n").startswith(
        "ours/tatoeba/test-de.tsv: 3 lines, but gold/tatoeba/test-de.tsv has 2"
    )
    assert refusal("udpos", "de", "X\n\nVERB\n", "X\n").startswith(
        "ours/udpos/test-de.tsv: 2 sentences, but gold/udpos/test-de.tsv has 1"
    )


def test_sentences_of_a_different_length_are_refused(refusal) -> None:
    assert refusal("udpos", "de", "X\n\nX\nVERB\n\nX\n", "X\n\nX\nVERB\nX\n\nX\n") == (
        "ours/udpos/test-de.tsv:3: a sentence of 2 tags has 3 in gold/udpos/test-de.tsv:3 (here 4 tags in 3 sentences,"
        " there 5 tags in 3 sentences); both files need the same sentences"
    )


def test_labels_outside_the_tasks_set_are_refused(refusal) -> None:
    assert refusal("xnli", "de", "neutral\nmaybe\n", "neutral\nneutral\n") == (
        "ours/xnli/test-de.tsv:2: 'maybe' is not one of contradiction, entailment, neutral"
    )
    assert "ours/pawsx/test-de.tsv:2: '' is not one of 0, 1" in refusal("pawsx", "de", "0\n\n1\n", "0\n1\n1\n")
    assert "ours/panx/test-de.tsv:3: 'B-MISC' is not one of B-LOC" in refusal("panx", "de", "O\n\nB-MISC\n", "O\n\nO\n")
    assert "gold/udpos/test-de.tsv:1: 'CONJ' is not one of ADJ" in refusal("udpos", "de", "ADJ\n", "CONJ\n")


def test_different_sets_of_questions_are_refused(refusal) -> None:
    second = {**QUESTION, "id": "b"}
    assert refusal("xquad", "de", '{"b": "Paris"}', squad(QUESTION, second)) == (
        "ours/xquad/test-de.json: no answer to 1 of the 2 questions in gold/xquad/test-de.json, such as 'a';"
        " one without an answer has the answer ''"
    )
    assert refusal("xquad", "de", '{"a": "", "c": "", "b": "Paris"}', squad(QUESTION, second)) == (
        "ours/xquad/test-de.json: answers 1 questions that are not in gold/xquad/test-de.json, such as 'c'"
    )


def test_gold_answers_must_exist_and_be_in_their_context(refusal) -> None:
    ours = '{"a": "Paris"}'
    assert refusal("tydiqa", "fi", ours, squad(QUESTION, context="In London.")) == (
        "gold/tydiqa/test-fi.json: the answer to 'a', 'Paris', is not in its context"
    )
    assert refusal("tydiqa", "fi", ours, squad({**QUESTION, "answers": []})) == (
        "gold/tydiqa/test-fi.json: question 'a' has no answer; a gold file has at least one for each"
    )


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "KeyError 'context'"),
        ('{"version": "1.1"}', "KeyError 'data'"),
        ("7", "TypeError"),
        (squad({**QUESTION, "id": 7}), "TypeError id 7 is not a text"),
        (squad({**QUESTION, "answers": [{"text": 7}]}), "TypeError"),
    ],
)
def test_json_of_another_shape_is_refused(refusal, gold: str, why: str) -> None:
    shape = "gold/mlqa/test-de.json: not SQuAD's JSON (data > paragraphs > context, qas > id, answers > text): "
    assert refusal("mlqa", "de", '{"a": "Paris"}', gold).startswith(shape + why)


def test_predictions_that_are_not_answers_are_refused(refusal) -> None:
    assert refusal("mlqa", "de", '["Paris"]', squad(QUESTION)) == (
        "ours/mlqa/test-de.json: not a JSON object; predictions are {question id: answer}"
    )
    assert refusal("mlqa", "de", '{"a": null}', squad(QUESTION)) == (
        "ours/mlqa/test-de.json: the answer to 'a' is None; an answer is a text, or empty"
    )


def test_a_file_without_questions_is_refused(refusal) -> None:
    assert refusal("mlqa", "de", "{}", '{"data": []}') == "gold/mlqa/test-de.json: holds no question"


def test_broken_files_are_refused(refusal) -> None:
    assert refusal("mlqa", "de", '{\n"a": "Paris",\n', squad(QUESTION)).startswith(
        "ours/mlqa/test-de.json:3: not JSON: "
    )
    for unreadable in ("[" * 100_000, "9" * 5000):
        assert "ours/mlqa/test-de.json: not JSON that can be read: " in refusal(
            "mlqa", "de", unreadable, squad(QUESTION)
        )
    assert refusal("pawsx", "de", b"0\n1\n\xff\n", "0\n1\n1\n") == "ours/pawsx/test-de.tsv:3: not UTF-8"
    assert refusal("pawsx", "de", "0\n", b"\xef\xbb\xbf0\n\xe9\n") == "gold/pawsx/test-de.tsv:2: not UTF-8"
    for task in ("xnli", "panx", "xquad", "bucc2018", "tatoeba"):
        name = file_name(task, "de")
        for nothing in ("", "\n", b"\xef\xbb\xbf", "\r\n \r\n"):
            assert refusal(task, "de", nothing, "") == f"ours/{name}: is empty"


def test_bad_lines_of_retrieval_files_are_refused(refusal) -> None:
    assert refusal("bucc2018", "de", "de-1\ten-1\nde-2 en-2\n", "de-1\ten-1\n") == (
        "ours/bucc2018/test-de.tsv:2: 'de-2 en-2' is not SOURCE-ID<tab>ENGLISH-ID"
    )
    assert "gold/bucc2018/test-de.tsv:1:" in refusal("bucc2018", "de", "de-1\ten-1\n", "de-1\ten-1\t0.9\n")
    assert "ours/bucc2018/test-de.tsv:2: '' is not" in refusal("bucc2018", "de", "de-1\ten-1\n\n", "de-1\ten-1\n")
    for number in ("-1", "1.0", "x", "", "٣", "07", "9" * 30):
        assert refusal("tatoeba", "de", f"0\n{number}\n1\n", "0\n1\n2\n") == (
            f"ours/tatoeba/test-de.tsv:2: {number!r} is not a sentence number; a line is 0, 1, 2, ..."
        )


def test_files_that_the_task_does_not_have_are_refused(some: Path) -> None:
    file = write(some / "predictions/pawsx/test-sw.tsv", "0\n")
    with pytest.raises(EvalError, match=r"test-sw\.tsv: pawsx has files test-XX\.tsv with XX one of de, en, es"):
        scores_of(some)
    file.unlink()
    file = write(some / "predictions/mlqa/test-de.tsv", "0\n")
    with pytest.raises(EvalError, match=r"test-de\.tsv: mlqa has files test-XX\.json"):
        scores_of(some)
    file.unlink()
    write(some / "predictions/mlqa/test-de.npz", "")  # files with other suffixes are ignored
    write(some / "predictions/mewslix/test-ar.json", "")
    assert len(scores_of(some).tasks) == 4


def test_missing_folders_and_unknown_names_are_refused(some: Path) -> None:
    with pytest.raises(EvalError, match="nowhere: no such folder"):
        score_directory(some / "nowhere", some / "labels")
    with pytest.raises(EvalError, match="nowhere: no such folder"):
        score_directory(some / "predictions", some / "nowhere")
    with pytest.raises(EvalError, match=r"udpos: no predictions with labels in .*; a file is xnli/test-de\.tsv"):
        score_directory(some / "predictions/udpos", some / "labels")
    with pytest.raises(DataError, match="task 'pos' is not one of XTREME's"):
        scores_of(some, tasks=["pawsx", "pos"])
    with pytest.raises(EvalError, match="predictions/xnli: nothing to score: no predictions: ar, bg"):
        scores_of(some, tasks=["pawsx", "xnli"])
    with pytest.raises(EvalError, match="no task has language 'xx'; there are af, ar"):
        scores_of(some, languages=["de", "xx"])
    (some / "labels/pawsx/test-de.tsv").unlink()
    with pytest.raises(EvalError, match=r"test-de\.tsv: No such file"):
        score_file("pawsx", "de", some / "predictions/pawsx/test-de.tsv", some / "labels/pawsx/test-de.tsv")
