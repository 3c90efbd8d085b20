"""Prompt templates: the text around messages, kept apart from the messages themselves.

A template gives a `Turn` for each answer: the prompt before it, as literal text and slots for messages, which
`chat.py` fills and tokenises. The layout depends on the roles only, never on the content of messages: a user who
writes template text cannot move the slots.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.records import DataError, Role
from data_pipeline.settings import Plain, Section
from data_pipeline.text.template_date import date_macro

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = """
af Afrikaans; am Amharic; ar Arabic; as Assamese; az Azerbaijani; be Belarusian; bg Bulgarian;
bm Bambara; bn Bengali; bo Tibetan; br Breton; bs Bosnian; ca Catalan; ceb Cebuano; cs Czech;
cy Welsh; da Danish; de German; dv Dhivehi; ee Ewe; el Greek; en English; eo Esperanto; es Spanish;
et Estonian; eu Basque; fa Persian; ff Fula; fi Finnish; fil Filipino; fo Faroese; fr French;
fy Frisian; ga Irish; gd Scottish Gaelic; gl Galician; gn Guarani; gu Gujarati; ha Hausa; he Hebrew;
hi Hindi; hr Croatian; ht Haitian Creole; hu Hungarian; hy Armenian; id Indonesian; ig Igbo;
is Icelandic; it Italian; ja Japanese; jv Javanese; ka Georgian; kk Kazakh; km Khmer; kn Kannada;
ko Korean; ku Kurdish; ky Kyrgyz; la Latin; lb Luxembourgish; lg Luganda; ln Lingala; lo Lao;
lt Lithuanian; lv Latvian; mg Malagasy; mi Maori; mk Macedonian; ml Malayalam; mn Mongolian;
mr Marathi; ms Malay; mt Maltese; my Burmese; nb Norwegian; ne Nepali; nl Dutch;
nn Norwegian Nynorsk; no Norwegian; ny Chichewa; oc Occitan; om Oromo; or Odia; pa Punjabi;
pl Polish; ps Pashto; pt Portuguese; qu Quechua; ro Romanian; ru Russian; rw Kinyarwanda;
sa Sanskrit; sd Sindhi; si Sinhala; sk Slovak; sl Slovenian; sn Shona; so Somali; sq Albanian;
sr Serbian; st Sesotho; su Sundanese; sv Swedish; sw Swahili; ta Tamil; te Telugu; tg Tajik;
th Thai; ti Tigrinya; tk Turkmen; tl Tagalog; tn Tswana; tr Turkish; ts Tsonga; tt Tatar; tw Twi;
ug Uyghur; uk Ukrainian; ur Urdu; uz Uzbek; vi Vietnamese; wo Wolof; xh Xhosa; yi Yiddish;
yo Yoruba; yue Cantonese; zh Chinese; zu Zulu
"""
# English names of languages, as used in prompts.
LANGUAGE_NAMES: dict[str, str] = dict(entry.strip().split(" ", 1) for entry in _NAMES.split(";"))

# (prompt, prompt when the answer is in another language than the question)
_PLAIN = ("{user}\n", "{user}\nAnswer in {response_language}:\n")
# The prompt of MathOctopus and QAlign, so that scores are comparable with theirs.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request"
    " in {response_language}. Please answer in {response_language}.\n\n### Instruction:\n{user}\n\n### Response:"
)
_FIELDS = {"user", "system", "language", "response_language"}


def language_name(code: str) -> str:
    """The English name of a language: "Swahili" for "sw", "Portuguese" for "pt-BR"; an unknown code is returned."""
    return LANGUAGE_NAMES.get(code) or LANGUAGE_NAMES.get(re.split("[-_]", code)[0].lower()) or code


class TemplateConfig(Section):
    """How prompts and answers are written."""

    name: Literal["plain", "alpaca", "chat", "custom"] = Field(
        "plain",
        description="plain: the user's text and a new line; alpaca: the prompt of MathOctopus and QAlign;"
        " chat: the tokenizer's own chat template; custom: `prompt`.",
    )
    prompt: str | None = Field(
        None,
        description="custom only: the text before an answer. Holds {user}; may hold {system}, and {language}"
        " and {response_language}, which become English names. Special tokens are written by their text.",
    )
    end_token: str | None = Field(
        None,
        description="The token that ends an answer. Default: the tokenizer's end-of-sequence token; for chat"
        " the one with which the chat template ends an assistant's turn.",
    )
    variables: Plain[dict[str, bool | int | float | str]] = Field(
        default_factory=dict,
        description="chat only: variables for the chat template, such as enable_thinking or date_string.",
    )
    date: dt.date | None = Field(
        None,
        description="chat only: today, for a chat template that prints the date. Default: the day when the run first"
        " started; it is saved with the run.",
    )

    @field_validator("date", mode="before")
    @classmethod
    def _is_a_date(cls, value: Any) -> Any:
        if isinstance(value, int | float):  # pydantic would read a number as seconds since 1970
            raise ValueError("must be a day, written 2026-01-31")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TemplateConfig:
        if (self.name == "custom") != (self.prompt is not None):
            raise ValueError("prompt: name: custom needs it, and no other template accepts it")
        if self.variables and self.name != "chat":
            raise ValueError("variables: only name: chat accepts them")
        if self.date is not None and self.name != "chat":
            raise ValueError("date: only name: chat accepts one")
        if self.prompt is not None:
            fields = [part[1:] for part in Formatter().parse(self.prompt) if part[1] is not None]
            if any(field not in _FIELDS or spec or conversion for field, spec, conversion in fields):
                raise ValueError(
                    "prompt: may hold {user}, {system}, {language} and {response_language}; {{ writes a brace"
                )
            if [field for field, _, _ in fields].count("user") != 1:
                raise ValueError("prompt: must hold {user} exactly once")
        return self


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of message number `message`, and the sides on which the template strips white space."""

    message: int
    strip_left: bool = False
    strip_right: bool = False

    def words(self, content: str) -> str:
        content = content.lstrip() if self.strip_left else content
        return content.rstrip() if self.strip_right else content


Turn = tuple[str | Slot, ...]


class PatternTemplate:
    """The templates plain, alpaca and custom: one pattern, repeated for every user turn."""

    def __init__(self, config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._name = config.name
        patterns = {"plain": _PLAIN, "alpaca": (_ALPACA, _ALPACA), "custom": (config.prompt, config.prompt)}
        self.same, self.differs = (
            [(literal, field) for literal, field, _, _ in Formatter().parse(pattern or "")]
            for pattern in patterns[config.name]
        )
        self.end_id = _token_id(tokenizer, config.end_token or _eos(tokenizer))
        writes_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.bos_id: int | None = tokenizer.bos_token_id if writes_bos else None
        self.answer_slot = Slot(-1)

    def turns(self, roles: tuple[Role, ...], language: str, response_language: str) -> list[Turn]:
        """The prompt before each answer.

        Args:
            roles: must end with the user.
            language: code of the prompt's language; "" if not known.
            response_language: code of the answer's language; "" if not known.

        Raises:
            DataError: the pattern names a language that is not known.
        """
        pattern = self.same if language == response_language else self.differs
        names = {"language": language_name(language), "response_language": language_name(response_language)}
        system = roles[0] == "system"
        system_slot: Turn = (Slot(0),) if system else ()
        turns = []
        for number, message in enumerate(range(int(system), len(roles), 2)):
            parts: list[str | Slot] = []
            if number == 0 and system and not any(field == "system" for _, field in pattern):
                parts += [Slot(0), "\n\n"]
            for literal, field in pattern:
                parts.append(literal)
                if field == "user":
                    parts.append(Slot(message))
                elif field == "system":
                    parts += system_slot if number == 0 else ()
                elif field is not None:
                    if not names[field]:
                        raise DataError(
                            f"the {self._name} template names {{{field}}}, which is not known; give --language"
                        )
                    parts.append(names[field])
            turns.append(tuple(parts))
        return turns

    def next_user_turn(self) -> list[str | Slot | None]:
        """The layout of later user turns; None stands for a language's name."""
        parts = [(text, Slot(0) if field == "user" else None) for text, field in self.same if field != "system"]
        return [each for pair in parts for each in pair]


class ChatTemplate:
    """The tokenizer's Jinja template (chat), rendered once per sequence of roles, with marks in place of messages."""

    bos_id: int | None = None  # written by the template itself, if at all

    def __init__(self, config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"template.name: the tokenizer {tokenizer.name_or_path!r} has no chat template;"
                " use plain, alpaca or custom"
            )
        self._tokenizer = tokenizer
        try:
            self.text = str(tokenizer.get_chat_template())
        except ValueError as error:  # several named templates, none of which is the default
            raise DataError(f"template.name: {tokenizer.name_or_path!r}: {' '.join(str(error).split())}") from error
        self.date_macro = "" if config.date is None else date_macro(self.text, config.date)
        self._variables = config.variables
        prompt = self._render(["user"], "", False, True)
        full = self._render(["user", "assistant"], "", False, False)
        slots = self._slots(["user", "assistant"], "", add_generation_prompt=False)
        self.answer_slot = next(part for part in slots if isinstance(part, Slot) and part.message == 1)
        header = full[: full.index(_mark(1))].removeprefix(prompt)
        if prompt == self._render(["user"], "", False, False) and header.strip():
            raise DataError(
                f"template.name: the chat template ignores add_generation_prompt, so generation would not"
                f" write {header.strip()!r} before an answer; use custom"
            )
        after = slots[-1] if isinstance(slots[-1], str) else ""
        self._end = config.end_token or self._first_token(after.lstrip()) or _eos(tokenizer)
        self.end_id = _token_id(tokenizer, self._end)

    def turns(self, roles: tuple[Role, ...], language: str, response_language: str) -> list[Turn]:
        """The prompt before each answer; `roles` must end with the user, languages are codes.

        If the answer's language differs from the prompt's, a line after the user's text names it.
        """
        cue = "" if language == response_language else f"\nPlease answer in {language_name(response_language)}."
        turns: list[list[str | Slot]] = [[]]
        answered = False
        for part in self._slots(roles, cue, add_generation_prompt=True):
            if isinstance(part, Slot) and roles[part.message] == "assistant":
                turns.append([])
                answered = True
                continue
            if answered and isinstance(part, str):  # the end token belongs to the answer, not to the next prompt
                part = re.sub(rf"^\s*{re.escape(self._end)}", "", part)
            answered = False
            turns[-1].append(part)
        return [tuple(turn) for turn in turns]

    def next_user_turn(self) -> list[str | Slot | None]:
        """The layout of later user turns; empty if the template takes one user message only."""
        try:
            turns = self.turns(("user", "assistant", "user"), "", "")
        except DataError:
            return []
        return [*turns[1]]

    def _slots(self, roles: Sequence[Role], cue: str, *, add_generation_prompt: bool) -> Turn:
        """The rendered conversation, split at the messages. A padded copy shows where the template strips them."""
        padded = self._render(roles, cue, True, add_generation_prompt)
        rest = self._render(roles, cue, False, add_generation_prompt)
        parts: list[str | Slot] = []
        for number, role in enumerate(roles):
            mark = _mark(number)
            if rest.count(mark) != 1:
                raise DataError(f"template.name: the chat template does not write a {role} message in its place")
            before, rest = rest.split(mark)
            parts += [before, Slot(number, f" \n{mark}" not in padded, f"{mark}\n " not in padded)]
        return (*parts, rest)

    def _render(self, roles: Sequence[Role], cue: str, pad: bool, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError  # a dependency of transformers' chat templates

        conversation = []
        for number, role in enumerate(roles):
            words = f" \n{_mark(number)}\n " if pad else _mark(number)
            conversation.append({"role": role, "content": words + cue if role == "user" else words})
        arguments: dict[str, Any] = {**self._variables, "add_generation_prompt": add_generation_prompt}
        try:
            template = self.date_macro + self.text
            return str(
                self._tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False, **arguments)
            )
        except Exception as error:  # a template is third-party code and may raise anything
            reason = " ".join(str(error).split())
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise DataError(f"the chat template refuses the turns {_listed(roles)}: {kind}{reason}") from error

    def _first_token(self, text: str) -> str | None:
        """The special or added token that `text` begins with."""
        added = (token.content for token in self._tokenizer.added_tokens_decoder.values())
        return max((token for token in added if text.startswith(token)), key=len, default=None)


def make_template(config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> PatternTemplate | ChatTemplate:
    """The template of `config` for this tokenizer. Raises DataError if it does not work with the tokenizer."""
    return (ChatTemplate if config.name == "chat" else PatternTemplate)(config, tokenizer)


def check_roles(roles: tuple[Role, ...]) -> None:
    """Raises DataError unless the roles are an optional system, then user and assistant in turn."""
    first = int(roles[:1] == ("system",))
    wrong = [n for n, role in enumerate(roles[first:], first) if role != ("user", "assistant")[(n - first) % 2]]
    if wrong or not roles[first:]:
        where = f"turn {wrong[0] + 1} is {roles[wrong[0]]}; " if wrong else ""
        raise DataError(
            f"the turns are {_listed(roles) or 'none'}: {where}they must be an optional system, then user and assistant"
            " in turn"
        )


def _listed(roles: Sequence[str], most: int = 8) -> str:
    return ", ".join(roles) if len(roles) <= most else f"{', '.join(roles[:most])}, ... ({len(roles)} in all)"


def _mark(message: int) -> str:
    return f"\ue000{message}\ue001"  # private-use characters, which no template treats specially


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise DataError(f"{tokenizer.name_or_path!r} has no end-of-sequence token; set template.end_token")
    return str(tokenizer.eos_token)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise DataError(f"template.end_token: {token!r} is not one token of {tokenizer.name_or_path!r}")
    return int(token_id)
