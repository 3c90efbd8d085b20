"""What the shift costs in generation: the same model without shift, with it, and with one language baked in.

    python -m benchmarks.generation --model MODEL --json FILE

MODEL is a decoder's folder, to which random language vectors are added; without it, a Llama of random weights. The
three generate the same number of tokens for the same prompts, round by round in turn; each gets the median over rounds
of its speed relative to that without shift. A model that cannot be baked (docs/methods.md, section 1.7) is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.ranks import machine
from data_pipeline.atomic import write_text
from data_pipeline.console import table

LANGUAGES = ("en", "sw", "th")
SIZES = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8}
log = logging.getLogger(__name__)


def write_export(model: Path | None, folder: Path) -> None:
    """A ShifCon export: the weights of a folder or random ones, and random vectors of a tenth of the states' length."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from modeling.export_info import EXPORT_FILE, VECTORS_FILE
    from modeling.layers import decoder_layers, hidden_size
    from modeling.loading import load_pretrained
    from modeling.shifcon.language_vectors import LanguageVectors
    from modeling.weights.weight_files import directory_hash

    torch.manual_seed(0)
    if model is None:
        LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **SIZES)).save_pretrained(folder)
    else:
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("README.md", "*.gguf"), dirs_exist_ok=True)
    opened = load_pretrained(folder, torch.float32, "auto", "cpu")
    layers, width = len(decoder_layers(opened)), hidden_size(opened)
    area = (layers // 3, 2 * layers // 3)
    mean = torch.randn(len(LANGUAGES), 2, width) / 10
    LanguageVectors(
        LANGUAGES, "en", area, area, mean, torch.ones(len(LANGUAGES), 2), torch.ones(len(LANGUAGES), dtype=torch.int64),
        "random", directory_hash(folder),
    ).save(folder / VECTORS_FILE)  # fmt: skip
    about = {"format": 1, "objective": "shifcon", "languages": LANGUAGES, "dominant": "en", "shifted": True}
    (folder / EXPORT_FILE).write_text(json.dumps(about), encoding="utf-8")


def seconds(model: Any, inputs: Any, tokens: int, **languages: Any) -> float:
    """Of generating exactly that many tokens for every row, greedily."""
    began = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **languages)
    assert output.shape[1] == inputs["input_ids"].shape[1] + tokens
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a decoder; default: a Llama of random weights")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens generated for each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import torch

    from modeling.errors import ModelError
    from modeling.loading import load_pretrained, resolve_device
    from modeling.shifcon.bake import bake
    from modeling.shifted_model import load_shifted

    device, dtype = resolve_device("auto")
    with TemporaryDirectory() as scratch:
        export, baked = Path(scratch, "export"), Path(scratch, "baked")
        write_export(options.model, export)
        systems: dict[str, tuple[Any, dict[str, Any]]] = {
            "without shift": (load_pretrained(export, dtype, "auto", device), {}),
            "shifted": (load_shifted(export, dtype, device), {"languages": "sw"}),
        }
        baked.mkdir()
        try:
            bake(export, "sw", baked)
            systems["baked"] = (load_pretrained(baked, dtype, "auto", device), {})
        except ModelError as error:
            log.warning("not baked: %s", error)
    vocabulary = systems["shifted"][0].get_input_embeddings().weight.shape[0]
    ids = torch.randint(10, vocabulary, (options.rows, options.prompt), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for model, languages in systems.values():
        seconds(model, inputs, 4, **languages)  # warm-up
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(options.rounds):
        for name, (model, languages) in systems.items():
            times[name].append(seconds(model, inputs, options.tokens, **languages))
    medians = {name: statistics.median(each) for name, each in times.items()}
    speed = {
        name: statistics.median(plain / own for plain, own in zip(times["without shift"], each, strict=True))
        for name, each in times.items()
    }
    produced = options.rows * options.tokens
    rows = [(name, f"{produced / medians[name]:.1f}", f"{speed[name]:.3f}") for name in systems]
    print(table(["system", "tokens/s", "relative to without shift"], rows))
    if options.json:
        result = {
            "model": options.model.name if options.model else "llama, random weights", "rows": options.rows,
            "prompt": options.prompt, "tokens": options.tokens, "seconds": times, "relative": speed,
            "machine": machine(1),
        }  # fmt: skip
        write_text(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
