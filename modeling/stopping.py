"""Ends an answer at the header of a next turn, though its end token did not come.

In: token ids and regular expressions that no answer holds (`data_pipeline/text/next_turn.py` makes them of a template).
Out: a stopping criterion for generation, and answers cut there. Next: `generation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

EVERY = 8  # tokens between two looks, since a look decodes every row; what is generated meanwhile is cut off
LOOKED_AT = 160  # of a row's last tokens: longer than a header and what comes between two looks


@dataclass(frozen=True)
class Stops:
    """`ids` end an answer as its end token does; where one of `patterns` matches, the answer ends before it."""

    ids: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()

    def __or__(self, other: Stops) -> Stops:
        return Stops(tuple({*self.ids, *other.ids}), tuple(dict.fromkeys((*self.patterns, *other.patterns))))

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        return re.compile("|".join(self.patterns)) if self.patterns else None

    def cut(self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
        """The tokens of an answer that stand before the first match; None where nothing matches."""
        if self.pattern is None or (found := self.pattern.search(_text(ids, tokenizer))) is None:
            return None
        kept = len(_text(ids, tokenizer)[: found.start()].rstrip())
        length = len(ids)
        while length and len(_text(ids[:length], tokenizer)) > kept:
            length -= 1
        return list(ids[:length])


class TextStop(StoppingCriteria):
    """Ends each row whose generated text, behind `prompt_length` tokens, has a match among its last tokens."""

    def __init__(self, pattern: re.Pattern[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.pattern, self.tokenizer, self.prompt_length = pattern, tokenizer, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """input_ids: (R, T). Returns (R,) bool."""
        if (input_ids.shape[1] - self.prompt_length) % EVERY:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tails = input_ids[:, self.prompt_length :][:, -LOOKED_AT:].tolist()
        found = [self.pattern.search(_text(tail, self.tokenizer)) is not None for tail in tails]
        return torch.tensor(found, device=input_ids.device)


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
