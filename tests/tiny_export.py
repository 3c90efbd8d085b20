"""A tiny ShifCon export of random weights and vectors, without a training run."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from modeling.shifcon.language_vectors import LanguageVectors
from modeling.weights.weight_files import directory_hash

LANGUAGES = ("en", "de", "sw", "xx")  # xx has no vector
AREA = (1, 3)
END = 1


def write_tokenizer(directory: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", *map(str, range(60))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(directory)


def write_export(directory: Path, model_type: str = "llama", vectors: bool = True, **description: Any) -> Path:
    torch.manual_seed(3)
    extra = {} if model_type == "gpt_neox" else {"num_key_value_heads": 2, "head_dim": 8}
    extra |= {"sliding_window": 6} if model_type == "mistral" else {}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.3,
        eos_token_id=END,
        pad_token_id=2,
        **extra,
    )
    config.use_cache = False  # as a training run saves it
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=[END]
    )
    model.save_pretrained(directory)
    write_tokenizer(directory)
    if vectors:
        LanguageVectors(
            languages=LANGUAGES,
            dominant="en",
            layers=AREA,
            area=AREA,
            mean=torch.randn(4, 2, 32) * 2,
            state_norm=torch.ones(4, 2),
            tokens=torch.tensor([9, 9, 9, 0]),
            estimator="test",
            model_hash=directory_hash(directory),
            text_mean=torch.randn(4, 32) * 2,
            text_deviation=torch.rand(32) + 0.5,
        ).save(directory / "language_vectors.safetensors")
    about = {
        "format": 1,
        "objective": "shifcon",
        "languages": list(LANGUAGES),
        "dominant": "en",
        "template": {"name": "plain"},
        "response_language": None,
        "shift_first_token": True,
    }
    (directory / "crosslift.json").write_text(json.dumps({**about, **description}))
    return directory
