"""The number in an answer, by four rules side by side.

Each rule of `RULES` extracts a number from a raw output, given its language, and compares it with the gold answer.

- `last_number` (headline): the rule of MathOctopus and QAlign, with its quirks, so that results are comparable with
  published ones: signs are dropped, "no number" counts as 0, tolerance 1e-3.
- `lm_eval_strict`, `lm_eval_flexible`: lm-evaluation-harness 0.4.13, tasks `mgsm_native_cot_*`, including the
  comparison of strings after deleting all punctuation (so 1.8 is "right" for 18).
- `robust` (ours): the number after the last answer marker (`answer_markers.py`), else the last one; digits of every
  script, the language's separators, words for powers of ten (`numerals.py`); exact fractions and decimals; an answer
  without a number is wrong.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from evals.mgsm.answer_markers import answer_markers, until_next_turn
from evals.mgsm.numerals import Number, multiplied, normalised, number_pattern, value

_TOLERANCE = 1e-3
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LM_EVAL_NUMBER = r"(\-?[0-9\.\,]+)"
_LM_EVAL_STRICT = {
    language: re.compile(pattern.replace("#", _LM_EVAL_NUMBER))
    for language, pattern in {
        "bn": "The answer is #",  # lm-eval gives Bengali the English phrase
        "de": "Die Antwort lautet #",
        "en": "The answer is #",
        "es": "La respuesta es #",
        "fr": "La réponse est #",
        "ja": "答えは#です。",
        "ru": "Ответ — #",
        "sw": "Jibu ni #",
        "te": "సమాధానం #",
        "th": "คำตอบคือ #",
        "zh": "答案是 #。",
    }.items()
}
_LM_EVAL_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

_EQUALS = re.compile(r"(?:[\d\s$+\-*/x×÷()%]|[.,](?=\d))*[=≈]")  # the rest of "9 * 2 =", within a sentence
# What may stand between a marker and its number without being a sentence: "$", "(", "x =", "USD".
_AT_ONCE = re.compile(r"(?:[^\W\d_]{1,12}\s*[=≈]|[A-Z]{2,3}\b|[^\w\n])*")
_IN_PARENTHESES = re.compile(r"[(（][^()（）\n]*[)）]")


def last_number(text: str, language: str = "") -> Decimal | None:
    """The last number as MathOctopus and QAlign read it: commas between digits dropped, no sign."""
    found: list[str] = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d)", r"\1\2", text))
    return Decimal(found[-1]) if found else None


def lm_eval_strict(text: str, language: str = "en") -> str | None:
    """What lm-eval's `strict-match` compares: the first number right after the language's answer phrase."""
    found = _LM_EVAL_STRICT.get(language, _LM_EVAL_STRICT["en"]).search(text)
    return found[1].translate(_NO_PUNCTUATION) if found else None


def lm_eval_flexible(text: str, language: str = "") -> str | None:
    """What lm-eval's `flexible-extract` compares: its last match, which may hold no digit at all ("...")."""
    found: list[tuple[str, str]] = _LM_EVAL_FLEXIBLE.findall(text)
    return (found[-1][0] or found[-1][1]).translate(_NO_PUNCTUATION) if found else None


def robust(text: str, language: str = "en") -> Number | None:
    """The number after the last answer marker that has one on its line, else the last number; exact.

    What follows a next turn's header ("### Instruction:") does not count. Separators: with both kinds present the
    last one is the decimal mark. A lone dot before exactly three digits is a decimal point, or a thousands mark in
    languages that write decimals with a comma. A lone comma before exactly three digits is a thousands mark in every
    language: in the Spanish, French, Russian and German translations of GSM8K all 325 such numbers that also stand in
    the English question are thousands. Words for powers of ten multiply ("3万5千", "1.2 million").
    """
    text = multiplied(until_next_turn(normalised(text)), language)
    pattern = number_pattern(language)
    for marker in reversed(answer_markers(text)):
        if found := _marked(text, marker, pattern):
            return value(*found, language)
    matches = list(pattern.finditer(text))
    return value(text, matches[-1], language) if matches else None


def _marked(text: str, marker: re.Match[str], pattern: re.Pattern[str]) -> tuple[str, re.Match[str]] | None:
    """A text and the number in it that the marker introduces; None if its line has none.

    It is the first number, or the one after an equals sign that follows: "9 * 2 = 18". But "Answer:" without a number
    before it may introduce a whole solution: then its last number is meant, unless the first one follows immediately.
    """
    rest = text[marker.end() :].lstrip(" \t\r\n:*_`,、，")
    answer = rest.split("\n", 1)[0]
    first = match = pattern.search(answer)
    while match and (equals := _EQUALS.match(answer, match.end())):
        following = pattern.search(answer, equals.end())
        if following is None:
            break
        match = following
    if first is None or match is None:
        return None
    at_once = match is first and _AT_ONCE.fullmatch(answer, 0, first.start())
    if marker.groupdict()["colon"] and not at_once and not re.search(r"\d", text[: marker.start()]):
        solution = _IN_PARENTHESES.sub(" ", rest)
        if numbers := list(pattern.finditer(solution)):
            return solution, numbers[-1]
    return answer, match


def gold_number(text: str) -> Decimal:
    """The value of a gold answer: "18", "8.0", "-3", "114,200". ValueError if it is not such a number."""
    if not re.fullmatch(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?", text):
        raise ValueError(f"{text!r} is not a number")
    return Decimal(text.replace(",", ""))


def _within_tolerance(answer: Number | str | None, gold: str) -> bool:
    expected = last_number(gold)  # their scorer parses gold and answer in the same way, so both lose a minus sign
    return abs(float(answer or 0) - float(expected or 0)) < _TOLERANCE


def _same_text(answer: Number | str | None, gold: str) -> bool:
    return answer == gold.translate(_NO_PUNCTUATION)


def _same_value(answer: Number | str | None, gold: str) -> bool:
    return answer is not None and Fraction(answer) == Fraction(gold_number(gold))


@dataclass(frozen=True, slots=True)
class Rule:
    """`extract(text, language)` returns what was found or None; `is_correct(found, gold text)` compares it."""

    name: str
    extract: Callable[[str, str], Number | str | None]
    is_correct: Callable[[Number | str | None, str], bool]


HEADLINE = "last_number"
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(HEADLINE, last_number, _within_tolerance),
        Rule("lm_eval_strict", lm_eval_strict, _same_text),
        Rule("lm_eval_flexible", lm_eval_flexible, _same_text),
        Rule("robust", robust, _same_value),
    )
}
