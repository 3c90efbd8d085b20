"""Where an answer ends though its end token did not come: at the header of the user's next turn.

In: a template of `templates.py` and its tokenizer. Out: NextTurn, token ids and texts that no answer holds. Next:
`modeling/generation.py` stops there. A model that goes on past its answer writes what it was trained to read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipeline.text.templates import PatternTemplate, Slot, make_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data_pipeline.text.templates import ChatTemplate, TemplateConfig

_SHORTEST = 8  # characters of a line that names a language, before the name: fewer may begin any sentence


@dataclass(frozen=True, slots=True)
class NextTurn:
    """`ids`: added tokens of the header. `patterns`: regular expressions, one for each of its lines."""

    ids: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()


def next_turn(config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> NextTurn:
    """The header that this template writes before a later message of the user; empty where it writes none.

    Raises DataError where template and tokenizer don't fit.
    """
    template = make_template(config, tokenizer)
    lines = _lines(template)
    header = "\n".join(text for text, _ in lines)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    ids = {number for token, number in added.items() if not token.isspace() and token in header}
    patterns = (_pattern(text, whole) for text, whole in lines)
    return NextTurn(
        tuple(sorted(ids - {template.end_id})), tuple(dict.fromkeys(each for each in patterns if each is not None))
    )


def _lines(template: PatternTemplate | ChatTemplate) -> list[tuple[str, bool]]:
    """The header's lines, and whether each is whole: the last one goes on with the user's words."""
    lines: list[tuple[str, bool]] = []
    text = ""
    for part in template.next_user_turn():
        if isinstance(part, Slot):
            *whole, last = text.split("\n")
            lines += [(line.strip(), True) for line in whole]
            lines.append((last.strip(), False))
            return [line for line in lines if line[0]]
        if part is None:  # a language's name, another one each time
            *whole, last = text.split("\n")
            lines += [(line.strip(), True) for line in whole]
            lines += [(last.strip(), False)] if len(last.strip()) >= _SHORTEST else []
            text = ""
        else:
            # what follows a name on its line belongs to that line
            text = text + part if text or not lines or lines[-1][1] else part.partition("\n")[2]
    return []


def _pattern(line: str, whole: bool) -> str | None:
    """None for a line that an answer may well hold: without letters, or of less than three characters."""
    if len(line) < 2 or not any(char.isalpha() for char in line):
        return None
    if not line[0].isalnum() or line == line.upper():  # "### Instruction:", "[INST]", "USER:"
        return rf"(?<![^\W\d_]){re.escape(line)}" if line[0].isalnum() else re.escape(line)
    return rf"(?<=\n){re.escape(line)}" + (r"[ \t]*\n" if whole else "")
