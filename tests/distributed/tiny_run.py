"""A tiny run on generated parallel data, for tests with real ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LANGUAGES = ["en", "sw", "th"]
WORDS = {
    "en": ["apples", "pears", "buy", "sells", "gives", "has", "more", "total", "morning", "evening", "farm", "book"],
    "sw": ["maembe", "mapapai", "nunua", "uza", "toa", "ana", "zaidi", "jumla", "asubuhi", "jioni", "shamba", "kitabu"],
    "th": ["แอปเปิล", "ลูกแพร์", "ซื้อ", "ขาย", "ให้", "มี", "เพิ่ม", "รวม", "เช้า", "เย็น", "ฟาร์ม", "หนังสือ"],
}


def write_data(folder: Path, items: int = 120) -> Path:
    """`<language>.jsonl` of the same items in three languages; answers hold the question's numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        lines = []
        for item in range(items):
            chance = random.Random(item)
            words = [WORDS[language][chance.randrange(12)] for _ in range(chance.randint(4, 12))]
            a, b = chance.randint(2, 9), chance.randint(2, 9)
            question = f"{a} {' '.join(words)} {b} ?"
            lines.append(json.dumps({"id": f"i{item}", "question": question, "answer": f"{a} + {b} = {a + b}"}))
        (folder / f"{language}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_values(data_dir: Path, output_dir: Path, objective: str = "shifcon", **changes: Any) -> dict[str, Any]:
    """A run file's values: 3-layer Llama from scratch, fp32, ZeRO-3 with nothing left unsharded."""
    objectives = {
        "sft": {"name": "sft"},
        "shifcon": {
            "name": "shifcon", "layers": [1, 2], "contrastive": {"weight": 0.5, "scale": 10.0, "set_size": 2},
            "probe_items": 6, "refresh_every": 4,
        },
    }  # fmt: skip
    values: dict[str, Any] = {
        "data_dir": str(data_dir),
        "output_dir": str(output_dir),
        "seed": 3,
        "max_steps": 8,
        "model": {
            "init": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
                "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
                "tie_word_embeddings": True,
            }
        },
        "tokenizer": {"train": {"vocab_size": 420}},
        "data": {
            "languages": LANGUAGES,
            "dominant": "en",
            "sources": [
                {
                    "name": language, "files": f"{language}.jsonl", "language": language,
                    "columns": {"id": "id", "prompt": "question", "completion": "answer"},
                }
                for language in LANGUAGES
            ],
            "mixture": {"strategy": "explicit", "weights": {"en": 0.5, "sw": 0.25, "th": 0.25}, "pairing": "reuse"},
            "slots_per_step": 80,
            "sequence_length": 128,
            "micro_batch_tokens": 1024,
            "heldout_items": 12,
        },
        "objective": objectives[objective],
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1},
        "precision": "fp32",
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        "checkpoint": {"every": 2, "keep": 2},
        "tracking": {"enabled": False},
    }  # fmt: skip
    return {**values, **changes}


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """The values as a run file."""
    import yaml

    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path
