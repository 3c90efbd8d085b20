"""Input data of the compared runs: parallel questions, labelled sentences, XTREME task folders, run files.

Everything is a pure function of this file, so both revisions get the same bytes. No module of the project is imported.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml

LANGUAGES = ("en", "de", "ru", "zh")
ITEMS = 160
LEXICON = 300  # words per language
ALPHABETS = {  # code points of the first letter and number of letters; other languages take Latin letters
    "ru": (0x430, 32), "zh": (0x4E00, 60), "ja": (0x3042, 60), "th": (0x0E01, 46), "bn": (0x0995, 35),
}  # fmt: skip
LATIN = (0x61, 26)
SPLITS = {"train": range(96), "dev": range(96, 112), "test": range(112, 136)}
TASKS = {  # XTREME task: labels used, or none
    "xnli": ("contradiction", "entailment", "neutral"),
    "udpos": ("NOUN", "NUM"),
    "xquad": (),
}


@cache
def lexicon(language: str) -> list[str]:
    """The words of a language, at the same positions in every language."""
    first, letters = ALPHABETS.get(language, LATIN)
    found = []
    for number in range(LEXICON):
        rng = random.Random(f"{language} {number}")
        found.append("".join(chr(first + rng.randrange(letters)) for _ in range(rng.randint(2, 5))))
    return found


def words(language: str, seed: object, n: int) -> list[str]:
    """`n` words of a language, drawn by `seed`: the same seed gives the same positions in every lexicon."""
    rng = random.Random(f"{seed}")
    return [lexicon(language)[int(LEXICON * rng.random() ** 2)] for _ in range(n)]


def question(language: str, item: int) -> dict[str, str]:
    """A decoder row: a question of 8 to 30 words and a short answer, parallel over languages."""
    length = 8 + item * 7 % 23
    text = words(language, f"question {item}", length)
    answer = [*words(language, f"answer {item}", 2 + item % 9), str(3 + item)]
    return {"id": f"i{item}", "language": language, "question": " ".join(text), "answer": " ".join(answer)}


def labelled(task: str, language: str, item: int) -> dict[str, Any]:
    """A row of an XTREME task in the layout of a prepared task folder, with its back-translation unless English."""
    row: dict[str, Any] = {"id": f"{language}-{item}", "group": f"i{item}", "language": language}
    own = _labelled_text(task, language, item)
    if language == "en":
        return row | own
    back = _labelled_text(task, "en", item, variant="back ")
    kept = ("text_a", "text_b", "words", "question", "context", "answers")
    return row | own | {f"back_{name}": back[name] for name in kept if name in back}


def _labelled_text(task: str, language: str, item: int, variant: str = "") -> dict[str, Any]:
    text = words(language, f"{variant}text {item}", 6 + item * 5 % 19)
    if task == "xnli":
        second = words(language, f"{variant}hypothesis {item}", 4 + item % 5)
        label = TASKS[task][item % 3]
        return {"text_a": " ".join(text), "text_b": " ".join([label[:3], *second]), "label": label}
    if task == "udpos":
        mixed = [str(place + item) if place % 4 == item % 4 else word for place, word in enumerate(text)]
        return {"words": mixed, "tags": ["NUM" if word.isdigit() else "NOUN" for word in mixed]}
    place = item % len(text)
    answer = {"text": text[place], "answer_start": len(" ".join([*text[:place], ""]))}
    return {"question": " ".join(words(language, f"asked {item}", 4)), "context": " ".join(text), "answers": [answer]}


def write_questions(folder: Path, languages: tuple[str, ...] | list[str], items: int = ITEMS) -> Path:
    """`<language>.jsonl` with the columns of decoders and, as `text`, of masked language modelling."""
    for language in languages:
        rows = [question(language, item) for item in range(items)]
        write_rows(folder / f"{language}.jsonl", [row | {"text": row["question"]} for row in rows])
    return folder


def write_task(folder: Path, task: str) -> Path:
    """A prepared XTREME task folder: `{train,dev,test}/<language>.jsonl`."""
    for split, items in SPLITS.items():
        for language in LANGUAGES:
            write_rows(folder / split / f"{language}.jsonl", [labelled(task, language, item) for item in items])
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_yaml(file: Path, values: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


DECODER: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "attention_dropout": 0.1,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "model_type": "xlm-roberta", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 386, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}  # fmt: skip


def decoder_run(data: Path, output: Path, objective: dict[str, Any]) -> dict[str, Any]:
    """A run file: a small Llama from scratch, 24 steps of 24 samples, fp32, ZeRO-3, held-out losses."""
    return {
        **_run(data, output),
        "model": {"init": DECODER},
        "tokenizer": {"train": {"vocab_size": 700}},
        "data": {
            "languages": list(LANGUAGES),
            "dominant": "en",
            "sources": [
                {
                    "name": "questions", "files": "*.jsonl",
                    "columns": {"id": "id", "language": "language", "prompt": "question", "completion": "answer"},
                }
            ],
            "template": {"name": "plain"},
            "mixture": {"strategy": "explicit", "weights": {"en": 3, "de": 1, "ru": 1, "zh": 1}, "pairing": "reuse"},
            "slots_per_step": 24,
            "sequence_length": 160,
            "micro_batch_tokens": 1536,
            "heldout_items": 16,
        },
        "objective": objective,
        "evaluation": {"every": 8, "items": 8, "swapped_prompts": True},
    }  # fmt: skip


def mlm_run(data: Path, output: Path) -> dict[str, Any]:
    """A run file: a small XLM-R from scratch on masked words."""
    return {
        **_run(data, output),
        "model": {"init": ENCODER},
        "tokenizer": {"train": {"vocab_size": 700, "style": "encoder"}},
        "data": {
            "languages": list(LANGUAGES),
            "dominant": "en",
            "task": {"kind": "text"},
            "sources": [
                {"name": "text", "files": "*.jsonl", "columns": {"id": "id", "language": "language", "text": "text"}}
            ],
            "mixture": {"strategy": "uniform"},
            "slots_per_step": 24,
            "sequence_length": 160,
            "micro_batch_tokens": 1024,
        },
        "objective": {"name": "mlm"},
    }


SHIFCON: dict[str, Any] = {
    "name": "shifcon", "layers": [1, 2], "probe_items": 8, "refresh_every": 6,
    "contrastive": {"weight": 0.5, "scale": 10.0, "set_size": 3},
}  # fmt: skip


def _run(data: Path, output: Path) -> dict[str, Any]:
    return {
        "data_dir": str(data),
        "output_dir": str(output),
        "seed": 5,
        "max_steps": 24,
        "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.1},
        "precision": "fp32",
        "zero_stage": 3,
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        "checkpoint": {"every": 8, "keep": 1},
        "tracking": {"enabled": False},
    }
