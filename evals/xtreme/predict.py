"""Predictions of an exported encoder for task rows, in the layout of XTREME's submissions.

Writes `{task}/test-{language}.tsv` (`.json` for question answering), complete or not at all.

A model trained with X-Mixup mixes rows that have a translation into the dominant language (`back_*`); a row of that
language is its own source. Classification averages both sides' logits; tagging and question answering take the target
side (docs/methods.md, section 2.2). Texts longer than a window are read in several; each word is tagged, and the answer
is searched in all of them.

Shapes: R rows (n targets, then their n sources), T tokens, C classes, W words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from data_pipeline.atomic import write_text
from data_pipeline.records import Example, Record
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.tokenize import EncodedSide, TaskTokenizer
from evals.errors import EvalError
from evals.xtreme.spans import ScoredWindow, best_span, window_of_each

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from modeling.export_info import ExportInfo
    from modeling.xmixup.mixup import CrossLingualMixup

MixupMode = Literal["auto", "on", "off"]
Floats = npt.NDArray[np.float32]
Logits = tuple[Floats, ...]  # logits of one side: (C,); (T, C); or start and end, (T,) each
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # rows x row length of one forward pass


@dataclass(frozen=True, slots=True)
class Predictions:
    """A model's predictions for each record, in order: a label, one tag a word, or an answer."""

    values: list[Any]
    mixed: int  # records that X-Mixup mixed with their translation


@dataclass(frozen=True, slots=True)
class _Unit:
    """One window of one record, and its source if the two are mixed."""

    record: int
    target: EncodedSide
    source: EncodedSide | None

    def __len__(self) -> int:
        return max(len(self.target), 0 if self.source is None else len(self.source))


class EncoderPredictor:
    """A task model that predicts records. `mixup` is None if the model does not mix."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: TaskTokenizer,
        info: ExportInfo,
        mixup: CrossLingualMixup | None,
        batch_tokens: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.info, self.mixup = model.eval(), tokenizer, info, mixup
        self.kind, self.labels = tokenizer.config.kind, tokenizer.config.labels
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])

    @classmethod
    def open(cls, path: str | Path, dtype: str = "auto", batch_tokens: int | None = None) -> EncoderPredictor:
        """Open an export. `dtype`: bf16, fp32, or auto: bf16 on a GPU, fp32 on a CPU.

        Raises EvalError for a model without a task, ModelError for files that do not fit together.
        """
        from modeling.export_info import EXPORT_FILE, ExportInfo
        from modeling.loading import resolve_device, resolve_directory
        from modeling.tasks.encoders import load_task_model
        from modeling.weights.untrusted import read_tokenizer
        from modeling.xmixup.mixup import CrossLingualMixup
        from modeling.xmixup.mixup_state import MIXUP_FILE

        directory = resolve_directory(path)
        info = ExportInfo.read(directory)
        info.warn_if_check_failed(directory)
        if info.task is None or info.sequence_length is None or info.task["kind"] == "text":
            raise EvalError(f"{directory / EXPORT_FILE}: missing, or without a task; use a model trained on one")
        task = TaskConfig(**info.task)
        device, number_format = resolve_device(dtype)
        model = load_task_model(directory, task.kind, task.labels, number_format, "auto", device)
        # A model trained on pairs that were never mixed (`objective.mix: false`) has no such file.
        mixup = CrossLingualMixup.attach(model, directory) if (directory / MIXUP_FILE).is_file() else None
        tokenizer = TaskTokenizer(read_tokenizer(directory, local_files_only=True), task, info.sequence_length)
        return cls(model, tokenizer, info, mixup, batch_tokens)

    def predict(self, records: Sequence[Record], mixup: MixupMode = "auto") -> Predictions:
        """A label, the tags or an answer for each record.

        mixup: "auto" mixes a record if model and record allow it; "on" requires that of every record; "off" never
        mixes. Raises EvalError for "on" if it is impossible, naming the language.
        """
        sources = [self._source(record, mixup) for record in records]
        mixed = sum(source is not None for source in sources)
        if self.kind == "classification":
            chosen = self.class_logits(records, mixup).argmax(axis=1)
            return Predictions([self.labels[number] for number in chosen], mixed)
        if self.kind == "tagging":
            tagged = [tuple(self.labels[tag] for tag in words.argmax(axis=1)) for words in self._tags(records, sources)]
            return Predictions(tagged, mixed)
        return Predictions(self._answers(records, sources), mixed)

    def class_logits(self, records: Sequence[Record], mixup: MixupMode = "auto") -> Floats:
        """(records, C), the mean of both sides' logits for mixed records; `predict` takes the highest."""
        found = np.zeros((len(records), len(self.labels)), np.float32)
        for unit, target, source in self._run(self._units(records, [self._source(each, mixup) for each in records])):
            found[unit.record] = target[0] if source is None else (target[0] + source[0]) / 2
        return found

    def tag_probabilities(self, records: Sequence[Record]) -> list[Floats]:
        """(W, C) for each record: the probability of each label, never mixed."""
        return [_softmax(words) for words in self._tags(records, [None] * len(records))]

    def _source(self, record: Record, mode: MixupMode) -> Example | None:
        """The source that a record is mixed with; None: it is not mixed."""
        if not record.example.texts or mode == "off" or (mode == "auto" and self.mixup is None):
            return None
        if self.mixup is None:
            raise EvalError("mixup 'on': the model has no X-Mixup; use auto or off")
        source = record.example if record.language == self.info.dominant else record.back
        if source is None and mode == "on":
            raise EvalError(
                f"{record.origin}: mixup is 'on', but this row of language {record.language!r} has no translation into"
                f" {self.info.dominant!r} (back_* fields); prepare the data with translations, or use auto or off"
            )
        return source

    def _tags(self, records: Sequence[Record], sources: Sequence[Example | None]) -> list[Floats]:
        """(W, C) logits for each record, each word's from the window with most context for it; none without words."""
        parts: list[list[tuple[EncodedSide, Floats]]] = [[] for _ in records]
        for unit, target, _ in self._run(self._units(records, sources)):
            parts[unit.record].append((unit.target, self._word_logits(unit.target, target[0])))
        nothing = np.zeros((0, len(self.labels)), np.float32)
        return [_joined(windows) if windows else nothing for windows in parts]

    def _answers(self, records: Sequence[Record], sources: Sequence[Example | None]) -> list[str]:
        """The best span of each record's context, over all its windows."""
        parts: list[list[ScoredWindow]] = [[] for _ in records]
        for unit, target, _ in self._run(self._units(records, sources)):
            parts[unit.record].append(ScoredWindow(unit.target, *target))
        answers = []
        for record, windows in zip(records, parts, strict=True):
            windows.sort(key=lambda scored: scored.window.words)
            answers.append(best_span(record.example.texts[1], windows).text)
        return answers

    def _word_logits(self, window: EncodedSide, logits_TC: Floats) -> Floats:
        """(words of the window, C): the mean over a word's tokens, or its first token's, as in training."""
        tokens = np.flatnonzero(window.word_of_token >= 0)  # whole words, in order
        firsts = np.flatnonzero(np.diff(window.word_of_token[tokens], prepend=-1))
        if self.tokenizer.config.word_pooling == "first":
            return logits_TC[tokens][firsts]
        counts = np.diff(firsts, append=len(tokens))
        sums: Floats = np.add.reduceat(logits_TC[tokens], firsts, axis=0, dtype=np.float32)
        return np.divide(sums, counts[:, None], dtype=np.float32)

    def _units(self, records: Sequence[Record], sources: Sequence[Example | None]) -> list[_Unit]:
        units = []
        for number, (record, example) in enumerate(zip(records, sources, strict=True)):
            if not record.example.texts:  # a sentence without words
                continue
            # Without answers, because they must not influence the choice of windows.
            windows = self.tokenizer.windows(Example(record.example.texts))
            others = None if example is None else self.tokenizer.windows(Example(example.texts))
            for place, window in enumerate(windows):
                source = None if others is None else others.nearest_to(windows, place)
                units.append(_Unit(number, window, source))
        return units

    def _run(self, units: Sequence[_Unit]) -> Iterator[tuple[_Unit, Logits, Logits | None]]:
        """Every unit with its logits and, if mixed, its source's: longest first, in batches of similar units."""
        import torch

        for paired in (True, False):
            chosen = sorted((unit for unit in units if (unit.source is not None) is paired), key=len, reverse=True)
            while chosen:
                rows_a_unit = 2 if paired else 1
                size = max(self.batch_tokens // (rows_a_unit * len(chosen[0])), 1)
                batch, chosen = chosen[:size], chosen[size:]
                sides = [unit.target for unit in batch]
                sides += [unit.source for unit in batch if unit.source is not None]
                with torch.inference_mode():
                    outputs = self._forward(sides, len(batch) if paired else 0)
                for number, unit in enumerate(batch):
                    target = self._of_row(outputs, number, unit.target)
                    source = None if unit.source is None else self._of_row(outputs, len(batch) + number, unit.source)
                    yield unit, target, source

    def _of_row(self, outputs: Logits, row: int, side: EncodedSide) -> Logits:
        """One row's logits without those of padding."""
        return tuple(each[row] if self.kind == "classification" else each[row, : len(side)] for each in outputs)

    def _forward(self, sides: Sequence[EncodedSide], n_pairs: int) -> Logits:
        """Logits of all rows: (R, C); (R, T, C); or start and end, (R, T) each."""
        inputs = {
            "input_ids": _padded([side.input_ids for side in sides], self.tokenizer.pad_id),
            "attention_mask": _padded([np.ones_like(side.input_ids) for side in sides], 0),
        }
        if self.tokenizer.has_token_types:
            inputs["token_type_ids"] = _padded([side.token_type_ids for side in sides], 0)
        inputs = {name: values.to(self.model.device) for name, values in inputs.items()}
        if self.mixup is None:
            outputs: Any = self.model(**inputs)
        else:
            with self.mixup.batch(inputs["attention_mask"], n_pairs):
                outputs = self.model(**inputs)
        found = (outputs.start_logits, outputs.end_logits) if self.kind == "qa" else (outputs.logits,)
        return tuple(logits.float().cpu().numpy() for logits in found)


def write_predictions(file: Path, kind: str, records: Sequence[Record], values: Sequence[Any]) -> None:
    """Write predictions in the layout of XTREME's submissions, completely or not at all. Raises EvalError."""
    if kind == "classification":
        text = "".join(f"{label}\n" for label in values)
    elif kind == "tagging":
        text = "\n".join("".join(f"{tag}\n" for tag in tags) for tags in values)
    else:
        answers = {record.id: answer for record, answer in zip(records, values, strict=True)}
        if len(answers) < len(records):
            raise EvalError(f"{file}: {len(records)} questions share {len(answers)} ids; each needs a unique one")
        text = json.dumps(answers, ensure_ascii=False, indent=0) + "\n"
    write_text(file, text)


def _padded(arrays: Sequence[npt.NDArray[Any]], fill: int) -> torch.Tensor:
    """(R, T) int64, padded on the right."""
    import torch

    rows = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def _joined(windows: Sequence[tuple[EncodedSide, Floats]]) -> Floats:
    """(W, C): each word's logits from the window in which it has most context."""
    ordered = sorted(windows, key=lambda part: part[0].words)
    ranges = [window.words for window, _ in ordered]
    chosen = window_of_each(ranges)
    return np.stack([ordered[number][1][word - ranges[number][0]] for word, number in enumerate(chosen)])


def _softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
