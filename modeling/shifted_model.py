"""`load_shifted`: an exported model as an ordinary transformers model, whose rows are shifted by their languages.

    model = load_shifted("runs/a/model")
    model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), languages=["sw", "en"], max_new_tokens=64)

The model is of its transformers class, with two methods changed and one added. A forward pass without languages is an
error: it would run unshifted, as the model was not trained.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.errors import ModelError
from modeling.export_info import EXPORT_FILE, VECTORS_FILE, ExportInfo
from modeling.loading import AttentionName, load_config, load_pretrained, resolve_directory
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.row_shift import RowShift
from modeling.weights.weight_files import directory_hash

log = logging.getLogger(__name__)


class OpenedExport(NamedTuple):
    """A decoder with its description, and its language vectors if it was trained with the shift."""

    directory: Path
    model: PreTrainedModel
    info: ExportInfo
    vectors: LanguageVectors | None


def open_export(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: AttentionName = "auto",
) -> OpenedExport:
    """Opens an export, a plain Hugging Face directory, or a hub name.

    Raises:
        ModelError: an encoder, a ShifCon model without its vectors or with those of other weights, or what
            `load_pretrained` raises.
    """
    directory = resolve_directory(path)
    info = ExportInfo.read(directory)
    info.warn_if_check_failed(directory)
    if info.task is not None:
        raise ModelError(f"{directory}: an encoder trained for {info.task['kind']}: it cannot generate text")
    vectors = LanguageVectors.of_export(directory) if info.shifted else None
    return OpenedExport(directory, load_pretrained(directory, dtype, attention, device), info, vectors)


def load_shifted(
    path: str | Path,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str | torch.device = "cpu",
    attention: AttentionName = "auto",
) -> ShiftedModel:
    """Opens the export of a ShifCon run, or its run folder.

    Args:
        path: directory or hub name.
        dtype: number format of weights and activations; auto: that of the stored weights.
        device: where the model is put.
        attention: as `model.attention` in a run file.

    Raises:
        ModelError: the model was not trained with the shift (a baked one needs none), or what `open_export` raises.
    """
    directory = resolve_directory(path)
    if dtype == "auto":
        dtype = getattr(load_config(directory), "dtype", None) or torch.float32
    opened = open_export(directory, dtype, device, attention)
    if opened.vectors is None:
        raise ModelError(
            f"{opened.directory}: has no shift; open it with transformers' AutoModelForCausalLM.from_pretrained"
        )
    model: Any = opened.model
    original = type(model)
    # the name is that of the original, which `save_pretrained` writes into the config
    model.__class__ = type(original.__name__, (ShiftedModel, original), {"__module__": original.__module__})
    model.row_shift = RowShift(model, opened.info, opened.vectors)
    model.register_forward_pre_hook(_refuse_without_languages)
    model.export_directory = opened.directory
    shifted: ShiftedModel = model
    return shifted


class ShiftedModel(PreTrainedModel):
    """The methods that `load_shifted` changes and adds, in front of those of the model's class."""

    row_shift: RowShift
    export_directory: Path

    @contextmanager
    def in_languages(
        self,
        languages: Sequence[str | None] | str | None,
        attention_mask: Tensor,
        response_languages: Sequence[str | None] | str | None = None,
    ) -> Iterator[None]:
        """Inside, forward passes over these rows are shifted, also those that `generate` of other libraries makes.

        Args:
            languages: (B,) codes, or one for all rows; None: the row is not shifted.
            attention_mask: (B, T), 0 at padding.
            response_languages: (B,) codes of the tokens after T, or one for all; by default the language of all
                answers in training, else that of the row.

        Raises:
            ModelError: another number of languages than rows, or a language that the model does not know.
        """
        rows = len(attention_mask)
        prompts, responses = self._codes(languages, rows), self._codes(response_languages, rows)
        with self.row_shift.batch(prompts, responses, attention_mask.to(self.device)):
            yield

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        languages: Sequence[str | None] | str | None = None,
        response_languages: Sequence[str | None] | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; each row, and what is generated for it, is shifted by its language.

        Args:
            inputs: as for transformers.
            languages, response_languages: as for `in_languages`.

        Raises:
            ModelError: no languages, or what `in_languages` raises.
        """
        given = next(
            (each for each in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if each is not None), None
        )
        if languages is None or given is None:
            raise ModelError(
                "generate: give the prompts (input_ids) and their `languages`, such as languages=['sw', 'en'] for two "
                "rows; None in the list leaves a row unshifted"
            )
        if isinstance(kwargs.get("assistant_model"), ShiftedModel):
            raise ModelError("generate: assistant_model must be a plain model, as it is called without languages")
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = self._mask_of(given)
        with self.in_languages(languages, mask, response_languages):
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]  # of the model's class

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """transformers' `save_pretrained`, with the description and the vectors, which belong to the saved weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        output, vectors = Path(save_directory), self.row_shift.vectors
        assert vectors is not None  # as `load_shifted` has made it
        shutil.copyfile(self.export_directory / EXPORT_FILE, output / EXPORT_FILE)
        replace(vectors, model_hash=directory_hash(output)).save(output / VECTORS_FILE)

    def _codes(self, languages: Sequence[str | None] | str | None, rows: int) -> list[str | None]:
        codes = [languages] * rows if languages is None or isinstance(languages, str) else list(languages)
        if len(codes) != rows:
            raise ModelError(f"languages: {len(codes)} for {rows} rows; give one for each row, or a single code")
        known = self.row_shift.vectors.languages if self.row_shift.vectors is not None else ()
        for code in codes:
            if code is not None and code not in known:
                raise ModelError(f"languages: {code!r} is not one of the model's, which are {', '.join(known)}")
            if code is not None and not self.row_shift.is_shifted(code, code):
                log.warning("language %r has no vector, so its rows run unshifted", code)
        return codes

    def _mask_of(self, inputs: Tensor) -> Tensor:
        """(B, T): as `generate` infers it without an attention mask, all tokens but padding on the left."""
        pad = self.generation_config.pad_token_id if self.generation_config is not None else None
        if inputs.dim() != 2 or pad is None:
            return torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
        return (inputs != pad).long().cummax(dim=1).values


def _refuse_without_languages(model: ShiftedModel, _: Any) -> None:
    shift = model.row_shift.shift
    if shift is not None and not shift.in_batch:
        raise ModelError(
            "this model shifts states by language and was given none: call generate(..., languages=[...]), or run it "
            "inside `with model.in_languages([...], attention_mask):`"
        )
