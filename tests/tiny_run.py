"""The tiny run that tests share: a parallel corpus in four languages, and a run file's values that fit it.

`conftest.py` makes fixtures of it. Tests with real ranks import it and so do the programs that are the ranks:
`distributed/ranks.py` puts this folder on their path. It imports no room of the project.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.run_folder.prepare import Prepared

LANGUAGES = ("en", "de", "sw", "zh")
ITEMS = 40
# Three situations a language: question, answer. A row's id is the item, so equal ids are translations.
SITUATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "en": (
        ("Anna has {a} apples and buys {b} more. How many apples does she have?", "{a} + {b} = {sum}. Answer: {sum}"),
        ("A bus carries {a} people, {b} more get on at the market and nobody leaves. How many?", "Answer: {sum}"),
        ("{a} plus {b}?", "{sum}"),
    ),
    "de": (
        ("Anna hat {a} Äpfel und kauft {b} dazu. Wie viele Äpfel hat sie?", "{a} + {b} = {sum}. Antwort: {sum}"),
        ("Im Bus sitzen {a} Leute, am Markt steigen {b} ein und niemand aus. Wie viele sind es?", "Antwort: {sum}"),
        ("{a} und {b}?", "{sum}"),
    ),
    "sw": (
        ("Anna ana matufaa {a} na ananunua {b} zaidi. Ana matufaa mangapi?", "{a} + {b} = {sum}. Jibu: {sum}"),
        ("Basi lina watu {a}, wengine {b} wanapanda sokoni na hakuna anayeshuka. Ni wangapi?", "Jibu: {sum}"),
        ("{a} na {b}?", "{sum}"),
    ),
    "zh": (
        ("安娜有{a}个苹果，又买了{b}个。她有多少个苹果？", "{a} + {b} = {sum}。答案：{sum}"),
        ("公交车上有{a}人，在市场又上来{b}人，没有人下车。一共多少人？", "答案：{sum}"),
        ("{a}加{b}？", "{sum}"),
    ),
}
# Settings of runs on real ranks: enough pairs per step for four ranks with four micro-batches each, and tied weights,
# with a layer before, between and after the two that shift.
FOR_RANKS: dict[str, Any] = {
    "model.init.num_hidden_layers": 3,
    "model.init.tie_word_embeddings": True,
    "data.mixture": {"strategy": "explicit", "weights": {"en": 3, "de": 1, "sw": 1, "zh": 1}, "pairing": "reuse"},
    "data.slots_per_step": 80,
    "data.micro_batch_tokens": 1024,
}
RANK_ITEMS = 240


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """The tiny run after `prepare`: index, tokenizer and starting weights lie in `config.output_dir`."""

    config: RunConfig
    prepared: Prepared


def corpus_rows(language: str, items: int = ITEMS) -> list[dict[str, str]]:
    """Rows of one language: id, language, question, answer. No two items have the same question."""
    rows = []
    for item in range(items):
        a, b = 3 + item, 2 + item * item % 17
        question, answer = (
            text.format(a=a, b=b, sum=a + b) for text in SITUATIONS[language][item % len(SITUATIONS[language])]
        )
        rows.append({"id": f"item-{item:02d}", "language": language, "question": question, "answer": answer})
    return rows


def write_data(folder: Path, items: int = ITEMS) -> Path:
    """`<language>.jsonl` of the same items in every language."""
    folder.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in corpus_rows(language, items)]
        (folder / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_parallel(folder: Path, lines: int = ITEMS) -> dict[str, str]:
    """`<language>.txt` whose lines are translations of each other, other texts than those of `write_data`: `files`."""
    for language in LANGUAGES:
        texts = [row["question"] for row in corpus_rows(language, RANK_ITEMS + lines)[RANK_ITEMS:]]
        (folder / f"{language}.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return {language: f"{language}.txt" for language in LANGUAGES}


def write_task_data(folder: Path, items: int = ITEMS) -> Path:
    """`<language>.jsonl` of the same questions as words, numbers tagged; all but English with a back-translation."""
    folder.mkdir(parents=True, exist_ok=True)
    english = [row["question"].split() for row in corpus_rows("en", items)]
    for language in LANGUAGES:
        lines = []
        for row, source in zip(corpus_rows(language, items), english, strict=True):
            words = list(row["question"]) if language == "zh" else row["question"].split()
            tags = ["NUMBER" if any(map(str.isdigit, word)) else "WORD" for word in words]
            content: dict[str, Any] = {
                "id": row["id"],
                "language": language,
                "text": row["question"],
                "words": words,
                "tags": tags,
            }
            if language != "en":
                content["back_words"] = source[::-1]
            lines.append(json.dumps(content, ensure_ascii=False) + "\n")
        (folder / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


# Changes that turn the tiny run into X-Mixup on a tagger, over `write_task_data`.
XMIXUP: dict[str, Any] = {
    "model.init": {
        "model_type": "xlm-roberta", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "max_position_embeddings": 130,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "tokenizer.train": {"vocab_size": 150, "style": "encoder"},
    "data.task": {"kind": "tagging", "labels": ["WORD", "NUMBER"]},
    "data.sources": [
        {
            "name": "questions",
            "files": "*.jsonl",
            "columns": {name: name for name in ("id", "language", "words", "tags", "back_words")},
        }
    ],
    "data.mixture": {"strategy": "uniform"},
    "data.slots_per_step": 32,
    "data.micro_batch_tokens": 4096,
    "objective": {"name": "xmixup", "layer": 1, "alpha": 0.8, "source_schedule": 4},
}  # fmt: skip


def run_values(data_dir: Path, output_dir: Path, /, **changes: Any) -> dict[str, Any]:
    """New values of a run file, with dotted keys set: `run_values(a, b, **{"data.workers": 2})`.

    A two-layer Llama from scratch with its own tokenizer, ShifCon, 12 steps of 8 slots, fp32, ZeRO-3 with
    nothing left unsharded.
    """
    values: dict[str, Any] = {
        "data_dir": str(data_dir),
        "output_dir": str(output_dir),
        "seed": 3,
        "max_steps": 12,
        "model": {
            "init": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            },
        },
        "tokenizer": {"train": {"vocab_size": 400}},
        "data": {
            "languages": list(LANGUAGES),
            "dominant": "en",
            "sources": [
                {
                    "name": "problems",
                    "files": "*.jsonl",
                    "columns": {"id": "id", "language": "language", "prompt": "question", "completion": "answer"},
                }
            ],
            "mixture": {"strategy": "uniform", "pairing": "reuse"},
            "slots_per_step": 8,
            "sequence_length": 96,
            "micro_batch_tokens": 384,
        },
        "objective": {
            "name": "shifcon", "layers": [1, 2], "probe_items": 16, "refresh_every": 4,
            "contrastive": {"weight": 0.5, "scale": 10.0, "set_size": 2},
        },
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1},
        "precision": "fp32",
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        "checkpoint": {"every": 2, "keep": 2},
        "tracking": {"enabled": False, "log_every": 1},
    }  # fmt: skip
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = values
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = copy.deepcopy(value)  # a later key may change a value in it
    return values


def rank_values(data_dir: Path, output_dir: Path, /, **changes: Any) -> dict[str, Any]:
    """`run_values` for `write_data(data_dir, RANK_ITEMS)` and one to four ranks."""
    return run_values(data_dir, output_dir, **{**FOR_RANKS, **changes})


def copy_preparation(earlier: Path, output_dir: Path) -> None:
    """Index, tokenizer and starting weights of a run: `prepare` of one with the same data and model finds them."""
    for name in ("index", "tokenizer", "initial_model"):
        shutil.copytree(earlier / name, output_dir / name)


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """The values as a run file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
