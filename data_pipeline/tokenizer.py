"""Trains a tokenizer for a model made from scratch.

In: texts. Out: a folder that `AutoTokenizer.from_pretrained` loads. Next: `chat.py`.

A sentencepiece BPE with byte fallback, kept as a fast Llama tokenizer: any text comes back exactly, character
for character, and since nothing is put in front of a text, its parts may be tokenised one by one. The one
character that does not come back is U+2581, which sentencepiece uses for the space.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.records import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3


class TokenizerTrainingConfig(BaseModel):
    """A tokenizer trained from the run's own sources."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(gt=260, description="Tokens, the 4 special ones and the 256 bytes included.")
    character_coverage: float = Field(
        0.9995,
        gt=0.9,
        le=1.0,
        description="Share of characters with their own token; the rest become bytes.",
    )
    max_sentences: int = Field(100_000, gt=0, description="Samples to train on, the same number from every language.")


def train_tokenizer(texts: Iterable[str], output: Path, config: TokenizerTrainingConfig) -> PreTrainedTokenizerBase:
    """Train on `texts`, save to the folder `output`, and return the tokenizer as loaded from there.

    The same texts in the same order give the same tokenizer. Raises DataError if there is no text, or if
    `vocab_size` is too large or too small for it.
    """
    from transformers import AutoTokenizer, LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    pieces = _train_pieces(texts, config)
    vocab = {piece: number for number, piece in enumerate(pieces)}
    unk, bos, eos, pad = SPECIAL_TOKENS
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=generate_merges(vocab, skip_tokens=SPECIAL_TOKENS),
        unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad,
        add_prefix_space=False, add_bos_token=True, add_eos_token=False,
    )  # fmt: skip
    tokenizer.save_pretrained(output)
    return AutoTokenizer.from_pretrained(output)


def _train_pieces(texts: Iterable[str], config: TokenizerTrainingConfig) -> list[str]:
    """The pieces by token id; the order of BPE pieces is the order of their merges."""
    import sentencepiece

    # Line ends stay bytes: one token each, never part of a word.
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError("tokenizer.train: there is no text to train on")
    unk, bos, eos, pad = SPECIAL_TOKENS
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            split_digits=True,
            required_chars="0123456789",  # a digit is one token even where the text lacks it
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Longer ones would be left out silently.
            max_sentence_length=max(len(line.encode()) for line in lines) + 1,
            num_threads=1,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3,
            unk_piece=unk, bos_piece=bos, eos_piece=eos, pad_piece=pad,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise _size_error(error, config) from error
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [trained.id_to_piece(number) for number in range(len(trained))]


def _size_error(error: RuntimeError, config: TokenizerTrainingConfig) -> DataError:
    wrong = f"tokenizer.train.vocab_size: {config.vocab_size}"
    if most := re.search(r"value <= (\d+)", str(error)):
        return DataError(f"{wrong} is too large for the text; it can be at most {most[1]}")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return DataError(
            f"{wrong} is too small: characters and bytes alone need {least[1]}; or lower character_coverage"
        )
    return DataError(f"tokenizer.train: sentencepiece failed: {' '.join(str(error).split())}")
