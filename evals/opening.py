"""Opens a model for generation, and answers prompts with it: `crosslift generate`.

In: an export (or any Hugging Face directory) and questions. Out: answers. Next: `mgsm.py` and people.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.records import Message
from evals.errors import EvalError

if TYPE_CHECKING:
    from data_pipeline.chat import Chat
    from modeling.generation import ShiftedGenerator
    from modeling.loading import AttentionName

TemplateName = Literal["plain", "alpaca", "chat"]
NO_SHIFT = "none"
NEAREST = "auto"


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt. `language` None: not known, so unshifted."""

    text: str
    language: str | None
    response_language: str | None


def open_model(
    path: str, *, dtype: str = "auto", template: TemplateName | None = None, attention: AttentionName = "auto"
) -> tuple[ShiftedGenerator, Chat]:
    """The generator and the prompt template of a model.

    Args:
        path: export, Hugging Face directory or hub name.
        dtype: bf16, fp32, or auto: bf16 on a GPU, fp32 on a CPU.
        template: a template's name instead of the one the model was trained with ("alpaca": MGSM's protocol).
    """
    import torch

    from data_pipeline.chat import Chat, TemplateConfig
    from modeling.generation import ShiftedGenerator

    on_gpu = torch.cuda.is_available()
    number_format = torch.bfloat16 if dtype == "bf16" or (dtype == "auto" and on_gpu) else torch.float32
    generator = ShiftedGenerator.from_directory(
        path, dtype=number_format, device="cuda" if on_gpu else "cpu", attention=attention
    )
    own = generator.info.template
    if template is not None:
        chosen = TemplateConfig(name=template)
    elif own is not None:
        chosen = TemplateConfig(**own)
    else:
        chosen = TemplateConfig(name="chat" if generator.tokenizer.chat_template else "plain")
    return generator, Chat(generator.tokenizer, chosen, generator.info.languages)


def read_questions(file: Path, default: str | None) -> list[Question]:
    """Questions of a JSONL file: `prompt`, optionally `language` and `response_language`. Raises EvalError."""
    questions = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{file}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            text = row["prompt"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise EvalError(f'{file}:{number}: not a question; a line is {{"prompt": TEXT}}') from error
        questions.append(Question(text, row.get("language", default), row.get("response_language")))
    if not questions:
        raise EvalError(f"{file}: holds no question")
    return questions


def answer(
    generator: ShiftedGenerator,
    chat: Chat,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Iterator[dict[str, Any]]:
    """Answers in the order of the questions, each with what was shifted.

    A question whose language is "auto" takes the nearest language vector's (methods.md, "Routing").
    """
    from modeling.generation import Prompt

    known = generator.info.languages
    prompts = []
    for question in questions:
        language = None if question.language == NO_SHIFT else question.language
        if known and language not in (None, NEAREST, *known):
            raise EvalError(f"language {language!r}: the model has {', '.join(known)}; or say auto or none")
        messages = [Message("user", question.text)]
        if language == NEAREST:
            ids, _ = chat.prompt_ids(messages, generator.info.dominant or "", generator.info.dominant or "")
            language = generator.nearest_language([int(token) for token in ids])
        response = question.response_language or generator.info.response_language or language
        ids, _ = chat.prompt_ids(messages, language or "", response or "")
        prompts.append(Prompt([int(token) for token in ids], language, response))
    answers = generator.generate(prompts, max_new_tokens, num_beams, batch_size, progress)
    for question, prompt, generated in zip(questions, prompts, answers, strict=True):
        yield {
            "prompt": question.text,
            "language": prompt.language,
            "response_language": prompt.response_language,
            "output": generated.text,
            "finished": generated.finished,
            "shifted": generated.shifted,
        }
