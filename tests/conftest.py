"""Small data that several tests share: a parallel corpus in four languages and a run that fits it.

`corpus` and `prepared_run` are made once a session; nobody writes into them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.prepare import Prepared

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


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """The tiny run after `prepare`: index, tokenizer and starting weights lie in `config.output_dir`."""

    config: RunConfig
    prepared: Prepared


def corpus_rows(language: str, n_items: int = ITEMS) -> list[dict[str, str]]:
    """Rows of one language: id, language, question, answer. No two items have the same question."""
    rows = []
    for item in range(n_items):
        a, b = 3 + item, 2 + item * item % 17
        question, answer = (
            text.format(a=a, b=b, sum=a + b) for text in SITUATIONS[language][item % len(SITUATIONS[language])]
        )
        rows.append({"id": f"item-{item:02d}", "language": language, "question": question, "answer": answer})
    return rows


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `<language>.jsonl`: 4 languages (en, de, sw, zh), the same 40 items in each."""
    folder = tmp_path_factory.mktemp("corpus")
    for language in LANGUAGES:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in corpus_rows(language)]
        (folder / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_run(corpus: Path) -> Callable[..., dict[str, Any]]:
    """`tiny_run(output_dir, **{"data.workers": 2})`: fresh values of a run file, dotted keys set as asked.

    A two-layer Llama from scratch with a tokenizer of its own, ShifCon, 12 steps of 8 slots, fp32.
    """
    from training.config import merged

    def make(output_dir: Path, **changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "data_dir": str(corpus),
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
                "name": "shifcon", "layers": [1, 2], "probe_items": 4, "refresh_every": 4,
                "contrastive": {"weight": 0.1, "scale": 10.0, "set_size": 2},
            },
            "optimizer": {"learning_rate": 1e-2},
            "precision": "fp32",
            "checkpoint": {"every": 4, "keep": 2},
            "tracking": {"enabled": False},
        }  # fmt: skip
        for key, value in changes.items():
            *parents, last = key.split(".")
            change = {last: value}
            for parent in reversed(parents):
                change = {parent: change}
            values = merged(values, change) if parents else {**values, last: value}
        return values

    return make


@pytest.fixture(scope="session")
def run_file(tiny_run: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """`run_file(folder, **changes)`: the tiny run as `folder/run.yaml`, its output_dir `folder/run`."""

    def write(folder: Path, **changes: Any) -> Path:
        path = folder / "run.yaml"
        values = tiny_run(folder / "run", **changes)
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: Callable[..., dict[str, Any]]) -> PreparedRun:
    """The tiny run, prepared once: index built, tokenizer trained, weights initialised."""
    from training.prepare import prepare
    from training.run_file import validate

    config = validate(tiny_run(tmp_path_factory.mktemp("prepared") / "run"), "tiny run")
    return PreparedRun(config, prepare(config))
