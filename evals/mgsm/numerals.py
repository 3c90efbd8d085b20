"""Numbers as people and models write them: native digits, separators, LaTeX, words for powers of ten.

Normalises a text to ASCII digits and marks, and gives a pattern for its numbers and their exact values. The robust rule
of `numbers.py` uses it.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from functools import cache

Number = Decimal | Fraction

_LONGEST = 200  # characters; a longer "number" is repetitive output
_SPACE_GROUPS = {"be", "bg", "cs", "es", "et", "fi", "fr", "hu", "hy", "ka", "kk", "lt", "lv", "nb", "nn"}
_SPACE_GROUPS |= {"no", "pl", "pt", "ru", "sk", "sq", "sv", "uk", "uz"}
_DECIMAL_COMMA = {"az", "bs", "ca", "da", "de", "el", "eu", "gl", "hr", "id", "is", "it", "mk", "nl"}
_DECIMAL_COMMA |= {"ro", "sl", "sr", "tr", "vi"} | _SPACE_GROUPS
_NO_BREAK = "\u00a0"  # replaces every space that groups digits
_ASCII = dict.fromkeys("\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f", _NO_BREAK)
_ASCII |= dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-") | dict.fromkeys("\u2044\u2215\uff0f", "/")
_ASCII |= {"\u066b": ".", "\uff0e": ".", "\u066c": ",", "\uff1d": "=", "\uff03": "#", "\uff0a": "*"}
_ASCII |= dict.fromkeys("\u2018\u2019\u02bc\u00b4\u2032\uff07", "'") | dict.fromkeys("\uff1a\ufe55\u2236", ":")
_ASCII |= dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff\u00ad", "")  # invisible characters
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\{([,.])\}", r"\1"),
        (r"\\!", ""),  # 12,\!000
        (r"(?<=\d)(?:\\[,;: ]|~|\\thinspace\b ?)(?=\d)", _NO_BREAK),  # 12\,000
        (r"\\([$%#])", r"\1"),
        (r"\\(?:text|textbf|textit|mathbf|mathrm|mathit|mbox|num|bold)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:times|cdot)\b", "*"),
        (r"\\approx\b", "≈"),
        (r"\\[dtc]?frac\{(\d+)\}\{(\d+)\}", r"\0\1/\2"),
    )
]
# Words that multiply the number before them, as powers of ten. Those that also begin other words exclude these.
_POWERS: dict[str, dict[str, int]] = {
    "ar": {"مئة|مائة": 2, "ألف|آلاف|الاف": 3, "مليون|ملايين": 6, "مليار(?:ات)?": 9},
    "bn": {"শত(?![ঀ-৿])": 2, "হাজার": 3, "লক্ষ(?!্)|লাখ": 5, "মিলিয়ন": 6, "কোটি": 7, "বিলিয়ন": 9},
    "de": {"hundert": 2, "tausend|tsd": 3, "million(?:en)?|mio": 6, "milliarden?|mrd": 9, "billion(?:en)?": 12},
    "en": {"hundreds?": 2, "thousands?": 3, "lakhs?|lacs?": 5, "millions?": 6, "crores?": 7, "billions?": 9,
           "trillions?": 12},
    "es": {"mil": 3, "mill[oó]n(?:es)?": 6, "bill[oó]n(?:es)?": 12},
    "fr": {"mille|milliers?": 3, "millions?": 6, "milliards?": 9, "billions?": 12},
    "hi": {"सौ(?![ऀ-ॿ])": 2, "हज़?ार": 3, "लाख": 5, "करोड़?": 7, "अरब": 9},
    "id": {"ratus": 2, "ribu": 3, "juta": 6, "miliar": 9, "triliun": 12},
    "it": {"mila|mille": 3, "milion[ei]": 6, "miliard[oi]": 9},
    "ko": {"백": 2, "천": 3, "만": 4, "억": 8, "조(?![각금])": 12},
    "pt": {"mil": 3, "milh(?:ão|ões)": 6, "bilh(?:ão|ões)": 9},
    "ru": {"сотн[яи]|сотен": 2, "тыс(?:яч[аиу]?)?": 3, "миллион(?:а|ов)?|млн": 6, "миллиард(?:а|ов)?|млрд": 9},
    "sw": {"mia": 2, "elfu": 3, "laki": 5, "milioni": 6, "bilioni": 9},
    "te": {"వంద(?:లు|ల)?": 2, "వేలు|వేల|వెయ్యి": 3, "లక్ష(?!్)(?:లు|ల)?": 5, "మిలియన్(?:లు|ల)?": 6, "కోటి|కోట్లు|కోట్ల": 7},
    "th": {"ร้อย(?!ละ)": 2, "พัน(?!ธ)": 3, "หมื่น": 4, "แสน": 5, "ล้าน": 6},
    "tr": {"bin": 3, "milyon": 6, "milyar": 9},
    "vi": {"trăm": 2, "nghìn|ngàn": 3, "triệu": 6, "tỷ|tỉ": 9},
    # 千克 and 千米 are kilograms and kilometres, 百分 begins a percentage, 兆赫 are megahertz
    "zh": {"百(?!分)": 2, "千(?![克米瓦卡赫帕焦伏])": 3, "[万萬]": 4, "[億亿]": 8, "兆(?![赫字瓦帕比])": 12},
}  # fmt: skip
_BEFORE_NUMBER = {"sw"}  # languages that put them first: "elfu 70" is 70,000


def normalised(text: str) -> str:
    """ASCII digits and marks for every script's, "$" for any currency, "1/2" for ½, plain text for LaTeX's numbers."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub("(?<=[０-９])，(?=[０-９]{3})", ",", text)  # in other languages this comma only separates clauses
    text = "".join(map(_to_ascii, text))
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return re.sub(r"(?<=\d)\0", " ", text).replace("\0", "")  # "2½" is "2 1/2", "-½" is "-1/2"


def multiplied(text: str, language: str) -> str:
    """A normalised text with powers of ten in digits: "3万5千" is "35000", "1.2 million" "1200000".

    Numbers that are words themselves ("十八", "eighteen") stay words.
    """
    number, powers = number_pattern(language), _power_pattern(language)
    if language in _BEFORE_NUMBER:
        pair = rf"({'|'.join(_POWERS[language])}) ({number.pattern})"
        chain = re.compile(rf"(?<!\d )\b(?:{pair} ?)+", re.IGNORECASE)
        text = chain.sub(lambda found: re.sub(pair, r"\2 \1", found[0], flags=re.IGNORECASE), text)
    written, place = [], 0
    while match := number.search(text, place):
        found = _multiple(text, match, number, powers, language)
        value, stop = found or (match[0], match.end())
        written += [text[place : match.start()], value]
        place = stop
    return "".join([*written, text[place:]])


@cache
def number_pattern(language: str) -> re.Pattern[str]:
    """One number: grouped by spaces or apostrophes, or by points and commas; then perhaps "/ another"."""
    groups = f"[{_NO_BREAK}' ]" if language in _SPACE_GROUPS else f"[{_NO_BREAK}']"
    number = rf"(?:\d{{1,3}}(?:{groups}\d{{3}})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)*|(?<![\w.])\.\d+)"
    return re.compile(rf"(?<!\d)(?:(?P<whole>\d+) (?=\d+/\d+(?![\d/])))?(?P<parts>{number}(?: ?/ ?{number})*)")


def value(text: str, match: re.Match[str], language: str) -> Number | None:
    """The match's value with its sign. More than one slash is a date or a path: its last part counts."""
    found = _size(match, language)
    if found is None or not _negative(text[: match.start()]):
        return found
    return found.copy_negate() if isinstance(found, Decimal) else -found  # Decimal's own minus would round


def _multiple(
    text: str, match: re.Match[str], number: re.Pattern[str], powers: re.Pattern[str], language: str
) -> tuple[str, int] | None:
    """The value of a number with the powers of ten after it, and where that ends; None without any."""
    total, stop, room = Fraction(0), match.start(), 0
    following: re.Match[str] | None = match
    while following is not None and (size := _size(following, language)) is not None:
        words = powers.match(text, following.end())
        power = _power(words[0], language) if words else 0
        if room:  # 3万 5千: each part is below the power of ten before it; after a space it has as many digits as that
            apart = text[stop : following.start()] != ""
            if size * 10**power >= 10**room or (apart and not power and len(str(int(size))) != room):
                break
        elif not power:
            return None
        total += Fraction(size) * 10**power
        stop, room = (words.end() if words and power else following.end()), power
        following = number.match(text, stop + (text[stop : stop + 1] == " ")) if power else None
    if stop == match.start():
        return None
    if total.denominator == 1:
        return str(total.numerator), stop
    return f"{total.numerator}/{total.denominator}", stop


@cache
def _powers_of(language: str) -> tuple[tuple[re.Pattern[str], int], ...]:
    """The words that count in a text of that language: its own, English ones, and those of non-Latin scripts."""
    chosen = {**_POWERS, language: _POWERS.get(language, {})}
    order = [language, "en", *(each for each in chosen if each not in (language, "en"))]
    return tuple(
        (re.compile(rf"(?:{unicodedata.normalize('NFC', words)}){_end_of_word(words)}", re.IGNORECASE), power)
        for each in order
        for words, power in chosen.get(each, {}).items()
        if each in (language, "en") or not _is_latin(words)
    )


@cache
def _power_pattern(language: str) -> re.Pattern[str]:
    """One or more of them after a number: "百万" and "mil millones" are two."""
    words = "|".join(pattern.pattern for pattern, _ in _powers_of(language))
    return re.compile(rf"(?:[ {_NO_BREAK}]{{0,2}}(?:{words}))+", re.IGNORECASE)


def _power(words: str, language: str) -> int:
    """The sum of the powers of ten that `words` names, one after the other."""
    found, place = 0, 0
    while place < len(words):
        here = ((pattern.match(words, place), power) for pattern, power in _powers_of(language))
        match, power = next(((match, power) for match, power in here if match), (None, 0))
        found, place = found + power, match.end() if match else place + 1
    return found


def _is_latin(word: str) -> bool:
    return "LATIN" in unicodedata.name(word.lstrip("[(?:")[0])


def _end_of_word(words: str) -> str:
    return r"(?!\w)" if _is_latin(words) or "CYRILLIC" in unicodedata.name(words[0]) else ""


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


def _size(match: re.Match[str], language: str) -> Number | None:
    """The match's value without a sign; None where it is too long or divides by zero."""
    if len(match["parts"]) > _LONGEST:
        return None
    parts = [_plain(part.strip(), language) for part in match["parts"].split("/")]
    if len(parts) != 2:
        return parts[-1]
    if parts[1] == 0:
        return None
    found = Fraction(parts[0]) / Fraction(parts[1])
    return found + int(match["whole"]) if match["whole"] and found < 1 else found  # "2 1/2"


def _negative(before: str) -> bool:
    """Whether a minus sign is attached: "-18", "-$18", "$-18"; neither "5-18", "x-18" nor "- 18"."""
    before = before[-4:].rstrip("$")
    if not before.endswith("-"):
        return False
    previous = before[:-1].rstrip("$")[-1:]
    # Scripts without letter case put no space before a number: 答えは-18 is minus eighteen.
    joined = previous.isdigit() or previous.lower() != previous.upper() or previous in tuple(")]%-")
    return not joined


def _plain(token: str, language: str) -> Decimal:
    """The value of digits with separators, by the language's convention if the digits are ambiguous."""
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
