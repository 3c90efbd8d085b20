"""Every rule that extracts numbers from answers, on a table of outputs, quirks included."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest

from evals.mgsm.numbers import RULES, gold_number, last_number, lm_eval_flexible, lm_eval_strict, robust

# output, gold, language, right by: last number, lm-eval flexible, needed (robust)
TABLE = [
    ("18.0", "18", "en", True, False, True),
    ("$18.00", "18", "en", True, False, True),
    ("1.8", "18", "en", False, True, False),
    ("-18", "18", "en", True, True, False),
    ("70.000", "70000", "de", False, True, True),
    ("70 000", "70000", "fr", False, False, True),
    ("1.234,00", "1234", "de", False, False, True),
    ("1.234,00", "1234", "es", False, False, True),
    ("১৮", "18", "bn", True, False, True),
    ("๑๘", "18", "th", True, False, True),
    ("१८", "18", "hi", True, False, True),
    ("١٨", "18", "ar", True, False, True),
    ("١٨٫٥", "18.5", "ar", False, False, True),
    ("１８", "18", "ja", True, False, True),
    ("1/2", "2", "en", True, True, False),
    ("36/2", "18", "en", False, False, True),
    ("I do not know.", "0", "en", True, False, False),
]


@pytest.mark.parametrize(("output", "gold", "language", "last", "flexible", "needed"), TABLE)
def test_every_rule_judges_the_table_of_outputs(
    output: str, gold: str, language: str, last: bool, flexible: bool, needed: bool
) -> None:
    framed = [f"She has 5 and 3.\n#### {output}"] if any(char.isdigit() for char in output) else []
    for text in [output, *framed]:
        judged = {name: rule.is_correct(rule.extract(text, language), gold) for name, rule in RULES.items()}
        assert judged["last_number"] == last
        assert judged["lm_eval_flexible"] == flexible
        assert judged["robust"] == needed


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        # after the last marker, not the last number
        ("16 - 3 = 13.\n#### 26\nShe has 99 left.", "en", "26"),
        ("#### 5\nWait.\n#### 18", "en", "18"),
        ("The answer is 18.\n\n### Instruction:\nTom has 3 apples", "en", "18"),
        ("The final answer is: **$1,234.50**.", "en", "1234.50"),
        ("The answer is\n18", "en", "18"),
        ("The answer is 9 * 2 = $18.", "en", "18"),
        ("The answer is x = 18", "en", "18"),
        ("The answer is 18, since 16-3-4=9", "en", "18"),
        ("It is 12. The answer is unknown.", "en", "12"),  # a marker without a number is ignored
        ("#### Step 3\nSo 7 and then 18", "en", "18"),  # a heading is not a marker
        (r"So $\boxed{18}$ for 2 days", "en", "18"),
        (r"\boxed{\frac{37}{2}}", "en", "37/2"),
        ("Die Antwort lautet 26. Das sind 2 mehr.", "de", "26"),
        ("La respuesta es 26 por 2.", "es", "26"),
        ("La réponse est 26 pour 2.", "fr", "26"),
        ("Ответ — 26, это 2.", "ru", "26"),
        ("Jibu ni 26. 2", "sw", "26"),
        ("উত্তর হল ২৬। 2", "bn", "26"),
        ("సమాధానం 26. 2", "te", "26"),
        ("คำตอบคือ ๒๖ ใน 2 วัน", "th", "26"),
        ("答えは26です。2日。", "ja", "26"),
        ("答案是 ２６。2 天。", "zh", "26"),
        ("The answer is 26. 2", "sw", "26"),  # an English answer to a Swahili question
        # separators
        ("1,234,567", "en", "1234567"),
        ("1.234.567", "de", "1234567"),
        ("1.234.567,89", "de", "1234567.89"),
        ("1,234.50", "de", "1234.50"),  # both marks: the last one is the decimal's
        ("1,00,000", "bn", "100000"),
        ("১,২৩৪", "bn", "1234"),
        ("๑,๒๓๔.๕", "th", "1234.5"),
        ("1 234 567,5", "ru", "1234567.5"),
        ("70\u202f000", "en", "70000"),
        ("70'000", "de", "70000"),
        ("5 100 gram bars", "en", "100"),
        ("18,5", "fr", "18.5"),
        ("18,50", "en", "18.50"),
        ("1.234", "en", "1.234"),
        ("0.125", "de", "0.125"),
        ("$20,000", "es", "20000"),
        ("１，２３４．５", "zh", "1234.5"),
        ("有16，300个", "zh", "300"),
        ("1, 2, 3", "en", "3"),
        ("1,2,3", "en", "3"),
        ("on 12.05.2020", "de", "2020"),
        ("$.50", "en", "0.50"),
        ("He has 18.", "en", "18"),
        # signs
        ("-18", "en", "-18"),
        ("−18", "en", "-18"),
        ("-$18", "en", "-18"),
        ("$-18.5", "en", "-18.5"),
        ("答えは-18です", "ja", "-18"),
        ("10-18", "en", "18"),
        ("10$-18$", "en", "18"),
        ("COVID-19", "en", "19"),
        ("- 18 eggs", "en", "18"),
        # fractions
        ("-1/2", "en", "-1/2"),
        ("2 1/2", "en", "5/2"),
        ("2½", "en", "5/2"),
        ("-½", "en", "-1/2"),
        ("36 / 2", "en", "18"),
        ("0.5/2", "en", "1/4"),
        ("12/05/2020", "en", "2020"),
        ("$18/day", "en", "18"),
    ],
)
def test_the_robust_rule_extracts_the_value(text: str, language: str, value: str) -> None:
    found = robust(text, language)
    assert found is not None
    assert Fraction(found) == Fraction(value)


@pytest.mark.parametrize("text", ["", "no number", "3/0", "####", "9" * 5000])
def test_the_robust_rule_returns_none_without_a_number(text: str) -> None:
    assert robust(text) is None


def test_the_robust_rule_is_exact_beyond_float_precision() -> None:
    digits = "-" + "1234567890" * 5
    assert robust(digits) == Decimal(digits)
    third = robust("1/3")
    assert third == Fraction(1, 3)
    assert not RULES["robust"].is_correct(third, "0.333")


def test_the_last_number_rule_keeps_the_published_scorers_quirks() -> None:
    assert last_number("1,2") == 12  # commas between digits are removed, wherever they are
    assert last_number("1,234,567 eggs") == 1234567
    assert last_number("from -5") == 5
    assert last_number("none") is None
    right = RULES["last_number"].is_correct
    assert right(None, "0")
    assert right(Decimal("18"), "-18")
    assert right(Decimal("2.001"), "2")  # in float arithmetic, as in the scorers, the difference is just below 1e-3
    assert not right(Decimal("18.001"), "18")
    assert not right(last_number("9" * 5000), "18")
    assert right(Decimal("114200"), "114,200")


@pytest.mark.parametrize(
    ("text", "language", "found"),
    [
        ("The answer is 18. The answer is 20.", "en", "18"),
        ("The answer is $18.", "en", None),
        ("The answer is 18.", "bn", "18"),
        ("The answer is 18.", "de", None),
        ("Die Antwort lautet -1.800.", "de", "1800"),
        ("答えは18です。", "ja", "18"),
        ("答えは18", "ja", None),
        ("答案是 18。", "zh", "18"),
        ("Ответ — 18.", "ru", "18"),
        ("The answer is 18.", "xx", "18"),
    ],
)
def test_the_lm_eval_strict_rule_finds_the_phrase(text: str, language: str, found: str | None) -> None:
    assert lm_eval_strict(text, language) == found


def test_the_lm_eval_flexible_rule_compares_strings() -> None:
    assert lm_eval_flexible("18. And so on...") == ""
    assert lm_eval_flexible("70 000") == "000"
    assert not RULES["lm_eval_flexible"].is_correct("000", "0")
    assert RULES["lm_eval_flexible"].is_correct("114200", "114,200")
    assert lm_eval_flexible("১৮") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("18", "18"), ("8.0", "8"), ("-3", "-3"), ("114,200", "114200"), ("1,234.5", "1234.5")],
)
def test_gold_numbers_are_parsed(text: str, value: str) -> None:
    assert gold_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "x", "1,2", "NaN", "1_000", "১৮", "1/2", " 18"])
def test_gold_without_a_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        gold_number(text)
