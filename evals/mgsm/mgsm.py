"""MGSM: grade-school problems in many languages, answered by a model and scored by every rule of `numbers.py`.

Reads `mgsm_XX.tsv` files (question TAB gold). Writes `predictions/mgsm_XX.jsonl`, every raw output with the result of
each rule, and `results.json`, which describes the run. `score_mgsm` scores saved outputs again, by the same rules or by
later ones.

The published protocol (MathOctopus, QAlign): zero-shot, greedy, up to 600 new tokens, the `alpaca` template. An
interrupted evaluation is continued in its folder: finished languages are kept. Batches hold several languages where one
has too few problems to fill them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from data_pipeline.atomic import write_text
from data_pipeline.console import Progress
from data_pipeline.records import Message
from evals.errors import EvalError
from evals.mgsm.numbers import HEADLINE, RULES, gold_number
from evals.results import claim, described_model, read_run
from evals.statistics import wilson_interval
from training.provenance import description
from training.tracking.run_record import RESULTS_FILE

if TYPE_CHECKING:
    from data_pipeline.text.chat import Chat
    from modeling.generation import Generation, Prompt, ShiftedGenerator

PUBLISHED_NEW_TOKENS = 600
# The languages MathOctopus and QAlign average over: MGSM's without Telugu.
PUBLISHED_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "th", "zh")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question and its gold answer as written: "18", "114,200"."""

    question: str
    gold: str


def find_files(directory: str | Path, pattern: str, languages: Sequence[str] | None = None) -> dict[str, Path]:
    """`mgsm_XX` files by language, in the order of `languages` (default: all, sorted). Raises EvalError."""
    found = {file.stem.removeprefix("mgsm_"): file for file in sorted(Path(directory).glob(f"mgsm_*{pattern}"))}
    if not found:
        raise EvalError(f"{directory}: holds no mgsm_XX{pattern} (XX: a language, as in mgsm_sw{pattern})")
    for language in languages or ():
        if language not in found:
            raise EvalError(f"{directory}: no mgsm_{language}{pattern}; there are {', '.join(found)}")
    return {language: found[language] for language in languages} if languages else found


def read_problems(file: Path) -> list[Problem]:
    """All problems of a `mgsm_XX.tsv`; BOM, CRLF and trailing blank lines are accepted.

    Raises EvalError naming file and line.
    """
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise EvalError(f"{file}: {error.strerror}") from error
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            question, gold = line.decode().removesuffix("\r").split("\t")
            gold_number(gold.strip())
            if not question.strip():
                raise ValueError("the question is empty")
        except UnicodeDecodeError as error:
            raise EvalError(f"{file}:{number}: not UTF-8") from error
        except ValueError as error:
            reason = str(error) if line.count(b"\t") == 1 else "not two columns"
            raise EvalError(f"{file}:{number}: {reason}; a line is QUESTION<tab>ANSWER") from error
        problems.append(Problem(question, gold.strip()))
    return problems


@dataclass(frozen=True, slots=True)
class MgsmSettings:
    """How MGSM is run."""

    languages: Sequence[str] | None = None  # None: all that the data have
    response_language: str | None = None  # of the answers; None: the model's own, otherwise the question's
    limit: int | None = None  # only the first problems of each language
    max_new_tokens: int = PUBLISHED_NEW_TOKENS
    batch_size: int = 16


def evaluate_mgsm(
    generator: ShiftedGenerator,
    chat: Chat,
    data_dir: str | Path,
    output: str | Path,
    settings: MgsmSettings | None = None,
) -> dict[str, Any]:
    """Run MGSM and return what it wrote to `output/results.json`.

    Raises EvalError for malformed data, or if `output` contains another evaluation.
    """
    settings = settings or MgsmSettings()
    limit, max_new_tokens = settings.limit, settings.max_new_tokens
    if limit is not None and limit < 1:
        raise EvalError(f"limit is {limit}; it must be at least 1")
    files = find_files(data_dir, ".tsv", settings.languages)
    found = {language: read_problems(file) for language, file in files.items()}
    problems = {language: every[:limit] for language, every in found.items()}
    response_language = settings.response_language or generator.info.response_language
    run = {
        "task": "mgsm",
        "model": described_model(generator),
        "protocol": {
            "shots": 0,
            "decoding": "greedy",
            "max_new_tokens": max_new_tokens,
            "template": chat.config.model_dump(mode="json"),
            "response_language": response_language or "the question's",
            "limit": limit,
        },
        "data": {language: sha256(file.read_bytes()).hexdigest() for language, file in files.items()},
        "versions": description(),
    }
    folder = Path(output)
    claim(folder, run)
    kept = folder / "predictions"
    rows = {
        language: read_predictions(kept / f"mgsm_{language}.jsonl", language, chosen)
        for language, chosen in problems.items()
        if (kept / f"mgsm_{language}.jsonl").exists()
    }
    with Progress("mgsm", sum(map(len, problems.values())), "problems") as progress:
        progress.advance(sum(map(len, rows.values())))
        for group in _filling_batches(problems, rows, settings.batch_size):
            prompts_of = {
                language: [_prompt(chat, problem, language, response_language or language) for problem in chosen]
                for language, chosen in group.items()
            }
            prompts = list(chain.from_iterable(prompts_of.values()))
            answers = iter(generator.generate(prompts, max_new_tokens, 1, settings.batch_size, progress.advance))
            for language, chosen in group.items():
                rows[language] = [
                    _scored(_row(chat, index, problem, prompt, next(answers)), language)
                    for index, (problem, prompt) in enumerate(zip(chosen, prompts_of[language], strict=True))
                ]
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[language]]
                write_text(kept / f"mgsm_{language}.jsonl", "".join(lines))
    scores = {language: _score(rows[language], len(every)) for language, every in found.items()}
    missing = dict.fromkeys(find_files(data_dir, ".tsv").keys() - files.keys(), "not requested")
    results = {"run": run, **_summary(scores, generator.info.dominant, missing)}
    write_text(folder / RESULTS_FILE, json.dumps(results, ensure_ascii=False, indent=2) + "\n")
    return results


def score_mgsm(predictions: str | Path, labels: str | Path) -> dict[str, Any]:
    """Score saved outputs again: `predictions` is an evaluation's folder, its predictions, or one file of them.

    A line needs only `output`; `index` (0-based; default: the line's place), `question`, `response_language`,
    `finished`, `shifted` and `tokens` are used if present. `labels`: the folder of `mgsm_XX.tsv`. Returns what
    `evaluate_mgsm` returns, with `run` None if no file beside the predictions describes it. Raises EvalError.
    """
    path = Path(predictions)
    if path.is_file():
        files = {path.stem.removeprefix("mgsm_"): path}
    else:
        files = find_files(path / "predictions" if (path / "predictions").is_dir() else path, ".jsonl")
    gold = find_files(labels, ".tsv", list(files))
    scores = {}
    for language, file in files.items():
        problems = read_problems(gold[language])
        scores[language] = _score(read_predictions(file, language, problems), len(problems))
    run = read_run(next(iter(files.values())).parent.parent)
    missing = dict.fromkeys(find_files(labels, ".tsv").keys() - files.keys(), "no predictions")
    return {"run": run, **_summary(scores, run["model"]["dominant"] if run else None, missing)}


def read_predictions(file: Path, language: str, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Saved rows, scored again against `problems`. Raises EvalError naming file and line."""
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(file.read_bytes().removesuffix(b"\n").split(b"\n")):
        try:
            row = json.loads(line)
            index = row.get("index", number)
            if not isinstance(row["output"], str) or not isinstance(index, int):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvalError(f'{file}:{number + 1}: not an answer; a line is {{"output": TEXT}}') from error
        if not 0 <= index < len(problems) or index in rows:
            fault = "occurs twice" if index in rows else f"is not one of the {len(problems)} problems"
            raise EvalError(f"{file}:{number + 1}: problem {index} {fault}")
        if row.get("question", problems[index].question) != problems[index].question:
            raise EvalError(f"{file}:{number + 1}: answers another question than problem {index} of the labels")
        rows[index] = _scored({**row, "gold": problems[index].gold}, language)
    return [rows[index] for index in sorted(rows)]


def _filling_batches(
    problems: Mapping[str, Sequence[Problem]], done: Collection[str], batch_size: int
) -> Iterator[dict[str, Sequence[Problem]]]:
    """Groups of the languages that are not `done`, each with enough problems to fill a batch."""
    group: dict[str, Sequence[Problem]] = {}
    for language, chosen in problems.items():
        if language not in done:
            group[language] = chosen
        if sum(map(len, group.values())) >= batch_size:
            yield group
            group = {}
    if group:
        yield group


def _prompt(chat: Chat, problem: Problem, language: str, response_language: str) -> Prompt:
    from modeling.generation import Prompt

    ids, _ = chat.prompt_ids([Message("user", problem.question)], language, response_language)
    return Prompt([int(token) for token in ids], language, response_language)


def _row(chat: Chat, index: int, problem: Problem, prompt: Prompt, answer: Generation) -> dict[str, Any]:
    return {
        "index": index,
        "language": prompt.language,
        "response_language": prompt.response_language,
        "question": problem.question,
        "prompt": chat.decode(prompt.ids),
        "output": answer.text,
        "gold": problem.gold,
        "tokens": len(answer.token_ids),
        "finished": answer.finished,
        "shifted": answer.shifted,
    }


def _scored(row: dict[str, Any], language: str) -> dict[str, Any]:
    """The row with what every rule extracts from its output, and whether that is correct."""
    written = row.get("response_language") or language
    found = {name: rule.extract(row["output"], written) for name, rule in RULES.items()}
    return {
        **row,
        "extracted": {name: None if value is None else str(value) for name, value in found.items()},
        "correct": {name: rule.is_correct(found[name], row["gold"]) for name, rule in RULES.items()},
    }


def _score(rows: Sequence[Mapping[str, Any]], available: int) -> dict[str, Any]:
    """One language's scores on `n` of the `available` problems, `partial` if there are more; shares of 1.

    `shifted`: every answer was shifted. None: the predictions do not contain it.
    """
    n = len(rows)

    def column(key: str) -> list[Any] | None:
        return [row[key] for row in rows] if all(key in row for row in rows) else None

    accuracy = {}
    for rule in RULES:
        correct = sum(row["correct"][rule] for row in rows)
        low, high = wilson_interval(correct, n)
        accuracy[rule] = {"correct": correct, "value": correct / n, "low": low, "high": high}
    finished, shifted, tokens, prompts = (column(key) for key in ("finished", "shifted", "tokens", "prompt"))
    return {
        "n": n,
        "available": available,
        "partial": n < available,
        "accuracy": accuracy,
        "no_number": {rule: sum(row["extracted"][rule] is None for row in rows) / n for rule in RULES},
        "unfinished": None if finished is None else finished.count(False) / n,
        "shifted": None if shifted is None else all(shifted),
        "mean_tokens": None if tokens is None else sum(tokens) / n,
        "prompts_sha256": None if prompts is None else sha256("\0".join(prompts).encode()).hexdigest(),
    }


def _summary(
    scores: Mapping[str, Mapping[str, Any]], dominant: str | None, missing: Mapping[str, str]
) -> dict[str, Any]:
    """Scores by language, and their unweighted means over languages by rule.

    `missing`: languages of the data without scores, with the reason. `partial`: the means that lack a language or some
    of its problems.
    """
    averaged: dict[str, Sequence[str]] = {"all": list(scores)}
    if dominant in scores and len(scores) > 1:
        averaged[f"without_{dominant}"] = [language for language in scores if language != dominant]
    if set(PUBLISHED_LANGUAGES) < set(scores):
        averaged["published_ten"] = PUBLISHED_LANGUAGES
    averages = {
        name: {rule: fmean(scores[language]["accuracy"][rule]["value"] for language in languages) for rule in RULES}
        for name, languages in averaged.items()
    }
    return {
        "headline": HEADLINE,
        "languages": dict(scores),
        "averages": averages,
        "missing": {language: missing[language] for language in sorted(missing)},
        "partial": [
            name
            for name, languages in averaged.items()
            if any(scores[language]["partial"] for language in languages) or (missing and name != "published_ten")
        ],
    }
