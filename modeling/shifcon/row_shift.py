"""The shift of a batch whose rows each have a language, given by its code: how an export is generated with and scored.

Prompt tokens take the prompt's language, generated tokens the response's (docs/methods.md, section 1.2). The response
language is by default the export's, where the answers of its training had one, else the prompt's.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from modeling.export_info import ExportInfo
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.shift import LanguageShift

NO_LANGUAGE = -1


class RowShift:
    """Shifts rows by the codes of their languages; does nothing for a model without vectors."""

    def __init__(self, model: nn.Module, info: ExportInfo, vectors: LanguageVectors | None) -> None:
        self.info, self.vectors = info, vectors
        self.shift: LanguageShift | None = None
        if vectors is not None:
            self.shift = LanguageShift(model, *vectors.area)
            self.shift.set_vectors(vectors)

    def batch(
        self, languages: Sequence[str | None], response_languages: Sequence[str | None], mask_BT: Tensor
    ) -> AbstractContextManager[None]:
        """Inside, forward passes over B rows are shifted.

        Args:
            languages: (B,) codes; None: the row is not shifted.
            response_languages: (B,) codes of generated tokens; None: the default.
            mask_BT: (B, T), 0 at padding.
        """
        if self.shift is None:
            return nullcontext()
        both = list(zip(languages, response_languages, strict=True))
        prompt_B = torch.tensor([self._index(language) for language, _ in both])
        response_B = torch.tensor([self._index(self.response_language(*each)) for each in both])
        shifts_BT = mask_BT.bool()
        if not self.info.shift_first_token:
            shifts_BT = shifts_BT & (mask_BT.cumsum(1) > 1)
        languages_BT = prompt_B.to(mask_BT.device)[:, None].masked_fill(~shifts_BT, NO_LANGUAGE)
        return self.shift.batch(languages_BT, response_B.to(mask_BT.device))

    def response_language(self, language: str | None, response_language: str | None) -> str | None:
        """The language of a row's generated tokens."""
        if language is None:
            return response_language
        return response_language or self.info.response_language or language

    def is_shifted(self, language: str | None, response_language: str | None) -> bool:
        """Whether the model shifts and both languages have a vector (the dominant language's shift is zero)."""
        return NO_LANGUAGE not in (
            self._index(language),
            self._index(self.response_language(language, response_language)),
        )

    def _index(self, language: str | None) -> int:
        if self.vectors is None or language is None or not self.vectors.has(language):
            return NO_LANGUAGE
        return self.vectors.languages.index(language)
