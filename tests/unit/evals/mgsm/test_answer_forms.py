"""The `robust` rule extracts correct answers in all formats of every MGSM language."""

from __future__ import annotations

import unicodedata
from fractions import Fraction

import pytest

from evals.mgsm.numbers import RULES, robust

# language: the nouns for "answer" with a colon behind them, and whole phrases with {} for the number
NOUNS = {
    "bn": ["উত্তর", "চূড়ান্ত উত্তর"],
    "de": ["Antwort", "Endantwort", "Endgültige Antwort", "Die Antwort"],
    "en": ["Answer", "Final answer", "Final Answer", "The answer"],
    "es": ["Respuesta", "Respuesta final", "La respuesta"],
    "fr": ["Réponse", "Réponse finale", "La réponse"],
    "ja": ["答え", "答", "解答", "最終的な答え"],
    "ru": ["Ответ", "Окончательный ответ"],
    "sw": ["Jibu", "Jibu la mwisho"],
    "te": ["సమాధానం", "జవాబు", "తుది సమాధానం"],
    "th": ["คำตอบ", "คำตอบสุดท้าย"],
    "zh": ["答案", "答", "最终答案"],
}
PHRASES = {
    "bn": ["উত্তর হল {}", "উত্তর হলো {}", "উত্তরটি হবে {}", "উত্তর {}"],
    "de": ["Die Antwort lautet {}", "Die Antwort ist {}", "Die Antwort auf die Frage ist {}", "Die Antwort beträgt {}"],
    "en": ["The answer is {}", "The final answer is: {}", "So the answer to the question is {}", "The answer: {}"],
    "es": ["La respuesta es {}", "La respuesta final es {}", "La respuesta correcta es {}"],
    "fr": ["La réponse est {}", "La réponse finale est {}", "La réponse à la question est {}"],
    "ja": ["答えは{}", "答えは {}", "答えは、{}", "答えが{}"],
    "ru": ["Ответ — {}", "Ответ: {}", "Ответ равен {}", "Ответ - {}"],
    "sw": ["Jibu ni {}", "Jibu la swali ni {}", "Jibu sahihi ni {}"],
    "te": ["సమాధానం {}", "సమాధానం అంటే {}", "సమాధానం ఏమిటంటే {}"],
    "th": ["คำตอบคือ {}", "คำตอบคือ{}", "คำตอบสุดท้ายคือ {}", "คำตอบก็คือ {}"],
    "zh": ["答案是 {}", "答案是{}", "答案为{}", "所以答案应该是{}", "答案就是：{}"],
}
COLONS = [
    "{noun}: {number}", "{noun}:{number}", "{noun} : {number}", "{noun}：{number}", "**{noun}:** {number}",
    "**{noun}**: {number}", "**{noun}: {number}**", "*{noun}*: {number}", "__{noun}__: {number}", "## {noun}: {number}",
    "### {noun}\n{number}", "**{noun}:**\n\n{number}", "{noun}:\n{number}", "{noun} = {number}", "{noun} - {number}",
    "{noun} — {number}", "{noun}: ${number}", "{noun}: **{number}**", "{noun}: x = {number}", "{noun}: \\({number}\\)",
    "{noun}: $\\boxed{{{number}}}$", "{noun}: \\$\\text{{{number}}}", "{noun} (USD): {number}", "- {noun}: {number}",
    "{noun} {number}", "{noun}:\u202f{number}", "\u200b{noun}\u00a0: {number}",
]  # fmt: skip
LANGUAGE_INDEPENDENT = [
    "#### {number}", "####{number}", "#### ${number}", "#### **{number}**", "＃＃＃＃ {number}",
    r"\boxed{{{number}}}", r"$\boxed{{\text{{{number}}}}}$", r"\boxed{{\${number}}}", r"\boxed{{{number}\%}}",
]  # fmt: skip
AFTERS = [" (1 + 2)", ". 16 + 2 = 99", "\n(1 + 2)", " (9 * 2)", "\n\n### Instruction:\nTom has 3 apples.\n#### 4", ""]
BEFORES = ["16 - 3 = 13, 13 + 5 = 18.\n", ""]


def forms(language: str) -> list[str]:
    """Every form of a marker, with {0} where the number goes."""
    nouns = [form.replace("{noun}", noun).replace("{number}", "{0}") for noun in NOUNS[language] for form in COLONS]
    written = [form for phrase in PHRASES[language] for form in (phrase, f"**{phrase}**", phrase + ".")]
    written += [phrase.replace("{}", "**{}**") for phrase in PHRASES[language]]
    phrases = [phrase.replace("{}", "{0}") for phrase in written]
    return [*nouns, *phrases, *(form.replace("{number}", "{0}") for form in LANGUAGE_INDEPENDENT)]


@pytest.mark.parametrize("language", NOUNS)
def test_a_correct_answer_is_found_in_every_form_of_every_language(language: str) -> None:
    wrong = []
    for form in forms(language):
        for number, after in enumerate(AFTERS):
            before = BEFORES[number % 2]
            text = before + unicodedata.normalize("NFD" if number == 1 else "NFC", form.format("18")) + after
            found = robust(text, language)
            if found is None or Fraction(found) != 18:
                wrong.append((text, found))
    assert wrong == []


@pytest.mark.parametrize("language", NOUNS)
def test_markers_of_every_language_count_in_every_language(language: str) -> None:
    """Models may answer a Swahili question in English, or a Thai one in Chinese."""
    for other in NOUNS:
        for form in forms(other)[::9]:
            assert robust(f"13 + 5\n{form.format('18')} (1 + 2)", language) == 18, (form, language)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # "Answer:" before a whole solution does not mark its first number as the answer
        ("Answer: Janet sells 16 - 3 - 4 = 9 eggs a day. She makes 9 * 2 = $18 every day.", "18"),
        ("Answer:\nJanet has 16 eggs.\nShe makes 9 * 2 = 18.", "18"),
        ("Step-by-Step Answer: 5 balls and 2 cans of 3 are 5 + 6 = 11. The answer is 11.", "11"),
        ("Step-by-Step Answer: 5 balls at first, then 5 + 6 = 11", "11"),
        ("Réponse étape par étape : 5 balles, puis 5 + 6 = 11", "11"),
        ("解答：小明有5个苹果。5 + 6 = 11。", "11"),
        ("Answer: 3 * 5 + 3 = 18", "18"),
        ("16 of them.\nAnswer: 3 * 5 + 3 = 18. 16 + 2 = 99", "18"),
        ("Answer: She has 18 eggs (9 * 2).", "18"),
        ("3 + 15 makes it.\nAnswer: She has 18 eggs for 2 days.", "18"),
        ("Each student must answer 5 questions in 90 minutes, so 18 a question.", "18"),
        # text after the header of a next turn is ignored
        ("18\n\n### Instruction:\nTom has 3 apples\n\n### Response: 3", "18"),
        ("She has 18 eggs.### Instruction: 5", "18"),
        ("### Response:\n18\n\n### Instruction:\n5", "18"),
        ("18<|im_end|>\n<|im_start|>user\nI have 7", "18"),
        ("18</s>[INST] 5 [/INST] 6", "18"),
        ("18<end_of_turn>\n<start_of_turn>user\n5", "18"),
        ("The answer is 18.\n\nQuestion: Tom has 3.\nAnswer: 3", "18"),
        ("The answer is 18.\n\nUser: I have 7", "18"),
        ("答案是18。\n\n问题：小明有3个苹果。\n答案：3", "18"),
        ("Below is an instruction that describes a task. 5\nAnswer: 18", "18"),
        ("Question: How many are 3 and 15?\nAnswer: 18", "18"),
    ],
)
def test_the_number_after_a_marker_counts_until_the_next_turn(text: str, value: str) -> None:
    found = robust(text, "en")
    assert found is not None
    assert Fraction(found) == Fraction(value)


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("3万5千", "ja", 35000),
        ("3万5千円", "zh", 35000),
        ("1.2万", "zh", 12000),
        ("1億2,000万", "ja", 120_000_000),
        ("1亿2000万", "zh", 120_000_000),
        ("1万2345", "ja", 12345),
        ("5百万", "ja", 5_000_000),
        ("2兆", "ja", 2 * 10**12),
        ("３万５千", "ja", 35000),
        ("答案是3千5百。", "zh", 3500),
        ("3 万 5 千", "zh", 35000),
        ("重5千克", "zh", 5),
        ("走了3千米", "zh", 3),
        ("১ লাখ ২০ হাজার", "bn", 120_000),
        ("২ কোটি", "bn", 20_000_000),
        ("১.৫ লক্ষ টাকা", "bn", 150_000),
        ("२ लाख", "hi", 200_000),
        ("3 లక్షలు", "te", 300_000),
        ("2 కోట్లు", "te", 20_000_000),
        ("5 వేలు", "te", 5000),
        ("3 หมื่น", "th", 30_000),
        ("๒ แสน", "th", 200_000),
        ("1.5 ล้าน", "th", 1_500_000),
        ("2 หมื่น 5 พัน", "th", 25_000),
        ("3 พันธุ์", "th", 3),
        ("1,2 Millionen", "de", 1_200_000),
        ("5 Mio. Euro", "de", 5_000_000),
        ("3 Tausend", "de", 3000),
        ("1.5 million", "en", 1_500_000),
        ("2 hundred thousand", "en", 200_000),
        ("2 lakh 50 thousand", "en", 250_000),
        ("5 thousand 200 people", "en", 5200),
        ("1/2 million", "en", 500_000),
        ("2 1/2 million", "en", 2_500_000),
        ("-3 million", "en", -3_000_000),
        ("$2 million", "en", 2_000_000),
        ("70 mil", "es", 70_000),
        ("3 mil millones", "es", 3 * 10**9),
        ("5 mil", "en", 5),
        ("2 milliards", "fr", 2 * 10**9),
        ("18 cents", "fr", 18),
        ("70 тысяч", "ru", 70_000),
        ("1,5 млн", "ru", 1_500_000),
        ("70 тыс. рублей", "ru", 70_000),
        ("shilingi elfu 70", "sw", 70_000),
        ("elfu 5 mia 3", "sw", 5300),
        ("milioni 2", "sw", 2_000_000),
        ("70 elfu", "sw", 70_000),
        ("1.2 million", "sw", 1_200_000),
        ("0.0125 thousand", "en", Fraction(25, 2)),
        # separators
        ("12\u2009000", "en", 12000),
        ("12\u00a0000", "en", 12000),
        ("12\u202f000,5", "fr", Fraction(24001, 2)),
        ("12\u200a000", "en", 12000),
        ("1\u2009234\u2009567", "ja", 1234567),
        ("12'000", "de", 12000),
        ("12\u2019000", "de", 12000),
        ("12\u02bc000", "fr", 12000),
        ("1,00,000", "en", 100_000),
        ("১,০০,০০০", "bn", 100_000),
        ("12,34,567.5", "hi", Fraction(2469135, 2)),
        ("٧٠٬٠٠٠", "ar", 70_000),
        ("౧౮", "te", 18),
        ("１２，０００", "ja", 12000),
        # LaTeX
        ("12{,}000", "en", 12000),
        (r"12\,000", "en", 12000),
        (r"12\ 000", "en", 12000),
        ("12~000", "en", 12000),
        (r"12,\!000", "en", 12000),
        (r"$12{,}000$ and so on", "en", 12000),
        (r"\boxed{12,000}", "en", 12000),
        (r"\boxed{12{,}000} for 2", "de", 12000),
        (r"\boxed{\text{18 dollars}} 2", "en", 18),
        (r"\boxed{18\text{ dollars}} 2", "en", 18),
        (r"\boxed{\$12{,}000} 2", "en", 12000),
        (r"\boxed{25\%} of 2", "en", 25),
        (r"\boxed{9 \times 2 = 18} 2", "en", 18),
        (r"\boxed{\dfrac{37}{2}} 2", "en", Fraction(37, 2)),
        (r"\text{The answer is } 18 \text{ of } 20", "en", 18),
        (r"5 \text{ million}", "en", 5_000_000),
        (r"3\,万 5", "en", 5),
    ],
)
def test_numbers_in_native_notations_are_read(text: str, language: str, value: int | Fraction) -> None:
    found = robust(text, language)
    assert found is not None
    assert Fraction(found) == value


def test_published_rules_extract_as_published() -> None:
    """Improvements of the `robust` rule do not apply to them: their scores are compared with published scores."""
    text = "Answer: 3万5千\n\n### Instruction:\nTom has 7 apples"
    found = {name: rule.extract(text, "ja") for name, rule in RULES.items()}
    assert found == {"last_number": 7, "lm_eval_strict": None, "lm_eval_flexible": "7", "robust": 35000}
