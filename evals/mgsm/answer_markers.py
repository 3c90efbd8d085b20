"""Markers that introduce the final answer in an output, and the end of the answer: one table for all languages.

Every language has the same forms, each with its own words: "Answer: 18", "**Answer**: 18", "The answer is 18", "Answer
- 18", "Answer = 18", and at the start of a line or sentence "Answer 18". "#### 18" and "\\boxed{18}" belong to no
language. The forms of all languages count in all texts, because models may answer in English or in the question's
language.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_STYLE = r"[*_`]*"  # Markdown's emphasis


class _Words(NamedTuple):
    """Regular expressions: nouns for "answer", words that link them to it ("is"), words that start the next question.

    `spaced`: words are separated by spaces, so that further words may stand between noun and link.
    """

    answer: str
    link: str
    question: str
    spaced: bool = True


_WORDS = {
    "ar": _Words("الإجابة(?: النهائية)?|الجواب(?: النهائي)?|إجابة|جواب", "هي|هو", "سؤال|السؤال"),
    "bn": _Words("উত্তর(?:টি|টা)?", "হলো|হল|হচ্ছে|হবে|হয়", "প্রশ্ন"),
    "de": _Words("(?:end|schluss)?antwort", "lautet|ist|beträgt|wäre", "frage|aufgabe"),
    "en": _Words("answer", "is|was|are|equals|(?:will|would|should|must) be", "question|problem|q"),
    "es": _Words("respuesta(?: final| correcta)?", "es|son|será|sería", "pregunta|problema"),
    "fr": _Words("r[ée]ponse(?: finale| correcte)?", "est|sera|serait", "question|problème"),
    "hi": _Words("उत्तर|जवाब", "है|होगा", "प्रश्न|सवाल"),
    "id": _Words("jawaban(?:nya)?(?: akhir)?", "adalah|ialah", "pertanyaan|soal"),
    "it": _Words("risposta(?: finale| corretta)?", "è|sarà|sarebbe", "domanda|problema"),
    "ja": _Words("答え?|解答|回答", "は|が", "質問|問題", spaced=False),
    "ko": _Words("정답|답변|답", "은|는", "질문|문제", spaced=False),
    "nl": _Words("antwoord", "is|luidt", "vraag"),
    "pt": _Words("resposta(?: final| correta)?", "é|são|será|seria", "pergunta|problema"),
    "ru": _Words("ответ", "это|равен|равно|составляет|составит|будет", "вопрос|задача"),
    "sw": _Words("jibu(?: la mwisho| sahihi)?", "ni", "swali"),
    "te": _Words("సమాధానం|జవాబు", "ఏమిటంటే|అంటే", "ప్రశ్న"),
    "th": _Words("คำตอบ(?:สุดท้าย|ที่ถูกต้อง)?", "คือ|ก็คือ|เท่ากับ|เป็น", "คำถาม|โจทย์", spaced=False),
    "tr": _Words("cevap|yanıt", "ise", "soru"),
    "vi": _Words("đáp án|đáp số|câu trả lời", "là", "câu hỏi"),
    "zh": _Words("答案?|解答|回答", "[就应應该該]*(?:是|为|為|等于|等於)", "问题|問題|题目", spaced=False),
}
# Before "answer" they introduce a solution with its steps, not the answer (as in MGSM's own exemplars).
_STEPWISE = re.compile(
    r"(?:step[- ]by[- ]step|schritt[- ]für[- ]schritt|ধাপে ধাপে|దశలవారీగా|пошаговый|ステップごとの)[\s-]*$", re.IGNORECASE
)
# Headers with which templates start the next turn. A model that continues after its answer writes one of these.
_TURN_HEADER = re.compile(
    r"""^[ \t]*\#{2,4}\ *(?:instruction|input|response|human|user|assistant|question|problem)s?\ *\d*\ *(?::|$)
      | \#{3}\ ?(?:instruction|response)\ ?:
      | below\ is\ an\ instruction\ that\ describes
      | <\|?/?(?:im_start|im_end|user|human|assistant|system|start_header_id|eot_id|eot|end|endoftext|end_of_text)\|?>
      | <(?:start|end)_of_turn> | </?s> | \[/?INST\]
      | ^[ \t]*(?:user|human)\ *:""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)


def until_next_turn(text: str) -> str:
    """The output up to the header of a next turn, without leading headers.

    Text that only looks like a next question ("Question: ...") ends the answer only after a number.
    """
    while header := _TURN_HEADER.match(text.lstrip()):
        text = text.lstrip()[header.end() :]
    if header := _TURN_HEADER.search(text):
        text = text[: header.start()]
    for question in _NEXT_QUESTION.finditer(text):
        if re.search(r"\d", text[: question.start()]):
            return text[: question.start()]
    return text


def answer_markers(text: str) -> list[re.Match[str]]:
    """Every marker, in order; one with the group "colon" may also introduce a whole solution."""
    return [found for found in _MARKER.finditer(text) if not _STEPWISE.search(text[: found.start()])]


def _joined(words: list[str]) -> str:
    return unicodedata.normalize("NFC", "|".join(words))


def _marker() -> re.Pattern[str]:
    nouns = _joined([each.answer for each in _WORDS.values()])
    noun = rf"(?<![^\W\d_])(?:{nouns})(?![^\W\d_]){_STYLE}"
    unspaced = _joined([each.answer for each in _WORDS.values() if not each.spaced])
    spaced_links = _joined([each.link for each in _WORDS.values() if each.spaced])
    links = _joined([each.link for each in _WORDS.values() if not each.spaced])
    either = rf"(?:{noun}|(?:{unspaced}){_STYLE})"
    forms = [
        r"#{4}(?=[\s$*(\\-]*\d)",  # GSM8K; not a heading
        r"\\(?:boxed|fbox)\s*\{",
        rf"{noun}(?:\s[^\n\d.:;,!?=]{{0,40}}?)?\s(?:{spaced_links})(?![^\W\d_])",
        rf"(?:{unspaced}){_STYLE} ?(?:{links})",
        rf"(?P<colon>{either}(?: ?\([^()\n\d]{{0,30}}\))?[ \u00a0]?{_STYLE}(?:[:=—]|-(?=\s)){_STYLE})",
        rf"(?:^|[.!?।。]\s*)[\s#>*_`]*(?:[^\s\d.:]{{1,20}} ?)?{either}\s+(?=[$*(\\-]*\d)",
    ]
    return re.compile("|".join(forms), re.IGNORECASE | re.MULTILINE)


def _next_question() -> re.Pattern[str]:
    words = _joined([each.question for each in _WORDS.values()])
    return re.compile(rf"^[ \t#*_>`]*(?:{words})[ \t]?\d*{_STYLE}[ \t]?:", re.IGNORECASE | re.MULTILINE)


_MARKER, _NEXT_QUESTION = _marker(), _next_question()
