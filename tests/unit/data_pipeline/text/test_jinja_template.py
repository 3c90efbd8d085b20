"""jinja_template.py: the exported chat template gives the prompts of training, token for token."""

from __future__ import annotations

import copy
import datetime as dt
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import ITEMS, KINDS, LANGUAGES, TEMPLATES, small_tokenizers
from transformers import AutoTokenizer

from data_pipeline.records import Conversation, Message
from data_pipeline.text.chat import Chat
from data_pipeline.text.jinja_template import Defaults, jinja_template
from data_pipeline.text.templates import TemplateConfig

SYSTEM, FIRST, ANSWER, SECOND = "Be brief.\n", "one {user} {{ two }}", "{% if x %} Uno 'y\" \\n", "drei\nvier 😀"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small_tokenizers(tmp_path_factory.mktemp("spm"))


def exported(chat: Chat, defaults: Defaults, folder: Path) -> Any:
    """The tokenizer as loaded from an export."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template, wrong = jinja_template(chat, defaults)
    assert wrong is None
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def conversations(question: str) -> list[list[Message]]:
    one = [Message("user", question)]
    more = [Message("user", FIRST), Message("assistant", ANSWER), Message("user", SECOND)]
    system = [Message("system", SYSTEM)]
    return [one, system + one, more, system + more, [*more, Message("assistant", "x"), *one]]


def ids(tokenizer: Any, messages: list[Message], **variables: Any) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **variables))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda each: each["name"])
def test_apply_chat_template_gives_the_prompt_of_training(
    tokenizers: dict[str, Any], kind: str, template: dict[str, Any], tmp_path: Path
) -> None:
    if (kind, template["name"]) == ("prefixed", "chat"):
        pytest.skip("the tokenizer adds a space where training splits the turns, which the model's own template cannot")
    chat = Chat(tokenizers[kind], TemplateConfig(**template), LANGUAGES)
    tokenizer = exported(chat, Defaults("en"), tmp_path)
    for language, (question, _) in ITEMS.items():
        for messages in conversations(question):
            expected = chat.prompt_ids(messages, language, language)[0].tolist()
            assert ids(tokenizer, messages, language=language) == expected
            if language == "en":
                assert ids(tokenizer, messages) == expected, "without a language: the dominant one"
            assert ids(tokenizer, messages, language=language, response_language="sw") == (
                chat.prompt_ids(messages, language, "sw")[0].tolist()
                if template["name"] != "chat"
                else expected  # training had no answers in another language, so the template names none
            )


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda each: each["name"])
def test_a_fixed_response_language_is_requested_as_in_training(
    tokenizers: dict[str, Any], template: dict[str, Any], tmp_path: Path
) -> None:
    chat = Chat(tokenizers["bytes-bos"], TemplateConfig(**template), LANGUAGES)
    tokenizer = exported(chat, Defaults("en", "de", may_differ=True), tmp_path)
    for messages in conversations("how many?"):
        assert ids(tokenizer, messages) == chat.prompt_ids(messages, "en", "de")[0].tolist()
        assert ids(tokenizer, messages, language="sw") == chat.prompt_ids(messages, "sw", "de")[0].tolist()
        named = ids(tokenizer, messages, language="sw", response_language="sw")
        assert named == chat.prompt_ids(messages, "sw", "sw")[0].tolist()
    prompt = tokenizer.decode(ids(tokenizer, [Message("user", "q")], language="sw"))
    assert "German" in prompt


def test_a_language_may_be_given_by_its_name(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    chat = Chat(tokenizers["bytes"], TemplateConfig(name="alpaca"), LANGUAGES)
    tokenizer = exported(chat, Defaults("en"), tmp_path)
    messages = [Message("user", "q")]
    assert ids(tokenizer, messages, language="Swahili") == ids(tokenizer, messages, language="sw")


def test_turns_that_training_refuses_are_refused(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    from jinja2 import TemplateError

    tokenizer = exported(Chat(tokenizers["spm"], TemplateConfig(name="plain"), LANGUAGES), Defaults("en"), tmp_path)
    for roles in (["user", "user"], ["assistant"], ["user", "system"]):
        with pytest.raises(TemplateError, match="user and assistant in turn"):
            ids(tokenizer, [Message(role, "x") for role in roles])  # type: ignore[arg-type]


def test_without_a_generation_prompt_a_conversation_equals_the_training_sample(
    tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    from data_pipeline.records import Record

    for number, (kind, template) in enumerate(product(("spm", "prefixed", "bytes-bos"), TEMPLATES[:2])):
        chat = Chat(tokenizers[kind], TemplateConfig(**template), LANGUAGES)
        tokenizer = exported(chat, Defaults("en"), tmp_path / str(number))
        messages = (Message("user", "one"), Message("assistant", "Uno"))
        sample = chat.tokenize(Record("1", "1", "en", "", Conversation(messages, "en")))
        turns = [{"role": message.role, "content": message.content} for message in messages]
        assert tokenizer.apply_chat_template(turns, return_dict=False) == sample.input_ids.tolist()


DATED = (  # as Llama 3's: the date is a variable, by default today's
    "{% if date_string is not defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }} "
    "{% set form = '%A, %-d.%m.%y' %}{{ strftime_now(form) }}|"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_export_keeps_the_date_and_the_variables_of_training(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizers["bytes"])
    tokenizer.chat_template = DATED + "{{ 'thinking' if enable_thinking else 'not thinking' }}{{ level }}{{ who }}"
    variables = {"enable_thinking": False, "level": 3, "who": 'a "b"'}
    template = TemplateConfig(name="chat", date=dt.date(2024, 2, 5), variables=variables)
    chat = Chat(tokenizer, template, LANGUAGES)
    messages = [Message("user", "q")]
    expected = chat.prompt_ids(messages, "en", "en")[0].tolist()
    opened = exported(chat, Defaults("en"), tmp_path)
    assert ids(opened, messages) == expected
    prompt = tokenizer.decode(expected)
    assert prompt.startswith("05 Feb 2024 Monday, 5.02.24|")
    assert prompt.endswith('not thinking3a "b"')
    assert "thinking3" in tokenizer.decode(ids(opened, messages, enable_thinking=True, date_string="today"))
    assert tokenizer.decode(ids(opened, messages, date_string="today")).startswith("today Monday, 5.02.24|")
    # a reopened export, as `generate` loads it, gives the same prompt
    again = Chat(opened, TemplateConfig(**template.model_dump(mode="json")), LANGUAGES)
    assert again.prompt_ids(messages, "en", "en")[0].tolist() == expected


def test_turns_that_the_template_cannot_reproduce_are_named(tokenizers: dict[str, Any]) -> None:
    chat = Chat(tokenizers["prefixed"], TemplateConfig(name="chat"), LANGUAGES)
    _, wrong = jinja_template(chat, Defaults("en"))
    assert wrong == "turns user, assistant, user (default)"
