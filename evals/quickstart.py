"""`crosslift quickstart`: the protocol of ShifCon at toy scale (docs/methods.md, section 1.5).

Generates a parallel corpus, trains an English-dominant base model, fine-tunes it on all languages (MSFT), and continues
from the MSFT model twice with equal steps and label tokens: by MSFT, and by ShifCon. All four models answer held-out
problems. `verdict` says what the numbers allow to say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline import console
from data_pipeline.atomic import write_text
from data_pipeline.toy_problems.corpus import LANGUAGES, CorpusSizes, write_corpus
from evals.errors import EvalError
from evals.mgsm.mgsm import MgsmSettings, evaluate_mgsm, find_files, read_predictions, read_problems
from evals.mgsm.numbers import HEADLINE
from evals.mgsm.report import track_results
from evals.opening import open_model
from evals.statistics import Accuracy, clustered_mean, wilson_interval
from training.start import train_to_end

SOURCE = Path(__file__).resolve().parents[1]
DOMINANT = "en"
OTHERS = tuple(language for language in LANGUAGES if language != DOMINANT)
# Run folder: column of the table.
MODELS = {"base": "base", "msft": "MSFT", "msft-continued": "MSFT continued", "shifcon": "ShifCon"}
TESTS = {"test_seen": "known situations, new numbers", "test_unseen": "situations never seen in training"}
LEAST_ENGLISH, LEAST_GAP = 0.50, 0.10  # below these there is no dominance that a method could use
ANSWER_TOKENS = 40
RANKS = 2
BATCH = 100  # answers generated together
PROBLEMS = 50  # of each test and language

Correct = dict[str, list[bool]]  # by language, in the order of the items


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be said of ShifCon against continued MSFT on one test, over all languages but English."""

    english: float
    gap: float  # English minus the mean of the others, both of the base model
    difference: float
    low: float
    high: float
    text: str


def run_quickstart(output: Path, seed: int) -> dict[str, Any]:
    """Everything from corpus to table, printed as it goes. A second call resumes where the first stopped."""
    import torch

    started = time.monotonic()
    data = output / "data"
    _say(f"1/6  parallel word problems in {len(LANGUAGES)} languages: {data}")
    write_corpus(data, CorpusSizes(test_seen=PROBLEMS, test_unseen=PROBLEMS), seed)
    _say("2/6  tokenizer and an English-dominant toy Llama, from scratch")
    _train("quickstart-base", output / "base", data, seed)
    _say("3/6  plain SFT on all languages (MSFT), ZeRO-3 on 2 ranks")
    _train("quickstart-msft", output / "msft", data, seed, start=output / "base" / "model")
    _say("4/6  from the MSFT model, MSFT continued")
    _train("quickstart-msft", output / "msft-continued", data, seed + 1, start=output / "msft" / "model")
    _say("5/6  from the MSFT model, ShifCon: same steps, same order, same label tokens")
    _train("quickstart-shifcon", output / "shifcon", data, seed + 1, start=output / "msft" / "model")
    _say(f"6/6  all {len(MODELS)} answer held-out problems")
    torch.set_num_threads(1)  # models this small answer no faster with more, and much slower on busy cores
    correct = {test: {model: _answers(output, model, test) for model in MODELS} for test in TESTS}
    verdicts = {
        test: verdict(answers["base"], answers["msft-continued"], answers["shifcon"])
        for test, answers in correct.items()
    }
    for test, title in TESTS.items():
        items = len(correct[test]["base"][DOMINANT])
        print(f"\nAccuracy on {title} ({items} problems a language, 95 % intervals)\n")
        print(table(correct[test]))
        print(f"\n{verdicts[test].text}")
    minutes = (time.monotonic() - started) / 60
    results = {"seed": seed, "minutes": minutes, **{test: asdict(each) for test, each in verdicts.items()}}
    write_text(output / "quickstart.json", json.dumps(results, indent=1))
    print(f"\n{minutes:.1f} minutes. Every answer: {output}/scores. The {len(MODELS)} runs in MLflow: {output}")
    print(f"Open its page:  crosslift ui {output}")
    return results


def verdict(base: Correct, continued: Correct, shifcon: Correct) -> Verdict:
    """What was measured, in words: no claim without a dominance gap, no gain unless the interval is above zero."""
    english = sum(base[DOMINANT]) / len(base[DOMINANT])
    others = sum(sum(base[language]) for language in OTHERS) / sum(len(base[language]) for language in OTHERS)
    gap = english - others
    difference, low, high = clustered_mean(
        [
            [float(shifcon[language][item]) - float(continued[language][item]) for language in OTHERS]
            for item in range(len(base[DOMINANT]))
        ]
    )
    measured = f"ShifCon minus MSFT continued over the {len(OTHERS)} other languages: {_points(difference, low, high)}."
    if english < LEAST_ENGLISH:
        text = f"No claim is possible: base English is {english:.0%}, below {LEAST_ENGLISH:.0%}. {measured}"
    elif gap < LEAST_GAP:
        text = (
            f"No claim is possible: base English is only {100 * gap:.0f} points above the others' mean, "
            f"and a dominance gap needs {100 * LEAST_GAP:.0f}. {measured}"
        )
    elif low > 0:
        text = f"ShifCon gained: {measured} Toy scale, one seed: it shows the machinery, not the method's worth."
    elif high < 0:
        text = f"ShifCon lost here: {measured}"
    else:
        text = f"No gain shown: {measured} The interval holds zero."
    return Verdict(english, gap, difference, low, high, text)


def table(correct: Mapping[str, Correct]) -> str:
    """Language by model, each with its interval; the last row is the mean without English."""
    rows = [(language, [_accuracy(correct[model][language]) for model in MODELS]) for language in LANGUAGES]
    rows.append((f"mean but {DOMINANT}", [_mean(correct[model]) for model in MODELS]))
    header = ["language", *MODELS.values()]
    return console.table(header, [(name, *cells) for name, cells in rows], text=range(len(header)))


def _train(config: str, output: Path, data: Path, seed: int, start: Path | None = None) -> None:
    """`crosslift train` as a user would call it."""
    overrides = [f"data_dir={data}", f"output_dir={output}", f"seed={seed}"]
    if start is not None:
        overrides.append(f"model.path={start}")
    file = SOURCE / "configs" / f"{config}.yaml"
    print(f"     crosslift train {file} {' '.join(overrides)} --nproc {RANKS}", flush=True)
    train_to_end(file, overrides, RANKS)


def _answers(output: Path, model: str, test: str) -> Correct:
    """Right or wrong by language and item, generated unless it was already; `track` takes the scores."""
    data, scores = output / "data" / f"mgsm_{test}", output / "scores" / model / test
    generator, chat = open_model(str(output / model / "model"))
    settings = MgsmSettings(LANGUAGES, max_new_tokens=ANSWER_TOKENS, batch_size=BATCH)
    track_results(evaluate_mgsm(generator, chat, data, scores, settings), scores, test)
    correct: Correct = {}
    for language, file in find_files(data, ".tsv", LANGUAGES).items():
        predictions = scores / "predictions" / f"mgsm_{language}.jsonl"
        problems = read_problems(file)
        rows = read_predictions(predictions, language, problems)
        if len(rows) < len(problems):  # the models are compared item by item, so all of them or none
            what = f"holds {len(rows)} of {len(problems)} answers"
            raise EvalError(f"{predictions}: {what}; delete {scores} and call quickstart again")
        correct[language] = [row["correct"][HEADLINE] for row in rows]
    return correct


def _accuracy(correct: Sequence[bool]) -> Accuracy:
    return Accuracy(sum(correct) / len(correct), *wilson_interval(sum(correct), len(correct)))


def _mean(correct: Correct) -> Accuracy:
    items = range(len(correct[DOMINANT]))
    return Accuracy(*clustered_mean([[float(correct[language][item]) for language in OTHERS] for item in items]))


def _points(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _say(text: str) -> None:
    print(text, flush=True)
