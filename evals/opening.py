"""Open a model for generation and answer prompts with it: `crosslift generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.console import Progress
from data_pipeline.records import BadRow, DataError, Message
from data_pipeline.sources.cells import Cells
from data_pipeline.sources.formats import JsonLines
from data_pipeline.text.turns import read_conversation
from evals.errors import EvalError

if TYPE_CHECKING:
    from data_pipeline.text.chat import Chat
    from modeling.generation import Prompt, Sampling, ShiftedGenerator
    from modeling.loading import AttentionName

TemplateName = Literal["plain", "alpaca", "chat"]
NO_SHIFT = "none"
NEAREST = "auto"


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt. `language`: a code, NEAREST, or NO_SHIFT (unknown; nothing is shifted)."""

    text: str  # last turn of the user
    language: str
    response_language: str | None = None
    origin: str | None = None  # "file.jsonl:17", for messages
    before: tuple[Message, ...] = ()  # a system message, and turns before the last
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)  # other fields of its row


def open_model(
    path: str, *, dtype: str = "auto", template: TemplateName | None = None, attention: AttentionName = "auto"
) -> tuple[ShiftedGenerator, Chat]:
    """The generator, which stops at the header of a next turn, and the prompt template of a model.

    Args:
        path: export, Hugging Face directory or hub name.
        dtype: bf16, fp32, or auto: bf16 on a GPU, fp32 on a CPU.
        template: a template's name instead of the one the model was trained with ("alpaca": MGSM's protocol).
    """
    from data_pipeline.text.chat import Chat
    from data_pipeline.text.next_turn import next_turn
    from data_pipeline.text.templates import TemplateConfig
    from modeling.generation import ShiftedGenerator
    from modeling.loading import resolve_device
    from modeling.stopping import Stops

    device, number_format = resolve_device(dtype)
    generator = ShiftedGenerator.from_directory(path, dtype=number_format, device=device, attention=attention)
    trained_template = generator.info.template
    if template is not None:
        chosen = TemplateConfig(name=template)
    elif trained_template is not None:
        chosen = TemplateConfig(**trained_template)
    else:
        chosen = TemplateConfig(name="chat" if generator.tokenizer.chat_template else "plain")
    trained = TemplateConfig(**trained_template) if trained_template is not None else chosen
    for each in (chosen, trained):  # a model continues in the format that it was trained or prompted with
        found = next_turn(each, generator.tokenizer)
        generator.stops |= Stops(found.ids, found.patterns)
    return generator, Chat(generator.tokenizer, chosen, generator.info.languages)


def read_questions(
    file: Path, language: str, response_language: str | None = None, system: str | None = None
) -> list[Question]:
    """Questions of a JSONL file: `prompt`, or `messages` that end with a user's turn.

    A row's own `system`, `language` and `response_language` override the given ones. Lines are read like training data.
    Raises EvalError, or DataError naming the line.
    """
    shard = JsonLines(str(file), file.name, "")
    questions = []
    try:
        with file.open("rb") as lines:
            for place, row in shard.rows(lines):
                if isinstance(row, BadRow):
                    raise row
                cells = Cells(row, shard.origin(place))
                *before, last = _turns(cells, system)
                languages = (
                    cells.optional_text("language") or language,
                    cells.optional_text("response_language") or response_language,
                )
                questions.append(Question(last.content, *languages, cells.origin, tuple(before), row))
    except OSError as error:
        raise EvalError(f"{file}: cannot be read: {error.strerror}") from error
    if not questions:
        raise EvalError(f"{file}: holds no question")
    return questions


def _turns(cells: Cells, system: str | None) -> tuple[Message, ...]:
    """The conversation of a row, up to the turn to be answered; `system` if the row has no such message."""
    system = cells.optional_text("system") or system
    if not cells.has("messages"):
        return (*system_message(system), Message("user", cells.text("prompt")))
    if cells.has("prompt"):
        raise cells.bad("has both 'prompt' and 'messages'; give one")
    if not cells.has("system") and _begins_with_system(cells):
        system = None
    messages = read_conversation(cells, "messages", system)
    if messages[-1].role != "user":
        raise cells.bad("'messages' must end with a user's turn, which is to be answered")
    return messages


def _begins_with_system(cells: Cells) -> bool:
    """Whether a row's own turns begin with a system message."""
    turns = cells.listed("messages")
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "system" in (first.get("role"), first.get("from"))


def system_message(text: str | None) -> tuple[Message, ...]:
    """A system message, if there is a text for it."""
    return () if text is None else (Message("system", text),)


def answer(
    generator: ShiftedGenerator,
    chat: Chat,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 16,
    sampling: Sampling | None = None,
) -> Iterator[dict[str, Any]]:
    """Answers in the order of the questions, each with its languages (None: unknown) and whether it was shifted.

    The fields of a question's row are kept, except those that the answer fills. A question whose language is NEAREST
    takes the language of the nearest vector (docs/methods.md, section 1.2). Raises EvalError for a language that the
    model does not have, or for an unknown language that its template needs.
    """
    for question in questions:
        _check_languages(question, generator.info.languages)
    encoded = [_encode(generator, chat, question) for question in questions]
    prompts = [each.prompt for each in encoded]
    with Progress("generate", len(prompts), "answers") as progress:
        answers = generator.generate(prompts, max_new_tokens, num_beams, batch_size, progress.advance, sampling)
    for question, each, generated in zip(questions, encoded, answers, strict=True):
        yield {
            **question.fields,
            **({} if "messages" in question.fields else {"prompt": question.text}),
            "language": each.language,
            "response_language": each.response_language,
            "output": generated.text,
            "finished": generated.finished,
            "shifted": generated.shifted,
        }


def without_vector(generator: ShiftedGenerator, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The languages whose tokens ran unshifted in these answers, because the model has no vector for them.

    Empty for a model that does not shift, and for questions without a shift.
    """
    vectors = generator.vectors
    if vectors is None:
        return []
    languages = {row[key] for row in rows if row["language"] for key in ("language", "response_language")}
    return sorted(language for language in languages if not vectors.has(language))


@dataclass(frozen=True, slots=True)
class _EncodedQuestion:
    """A question as tokens, and its languages as far as they are known."""

    prompt: Prompt
    language: str | None
    response_language: str | None


def _encode(generator: ShiftedGenerator, chat: Chat, question: Question) -> _EncodedQuestion:
    """Tokenise a question with two languages: that of the shift, and that of the template.

    An unknown language is not shifted. A template that names a language then gets the dominant one, or the only one.
    """
    from modeling.errors import ModelError
    from modeling.generation import Prompt

    info = generator.info
    default = info.dominant or (info.languages[0] if len(info.languages) == 1 else None)
    response_language = question.response_language or info.response_language
    messages = [*question.before, Message("user", question.text)]

    def tokens(language: str | None) -> tuple[list[int], list[bool]]:
        prompt_language = language or default or ""
        try:
            ids, content = chat.prompt_ids(messages, prompt_language, response_language or prompt_language)
            generator.refuse_too_long(ids.tolist())
        except (DataError, ModelError) as error:
            raise EvalError(f"{_where(question)}{error}") from error
        return ids.tolist(), content.tolist()

    language = None if question.language in (NO_SHIFT, NEAREST) else question.language
    if question.language == NEAREST:
        language = generator.nearest_language(*tokens(None))
    ids, _ = tokens(language)
    response = response_language or language
    shift = (None, None) if question.language == NO_SHIFT else (language, response)
    return _EncodedQuestion(Prompt(ids, *shift), language, response)


def _check_languages(question: Question, known: Sequence[str]) -> None:
    """Raises EvalError for a language that the model does not have; plain Hugging Face folders list none."""
    if not known:
        return
    if question.language not in (NO_SHIFT, NEAREST, *known):
        raise EvalError(
            f"{_where(question)}language {question.language!r}: the model has {', '.join(known)}; or use auto or none"
        )
    if question.response_language not in (None, *known):
        raise EvalError(
            f"{_where(question)}response language {question.response_language!r}: the model has {', '.join(known)}"
        )


def _where(question: Question) -> str:
    return f"{question.origin}: " if question.origin else ""
