"""Cuts a decoder's vocabulary to the tokens of some texts: the same model on these texts, with a smaller embedding.

For experiments on small machines: of Gemma-3-270M's 268M weights, 168M are the embeddings of 262,144 tokens. The
tokenizer keeps the tokens that the texts need, with those that their merges pass through, and all special and byte
tokens. Every text is tokenised into the same pieces as before, which is checked; other texts fall back to bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BYTES = [f"<0x{number:02X}>" for number in range(256)]


def cut_vocabulary(model: Path, texts: Iterable[str], output: Path) -> int:
    """Writes `model` with a smaller vocabulary to `output`; returns its number of tokens.

    Args:
        model: a Hugging Face folder of a decoder whose tokenizer is a BPE with byte fallback, such as Gemma's.

    Raises:
        ValueError: another kind of tokenizer, or a text that is tokenised differently.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    distinct = sorted(set(texts))
    before = AutoTokenizer.from_pretrained(model)
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE" or not content["model"].get("byte_fallback"):
        raise ValueError(f"{model}: its tokenizer is no BPE with byte fallback")
    pieces = [before.convert_ids_to_tokens(ids) for ids in before(distinct)["input_ids"]]
    kept = _closure({piece for each in pieces for piece in each}, content["model"]["merges"])
    special = {each["content"] for each in content["added_tokens"] if each["special"]}
    number_of: Mapping[str, int] = content["model"]["vocab"]
    tokens = sorted({*kept, *special, *BYTES} & number_of.keys(), key=number_of.__getitem__)
    new_number = {token: number for number, token in enumerate(tokens)}
    _renumber(content, new_number)
    shutil.copytree(model, output, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer.json"))
    (output / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    after = AutoTokenizer.from_pretrained(output)
    for text, was, ids in zip(distinct, pieces, after(distinct)["input_ids"], strict=True):
        if after.convert_ids_to_tokens(ids) != was:
            raise ValueError(f"tokenised differently after the cut: {text[:60]!r}")
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    rows = torch.tensor([number_of[token] for token in tokens])
    embeddings = whole.get_input_embeddings()
    chosen = embeddings.weight.data[rows].clone()
    whole.resize_token_embeddings(len(tokens), mean_resizing=False)
    whole.get_input_embeddings().weight.data.copy_(chosen)
    if not whole.config.tie_word_embeddings:
        raise ValueError(f"{model}: its head has weights of its own, which this function does not cut")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (whole.config, whole.config.get_text_config(), whole.generation_config):
            setattr(config, name, getattr(after, name))
    whole.save_pretrained(output)
    return len(tokens)


def _closure(pieces: set[str], merges: Sequence[Sequence[str]]) -> set[str]:
    """The pieces, and what BPE makes of their characters on the way to them."""
    rank = {tuple(pair): number for number, pair in enumerate(merges)}
    kept = set(pieces)
    for piece in pieces:
        parts = list(piece)
        kept.update(parts)
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda at: rank.get((parts[at], parts[at + 1]), len(rank)))
            if (parts[best], parts[best + 1]) not in rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
            kept.add(parts[best])
    return kept


def _renumber(content: dict[str, Any], new_number: Mapping[str, int]) -> None:
    """The tokenizer's file with these tokens alone."""
    content["model"]["vocab"] = dict(new_number)
    content["model"]["merges"] = [
        pair for pair in content["model"]["merges"] if {pair[0], pair[1], pair[0] + pair[1]} <= new_number.keys()
    ]
    content["added_tokens"] = [
        {**each, "id": new_number[each["content"]]} for each in content["added_tokens"] if each["content"] in new_number
    ]
    for each in content["post_processor"]["special_tokens"].values():
        each["ids"] = [new_number[token] for token in each["tokens"]]
