"""Stop tokens and patterns for generation: the header of the user's next turn.

A model that continues past its answer without an end token writes the header of the next turn, as it was trained to
read it. `modeling/generation.py` stops there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipeline.text.templates import PatternTemplate, Slot, make_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data_pipeline.text.templates import ChatTemplate, TemplateConfig

_SHORTEST = 8  # least characters before a language's name in a header line: shorter text may begin any sentence


@dataclass(frozen=True, slots=True)
class NextTurn:
    """Stop conditions of one template."""

    ids: tuple[int, ...] = ()  # added tokens of the header
    patterns: tuple[str, ...] = ()  # regular expressions, one per line of the header


def next_turn(config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> NextTurn:
    """The header that the template writes before later user turns; empty if it writes none.

    Raises:
        DataError: the template does not work with the tokenizer.
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
    """The header's lines, and whether each is complete: the last one continues with the user's text."""
    lines: list[tuple[str, bool]] = []
    text = ""
    for part in template.next_user_turn():
        if isinstance(part, str):
            # what follows a name on its line belongs to that line
            text = text + part if text or not lines or lines[-1][1] else part.partition("\n")[2]
            continue
        *whole, last = text.split("\n")
        lines += [(line.strip(), True) for line in whole]
        if isinstance(part, Slot):
            lines.append((last.strip(), False))
            return [line for line in lines if line[0]]
        if len(last.strip()) >= _SHORTEST:  # a language's name follows, which varies
            lines.append((last.strip(), False))
        text = ""
    return []


def _pattern(line: str, whole: bool) -> str | None:
    """The pattern of a header line; None for a line that answers may contain: one without letters, or too short."""
    if len(line) < 2 or not any(char.isalpha() for char in line):
        return None
    if not line[0].isalnum() or line == line.upper():  # "### Instruction:", "[INST]", "USER:"
        return rf"(?<![^\W\d_]){re.escape(line)}" if line[0].isalnum() else re.escape(line)
    return rf"(?<=\n){re.escape(line)}" + (r"[ \t]*\n" if whole else "")
