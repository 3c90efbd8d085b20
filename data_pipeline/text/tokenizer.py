"""Trains a tokenizer for a model trained from scratch. For any tokenizer: a hash, a private copy, encoding in batches.

Decoder: a sentencepiece BPE model with byte fallback, saved as a fast Llama tokenizer. Decoding restores any text
exactly, except for U+2581, which sentencepiece uses for the space. No prefix space is added, so the parts of a text
can be tokenised separately.

Encoder: a sentencepiece unigram model with XLM-R's conventions (arXiv 1911.02116), saved as a fast XLM-R tokenizer:
`<s> A </s>` or `<s> A </s></s> B </s>`, a space before each word, NFKC normalisation, white space collapsed, rare
characters unknown.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from data_pipeline.records import DataError
from data_pipeline.settings import Section

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3
ENCODER_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3; `<mask>` is the last id, as in XLM-R


class TokenizerTrainingConfig(Section):
    """A tokenizer trained on the run's own sources."""

    style: Literal["decoder", "encoder"] = Field(
        "decoder", description="decoder: BPE with bytes, exact; encoder: XLM-R's conventions, with a mask token."
    )
    vocab_size: int = Field(gt=5, description="Tokens, special ones included and, for a decoder, the 256 bytes.")
    character_coverage: float = Field(
        0.9995,
        gt=0.9,
        le=1.0,
        description="Share of characters with their own token; the rest become bytes, or unknown for an encoder.",
    )
    max_sentences: int = Field(100_000, gt=0, description="Samples to train on, the same number from every language.")

    @model_validator(mode="after")
    def _vocabulary_holds_bytes(self) -> TokenizerTrainingConfig:
        if self.style == "decoder" and self.vocab_size <= 260:
            raise ValueError("'vocab_size' must be greater than 260: bytes and special tokens take that many")
        return self


def train_tokenizer(texts: Iterable[str], output: Path, config: TokenizerTrainingConfig) -> PreTrainedTokenizerBase:
    """Trains on `texts`, saves to the folder `output`, and returns the tokenizer loaded from there.

    The same texts in the same order give the same tokenizer.

    Raises:
        DataError: there is no text, or `vocab_size` is too large or too small for it.
    """
    from transformers import AutoTokenizer

    tokenizer = _decoder(texts, config) if config.style == "decoder" else _encoder(texts, config)
    tokenizer.save_pretrained(output)
    return AutoTokenizer.from_pretrained(output, trust_remote_code=False)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary, the tokenisation rules and the chat template, independent of where the files are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokens = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(json.dumps([tokens, tokenizer.chat_template]).encode()).hexdigest()


def private_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy that never truncates or pads: both are state of the shared backend, which other code changes."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


class UnencodableText(DataError):
    """A text that no tokenizer accepts. Of texts encoded together, it is not known which."""


def encode_batch(
    backend: Tokenizer, texts: Sequence[str] | Sequence[Sequence[str]], *, offsets: bool = False
) -> Iterator[Encoding]:
    """Encodes texts, or lists of words, without special tokens; offsets and word ids only if they are needed.

    One call for all of them: it releases the interpreter's lock, which `Tokenizer.encode` holds. An encoding should not
    be kept: freeing many at once holds the lock too.

    Raises:
        UnencodableText: one of them is not valid Unicode.
    """
    if not texts:
        return
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        found = encode(texts, is_pretokenized=not isinstance(texts[0], str), add_special_tokens=False)
    except TypeError as error:  # a text cannot be encoded in UTF-8
        raise UnencodableText("the text is not valid Unicode: it holds half a surrogate pair") from error
    found.reverse()
    while found:
        yield found.pop()


def token_offsets(encoding: Encoding) -> npt.NDArray[np.int32]:
    """(T, 2) start and stop of each token, in characters."""
    return np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(encoding)).reshape(-1, 2)


def _decoder(texts: Iterable[str], config: TokenizerTrainingConfig) -> PreTrainedTokenizerBase:
    import sentencepiece
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    unk, bos, eos, pad = SPECIAL_TOKENS
    model = _train(
        texts,
        config,
        model_type="bpe",
        vocab_size=config.vocab_size,
        byte_fallback=True,
        split_digits=True,
        required_chars="0123456789",  # every digit gets a token, even if the text lacks it
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        unk_piece=unk, bos_piece=bos, eos_piece=eos, pad_piece=pad,
    )  # fmt: skip
    trained = sentencepiece.SentencePieceProcessor(model_proto=model)
    # the order of BPE pieces is the order of their merges
    vocab = {trained.id_to_piece(number): number for number in range(len(trained))}
    return LlamaTokenizer(
        vocab=vocab,
        merges=generate_merges(vocab, skip_tokens=SPECIAL_TOKENS),
        unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad,
        add_prefix_space=False, add_bos_token=True, add_eos_token=False,
    )  # fmt: skip


def _encoder(texts: Iterable[str], config: TokenizerTrainingConfig) -> PreTrainedTokenizerBase:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made when imported
    from transformers import XLMRobertaTokenizer

    bos, pad, eos, unk = ENCODER_TOKENS
    model = ModelProto()
    model.ParseFromString(
        _train(
            texts,
            config,
            model_type="unigram",
            vocab_size=config.vocab_size - 1,  # `<mask>` is added
            normalization_rule_name="nmt_nfkc",
            bos_id=0, pad_id=1, eos_id=2, unk_id=3,
            bos_piece=bos, pad_piece=pad, eos_piece=eos, unk_piece=unk,
        )
    )  # fmt: skip
    return XLMRobertaTokenizer(
        vocab=[*((piece.piece, piece.score) for piece in model.pieces), ("<mask>", 0.0)],
        _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap,
    )


def _train(texts: Iterable[str], config: TokenizerTrainingConfig, **settings: Any) -> bytes:
    """A sentencepiece model, serialised."""
    import sentencepiece

    # Line ends are not part of words; a decoder encodes them as bytes.
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError("tokenizer.train: there is no text to train on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            character_coverage=config.character_coverage,
            # sentencepiece silently skips longer lines.
            max_sentence_length=max(len(line.encode()) for line in lines) + 1,
            num_threads=1,
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        raise _size_error(error, config) from error
    return model.getvalue()


def _size_error(error: RuntimeError, config: TokenizerTrainingConfig) -> DataError:
    wrong = f"tokenizer.train.vocab_size: {config.vocab_size}"
    mask, what = (0, "characters and bytes") if config.style == "decoder" else (1, "characters")
    if most := re.search(r"value <= (\d+)", str(error)):
        return DataError(f"{wrong} is too large for the text; it can be at most {int(most[1]) + mask}")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return DataError(f"{wrong} is too small: {what} alone need {int(least[1]) + mask}; or lower character_coverage")
    return DataError(f"tokenizer.train: sentencepiece failed: {' '.join(str(error).split())}")
