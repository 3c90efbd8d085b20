"""`crosslift probe`: what a model's layers say about languages, and the layer area that follows for ShifCon.

Sentences are read from files, one language a file or a row; their token states are compared with those of the dominant
language at every layer, without shift (`modeling/shifcon/layer_probe.py`; docs/methods.md, section 1.4). Under
`torchrun`, every rank runs a share of the sentences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data_pipeline.atomic import write_text
from data_pipeline.console import Progress, table
from data_pipeline.records import BadRow, DataError, item_key, stable_hash
from data_pipeline.sources.formats import JsonLines
from data_pipeline.xtreme.lines import text_lines
from evals.errors import EvalError
from evals.parallel_texts import TEXT_FIELDS
from training.provenance import description

if TYPE_CHECKING:
    from torch import Tensor

    from modeling.shifcon.language_vectors import LanguageVectors
    from modeling.shifcon.layer_area import AreaChoice
    from modeling.shifcon.layer_probe import LanguageMeans, LanguageStates, LayerMeasures, ProbeBatch
    from modeling.tasks.sentence_states import EncodedText, SentenceStates

JSON_FILE = "probe.json"
FIELDS = (*TEXT_FIELDS, "prompt")
PLOT_FILE, SCATTER_FILE = "probe.png", "scatter.png"
BATCH_SIZE = 32  # sentences
LEAST_SENTENCES = 16  # of a language
MOST_BYTES = 0.9  # tokens per UTF-8 byte from which on a text consists of single bytes


class Sentence(NamedTuple):
    """`item`: translations have the same."""

    item: int
    text: str


@dataclass(frozen=True, slots=True)
class ScatterStates:
    """Pooled states of some sentences: (sentences, N + 1, H), without and with the shift, and their languages."""

    plain: Tensor
    shifted: Tensor
    languages: list[str]


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The result of a probe. `measures`: by language, without the dominant one."""

    model: str
    vectors: LanguageVectors  # of all layers, with the chosen area
    layers: int
    width: int
    dtype: str
    truncated: int  # sentences that were cut
    measures: Mapping[str, LayerMeasures]
    choice: AreaChoice
    scatter: ScatterStates

    def to_json(self) -> dict[str, Any]:
        """Plain data: what `probe.json` holds. NaN is null."""
        from modeling.shifcon.layer_probe import MEASURES, jackknife_error

        def curve(values: Tensor) -> list[float | None]:
            return [None if math.isnan(value) else value for value in values.tolist()]

        languages = {
            language: {
                "tokens": each.tokens, "sentences": each.sentences, "pairs": each.pairs,
                "no_more_tokens_than_dimensions": each.with_few_tokens,
                **{name: curve(each.values[name][0]) for name in MEASURES},
                "standard_error": {name: curve(jackknife_error(each.values[name][1:])) for name in MEASURES},
            }
            for language, each in self.measures.items()
        }  # fmt: skip
        choice, vectors = self.choice, self.vectors
        return {
            "model": self.model, "model_hash": vectors.model_hash, "layers": self.layers, "width": self.width,
            "dtype": self.dtype, "dominant": vectors.dominant, "truncated": self.truncated,
            "tokens": dict(zip(vectors.languages, vectors.tokens.tolist(), strict=True)),
            "area": choice.area, "rule": choice.rule, "area_by_rule": dict(choice.by_rule),
            "runners_up": choice.runners_up, "agreement": choice.agreement, "measures": MEASURES,
            "languages": languages, "versions": description(),
        }  # fmt: skip


def read_sentences(files: Sequence[Path], limit: int | None = None) -> dict[str, list[Sentence]]:
    """Sentences by language, the first `limit` of each.

    `CODE.txt` has one sentence a line; the same line of another file is its translation. `NAME.jsonl` has rows with a
    text (`text`, `question`, `prompt`, ...), `id` or `group`, which translations share, and `language`, by default the
    file's name.

    Raises:
        EvalError, DataError: with the file and line.
    """
    found: dict[str, list[Sentence]] = {}
    for file in files:
        try:
            rows = list(_lines(file) if file.suffix == ".txt" else _rows(file))
        except OSError as error:
            raise EvalError(f"{file}: cannot be read ({error.strerror})") from error
        for language, sentence in rows:
            found.setdefault(language, []).append(sentence)
    return {language: sentences[:limit] for language, sentences in found.items()}


def _lines(file: Path) -> Iterator[tuple[str, Sentence]]:
    try:
        for number, line in text_lines(file):
            if text := line.strip():
                yield file.stem, Sentence(number, text)
    except DataError as error:
        raise EvalError(str(error)) from error


def _rows(file: Path) -> Iterator[tuple[str, Sentence]]:
    shard = JsonLines(str(file), file.name, "")
    with file.open("rb") as stream:
        for place, row in shard.rows(stream):
            origin = shard.origin(place)
            if isinstance(row, BadRow):
                raise row
            item = row.get("group", row.get("id"))
            text = next((row[name] for name in FIELDS if isinstance(row.get(name), str) and row[name].strip()), None)
            if item is None or text is None:
                what = f"no text; a row has one of {', '.join(FIELDS)}" if item is not None else "no `id` or `group`"
                raise EvalError(f"{origin}: {what}")
            language = row.get("language", file.stem)
            if not isinstance(language, str):
                raise EvalError(f"{origin}: `language` is {language!r}, not a code")
            yield language, Sentence(stable_hash(item_key(str(item))), text.strip())


def probe(
    model: str,
    sentences: Mapping[str, Sequence[Sentence]],
    *,
    dominant: str,
    max_length: int = 128,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
) -> ProbeReport:
    """Measures every language against the dominant one. Called on all ranks.

    Raises:
        EvalError: too few languages or sentences, or a language that the tokenizer splits into single bytes.
        ModelError: a model that cannot be opened.
    """
    from modeling.loading import resolve_device, resolve_directory
    from modeling.shifcon.layer_area import choose_area
    from modeling.shifcon.layer_probe import probe_languages
    from modeling.tasks.sentence_states import SentenceStates
    from modeling.weights.weight_files import directory_hash
    from training.distributed import rank, world_size

    _check(sentences, dominant)
    device, number_format = resolve_device(dtype)
    opened = SentenceStates.open(model, max_length=max_length, dtype=number_format, device=device)
    encoded = {language: _encoded(opened, language, each) for language, each in sentences.items()}
    order = sorted(encoded, key=lambda language: language != dominant)
    with Progress("probe", sum(map(len, encoded.values())), "sentences") as progress:

        def batches(language: str) -> Iterator[ProbeBatch]:
            mine = list(zip(sentences[language], encoded[language], strict=True))[rank() :: world_size()]
            return _batches(opened, mine, progress)

        found = probe_languages(opened.model, order, batches, lambda states: _over_ranks(states, opened))
    choice = choose_area(found.measures)
    vectors = _vectors(found.means, dominant, choice.area, directory_hash(resolve_directory(model)))
    return ProbeReport(
        model, vectors, opened.layers, opened.width, str(number_format).removeprefix("torch."), opened.truncated,
        found.measures, choice, _scatter(opened, sentences, encoded, found.means, vectors),
    )  # fmt: skip


def _check(sentences: Mapping[str, Sequence[Sentence]], dominant: str) -> None:
    if dominant not in sentences:
        raise EvalError(
            f"--dominant {dominant}: no sentences in it; there are {', '.join(sorted(sentences)) or 'none'}"
        )
    if len(sentences) < 2:
        raise EvalError(f"only {dominant!r} has sentences; there must be other languages to compare with it")
    for language, each in sentences.items():
        if len(each) < LEAST_SENTENCES:
            raise EvalError(f"{language!r} has {len(each)} sentences; {LEAST_SENTENCES} are needed")


def _encoded(opened: SentenceStates, language: str, sentences: Sequence[Sentence]) -> list[EncodedText]:
    texts = [sentence.text for sentence in sentences]
    encoded = opened.encode(texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    n_tokens = sum(sum(each.content) for each in encoded)
    if not all(text.isascii() for text in texts) and n_tokens > MOST_BYTES * n_bytes:
        raise EvalError(
            f"{language!r}: {n_tokens} tokens for {n_bytes} bytes of text; the model's tokenizer does not know its "
            "script and splits it into single bytes, so its states say nothing about the language; leave it out"
        )
    return encoded


def _batches(
    opened: SentenceStates, mine: Sequence[tuple[Sentence, EncodedText]], progress: Progress
) -> Iterator[ProbeBatch]:
    by_length = sorted(mine, key=lambda each: len(each[1].ids))  # little padding
    for start in range(0, len(by_length), BATCH_SIZE):
        chunk = by_length[start : start + BATCH_SIZE]
        yield _batch(opened, chunk)
        progress.advance(len(chunk))


def _batch(opened: SentenceStates, chunk: Sequence[tuple[Sentence, EncodedText]]) -> ProbeBatch:
    import torch

    from modeling.shifcon.layer_probe import ProbeBatch

    ids, mask, content = opened.padded([encoded for _, encoded in chunk])
    segments = torch.arange(len(chunk), device=ids.device)[:, None].expand_as(ids)
    items = [sentence.item for sentence, _ in chunk]
    inputs = {"input_ids": ids, "attention_mask": mask}
    return ProbeBatch(inputs, segments.masked_fill(mask == 0, -1), content, items)


def _over_ranks(states: LanguageStates, opened: SentenceStates) -> LanguageStates:
    """The states of all ranks together."""
    from modeling.shifcon.layer_probe import LanguageStates
    from training.distributed import all_sum, gather_objects

    device = opened.model.device
    moments = states.moments.over_ranks(lambda values: all_sum(values, device).to(device))
    gathered = gather_objects((states.pooled, states.items))
    pooled = [each for part, _ in gathered for each in part]
    return LanguageStates(moments, pooled, [item for _, part in gathered for item in part])


def _vectors(
    means: Mapping[str, LanguageMeans], dominant: str, area: tuple[int, int], model_hash: str
) -> LanguageVectors:
    """The means of all layers, as `LanguageVectors` of the chosen area."""
    import torch

    from modeling.shifcon.language_vectors import LanguageVectors
    from modeling.shifcon.normalisation import with_floor

    found = means.values()
    mean = torch.stack([each.mean for each in found]).float().cpu()
    return LanguageVectors(
        tuple(means), dominant, tuple(range(mean.shape[1])), area, mean,
        torch.stack([each.length for each in found]).float().cpu(), torch.tensor([each.tokens for each in found]),
        estimator="mean over the tokens of sentences, unshifted", model_hash=model_hash,
        text_mean=torch.stack([each.text_mean[area[0]] for each in found]),
        text_deviation=with_floor(means[dominant].text_deviation[area[0]]),
    )  # fmt: skip


def _scatter(
    opened: SentenceStates,
    sentences: Mapping[str, Sequence[Sentence]],
    encoded: Mapping[str, Sequence[EncodedText]],
    means: Mapping[str, LanguageMeans],
    vectors: LanguageVectors,
) -> ScatterStates:
    """Pooled states of some sentences of each language, without the shift as they were measured, and with it."""
    import torch

    from modeling.shifcon.shift import LanguageShift

    shift = LanguageShift(opened.model, *vectors.area)
    shift.set_vectors(vectors)
    shifted, languages = [], []
    for number, language in enumerate(vectors.languages):
        by_item = {each.item: text for each, text in zip(sentences[language], encoded[language], strict=True)}
        chosen = [by_item[item] for item in means[language].items]
        languages += [language] * len(chosen)
        for start in range(0, len(chosen), BATCH_SIZE):
            chunk = chosen[start : start + BATCH_SIZE]
            width = max(len(each.ids) for each in chunk)
            with shift.batch(torch.full((len(chunk), width), number, device=opened.model.device)):
                shifted.append(opened.pooled(chunk).transpose(0, 1).cpu())
    shift.remove()
    plain = torch.cat([means[language].texts for language in vectors.languages])
    return ScatterStates(plain, torch.cat(shifted), languages)


def probe_table(report: ProbeReport) -> str:
    """Means over the languages by layer, the area, and notes."""
    from modeling.shifcon.layer_area import mean_curves
    from modeling.shifcon.layer_probe import MEASURES

    toward, back = report.choice.area
    curves = [mean_curves(report.measures, name)[0].tolist() for name in MEASURES]
    rows = [
        [
            f"{layer}{'*' if toward <= layer < back else ''}",
            *("-" if math.isnan(each) else f"{each:.3f}" for each in values),
        ]
        for layer, values in enumerate(zip(*curves, strict=True))
    ]
    languages = ", ".join(report.measures)
    choice = report.choice
    lines = [
        f"Token states of {languages} against {report.vectors.dominant}, mean over languages, by the layer they enter",
        table(["layer", *(name.replace("_", " ") for name in MEASURES)], rows, text=()),
        "",
        f"* layer area [{toward}, {back}), chosen by {choice.rule}; {100 * choice.agreement:.0f} % of the jackknife's "
        "replicates choose the same",
        "by each measure alone: " + ", ".join(f"{name} [{a}, {b})" for name, (a, b) in choice.by_rule.items()),
        "runners-up: " + (", ".join(f"[{a}, {b})" for a, b in choice.runners_up) or "none"),
        f"in a run file: objective: {{name: shifcon, layers: [{toward}, {back}], ...}}",
    ]
    if few := [language for language, each in report.measures.items() if each.with_few_tokens]:
        lines.append(
            f"no more tokens than the {report.width} dimensions of a state, so that the covariances are singular and "
            f"the distances depend on what is added to the variances: {', '.join(few)}; give more sentences"
        )
    if report.truncated:
        lines.append(f"{report.truncated} sentences were cut to the longest length")
    return "\n".join(lines)


def write_probe(report: ProbeReport, output: Path) -> tuple[Path, ...]:
    """Writes `probe.json`, `language_vectors.safetensors`, `probe.png` and `scatter.png`."""
    from data_pipeline.atomic import atomic_file
    from evals.probe_plots import draw_curves, draw_scatter
    from modeling.export_info import VECTORS_FILE

    output.mkdir(parents=True, exist_ok=True)
    files = tuple(output / name for name in (JSON_FILE, VECTORS_FILE, PLOT_FILE, SCATTER_FILE))
    write_text(files[0], json.dumps(report.to_json(), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    with atomic_file(files[1]) as temporary:
        report.vectors.save(temporary)
    for file, draw in zip(files[2:], (draw_curves, draw_scatter), strict=True):
        with atomic_file(file) as temporary:
            draw(report).savefig(temporary, dpi=150, format="png")
    return files
