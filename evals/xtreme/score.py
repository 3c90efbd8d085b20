"""Score a folder of XTREME predictions against a folder of gold labels: all scores and averages of its own scorer.

Files are `{task}/test-{language}.tsv` (`.json` for question answering) in both folders; scores are 0 to 100.

Numbers on complete, well-formed input equal those of XTREME's `evaluate.py` (github.com/google-research/xtreme) with
the seqeval 0.0.12 that it was published with. Faulty input that this script accepts is an error here: missing questions
(which score 0 there) or unknown ones, sentences of other lengths, labels outside the task's set, erased gold labels.
Incomplete input is scored and marked: `missing`, `partial`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.console import table
from data_pipeline.xtreme.tasks import TASKS, XtremeTask, xtreme_task
from evals.errors import EvalError
from evals.results import by_reason
from evals.xtreme.label_files import (
    TaggedSentence,
    read_answers,
    read_indices,
    read_labels,
    read_pairs,
    read_questions,
    read_tags,
)
from evals.xtreme.metrics import accuracy, answer_scores, mlqa_words, set_f1, squad_words, tagging_scores

ALL_TASKS = "all_task"  # its name in XTREME's scorer
# The order in which XTREME's scorer sums over languages, if not alphabetical: another order may change the last binary
# digit and so, at a tie, a printed one.
_NER_ORDER = (
    "ar he vi id jv ms tl eu ml ta te af nl en de el bn hi mr ur fa fr it pt es bg ru ja ka ko th sw yo my zh kk tr et"
    " fi hu"
)
_SUMMATION_ORDER = {
    "panx": _NER_ORDER,
    "tatoeba": _NER_ORDER,
    "xquad": "en es de el ru tr ar vi th zh hi",
    "mlqa": "en es de ar hi vi zh",
    "tydiqa": "en ar bn fi id ko ru sw te",
}


@dataclass(frozen=True, slots=True)
class TaskScores:
    """One task: metrics by language, their unweighted means over languages, and the task's score, 0 to 100.

    `missing`: each language of the task without a score, with the reason. The means are then partial.
    """

    languages: dict[str, dict[str, float]]
    average: dict[str, float]
    score: float
    missing: dict[str, str]

    @property
    def partial(self) -> bool:
        """Whether a language of the task is missing."""
        return bool(self.missing)


@dataclass(frozen=True, slots=True)
class XtremeScores:
    """Scores of tasks, means over a group's tasks, and over all. `missing`: tasks of XTREME without scores.

    `partial`: the groups, and possibly "all_task", whose mean lacks a task or a task's language; XTREME's scorer prints
    no such mean.
    """

    tasks: dict[str, TaskScores]
    groups: dict[str, float]
    all_task: float
    missing: tuple[str, ...]
    partial: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data: what `results.json` holds."""
        values = asdict(self)
        for name, task in self.tasks.items():
            values["tasks"][name]["partial"] = task.partial
        return values | {"missing": list(self.missing), "partial": list(self.partial)}


def score_directory(
    predictions: Path, labels: Path, tasks: Sequence[str] | None = None, languages: Sequence[str] | None = None
) -> XtremeScores:
    """Score every task that has predictions, or only `tasks` and `languages`.

    A language without predictions or labels is left out and named; a task requested by name must have at least one.
    Raises EvalError with file and line, DataError for an unknown task name.
    """
    for folder in (predictions, labels):
        if not folder.is_dir():
            raise EvalError(f"{folder}: no such folder; it holds a folder for each task, such as xnli")
    chosen = [xtreme_task(name) for name in dict.fromkeys(tasks or TASKS)]
    known = {language for task in chosen for language in task.languages}
    for language in languages or ():
        if language not in known:
            raise EvalError(f"no task has language {language!r}; there are {', '.join(sorted(known))}")
    scores = {task.name: _score_task(task, predictions, labels, languages) for task in chosen}
    for name, task in scores.items():
        if tasks and not task.languages:
            raise EvalError(f"{predictions / name}: nothing to score: {by_reason(task.missing)}")
    found = {name: scores[name] for name in TASKS if name in scores and scores[name].languages}
    if not found:
        raise EvalError(f"{predictions}: no predictions with labels in {labels}; a file is xnli/test-de.tsv")
    return _totals(found)


def score_file(task: str, language: str, prediction_path: Path, label_path: Path) -> dict[str, float]:
    """One language's metrics, 0 to 100: those of XTREME's scorer, for taggers also those of `tagging_scores`.

    Raises EvalError with file and line, DataError for an unknown task name.
    """
    kind = xtreme_task(task)
    if language not in kind.languages:
        raise EvalError(f"{task} has no language {language!r}; it has {', '.join(kind.languages)}")
    return _SCORERS[kind.kind](kind, language, Path(prediction_path), Path(label_path))


def score_table(scores: XtremeScores) -> str:
    """One line a language, one column a task and, for question answering, EM and F1; then means, groups, notes."""
    columns = [(name, metric) for name in scores.tasks for metric in TASKS[name].metrics]
    heads = [f"{name} {_SHORT[metric]}" if len(TASKS[name].metrics) > 1 else name for name, metric in columns]
    used = sorted({language for task in scores.tasks.values() for language in task.languages})
    rows = []
    for language in used:
        found = [scores.tasks[name].languages.get(language, {}).get(metric) for name, metric in columns]
        rows.append([language, *("-" if value is None else f"{value:.2f}" for value in found)])
    means = [scores.tasks[name].average[metric] for name, metric in columns]
    stars = ["*" * scores.tasks[name].partial for name, _ in columns]
    rows.append(["mean", *(f"{value:.2f}{star}" for value, star in zip(means, stars, strict=True))])
    lines = [table(["", *heads], rows)]
    totals = {**{name: task.score for name, task in scores.tasks.items()}, **scores.groups, ALL_TASKS: scores.all_task}
    partial = {*scores.partial, *(name for name, task in scores.tasks.items() if task.partial)}
    width = max(map(len, totals))
    lines += ["", *(f"{name:{width}}  {value:.2f}{'*' * (name in partial)}" for name, value in totals.items())]
    lines += [f"* {name}: {by_reason(task.missing)}" for name, task in scores.tasks.items() if task.partial]
    if scores.missing:
        lines.append(f"* not scored: {', '.join(scores.missing)}")
    return "\n".join(lines)


_SHORT = {"exact_match": "EM", "f1": "F1"}


def _score_task(task: XtremeTask, predictions: Path, labels: Path, wanted: Sequence[str] | None) -> TaskScores:
    suffix = ".json" if task.kind == "qa" else ".tsv"
    for file in sorted((predictions / task.name).glob("test-*")):
        language = file.stem.removeprefix("test-")
        if file.suffix in (".json", ".tsv") and (file.suffix != suffix or language not in task.languages):
            names = ", ".join(task.languages)
            raise EvalError(f"{file}: {task.name} has files test-XX{suffix} with XX one of {names}")
    scores, missing = {}, {}
    for language in task.languages:
        ours, gold = (folder / task.name / f"test-{language}{suffix}" for folder in (predictions, labels))
        if wanted and language not in wanted:
            missing[language] = "not requested"
        elif not ours.is_file():
            missing[language] = "no predictions"
        elif not gold.is_file():
            missing[language] = "no labels"
        else:
            scores[language] = score_file(task.name, language, ours, gold)
    average = _averages(task, scores) if scores else {}
    score = sum(average[metric] for metric in task.metrics) / len(task.metrics) if scores else 0.0
    return TaskScores(scores, average, score, missing)


def _averages(task: XtremeTask, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    summation_order = _SUMMATION_ORDER.get(task.name, " ".join(task.languages)).split()
    order = [language for language in summation_order if language in scores]
    metrics = scores[order[0]]
    return {metric: sum(scores[language][metric] for language in order) / len(order) for metric in metrics}


def _totals(found: dict[str, TaskScores]) -> XtremeScores:
    members: dict[str, list[str]] = {}
    for task in TASKS.values():
        members.setdefault(task.kind, []).append(task.name)
    groups = {group: [name for name in names if name in found] for group, names in members.items()}
    means = {group: sum(found[name].score for name in names) / len(names) for group, names in groups.items() if names}
    whole = {name for name, task in found.items() if not task.partial}
    partial = [group for group in means if not whole.issuperset(members[group])]
    return XtremeScores(
        tasks=found,
        groups=means,
        all_task=sum(task.score for task in found.values()) / len(found),
        missing=tuple(name for name in TASKS if name not in found),
        partial=tuple(partial if whole.issuperset(TASKS) else [*partial, ALL_TASKS]),
    )


def _classification(task: XtremeTask, language: str, ours: Path, gold: Path) -> dict[str, float]:
    predicted, labels = read_labels(ours, task.labels), read_labels(gold, task.labels, gold=True)
    _same_number(ours, len(predicted), gold, len(labels), "labels")
    return {"accuracy": accuracy(labels, predicted)}


def _tagging(task: XtremeTask, language: str, ours: Path, gold: Path) -> dict[str, float]:
    predicted, labels = read_tags(ours, task.labels), read_tags(gold, task.labels, gold=True)
    for one, other in zip(predicted, labels, strict=False):
        if len(one.tags) != len(other.tags):
            counts = f"{_counts(predicted)}, there {_counts(labels)}"
            raise EvalError(
                f"{ours}:{one.line}: a sentence of {len(one.tags)} tags has {len(other.tags)} in {gold}:{other.line}"
                f" (here {counts}); both files need the same sentences"
            )
    _same_number(ours, len(predicted), gold, len(labels), "sentences")
    return tagging_scores([sentence.tags for sentence in labels], [sentence.tags for sentence in predicted])


def _qa(task: XtremeTask, language: str, ours: Path, gold: Path) -> dict[str, float]:
    predicted, questions = read_answers(ours), read_questions(gold)
    expected = {question for question, _ in questions}
    if left_out := sorted(expected - predicted.keys()):
        what = f"no answer to {len(left_out)} of the {len(expected)} questions in {gold}, such as {left_out[0]!r}"
        raise EvalError(f"{ours}: {what}; one without an answer has the answer ''")
    if unknown := sorted(predicted.keys() - expected):
        raise EvalError(f"{ours}: answers {len(unknown)} questions that are not in {gold}, such as {unknown[0]!r}")
    normalise = mlqa_words(language) if task.name == "mlqa" else squad_words
    return answer_scores(questions, predicted, normalise)


def _retrieval(task: XtremeTask, language: str, ours: Path, gold: Path) -> dict[str, float]:
    if task.name == "bucc2018":
        mined, pairs = read_pairs(ours), read_pairs(gold)
        return set_f1(pairs, mined)
    predicted, labels = read_indices(ours), read_indices(gold)
    _same_number(ours, len(predicted), gold, len(labels), "lines")
    return {"accuracy": accuracy(labels, predicted)}


_SCORERS: dict[str, Callable[[XtremeTask, str, Path, Path], dict[str, float]]] = {
    "classification": _classification,
    "tagging": _tagging,
    "qa": _qa,
    "retrieval": _retrieval,
}


def _counts(sentences: Sequence[TaggedSentence]) -> str:
    return f"{sum(len(sentence.tags) for sentence in sentences)} tags in {len(sentences)} sentences"


def _same_number(ours: Path, n: int, gold: Path, expected: int, what: str) -> None:
    if n != expected:
        raise EvalError(f"{ours}: {n} {what}, but {gold} has {expected}; both files need one for each test item")
