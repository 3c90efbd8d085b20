"""Five kinds of tokenizer, four templates and ten languages, shared by tests of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from data_pipeline.records import ChatSample, Record
from data_pipeline.text.chat import Chat
from data_pipeline.text.label_check import check_labels
from data_pipeline.text.tokenizer import TokenizerTrainingConfig, train_tokenizer

ITEMS = {  # language: (question, answer)
    "en": ("Anna has 12 apples and buys 30 more. How many now?", "12 + 30 = 42\nShe has 42.\n#### 42"),
    "de": ("Anna hat 12 Äpfel und kauft 30 weitere. Wie viele nun?", "12 + 30 = 42\nÄpfel: 42.\n#### 42"),
    "es": ("Ana tiene 12 manzanas y compra 30 más. ¿Cuántas hay?", "Así: 12 + 30 = 42\n#### 42"),
    "fr": ("Anne a 12 pommes et en achète 30. Combien à présent ?", "Voilà : 12 + 30 = 42\n#### 42"),
    "ru": ("У Анны 12 яблок, она покупает ещё 30. Сколько теперь?", "Теперь 12 + 30 = 42\n#### 42"),
    "zh": ("安娜有12个苹果,又买了30个。现在有多少个?", "现在有12 + 30 = 42个。\n#### 42"),
    "ja": ("りんごが12個あり、30個買いました。今は何個ですか。", "全部で12 + 30 = 42個です。\n#### 42"),
    "th": ("แอนนามีแอปเปิล 12 ผล ซื้ออีก 30 ผล ตอนนี้มีกี่ผล", "ตอนนี้มี 12 + 30 = 42 ผล\n#### 42"),
    "sw": ("Anna ana tufaha 12, ananunua 30 zaidi. Sasa ngapi?", "Sasa ana 12 + 30 = 42\n#### 42"),
    "bn": ("আনার ১২টি আপেল আছে, সে আরও ৩০টি কেনে। এখন কয়টি?", "এখন ১২ + ৩০ = ৪২টি\n#### 42"),
}
LANGUAGES = tuple(ITEMS)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim if message.role == 'user' else message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CUSTOM = "<|im_start|>{system}|{language}>{response_language}: {user} {{go}}<|im_start|>"
KINDS = ("spm", "prefixed", "bytes", "bytes-bos", "nfc")
TEMPLATES: tuple[dict[str, Any], ...] = (
    {"name": "plain"},
    {"name": "alpaca"},
    {"name": "chat"},
    {"name": "custom", "prompt": CUSTOM, "end_token": "<|im_end|>"},
)


def small_tokenizers(folder: Path) -> dict[str, Any]:
    """Sentencepiece with and without a dummy prefix, byte-level BPE with and without BOS, one that normalises."""
    texts = [text for item in ITEMS.values() for text in item]
    path = folder
    train_tokenizer(texts, path, TokenizerTrainingConfig(vocab_size=800, character_coverage=1.0))
    made: dict[str, Any] = {"spm": AutoTokenizer.from_pretrained(path)}
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    made["prefixed"] = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    for name, bos in (("bytes", None), ("bytes-bos", "<s>"), ("nfc", None)):
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.NFC() if name == "nfc" else None
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<s>", "</s>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        if bos:
            bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        made[name] = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token="<|endoftext|>")
    for tokenizer in made.values():
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.add_tokens(["<tool>"])  # added, but not special
        tokenizer.chat_template = CHATML
    return made


def byte_tokenizer(chat_template: str | None = None, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Three special tokens, one for every byte, and `special`."""
    vocabulary = {symbol: i for i, symbol in enumerate(["<s>", "</s>", "<pad>"])}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=list(special),
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer


def check_sample(chat: Chat, record: Record, sample: ChatSample) -> None:
    """`check_labels` for one sample. Raises DataError for a wrong mask, BadRow for an answer that cannot be used."""
    (bad,) = check_labels(chat, [record], [sample])
    if bad is not None:
        raise bad
