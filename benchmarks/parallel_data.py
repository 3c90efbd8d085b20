"""Generated parallel data of realistic lengths: samples of about 60 to 200 tokens in five languages.

`write_data` writes `<language>.jsonl` files with the same items in every language; `sources` describes such files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LETTERS = {  # consonants, vowels
    "en": ("bcdfghlmnprstw", "aeiou"), "de": ("bdfghklmnrstwz", "aeiouäöü"), "es": ("bcdlmnprstvñ", "aeioué"),
    "ru": ("бвгдзклмнпрст", "аеиоуя"), "sw": ("bdghjklmnpstwz", "aeiou"),
}  # fmt: skip
LANGUAGES = list(LETTERS)
WEIGHTS = {language: 0.3 if language == "en" else 0.175 for language in LANGUAGES}
LEXICON = 400  # words a language
ITEMS = 600
QUESTION_WORDS, ANSWER_WORDS = (35, 110), (20, 80)  # about one token a word


def sources(languages: Sequence[str]) -> list[dict[str, Any]]:
    """`data.sources` of a run file for `<language>.jsonl` with the keys id, question and answer."""
    columns = {"id": "id", "prompt": "question", "completion": "answer"}
    return [{"name": each, "files": f"{each}.jsonl", "language": each, "columns": columns} for each in languages]


def write_data(folder: Path) -> None:
    """Write `<language>.jsonl`: the same items, word for word, in each language's own words."""
    folder.mkdir(parents=True)
    for language, (consonants, vowels) in LETTERS.items():
        rng = random.Random(language)
        lexicon = [
            "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.randint(1, 3)))
            for _ in range(LEXICON)
        ]
        lines = []
        for item in range(ITEMS):
            rng = random.Random(item)  # the same words in every language
            texts = [
                " ".join(lexicon[int(LEXICON * rng.random() ** 2)] for _ in range(rng.randint(*words)))
                for words in (QUESTION_WORDS, ANSWER_WORDS)
            ]
            lines.append(json.dumps({"id": f"i{item}", "question": texts[0], "answer": texts[1]}))
        (folder / f"{language}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
