"""The number that an answer gives, by four rules side by side.

In: a model's raw output, the language it is written in, the gold answer as the label file has it. Out: the
number each rule extracts and whether it is right. Next: `mgsm.py`, which applies every rule of `RULES` to
every kept output.

- `last_number` (headline): the rule of MathOctopus and QAlign, kept with its quirks so that results stand
  beside published ones: signs are dropped, "no number" counts as 0, tolerance 1e-3.
- `lm_eval_strict`, `lm_eval_flexible`: lm-evaluation-harness 0.4.13, tasks `mgsm_native_cot_*`, including
  that it compares strings after deleting all punctuation (so 1.8 is "right" for 18).
- `robust` (ours): the number after the last answer marker, else the last; digits of every script; the
  language's separators; fractions and decimals exact; no number is wrong.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache

Number = Decimal | Fraction

_TOLERANCE = 1e-3
_LONGEST = 200  # characters; a longer "number" is a model gone round in circles
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

_SPACE_GROUPS = {"be", "bg", "cs", "es", "et", "fi", "fr", "hu", "hy", "ka", "kk", "lt", "lv", "nb", "nn"}
_SPACE_GROUPS |= {"no", "pl", "pt", "ru", "sk", "sq", "sv", "uk", "uz"}
_DECIMAL_COMMA = {"az", "bs", "ca", "da", "de", "el", "eu", "gl", "hr", "id", "is", "it", "mk", "nl"}
_DECIMAL_COMMA |= {"ro", "sl", "sr", "tr", "vi"} | _SPACE_GROUPS
_NO_BREAK = "\u00a0"  # stands for every space that keeps a number together
_ASCII = dict.fromkeys("\u2007\u2009\u202f", _NO_BREAK) | dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-")
_ASCII |= dict.fromkeys("\u2044\u2215\uff0f", "/") | {"\u066b": ".", "\uff0e": ".", "\u066c": ","}
_ASCII |= {"\u2019": "'", "\uff1d": "=", "\uff03": "#", "\uff1a": ":"}
_MARKER = re.compile(
    r"""\#{4}(?=[\s$*(-]*\d)                                  # GSM8K; not a heading
      | \\boxed\{
      | final\ answer(?:\ is|\s*:)? | answer\ is              # en, and what models fall back to
      | antwort\ (?:lautet|ist) | respuesta(?:\ final)?\ es | réponse(?:\ finale)?\ est
      | ответ\s*(?:[—:]|-\s) | jibu\ ni | উত্তর\ (?:হলো|হল) | సమాధానం | คำตอบคือ
      | 答え(?:は|:) | 答案(?:是|为|為|:)""",
    re.IGNORECASE | re.VERBOSE,
)
_EQUALS = re.compile(r"[\d\s$+\-*/x×÷().,%]*[=≈]")


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

    Separators: with both kinds present the last one is the decimal mark. A lone dot before exactly three
    digits is a decimal point, or a thousands mark in languages that write decimals with a comma. A lone comma
    before exactly three digits is a thousands mark in every language: in the Spanish, French, Russian and
    German translations of GSM8K all 325 such numbers that also stand in the English question are thousands.
    """
    text = _normalise(text)
    pattern = _number_pattern(language)
    for marker in reversed(list(_MARKER.finditer(text))):
        answer = text[marker.end() :].lstrip(" \t\r\n:*").split("\n", 1)[0]
        match = pattern.search(answer)
        while match and (equals := _EQUALS.match(answer, match.end())):  # "the answer is 9 * 2 = 18"
            following = pattern.search(answer, equals.end())
            if following is None:
                break
            match = following
        if match:
            return _value(answer, match, language)
    matches = list(pattern.finditer(text))
    return _value(text, matches[-1], language) if matches else None


def gold_number(text: str) -> Decimal:
    """The value of a gold answer: "18", "8.0", "-3", "114,200". ValueError if it is nothing of the kind."""
    if not re.fullmatch(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?", text):
        raise ValueError(f"{text!r} is not a number")
    return Decimal(text.replace(",", ""))


def _within_tolerance(answer: Number | str | None, gold: str) -> bool:
    expected = last_number(gold)  # their scorer reads gold and answer alike, so a minus is lost in both
    return abs(float(answer or 0) - float(expected or 0)) < _TOLERANCE


def _same_text(answer: Number | str | None, gold: str) -> bool:
    return answer == gold.translate(_NO_PUNCTUATION)


def _same_value(answer: Number | str | None, gold: str) -> bool:
    return answer is not None and Fraction(answer) == Fraction(gold_number(gold))


@dataclass(frozen=True, slots=True)
class Rule:
    """`extract(text, language)` gives what was found or None; `right(found, gold text)` judges it."""

    name: str
    extract: Callable[[str, str], Number | str | None]
    right: Callable[[Number | str | None, str], bool]


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


def _normalise(text: str) -> str:
    """ASCII digits and marks for every script's, "$" for any currency, "1/2" for ½ and LaTeX's fractions."""
    text = re.sub("(?<=[０-９])，(?=[０-９]{3})", ",", text)  # elsewhere this comma only parts clauses
    text = "".join(map(_to_ascii, text)).replace("{,}", ",")
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\0\1/\2", text)
    return re.sub(r"(?<=\d)\0", " ", text).replace("\0", "")  # "2½" is "2 1/2", "-½" is "-1/2"


def _to_ascii(char: str) -> str:
    if char < "\x80":
        return char
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Sc":
        return "$"
    if category == "No" and unicodedata.decomposition(char).startswith("<fraction>"):
        return "\0" + unicodedata.normalize("NFKC", char).replace("\u2044", "/")
    return _ASCII.get(char, char)


@cache
def _number_pattern(language: str) -> re.Pattern[str]:
    """One number: grouped by spaces or apostrophes, or by points and commas; then perhaps "/ another"."""
    groups = f"[{_NO_BREAK}' ]" if language in _SPACE_GROUPS else f"[{_NO_BREAK}']"
    number = rf"(?:\d{{1,3}}(?:{groups}\d{{3}})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)*|(?<![\w.])\.\d+)"
    return re.compile(rf"(?<!\d)(?:(?P<whole>\d+) (?=\d+/\d+(?![\d/])))?(?P<parts>{number}(?: ?/ ?{number})*)")


def _value(text: str, match: re.Match[str], language: str) -> Number | None:
    """The match's value with its sign. More than one slash is a date or a path: its last part counts."""
    if len(match["parts"]) > _LONGEST:
        return None
    parts = [_plain(part.strip(), language) for part in match["parts"].split("/")]
    value: Number = parts[-1]
    if len(parts) == 2:
        if parts[1] == 0:
            return None
        value = Fraction(parts[0]) / Fraction(parts[1])
        if match["whole"] and value < 1:  # "2 1/2"
            value += int(match["whole"])
    if not _negative(text[: match.start()]):
        return value
    return value.copy_negate() if isinstance(value, Decimal) else -value  # Decimal's own minus would round


def _negative(before: str) -> bool:
    """Whether a minus sign is attached: "-18", "-$18", "$-18"; neither "5-18", "x-18" nor "- 18"."""
    before = before[-4:].rstrip("$")
    if not before.endswith("-"):
        return False
    previous = before[:-1].rstrip("$")[-1:]
    # Letters without case are of scripts that put no space before a number: 答えは-18 is minus eighteen.
    joined = previous.isdigit() or previous.lower() != previous.upper() or previous in tuple(")]%-")
    return not joined


def _plain(token: str, language: str) -> Decimal:
    """The value of digits with separators, by the language's custom where the digits leave a choice."""
    token = re.sub(rf"[{_NO_BREAK}' ]", "", token)
    marks = re.sub(r"\d", "", token)
    if not marks:
        return Decimal(token)
    decimal = marks[-1] if len(set(marks)) == 2 or len(marks) == 1 else ""
    if len(marks) == 1 and re.fullmatch(r"[1-9]\d{0,2}[.,]\d{3}", token):
        decimal = "." if marks == "." and language not in _DECIMAL_COMMA else ""
    whole, _, fraction = token.rpartition(decimal) if decimal else (token, "", "")
    if not re.fullmatch(r"\d*|\d{1,3}(?:[.,]\d{2})*[.,]\d{3}|\d{1,3}(?:[.,]\d{3})+", whole):
        return _plain(re.split("," if "," in token else r"\.", token)[-1], language)  # a list or a date
    return Decimal(f"{re.sub('[.,]', '', whole) or 0}.{fraction or 0}")
