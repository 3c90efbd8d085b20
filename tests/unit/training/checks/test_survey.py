"""`check` names unusable rows with their reasons: those of a sample or, with --all-rows, of all rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import LANGUAGES, XMIXUP, corpus_rows, run_values, write_task_data
from transformers import AutoTokenizer

from data_pipeline.records import BadRow, DataError
from data_pipeline.text.tokenizer import TokenizerTrainingConfig, train_tokenizer
from training.assembly import assemble_data
from training.check import check_run
from training.checks.survey import by_reason
from training.config import RunConfig
from training.run_file import validate
from training.run_folder.prepare import prepare

# Like Gemma's, it has no system role.
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ITEMS = 60  # a language: more than the sample of 32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [row[what] for language in LANGUAGES for row in corpus_rows(language) for what in ("question", "answer")]
    train_tokenizer(texts, folder, TokenizerTrainingConfig(vocab_size=400))
    made = AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def conversations(folder: Path, tokenizer: Path, change: Any, **changes: Any) -> RunConfig:
    """The tiny run on conversations, in which `change(language, number, turns)` changed some."""
    data = folder / "data"
    data.mkdir()
    for language in LANGUAGES:
        lines = []
        for number, row in enumerate(corpus_rows(language, ITEMS)):
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            turns = change(language, number, turns) or turns
            lines.append(json.dumps({"id": row["id"], "language": language, "turns": turns}) + "\n")
        (data / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    columns = {"id": "id", "language": "language", "messages": "turns"}
    values = {
        "tokenizer": {"path": str(tokenizer)},
        "data.sources": [{"name": "talks", "files": "*.jsonl", "columns": columns}],
        "data.template": {"name": "chat"},
        "data.sequence_length": 160,
        "data.micro_batch_tokens": 960,
    }
    return validate(run_values(data, folder / "run", **{**values, **changes}), "test")


def with_system(where: Any) -> Any:
    def change(language: str, number: int, turns: list[dict[str, str]]) -> list[dict[str, str]] | None:
        return [{"role": "system", "content": "Be brief."}, *turns] if where(language, number) else None

    return change


REFUSED = "the chat template refuses the turns system, user: System role not supported"


def test_the_templates_reason_is_reported_if_no_row_of_a_language_is_usable(tmp_path: Path, tokenizer: Path) -> None:
    """And not `data.sequence_length` as the cause."""
    config = conversations(
        tmp_path, tokenizer, with_system(lambda language, _: language == "sw"), **{"data.max_bad_rows": 1000}
    )
    with pytest.raises(DataError) as refusal:
        list(check_run(config))
    text = str(refusal.value)
    assert text.startswith(f"{tmp_path}/data/sw.jsonl:")
    assert text.endswith(f": {REFUSED} (none of the 32 rows looked at in language 'sw' is usable: 32 such)")


def test_an_unusable_row_of_the_sample_is_refused_by_check_and_by_a_start(tmp_path: Path, tokenizer: Path) -> None:
    config = conversations(
        tmp_path, tokenizer, with_system(lambda language, number: (language, number % 4) == ("sw", 0))
    )
    for start in (lambda: list(check_run(config)), lambda: assemble_data(config, prepare(config))):
        with pytest.raises(DataError) as refusal:
            start()
        text = str(refusal.value)
        assert text.startswith(f"{tmp_path}/data/sw.jsonl:")
        assert f": {REFUSED} (" in text
        sample = "of each language; crosslift check --all-rows reads all; data.max_bad_rows is"
        assert f"unusable rows among the first 32 {sample}" in text
    allowed = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_rows": 100})})
    lines = list(check_run(allowed))
    assert lines[-1] == "ready to train"
    place = lines.index("of the first 32 rows of each language (crosslift check --all-rows reads all):")
    assert lines[place + 1].startswith("unusable, ")
    assert REFUSED in lines[place + 1]


def last_rows(language: str, number: int, turns: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """Rows of three kinds of mistakes, few enough to be missed by a sample."""
    if language == "de" and number in (50, 51, 52, 53):
        turns[1]["content"] = f"{number}\u2581Antwort"
    if (language, number) == ("zh", 55):
        return [{"role": "system", "content": "."}, *turns]
    if (language, number) == ("sw", 57):
        return [turns[0], *turns]
    return None


def extend(lines: list[str], more: Iterator[str]) -> None:
    """Like `list.extend`, but keeps the lines before an exception."""
    for line in more:
        lines.append(line)


def test_all_rows_are_read_and_summed_up_by_reason(tmp_path: Path, tokenizer: Path) -> None:
    config = conversations(tmp_path, tokenizer, last_rows)
    with pytest.raises(DataError, match=r"\(6 unusable rows; data.max_bad_rows is 0\)$"):
        list(check_run(config, all_rows=True))
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_rows": 5})})
    lines: list[str] = []
    with pytest.raises(DataError) as refusal:
        extend(lines, check_run(config, all_rows=True))
    data = tmp_path / "data"
    place = lines.index("all rows: 240 read, 6 of them unusable")
    assert lines[place + 1] == (
        f"unusable, 4 rows, such as {data}/de.jsonl:51: the tokenizer writes '50 Antwort' for '50\u2581Antwort':"
        " U+2581 is lost; change or remove the row"
    )
    assert lines[place + 2] == f"    {data}/de.jsonl:52, {data}/de.jsonl:53 and 1 more"
    others = sorted(lines[place + 3 :])
    assert others == [
        f"unusable, 1 row, such as {data}/sw.jsonl:58: 'turns': the turns are user, user, assistant: turn 2 is user;"
        " they must be an optional system, then user and assistant in turn",
        f"unusable, 1 row, such as {data}/zh.jsonl:56: {REFUSED}",
    ]
    assert str(refusal.value).endswith("(6 unusable rows; data.max_bad_rows is 5)")
    allowed = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_rows": 6})})
    lines = list(check_run(allowed, all_rows=True))
    assert "all rows: 240 read, 6 of them unusable" in lines
    assert len([line for line in lines if line.startswith("unusable, ")]) == 3, (
        "each kind once, not again for the sample"
    )
    assert lines[-1] == "ready to train"


def test_all_rows_of_a_task_are_read_too(tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data")
    tokenizer = {"vocab_size": 120, "style": "encoder"}
    changes = {**XMIXUP, "tokenizer.train": tokenizer, "data.heldout_items": 5}  # which are read too
    config = validate(run_values(data, tmp_path / "run", **changes), "test")
    assert "all rows: 160 read, 0 of them unusable" in list(check_run(config, all_rows=True))


def test_if_no_row_is_usable_the_reason_of_the_first_is_reported(tmp_path: Path, tokenizer: Path) -> None:
    config = conversations(tmp_path, tokenizer, lambda language, number, turns: [turns[0], *turns])
    with pytest.raises(
        DataError, match=r"source 'talks' has no usable rows; 240 rows are unusable, such as .*de.jsonl:1: "
    ):
        list(check_run(config, all_rows=True))


def test_reasons_that_differ_only_in_quoted_text_are_one_kind() -> None:
    rows = [BadRow(f"a:{n}", f"'content'[{n}] is {text!r}, not 7") for n, text in enumerate(["it's", 'say "x"', "b"])]
    rows += [BadRow(f"c:{n}", f"'{each}': U+{ord(each):04X} is lost") for n, each in enumerate("ก▁«🙂")]
    assert list(by_reason([*rows, BadRow("b:1", "'content' is empty")])) == [
        "unusable, 4 rows, such as c:0: 'ก': U+0E01 is lost",
        "    c:1, c:2 and 1 more",
        "unusable, 3 rows, such as a:0: 'content'[0] is \"it's\", not 7",
        "    a:1, a:2",
        "unusable, 1 row, such as b:1: 'content' is empty",
    ]
