"""The shift of ShifCon (arXiv 2410.19453, section 3.2): into the dominant language's subspace and back.

Layers `toward .. back-1` work on states that are moved to the dominant language (docs/methods.md, section 1.2):

    h[toward] += v[d, toward] - v[lang, toward]        h[back] += v[lang, back] - v[d, back]

Languages are given per token, as indices into the vectors' `languages`. Tokens of -1, of the dominant language and of
languages without a vector are not shifted: their states keep every bit.

Shapes: B rows, T tokens, L languages, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from modeling.errors import ModelError
from modeling.layers import decoder_layers, hidden_size, state_hook
from modeling.shifcon.language_vectors import LanguageVectors


def shift_tables(vectors: LanguageVectors) -> Tensor:
    """(2, L+1, H) fp32: what is added at `toward` and at `back`, for each language, with the vectors' strength.

    The last row, at index -1, is "no language". Rows that must not move a state hold -0.0, the only number that leaves
    every float unchanged (0.0 would turn -0.0 into 0.0).
    """
    dominant = vectors.languages.index(vectors.dominant)
    toward, back = (vectors.at(layer) for layer in vectors.area)
    shifts = vectors.strength * torch.stack([toward[dominant] - toward, back - back[dominant]])
    unshifted = vectors.tokens == 0
    unshifted[dominant] = True
    shifts[:, unshifted] = -0.0
    return torch.cat([shifts, torch.full_like(shifts[:, :1], -0.0)], dim=1)


class LanguageShift:
    """Shifts every forward pass of a model inside `batch()`; does nothing outside it or without vectors."""

    def __init__(self, model: nn.Module, toward: int, back: int) -> None:
        """Installs the hooks.

        Raises:
            ModelError: not 0 <= toward < back <= number of layers.
        """
        layers = decoder_layers(model)
        if not 0 <= toward < back <= len(layers):
            raise ModelError(f"layer area [{toward}, {back}): need 0 <= toward < back <= {len(layers)} layers")
        self.area = (toward, back)
        self.vectors: LanguageVectors | None = None
        self._hidden_size = hidden_size(model)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._languages_BT: Tensor | None = None
        self._response_B: Tensor | None = None
        self._index_BT: Tensor | None = None  # of the current forward pass
        self._enabled = True
        self._handles = [
            # Before layer 0 no layer has written to the cache, so its length is the number of past tokens.
            layers[0].register_forward_pre_hook(self._locate, with_kwargs=True),
            state_hook(model, toward, lambda hidden: self._shifted(hidden, 0)),
            state_hook(model, back, lambda hidden: self._shifted(hidden, 1)),
        ]

    def set_vectors(self, vectors: LanguageVectors | None) -> None:
        """Sets the vectors to shift by; None: no shift.

        Raises:
            ModelError: they are of another layer area or width.
        """
        if vectors is not None and (vectors.area, vectors.mean.shape[2]) != (self.area, self._hidden_size):
            raise ModelError(
                f"language vectors of area {vectors.area} and width {vectors.mean.shape[2]} do not fit "
                f"area {self.area} and width {self._hidden_size}: estimate them again on this model"
            )
        self.vectors = vectors
        self._tables.clear()

    @contextmanager
    def batch(self, languages: Tensor, response_languages: Tensor | None = None) -> Iterator[None]:
        """Inside, each forward pass shifts token [b, t] by its language.

        Args:
            languages: (B, T) int64 on the model's device. With a KV cache, t counts from the first cached token. If a
                pass has n times B rows (beams, several samples per prompt), each row of languages serves n rows.
            response_languages: (B,) int64, for generated tokens (those after T); by default the row's last language.
        """
        before = self._languages_BT, self._response_B
        self._languages_BT, self._response_B = languages, response_languages
        try:
            yield
        finally:
            self._languages_BT, self._response_B = before
            self._index_BT = None

    @property
    def in_batch(self) -> bool:
        """Whether forward passes are inside `batch()`."""
        return self._languages_BT is not None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, nothing is shifted, as when vectors are measured."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def shift_norms(self) -> dict[str, float]:
        """Length of each language's shift at `toward`, relative to the mean length of its states."""
        if self.vectors is None:
            return {}
        toward = self.vectors.layers.index(self.area[0])
        lengths = shift_tables(self.vectors)[0, :-1].norm(dim=1) / self.vectors.state_norm[:, toward]
        return {
            language: float(length)
            for language, length in zip(self.vectors.languages, lengths, strict=True)
            if self.vectors.has(language)
        }

    def _shifted(self, hidden_BTH: Tensor, end: int) -> Tensor | None:
        """The state after the shift at `toward` (end 0) or `back` (end 1)."""
        if self._index_BT is None or self.vectors is None:
            return None
        key = hidden_BTH.device, hidden_BTH.dtype
        if key not in self._tables:
            self._tables[key] = shift_tables(self.vectors).to(*key)
        return hidden_BTH + self._tables[key][end][self._index_BT]

    def _locate(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before layer 0: finds the language of each token of this forward pass."""
        self._index_BT = None
        if self._languages_BT is None or self.vectors is None or not self._enabled:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        # Layers call it past_key_values, cache or layer_past, by name or by position.
        cache = next((value for value in (*args[1:], *kwargs.values()) if isinstance(value, Cache)), None)
        past = 0 if cache is None else int(cache.get_seq_length())
        rows, tokens = hidden.shape[:2]
        self._index_BT = self._token_languages(self._languages_BT, past, rows, tokens, cache is None)

    def _token_languages(self, languages_BT: Tensor, past: int, rows: int, tokens: int, whole: bool) -> Tensor:
        """(rows, tokens) int64: the languages of columns past..past+tokens, rows repeated for beams."""
        batch, width = languages_BT.shape
        end = past + tokens
        if rows % batch or (whole and tokens < width):
            raise ModelError(
                f"a forward pass of {rows} rows and {tokens} tokens{' without a cache' if whole else ''} "
                f"does not fit languages given for {batch} rows and {width} tokens"
            )
        index = languages_BT[:, past:end]
        if end > width:
            if self._response_B is None:
                last = ((languages_BT >= 0) * torch.arange(width, device=languages_BT.device)).argmax(dim=1)
                self._response_B = languages_BT.gather(1, last.unsqueeze(1)).squeeze(1)
            beyond = self._response_B.unsqueeze(1).expand(-1, end - max(past, width))
            index = torch.cat([index, beyond], dim=1)
        return index.repeat_interleave(rows // batch, dim=0) if rows != batch else index
