"""Sentence representations at every layer of any encoder or decoder, without its head.

They are pooled states at h[0] (the embeddings) to h[number of layers] (before a decoder's final norm), from one plain
forward pass: nothing is mixed or shifted.

Shapes: R rows (sentences of a batch), T tokens, H hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling.architectures import Architecture, model_class
from modeling.errors import ModelError
from modeling.layers import decoder_layers, hidden_size, position_limit, state_hook
from modeling.loading import load_config, quiet, resolve_directory
from modeling.transformers_internals import supports_attention
from modeling.weights.untrusted import read_tokenizer
from modeling.weights.weight_files import stored_tensors
from modeling.weights.weight_match import named
from modeling.xmixup.consistency import representations

Pooling = Literal["mean", "first"]


class EncodedText(NamedTuple):
    """Token ids, at least one; `content` marks those that are averaged."""

    ids: list[int]
    content: list[bool]


class SentenceStates:
    """Computes pooled sentence states at every layer of one model.

    Pooling "mean" averages the sentence's tokens except special ones and, in a decoder, except the first token, an
    attention sink with a huge norm. "first" takes the first token's state, in encoders only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling = "mean",
        max_length: int = 128,
    ) -> None:
        """Args:
            model: without or with a head.
            tokenizer: of the model.
            pooling: see the class.
            max_length: most tokens of a sentence, special ones included; never more than the model has positions for.

        Raises:
            ModelError: pooling "first" of a decoder, whose first token attends to no other; a model whose layers cannot
                be found.
        """
        self.model, self.tokenizer, self.pooling = model.eval(), tokenizer, pooling
        self.layers, self.width = len(decoder_layers(model)), hidden_size(model)
        self.is_decoder = _is_decoder(model.config)
        if pooling == "first" and self.is_decoder:
            raise ModelError(
                f'{type(model).__name__}: a decoder\'s first token attends to no other; use pooling "mean"'
            )
        self.max_length = min(max_length, position_limit(model) or max_length)
        self.truncated = 0  # number of sentences cut so far

    @classmethod
    def open(
        cls,
        directory_or_name: str | Path,
        *,
        pooling: Pooling = "mean",
        max_length: int = 128,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> SentenceStates:
        """The model of a directory or hub name with its tokenizer.

        Raises:
            ModelError: no usable model or tokenizer; weights of the layers that are missing, unexpected or wrongly
                shaped.
        """
        directory = resolve_directory(directory_or_name)
        tokenizer = read_tokenizer(directory, local_files_only=True)
        model: Any = _without_head(directory, dtype)
        return cls(model.to(device), tokenizer, pooling, max_length)

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """Sentences as tokens, cut to `max_length`.

        Raises:
            ModelError: a sentence without content, by its number and text.
        """
        encoded = self.encode_all(texts)
        for number, (text, found) in enumerate(zip(texts, encoded, strict=True), 1):
            if not any(found.content):
                shown = text if len(text) <= 40 else text[:40] + "..."
                raise ModelError(f"sentence {number}, {shown!r}: has special tokens only; leave it out")
        return encoded

    def encode_all(self, texts: Sequence[str]) -> list[EncodedText]:
        """As `encode`, but a sentence may have no content."""
        encoded = []
        for ids, special in self._tokenized(texts):
            content = [not each for each in special]
            if self.is_decoder and any(content[1:]):
                content[0] = False
            encoded.append(EncodedText(ids, content))
        return encoded

    @torch.inference_mode()
    def pooled(self, encoded: Sequence[EncodedText]) -> Tensor:
        """(L + 1, R, H) fp32 on the model's device, from one forward pass; padding and other rows have no effect."""
        ids_RT, mask_RT, content_RT = self.padded(encoded)
        found: dict[int, Tensor] = {}

        def pooler(layer: int) -> Callable[[Tensor], None]:
            def pool(hidden_RTH: Tensor) -> None:
                found[layer] = representations(hidden_RTH, content_RT if self.pooling == "mean" else None)

            return pool

        hooks = [state_hook(self.model, layer, pooler(layer)) for layer in range(self.layers + 1)]
        try:
            self.model(input_ids=ids_RT, attention_mask=mask_RT)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([found[layer] for layer in range(self.layers + 1)])

    def _tokenized(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(ids, 1 at special tokens) of each text; counts those that are cut."""

        def rows(texts: list[str], limit: int) -> list[tuple[list[int], list[int]]]:
            if not texts:
                return []
            found = self.tokenizer(texts, truncation=True, max_length=limit, return_special_tokens_mask=True)
            return list(zip(found["input_ids"], found["special_tokens_mask"], strict=True))

        whole = rows(list(texts), self.max_length + 1)  # one token more, to find those that are too long
        long = [place for place, (ids, _) in enumerate(whole) if len(ids) > self.max_length]
        self.truncated += len(long)
        for place, cut in zip(long, rows([texts[place] for place in long], self.max_length), strict=True):
            whole[place] = cut
        return whole

    def padded(self, encoded: Sequence[EncodedText]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and mask, int64, and content, bool: (R, T) each on the model's device, padded on the right."""
        width = max(len(each.ids) for each in encoded)
        ids = torch.full((len(encoded), width), self.tokenizer.pad_token_id or 0)
        mask, content = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, each in enumerate(encoded):
            ids[row, : len(each.ids)] = torch.tensor(each.ids)
            mask[row, : len(each.ids)] = 1
            content[row, : len(each.ids)] = torch.tensor(each.content)
        device = self.model.device
        return ids.to(device), mask.to(device), content.to(device)


def _is_decoder(config: PreTrainedConfig) -> bool:
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING or bool(getattr(config, "is_decoder", False))


def _without_head(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The layers with all their weights; weights of a head or pooler may be stored or not."""
    architecture: Architecture = "masked-lm"
    try:
        config = load_config(directory, architecture)
    except ModelError:
        architecture = "causal-lm"
        config = load_config(directory, architecture)
    if config.is_encoder_decoder:
        raise ModelError(f"{directory}: a {config.model_type} model has an encoder and a decoder; take one with either")
    config.use_cache = False
    stored_tensors(directory)  # checks that files are whole and safetensors
    with quiet(), torch.random.fork_rng(devices=[]):  # a pooler that is not stored is initialised, with a warning
        loaded: Any = AutoModel.from_pretrained(
            directory, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            local_files_only=True, use_safetensors=True, trust_remote_code=False,
            attn_implementation="sdpa" if supports_attention(model_class(config, architecture), "sdpa") else "eager",
        )  # fmt: skip
    model, report = loaded
    parts = {name for name, _ in model.named_children()} - {"pooler"}
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in report[problem]]
        # weights of the layers begin with the name of a part of the model, after the prefix of task models
        names = [key for key in keys if key.removeprefix(f"{model.base_model_prefix}.").split(".")[0] in parts]
        if names:
            what = problem.removesuffix("_keys")
            raise ModelError(f"{directory}: {len(names)} {what} weights for {type(model).__name__}: {named(names)}")
    return model
