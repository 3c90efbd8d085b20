"""Questions of `crosslift generate`: reading them, the template's language, and the language of the shift."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_task_model
import torch
from small_tokenizers import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from data_pipeline.records import DataError, Message
from data_pipeline.text.chat import Chat
from evals.commands import eval as eval_command
from evals.commands import generate
from evals.errors import EvalError
from evals.opening import Question, answer, open_model, read_questions, without_vector
from modeling.errors import ModelError
from modeling.generation import Generation, Prompt, ShiftedGenerator
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.weights.weight_files import directory_hash

LANGUAGES = ("en", "zh", "sw", "bn")  # bn has no vector
AREA = (1, 3)
CUSTOM = {"name": "custom", "prompt": "A question in {language}: {user}\nIts answer in {response_language}: "}
Opened = tuple[ShiftedGenerator, Chat]


def write_model(directory: Path, *, shifts: bool = False, plain: bool = False, **described: Any) -> Path:
    """Write a tiny Llama with one token per byte, as an export; `plain`: as a Hugging Face directory."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(5)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=512, initializer_range=0.3, eos_token_id=1,
        )
    ).save_pretrained(directory)  # fmt: skip
    if shifts:
        write_vectors(directory, torch.randn(4, 2, 32) * 2)
    if not plain:
        about = {"format": 1, "objective": "shifcon" if shifts else "sft", "languages": LANGUAGES, "dominant": "en"}
        (directory / "crosslift.json").write_text(json.dumps({**about, "template": {"name": "plain"}, **described}))
    return directory


def write_vectors(directory: Path, mean: torch.Tensor, text_mean: torch.Tensor | None = None) -> None:
    LanguageVectors(
        languages=LANGUAGES,
        dominant="en",
        layers=AREA,
        area=AREA,
        mean=mean,
        state_norm=torch.ones(4, 2),
        tokens=torch.tensor([9, 9, 9, 0]),
        estimator="test",
        model_hash=directory_hash(directory),
        **({} if text_mean is None else {"text_mean": text_mean, "text_deviation": torch.ones(32)}),
    ).save(directory / "language_vectors.safetensors")


def ask(opened: Opened, *questions: Question) -> list[dict[str, Any]]:
    return list(answer(*opened, questions, max_new_tokens=4))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """The prompts passed to `generate`, which is replaced and returns empty answers."""
    prompts: list[Prompt] = []

    def record(self: ShiftedGenerator, batch: list[Prompt], *_: object) -> list[Generation]:
        prompts.extend(batch)
        return [Generation("", [], True, False) for _ in batch]

    monkeypatch.setattr(ShiftedGenerator, "generate", record)
    return prompts


@pytest.mark.parametrize("response", [None, "sw"])
@pytest.mark.parametrize(("shifts", "language"), [(False, "auto"), (False, "none"), (True, "none")])
def test_a_prompt_of_unknown_language_uses_the_template_of_the_dominant_language(
    tmp_path: Path, recorded: list[Prompt], shifts: bool, language: str, response: str | None
) -> None:
    """The template names the dominant language, nothing is shifted; the export may set the response language."""
    for template, words in (
        ({"name": "alpaca"}, "the request in {}. Please answer in {}.\n\n### Instruction:\n3+4?\n\n### Response:"),
        (CUSTOM, "A question in English: 3+4?\nIts answer in {}: "),
    ):
        model = write_model(tmp_path / template["name"], shifts=shifts, template=template, response_language=response)
        generator, chat = open_model(str(model))
        (row,) = ask((generator, chat), Question("3+4?", language))
        name = "Swahili" if response else "English"
        assert chat.decode(recorded[-1].ids).endswith(words.format(name, name))
        assert (row["language"], row["response_language"]) == (None, response)
        assert recorded[-1].language is None


def test_a_given_language_is_used_by_the_template_and_the_shift(tmp_path: Path, recorded: list[Prompt]) -> None:
    generator, chat = open_model(str(write_model(tmp_path, shifts=True, template=CUSTOM)))
    ask((generator, chat), Question("3+4?", "sw"), Question("3+4?", "zh", "sw"))
    assert [(prompt.language, prompt.response_language) for prompt in recorded] == [("sw", "sw"), ("zh", "sw")]
    assert [chat.decode(prompt.ids) for prompt in recorded] == [
        "A question in Swahili: 3+4?\nIts answer in Swahili: ",
        "A question in Chinese: 3+4?\nIts answer in Swahili: ",
    ]


def test_without_a_dominant_language_templates_that_name_a_language_are_refused(
    tmp_path: Path, recorded: list[Prompt]
) -> None:
    for template, field in (({"name": "alpaca"}, "{response_language}"), (CUSTOM, "{language}")):
        opened = open_model(str(write_model(tmp_path / template["name"], template=template, dominant=None)))
        question = Question("3+4?", "auto", origin="questions.jsonl:7")
        with pytest.raises(EvalError) as caught:
            ask(opened, question)
        message = (
            f"questions.jsonl:7: the {template['name']} template names {field}, which is not known; give --language"
        )
        assert (str(caught.value), caught.value.exit_status) == (message, 2)
        ask(opened, Question("3+4?", "sw"))
    opened = open_model(str(write_model(tmp_path / "plain", dominant=None)))
    ask(opened, Question("3+4?", "auto"))
    opened = open_model(str(write_model(tmp_path / "one", template=CUSTOM, dominant=None, languages=["sw"])))
    ask(opened, Question("3+4?", "none"))
    assert opened[1].decode(recorded[-1].ids) == "A question in Swahili: 3+4?\nIts answer in Swahili: "


def test_a_plain_hugging_face_directory_takes_any_language_or_none(tmp_path: Path, recorded: list[Prompt]) -> None:
    generator, chat = open_model(str(write_model(tmp_path, plain=True)))
    ask((generator, chat), *(Question("3+4?", "auto", response) for response in (None, "yo")), Question("3+4?", "yo"))
    assert [chat.decode(prompt.ids) for prompt in recorded] == ["3+4?\n", "3+4?\nAnswer in Yoruba:\n", "3+4?\n"]


def test_language_none_shifts_no_token(tmp_path: Path) -> None:
    opened = open_model(str(write_model(tmp_path, shifts=True, response_language="sw")))
    generator, _ = opened
    plain, with_response, shifted = ask(
        opened, Question("3 + 4?", "none"), Question("3 + 4?", "none", "zh"), Question("3 + 4?", "en")
    )
    assert generator.shift is not None
    with generator.shift.disabled():
        unshifted = ask(opened, Question("3 + 4?", "en"), Question("3 + 4?", "en", "zh"))
    assert [plain["output"], with_response["output"]] == [row["output"] for row in unshifted]
    assert shifted["output"] != plain["output"], "the shift changes the answer"
    assert [row["shifted"] for row in (plain, with_response, shifted)] == [False, False, True]
    assert [row["response_language"] for row in (plain, with_response, shifted)] == ["sw", "zh", "sw"]


def test_language_auto_uses_the_question_and_not_the_template(tmp_path: Path) -> None:
    """The question's words are nearest to Chinese; the whole prompt with its English template is nearest to English."""
    model = write_model(tmp_path, shifts=True, template={"name": "alpaca"})
    generator, chat = open_model(str(model))
    ids, content = chat.prompt_ids([Message("user", "安娜有三个苹果？")], "en", "en")
    states = generator.model(torch.tensor(ids[None]).long(), output_hidden_states=True).hidden_states[AREA[0]][0]
    text_mean = torch.zeros(4, 32)
    text_mean[0], text_mean[1], text_mean[2] = states[1:].mean(0), states[torch.tensor(content)].mean(0), 99.0
    write_vectors(model, torch.randn(4, 2, 32), text_mean.detach())
    opened = open_model(str(model))
    (row,) = ask(opened, Question("安娜有三个苹果？", "auto"))
    assert (row["language"], row["response_language"], row["shifted"]) == ("zh", "zh", True)


def test_languages_that_the_model_lacks_are_refused(tmp_path: Path, recorded: list[Prompt]) -> None:
    opened = open_model(str(write_model(tmp_path)))
    for question, message in {
        Question("?", "sww"): "language 'sww': the model has en, zh, sw, bn; or use auto or none",
        Question("?", "sw", "sww"): "response language 'sww': the model has en, zh, sw, bn",
        Question("?", "sw", "auto", "q.jsonl:3"): "q.jsonl:3: response language 'auto': the model has en, zh, sw, bn",
    }.items():
        with pytest.raises(EvalError) as caught:
            ask(opened, Question("?", "sw"), question)
        assert str(caught.value) == message
    assert not recorded


def test_a_lone_surrogate_is_refused_with_its_line(tmp_path: Path) -> None:
    opened = open_model(str(write_model(tmp_path)))
    with pytest.raises(EvalError, match=r"^q\.jsonl:3: the text is not valid Unicode"):
        ask(opened, Question("\ud800", "sw", origin="q.jsonl:3"))


def test_questions_of_a_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    lines = [
        '\ufeff{"prompt": "one\u2028two\x85three"}',
        "",
        '{"prompt": "b", "language": "sw", "response_language": "en"}\r',
        " \r",
        '{"prompt": "c", "language": null}',
    ]
    file.write_bytes("\n".join(lines).encode())
    assert read_questions(file, "auto") == [
        Question("one\u2028two\x85three", "auto", None, f"{file}:1"),
        Question("b", "sw", "en", f"{file}:3"),
        Question("c", "auto", None, f"{file}:5"),
    ]
    languages = [(each.language, each.response_language) for each in read_questions(file, "de", "zh")]
    assert languages == [
        ("de" if each.language == "auto" else each.language, each.response_language or "zh")
        for each in read_questions(file, "auto")
    ]


TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
]
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_system_messages_and_earlier_turns_are_written_by_the_template(tmp_path: Path, recorded: list[Prompt]) -> None:
    model = write_model(tmp_path / "m", template={"name": "chat"})
    (model / "chat_template.jinja").write_text(CHATML)
    file = tmp_path / "q.jsonl"
    rows = [
        {"messages": TURNS},
        {"messages": [{"from": "system", "value": "Own."}, *TURNS]},
        {"messages": [{"from": "human", "value": "three?"}], "system": "Row's."},
        {"prompt": "four?"},
        {"prompt": "five?", "system": "Row's."},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_model(str(model))
    ask(opened, *read_questions(file, "en", system="Given."), Question("six?", "en"))
    earlier = "<user>one?</s><assistant>1</s><user>two?</s><assistant>"
    assert [opened[1].decode(prompt.ids).removeprefix("<s>") for prompt in recorded] == [
        f"<system>Given.</s>{earlier}",
        f"<system>Own.</s>{earlier}",
        "<system>Row's.</s><user>three?</s><assistant>",
        "<system>Given.</s><user>four?</s><assistant>",
        "<system>Row's.</s><user>five?</s><assistant>",
        "<user>six?</s><assistant>",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TURNS[:2]}, "'messages' must end with a user's turn, which is to be answered"),
        ({"messages": TURNS[1:]}, "'messages': the turns are assistant, user: turn 1 is assistant;"),
        ({"messages": TURNS, "prompt": "x"}, "has both 'prompt' and 'messages'; give one"),
        ({"messages": "hello"}, "'messages' is not valid JSON"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages'[0] has role 'tool'"),
        ({"messages": TURNS, "tools": [{"name": "f"}]}, "'tools' beside 'messages'"),
    ],
)
def test_a_conversation_that_cannot_be_answered_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        read_questions(file, "auto")
    assert str(caught.value).startswith(f"{file}:1: {message}")


def test_a_rows_other_fields_are_kept_with_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "q.jsonl"
    rows = [{"id": 7, "prompt": "a", "gold": ["x"], "output": "old"}, {"id": 8, "messages": TURNS, "n": None}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate(str(write_model(tmp_path / "m")), file=file, max_new_tokens=2, as_json=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["id"], first["gold"], first["prompt"]) == (7, ["x"], "a")
    assert (second["id"], second["messages"], second["n"]) == (8, TURNS, None)
    assert "prompt" not in second
    assert first["output"] != "old"
    assert set(first) - {"id", "gold"} == set(second) - {"id", "messages", "n"} | {"prompt"}


def test_a_run_folder_opens_its_export(tmp_path: Path, recorded: list[Prompt]) -> None:
    run = tmp_path / "run"
    write_model(run / "model", shifts=True)
    (run / "checkpoints").mkdir()
    ask(open_model(str(run)), Question("a", "sw"))
    assert recorded[0].language == "sw"


def test_a_run_or_checkpoint_without_an_export_names_the_command(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    for folder, what in ((tmp_path / "run", "a run without an export"), (checkpoint, "a checkpoint")):
        with pytest.raises(ModelError, match=rf"^{folder}: {what}; `crosslift export {folder} --output DIR` makes "):
            open_model(str(folder))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    trained = tiny_task_model.export(tmp_path / "trained", "classification", ("a", "b"))
    plain = tiny_task_model.export(tmp_path / "plain", "classification", ("a", "b"), family="bert")
    (plain / "crosslift.json").unlink()
    with pytest.raises(ModelError, match=r"an encoder trained for classification: it cannot generate text$") as refused:
        generate(str(trained), prompt="a")
    assert refused.value.exit_status == 2
    with pytest.raises(
        ModelError, match="a bert model is an encoder, not a decoder language model: it cannot generate text"
    ):
        generate(str(plain), prompt="a")
    (tmp_path / "mgsm_en.tsv").write_text("a\t1\n")
    with pytest.raises(ModelError, match=r"an encoder trained for classification"):
        eval_command(str(trained), output=tmp_path / "out", data_dir=tmp_path)


def test_sampling_options_reach_the_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_model(tmp_path))

    def answers(**options: Any) -> str:
        generate(model, prompt="a", max_new_tokens=12, **options)
        return capsys.readouterr().out

    assert answers(temperature=1.0, seed=1) == answers(temperature=1.0, seed=1) != answers(temperature=1.0, seed=2)
    assert answers(temperature=9.0, top_k=1) == answers() == answers(temperature=9.0, top_p=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, "--top-p 0.9: needs sampling; give --temperature above 0"),
        ({"top_k": 3}, "--top-k 3: needs sampling"),
        ({"temperature": 1.0, "num_beams": 2}, "--num-beams 2: beam search does not sample"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p 1.5: must be above 0 and at most 1"),
        ({"temperature": float("inf")}, "--temperature inf: must be a finite number"),
    ],
)
def test_impossible_sampling_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvalError) as refused:
        generate("nowhere", prompt="a", **options)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "b", "language": 5}', ":2: 'language' is int; it must be text"),
        (b'{"prompt": "b", "response_language": ["sw"]}', ":2: 'response_language' is list; it must be text"),
        (b'{"prompt": 5}', ":2: 'prompt' is int; it must be text"),
        (b'{"question": "b"}', ":2: no field 'prompt'; the row has 'question'"),
        (b'"b"', ":2: a JSON str; each line must be one JSON object"),
        (b"b", ":2: not valid JSON (Expecting value at column 1); each line must be one JSON object"),
        (b'{"prompt": "\xff"}', ":2: not UTF-8 (byte 0xff, number 13 of the line)"),
    ],
)
def test_a_line_that_is_not_a_question_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_questions(file, "auto")
    assert (str(caught.value), caught.value.exit_status) == (f"{file}{message}", 2)


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n \n")
    for file, message in (("q.jsonl", "q.jsonl: holds no question"), ("x.jsonl", "x.jsonl: cannot be read: No such")):
        with pytest.raises(EvalError, match=message):
            read_questions(tmp_path / file, "auto")


def test_the_command_names_the_languages_that_ran_unshifted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A language without a vector is reported; a model without a shift and a question with language none are not."""
    model = str(write_model(tmp_path / "shifts", shifts=True))
    file = tmp_path / "q.jsonl"
    rows = [{"prompt": "a", "language": "sw"}, {"prompt": "b", "language": "bn"}, {"prompt": "c", "language": "none"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate(model, file=file, max_new_tokens=2)
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "no language vector: bn ran unshifted"
    generate(model, file=file, response_language="en", max_new_tokens=2, as_json=True)
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "no language vector: bn ran unshifted"
    rows_out = [(row["prompt"], row["response_language"], row["shifted"]) for row in map(json.loads, out.splitlines())]
    assert rows_out == [("a", "en", True), ("b", "en", False), ("c", "en", False)]
    for quiet, language in ((model, "sw"), (model, "none"), (str(write_model(tmp_path / "sft")), "bn")):
        generate(quiet, prompt="a", language=language, max_new_tokens=2)
        assert "unshifted" not in capsys.readouterr().err


def test_an_answer_in_a_language_without_a_vector_is_named_too(tmp_path: Path) -> None:
    generator, chat = open_model(str(write_model(tmp_path, shifts=True, response_language="bn")))
    rows = ask((generator, chat), Question("a", "sw"), Question("a", "none"))
    assert without_vector(generator, rows) == ["bn"]
    assert without_vector(generator, rows[1:]) == []
