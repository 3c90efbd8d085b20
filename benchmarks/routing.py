"""How often `--language auto` finds a text's language: a confusion table on held-out sentences.

    python -m benchmarks.routing --model MODEL --data en.txt sw.txt ... --layer 5 --json FILE

`CODE.txt` has one sentence a line. The means of each language, and the standard deviations of the dominant one, are
taken over the first half of the sentences entering `--layer`; the other half is sorted by `LanguageVectors.nearest`.
Beside it stands the accuracy without the division by the deviations (docs/methods.md, section 1.2).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ranks import machine
from data_pipeline.atomic import write_text
from data_pipeline.console import table

BATCH_SIZE = 32

if TYPE_CHECKING:
    from torch import Tensor

    from modeling.shifcon.language_vectors import LanguageVectors


def pooled_states(model: str, texts: Mapping[str, list[str]], layer: int) -> dict[str, Tensor]:
    """By language, (sentences, H): the means of the states entering a layer over each sentence's tokens."""
    import torch

    from modeling.loading import resolve_device
    from modeling.tasks.sentence_states import SentenceStates

    device, dtype = resolve_device("auto")
    opened = SentenceStates.open(model, dtype=dtype, device=device)
    found = {}
    for language, each in texts.items():
        encoded = opened.encode(each)
        batches = (encoded[start : start + BATCH_SIZE] for start in range(0, len(encoded), BATCH_SIZE))
        found[language] = torch.cat([opened.pooled(batch)[layer].cpu() for batch in batches])
    return found


def vectors_of(states: Mapping[str, Tensor], dominant: str, layer: int) -> LanguageVectors:
    """Language vectors with the means of these sentences."""
    import torch

    from modeling.shifcon.language_vectors import LanguageVectors
    from modeling.shifcon.normalisation import with_floor

    mean = torch.stack([each.mean(dim=0) for each in states.values()])
    return LanguageVectors(
        tuple(states), dominant, (layer, layer + 1), (layer, layer + 1), mean[:, None].expand(-1, 2, -1).contiguous(),
        torch.ones(len(mean), 2), torch.tensor([len(each) for each in states.values()]), "sentences", "",
        text_mean=mean, text_deviation=with_floor(states[dominant].std(dim=0)),
    )  # fmt: skip


def confusion(vectors: LanguageVectors, states: Mapping[str, Tensor]) -> dict[str, Counter[str]]:
    """By language, how often each language was found."""
    return {language: Counter(vectors.nearest(state) for state in each) for language, each in states.items()}


def accuracy(found: Mapping[str, Counter[str]]) -> float:
    """Mean over languages, in per cent."""
    return sum(100 * counts[language] / counts.total() for language, counts in found.items()) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="CODE.txt, the dominant language first")
    parser.add_argument("--layer", type=int, required=True, help="where the shift begins")
    parser.add_argument("--sentences", type=int, default=256, help="of each language, half of them held out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts = {file.stem: file.read_text(encoding="utf-8").splitlines()[: options.sentences] for file in options.data}
    states = pooled_states(options.model, texts, options.layer)
    half = options.sentences // 2
    vectors = vectors_of({code: each[:half] for code, each in states.items()}, options.data[0].stem, options.layer)
    held_out = {code: each[half:] for code, each in states.items()}
    found = confusion(vectors, held_out)
    ones = vectors.text_deviation.new_ones(len(vectors.text_deviation))
    raw = confusion(replace(vectors, text_deviation=ones), held_out)
    codes = list(found)
    rows = [(code, *(str(found[code][other] or ".") for other in codes)) for code in codes]
    print(table(["is / found", *codes], rows))
    print(
        f"right: {accuracy(found):.1f} % of {half} held-out sentences a language; {accuracy(raw):.1f} % on raw states"
    )
    if options.json:
        result: dict[str, Any] = {
            "layer": options.layer, "sentences": half, "found": found, "accuracy": accuracy(found),
            "accuracy_raw": accuracy(raw), "found_raw": raw, "machine": machine(1),
        }  # fmt: skip
        write_text(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
