"""Generation from an exported model, each prompt shifted by its own language.

The shift applies to every token (docs/methods.md, section 1.2): prompt tokens by the prompt's language, generated
tokens by the response's. A ShifCon model without its own language vectors is not loaded.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from modeling.errors import ModelError
from modeling.export_info import ExportInfo
from modeling.layers import position_limit, position_table, state_hook
from modeling.loading import AttentionName
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.row_shift import RowShift
from modeling.shifted_model import open_export
from modeling.stopping import Stops, TextStop
from modeling.weights.untrusted import read_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids up to the beginning of the answer, and languages as codes, None for unknown.

    The response language is by default the export's, then the prompt's. If both languages are None, nothing is shifted.
    """

    ids: list[int]
    language: str | None = None
    response_language: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        temperature, top_p: above 0; top_p at most 1.
        top_k: 0 or more; 0 means all tokens.
        seed: fixes the samples on one kind of machine, for the same prompts in batches of the same size.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    Attributes:
        token_ids: without the end token, and without the header of a next turn.
        finished: the end token or such a header was generated.
        shifted: the model shifts and both languages have a vector (the dominant language's shift is zero). Otherwise
            tokens of a language without a vector were not shifted.
    """

    text: str
    token_ids: list[int]
    finished: bool
    shifted: bool


class ShiftedGenerator:
    """A model that generates with each row shifted by its language; without a shift if it is not a ShifCon model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        info: ExportInfo,
        vectors: LanguageVectors | None,
    ) -> None:
        self.model, self.tokenizer, self.info, self.vectors = model, tokenizer, info, vectors
        # most tokens of prompt and answer together, for a model with learned positions
        self.positions = position_limit(model) if position_table(model) is not None else None
        self.rows = RowShift(model, info, vectors)
        self.shift = self.rows.shift
        self.end_ids = _end_ids(model, tokenizer)
        self.stops = Stops()  # further ends of an answer, set by callers from the chat template
        # Replaced, because sampling and penalties that the model's authors set would apply to every call of generate.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=self.end_ids, pad_token_id=self._padding_id()
        )

    @classmethod
    def from_directory(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: AttentionName = "auto",
    ) -> ShiftedGenerator:
        """Opens a model and its tokenizer. Raises ModelError as `open_export` does."""
        opened = open_export(path, dtype, device, attention)
        tokenizer = read_tokenizer(opened.directory, local_files_only=True)
        return cls(opened.model, tokenizer, opened.info, opened.vectors)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        num_beams: int = 1,
        batch_size: int = 16,
        progress: Callable[[int], object] | None = None,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """Generates an answer for each prompt.

        Prompts of similar length share a batch, the longest first. If the model has learned positions, an answer ends
        with the last of them, whatever prompts share its batch.

        Args:
            prompts: with at least one token each.
            max_new_tokens: most tokens of an answer.
            num_beams: above 1, beam search.
            progress: is called with the number of answers of each finished batch.
            sampling: None decodes greedily, or by beam search.

        Returns:
            Answers in the order of `prompts`.

        Raises:
            ModelError: a prompt without tokens, or without a position left for an answer.
        """
        limits = self._answer_limits(prompts, max_new_tokens)
        config = GenerationConfig(max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False, use_cache=True)
        if sampling is not None:
            config.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
            torch.manual_seed(sampling.seed)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        answers: dict[int, Generation] = {}
        for limit, group in groupby(order, key=limits.__getitem__):
            config.max_new_tokens, same = limit, list(group)
            for start in range(0, len(same), batch_size):
                chosen = same[start : start + batch_size]
                answers.update(zip(chosen, self._batch([prompts[i] for i in chosen], config), strict=True))
                if progress is not None:
                    progress(len(chosen))
        return [answers[i] for i in range(len(prompts))]

    def _answer_limits(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[int]:
        """Most tokens of each prompt's answer."""
        limits = [max_new_tokens] * len(prompts)
        for i, prompt in enumerate(prompts):
            if not prompt.ids:
                raise ModelError(f"prompt {i} has no tokens; it needs at least one")
            if self.positions is not None:
                self.refuse_too_long(prompt.ids, f"prompt {i}: ")
                limits[i] = min(max_new_tokens, self.positions - len(prompt.ids))
        if cut := sum(each < max_new_tokens for each in limits):
            log.warning(
                "%d of %d answers have room for fewer than %d tokens: the model has positions for %d, prompt included",
                cut, len(prompts), max_new_tokens, self.positions,
            )  # fmt: skip
        return limits

    def refuse_too_long(self, ids: Sequence[int], where: str = "") -> None:
        """Raises ModelError, beginning with `where`, for a prompt that leaves no position for an answer."""
        if self.positions is not None and len(ids) >= self.positions:
            raise ModelError(
                f"{where}a prompt of {len(ids)} tokens leaves no room for an answer: the model has positions for "
                f"{self.positions}; shorten it"
            )

    @torch.inference_mode()
    def nearest_language(self, ids: Sequence[int], content: Sequence[bool]) -> str | None:
        """The language whose texts are nearest to a prompt (`LanguageVectors.nearest`).

        Args:
            ids: of the prompt.
            content: marks the user's own words, over which the means are taken (docs/methods.md, section 1.1). If it
                marks none, all tokens count. The first token, an attention sink, is left out if there are others.

        Returns:
            A language code; None for a model that does not shift.
        """
        if self.vectors is None or self.shift is None:
            return None
        self.refuse_too_long(ids)
        toward = self.vectors.area[0]
        states: list[Tensor] = []
        hook = state_hook(self.model, toward, lambda hidden_BTH: states.append(hidden_BTH))
        try:
            with self.shift.disabled():
                self.model(input_ids=torch.tensor([list(ids)], device=self.model.device), use_cache=False)
        finally:
            hook.remove()
        others = range(1, len(ids))
        chosen = [place for place in others if content[place]] or list(others) or [0]
        return self.vectors.nearest(states[0][0, chosen].float().mean(dim=0))

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Prompt], config: GenerationConfig) -> list[Generation]:
        ids_BT, mask_BT = self._left_padded([prompt.ids for prompt in prompts])
        model: Any = self.model
        ends = [*self.end_ids, *self.stops.ids]
        if self.stops.ids:
            config.eos_token_id = ends
        criteria = StoppingCriteriaList()
        if self.stops.pattern is not None:
            criteria.append(TextStop(self.stops.pattern, self.tokenizer, ids_BT.shape[1]))
        with self.shifted(prompts, mask_BT):
            output: Any = model.generate(
                input_ids=ids_BT, attention_mask=mask_BT, generation_config=config, stopping_criteria=criteria
            )
        answers = []
        for prompt, row in zip(prompts, output[:, ids_BT.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            cut = self.stops.cut(row[:end], self.tokenizer)
            answer = row[:end] if cut is None else cut
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            finished = end is not None or cut is not None
            shifted = self.rows.is_shifted(prompt.language, prompt.response_language)
            answers.append(Generation(str(text), answer, finished, shifted))
        return answers

    def shifted(self, prompts: Sequence[Prompt], mask_BT: Tensor) -> AbstractContextManager[None]:
        """Inside, forward passes over these rows are shifted; `mask_BT` (B, T) is 0 at padding."""
        both = [prompt.language for prompt in prompts], [prompt.response_language for prompt in prompts]
        return self.rows.batch(*both, mask_BT)

    def _left_padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, T) int64 on the model's device, every row ending in the last column."""
        width = max(map(len, rows))
        ids = [[self._padding_id()] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _padding_id(self) -> int:
        return next(id for id in (self.tokenizer.pad_token_id, *self.end_ids, 0) if id is not None)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the model's (chat models have several) and the tokenizer's."""
    known = model.generation_config.eos_token_id
    ids = known if isinstance(known, list) else [known]
    return sorted({id for id in (*ids, tokenizer.eos_token_id) if id is not None})
