"""Exports a run's template as a Jinja chat template, so that the exported tokenizer writes the prompts of training.

`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` with this template gives the ids of
`Chat.prompt_ids`, for messages that spell no special token: training splits such text (`chat.py`), and so does
`apply_chat_template(..., sanitize_control_tokens=True)`. A template that names languages takes the variables `language`
and `response_language`, codes or names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from data_pipeline.records import DataError, Message, Role
from data_pipeline.text.chat import Chat
from data_pipeline.text.templates import ChatTemplate, PatternTemplate, language_name


@dataclass(frozen=True, slots=True)
class Defaults:
    """Languages of a prompt for which the caller gives none."""

    language: str  # code of the prompt's language
    response_language: str | None = None  # code of the answer's language; None: the prompt's language
    may_differ: bool = False  # whether training had answers in another language than their prompts


def jinja_template(chat: Chat, defaults: Defaults) -> tuple[str, str | None]:
    """The chat template, and the first sample conversation for which its tokens differ from training's, or None.

    A tokenizer that adds a space before each text adds one wherever training splits a conversation. Whether and where
    the template must write that space is found by comparing candidates.
    """
    if isinstance(chat.template, ChatTemplate):
        candidates = [_preamble(chat, defaults) + chat.template.text]
    else:
        candidates = [_of_pattern(chat, chat.template, defaults, *spaces) for spaces in product(("", " "), repeat=3)]
    found = []
    for text in candidates:
        wrong = _differences(chat, text, defaults)
        found.append((text, wrong))
        if not wrong:
            break
    text, wrong = min(found, key=lambda each: len(each[1]))
    return text, wrong[0] if wrong else None


def _of_pattern(chat: Chat, template: PatternTemplate, defaults: Defaults, first: str, later: str, answer: str) -> str:
    """Template for plain, alpaca and custom.

    Args:
        first: text before the first user turn.
        later: text before later user turns.
        answer: text before answers.
    """
    end = chat.decode([template.end_id])
    names_languages = template.same != template.differs or any(
        field in ("language", "response_language") for _, field in template.same
    )
    before_user, after_user = (
        f"({same} if code == answer_code else {differs})" if same != differs else same
        for same, differs in zip(_around_user(template.same), _around_user(template.differs), strict=True)
    )
    return "".join(
        [
            _languages(chat, defaults) if names_languages else "",
            "{{- bos_token -}}" if template.bos_id is not None else "",
            "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
            "{%- set turns = messages[1:] -%}{%- else -%}{%- set system = none -%}{%- set turns = messages -%}"
            "{%- endif -%}{%- for message in turns -%}"
            "{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}"
            "{{- raise_exception('the turns must be an optional system, then user and assistant in turn') -}}"
            "{%- endif -%}{%- if message['role'] == 'user' -%}",
            f"{{{{- ({_quoted(first)} if loop.first else {_quoted(later)}) ~ {before_user} ~ message['content'] -}}}}",
            f"{{%- if not loop.last or add_generation_prompt -%}}{{{{- {after_user} -}}}}{{%- endif -%}}",
            f"{{%- else -%}}{{{{- {_quoted(answer)} ~ message['content'] ~ {_quoted(end)} -}}}}",
            "{%- endif -%}{%- endfor -%}",
        ]
    )


def _around_user(pattern: Sequence[tuple[str, str | None]]) -> tuple[str, str]:
    """The pattern's text before and after the user's text, as Jinja expressions."""
    fields = {
        "system": "(system if loop.first and system is not none else '')",
        "language": "name",
        "response_language": "answer_name",
    }
    sides: tuple[list[str], list[str]] = ([], [])
    if not any(field == "system" for _, field in pattern):
        sides[0].append(f"(system ~ {_quoted(chr(10) * 2)} if loop.first and system is not none else '')")
    side = 0
    for literal, field in pattern:
        if literal:
            sides[side].append(_quoted(literal))
        if field == "user":
            side = 1
        elif field is not None:
            sides[side].append(fields[field])
    before_user, after_user = (" ~ ".join(parts) or "''" for parts in sides)
    return f"({before_user})", f"({after_user})"


def _languages(chat: Chat, defaults: Defaults) -> str:
    """Jinja code that sets `code` and `answer_code`, and their English names `name` and `answer_name`."""
    names = json.dumps({code: language_name(code) for code in chat.languages}, ensure_ascii=False)
    answer = "code" if defaults.response_language is None else _quoted(defaults.response_language)
    return (
        f"{{%- set names = {names} -%}}"
        f"{{%- set code = language | default({_quoted(defaults.language)}) -%}}"
        f"{{%- set answer_code = response_language | default({answer}) -%}}"
        "{%- set name = names[code] if code in names else code -%}"
        "{%- set answer_name = names[answer_code] if answer_code in names else answer_code -%}"
    )


def _preamble(chat: Chat, defaults: Defaults) -> str:
    """Code before the tokenizer's own template (chat): training's variables, unless the caller sets them."""
    assert isinstance(chat.template, ChatTemplate)
    parts = [
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(value)} -%}}{{%- endif -%}}"
        for name, value in chat.config.variables.items()
    ]
    parts.append(chat.template.date_macro)
    if defaults.may_differ:
        cue = f"{_quoted(chr(10) + 'Please answer in ')} ~ answer_name ~ '.'"
        parts += [
            _languages(chat, defaults),
            "{%- if code != answer_code -%}{%- set cued = namespace(messages=[]) -%}{%- for message in messages -%}"
            "{%- set cued.messages = cued.messages + [dict(message, content=message['content'] ~ ",
            f"{cue}) if message['role'] == 'user' else message] -%}}",
            "{%- endfor -%}{%- set messages = cued.messages -%}{%- endif -%}",
        ]
    return "".join(parts)


def _quoted(text: str) -> str:
    """A Jinja string literal; Jinja reads JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)


def _literal(value: bool | int | float | str) -> str:
    return _quoted(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)


def _differences(chat: Chat, template: str, defaults: Defaults) -> list[str]:
    """Descriptions of the sample conversations for which the template's tokens differ from training's."""
    wrong = []
    for messages, variables in _samples(chat, defaults):
        language = variables.get("language", defaults.language)
        response = variables.get("response_language") or defaults.response_language or language
        try:
            wanted = chat.prompt_ids(messages, language, response)[0].tolist()
        except DataError:  # a template that rejects such turns
            continue
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            found = chat.tokenizer.apply_chat_template(
                conversation, chat_template=template, add_generation_prompt=True, return_dict=False, **variables
            )
        except Exception:  # a template may raise anything; the model is exported nevertheless, and this is reported
            found = None
        if found is None or list(found) != wanted:
            roles = ", ".join(message.role for message in messages)
            wrong.append(
                f"turns {roles} ({', '.join(f'{key} {value}' for key, value in variables.items()) or 'default'})"
            )
    return wrong


def _samples(chat: Chat, defaults: Defaults) -> Iterator[tuple[list[Message], dict[str, Any]]]:
    words: dict[Role, str] = {"system": "Be brief.", "user": "How many are 3 and 4?", "assistant": "They are 7."}
    turns: list[list[Role]] = [
        ["user"], ["system", "user"], ["user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant", "user"],
    ]  # fmt: skip
    variables: list[dict[str, Any]] = [{}]
    if isinstance(chat.template, PatternTemplate) or defaults.may_differ:
        variables += [{"language": code} for code in chat.languages]
        variables += [{"language": code, "response_language": chat.languages[0]} for code in chat.languages[1:2]]
    for roles, languages in product(turns, variables):
        yield [Message(role, words[role]) for role in roles], languages
