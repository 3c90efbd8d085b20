"""What `crosslift probe` costs beside bare forward passes over the same sentences.

    python -m benchmarks.probe --model MODEL --data en.txt sw.txt ... --json FILE

`CODE.txt` has one sentence a line, the dominant language first. The bare passes read the same batches, sorted by length
in each language, through the model without its head, and keep nothing. The probe is the whole command but for
reading and writing files: loading, tokenising, moments, distances, choice of the area, states for the scatter plot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ranks import machine
from data_pipeline.atomic import write_text
from data_pipeline.console import table

if TYPE_CHECKING:
    from modeling.tasks.sentence_states import SentenceStates


def bare_seconds(opened: SentenceStates, texts: Mapping[str, list[str]], batch_size: int) -> float:
    """Of forward passes over all sentences."""
    import torch

    began = time.perf_counter()
    for each in texts.values():
        encoded = sorted(opened.encode(each), key=lambda one: len(one.ids))
        for start in range(0, len(encoded), batch_size):
            ids, mask, _ = opened.padded(encoded[start : start + batch_size])
            with torch.inference_mode():
                opened.model(input_ids=ids, attention_mask=mask)
    if opened.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="CODE.txt, the dominant language first")
    parser.add_argument("--sentences", type=int, default=500, help="of each language")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from evals.probe import BATCH_SIZE, probe, read_sentences
    from modeling.loading import resolve_device
    from modeling.tasks.sentence_states import SentenceStates

    device, dtype = resolve_device("auto")
    opened = SentenceStates.open(options.model, dtype=dtype, device=device)
    sentences = read_sentences(options.data, options.sentences)
    texts = {language: [sentence.text for sentence in each] for language, each in sentences.items()}
    bare_seconds(opened, {language: each[:BATCH_SIZE] for language, each in texts.items()}, BATCH_SIZE)  # warm-up
    bare = bare_seconds(opened, texts, BATCH_SIZE)
    began = time.perf_counter()
    probe(options.model, sentences, dominant=options.data[0].stem)
    whole = time.perf_counter() - began
    counts = f"{len(texts)} languages, {options.sentences} sentences each"
    rows = [("bare forward passes", f"{bare:.1f}", "1.00"), ("probe", f"{whole:.1f}", f"{whole / bare:.2f}")]
    print(table([counts, "seconds", "relative"], rows))
    if options.json:
        result: dict[str, Any] = {
            "model": Path(options.model).name, "languages": list(texts), "sentences": options.sentences,
            "tokens": sum(len(each.ids) for one in texts.values() for each in opened.encode(one)),
            "seconds": {"bare": bare, "probe": whole}, "relative": whole / bare, "machine": machine(1),
        }  # fmt: skip
        write_text(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
