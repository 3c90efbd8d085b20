"""Ends an answer at the header of a next turn when the model emits no end token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

CHECK_INTERVAL = 8  # tokens, because a check decodes every row; tokens generated in between are cut off
CHECKED_TOKENS = 160  # at the end of a row: longer than a header and the tokens between two checks


@dataclass(frozen=True)
class Stops:
    """What ends an answer besides its end token.

    Attributes:
        ids: tokens that end an answer.
        patterns: regular expressions; an answer ends before the first match.
            `data_pipeline/text/next_turn.py` makes them from a chat template.
    """

    ids: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()

    def __or__(self, other: Stops) -> Stops:
        return Stops(tuple({*self.ids, *other.ids}), tuple(dict.fromkeys((*self.patterns, *other.patterns))))

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        return re.compile("|".join(self.patterns)) if self.patterns else None

    def cut(self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
        """The tokens of an answer before the first match; None if nothing matches."""
        if self.pattern is None or (found := self.pattern.search(_text(ids, tokenizer))) is None:
            return None
        kept = len(_text(ids, tokenizer)[: found.start()].rstrip())
        length = len(ids)
        while length and len(_text(ids[:length], tokenizer)) > kept:
            length -= 1
        return list(ids[:length])


class TextStop(StoppingCriteria):
    """Ends each row whose generated text, after `prompt_length` tokens, has a match among its last tokens."""

    def __init__(self, pattern: re.Pattern[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.pattern, self.tokenizer, self.prompt_length = pattern, tokenizer, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """input_ids: (R, T). Returns (R,) bool."""
        if (input_ids.shape[1] - self.prompt_length) % CHECK_INTERVAL:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tails = input_ids[:, self.prompt_length :][:, -CHECKED_TOKENS:].tolist()
        found = [self.pattern.search(_text(tail, self.tokenizer)) is not None for tail in tails]
        return torch.tensor(found, device=input_ids.device)


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
