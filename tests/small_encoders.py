"""Two small encoder tokenizers and words of five scripts, for tests of tasks.

`wordpiece` is of BERT's family: every digit and character of WORDS, and a few longer pieces. `unigram` is of XLM-R's,
with the pieces listed by score. Both vocabularies are too small to keep most words whole.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS: dict[str, tuple[str, ...]] = {
    "en": ("The", "old", "bridge", "in", "Budapest", "was", "rebuilt", "(", "1949", ")", "after", "the", "war", "."),
    "th": ("สะพาน", "เก่า", "ใน", "บูดาเปสต์", "ถูก", "สร้าง", "ใหม่", "หลัง", "สงคราม"),
    "zh": ("布达佩斯", "的", "旧", "桥", "在", "战后", "重建", "。"),
    "ar": ("أعيد", "بناء", "الجسر", "القديم", "في", "بودابست", "بعد", "الحرب"),
    "bn": ("যুদ্ধের", "পরে", "বুদাপেস্টের", "পুরানো", "সেতুটি", "পুনর্নির্মাণ", "করা", "হয়েছিল", "।"),
}
SPACE = {"th": "", "zh": ""}  # between words; elsewhere one
CHARACTERS = sorted({character for words in WORDS.values() for word in words for character in word} | set("0123456789"))
LONGER = ("bridge", "re", "built", "bu", "da", "สะ", "พาน", "佩斯", "战后", "ال", "جسر", "সেতু", "পরে")


def sentence(language: str) -> str:
    """The words as they are written."""
    return SPACE.get(language, " ").join(WORDS[language])


@cache
def wordpiece() -> PreTrainedTokenizerBase:
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for character in CHARACTERS:
        pieces += [character, f"##{character}"]
    for piece in LONGER:
        pieces += [piece, f"##{piece}"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocab, do_lower_case=False, strip_accents=False)


@cache
def unigram() -> PreTrainedTokenizerBase:
    from transformers import XLMRobertaTokenizer

    pieces: dict[str, float] = {"<s>": 0.0, "<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0}
    for character in CHARACTERS:
        pieces[character] = -6.0
    for piece in LONGER:
        pieces |= {piece: -5.0, f"▁{piece}": -5.5}
    return XLMRobertaTokenizer(vocab=[*pieces.items(), ("<mask>", 0.0)])


TOKENIZERS: dict[str, Any] = {"wordpiece": wordpiece, "unigram": unigram}
