"""Zero-shot transfer, translate-train and X-Mixup on a small generated task, five seeds each.

    python -m benchmarks.mixup_toy [--json FILE]

The task (`data_pipeline/toy_problems/labelled.py`) is to classify word problems in ten languages into seven kinds. One
encoder is trained from scratch by masked language modelling, mostly on English. Every method is fine-tuned from it with
each seed, for the same number of steps and samples (X-Mixup also reads each sample's source). The seed sets the initial
weights of the head, the order of samples and which sources are back-translations. The last checkpoint is used.

Intervals are over seeds (Student's t), and methods are compared seed by seed: they show how much the numbers vary with
the seed, for this data set and this encoder. X-Mixup predicts twice: from a test text alone, and mixed with its
translation into English (`back_text_a`). A second call resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ranks import SOURCE, machine
from data_pipeline.tasks.rows import read_task_file
from data_pipeline.toy_problems.corpus import LANGUAGES
from data_pipeline.toy_problems.labelled import DOMINANT, LABELS, LabelledSizes, write_labelled_task
from evals.statistics import clustered_mean
from evals.xtreme.predict import EncoderPredictor, MixupMode

SEEDS = (1, 2, 3, 4, 5)
TESTS = {"test_seen": "known situations, new wording and numbers", "test_unseen": "unknown situations"}
OTHERS = [language for language in LANGUAGES if language != DOMINANT]
SIZES = LabelledSizes(n_train=560, n_dev=70, n_test_seen=210, n_test_unseen=210)
XMIXUP: dict[str, Any] = {"name": "xmixup", "layer": 2, "alpha": 0.4, "source_schedule": 40}
# method -> languages of the training rows, objective, mixing modes of the prediction
METHODS: dict[str, tuple[Sequence[str], dict[str, Any], MixupMode]] = {
    "zero-shot": ([DOMINANT], {"name": "finetune"}, "off"),
    "translate-train": (LANGUAGES, {"name": "finetune"}, "off"),
    "X-Mixup, text alone": (LANGUAGES, XMIXUP, "off"),
    "X-Mixup, mixed": (LANGUAGES, XMIXUP, "on"),
}

Scores = dict[str, dict[str, float]]  # test -> language -> accuracy, per cent


def encoder_values(output: Path) -> dict[str, Any]:
    """`configs/encoder-mlm.yaml`, scaled to the toy problems."""
    values: dict[str, Any] = yaml.safe_load((SOURCE / "configs" / "encoder-mlm.yaml").read_text(encoding="utf-8"))
    values |= {"data_dir": str((output / "data" / "text").resolve()), "output_dir": str((output / "encoder").resolve())}
    values["tokenizer"]["train"] |= {"vocab_size": 3000, "character_coverage": 1.0}
    values["data"]["mixture"] = {"strategy": "proportional"}
    return values | {"max_steps": 800}


def run_values(output: Path, method: str, seed: int) -> dict[str, Any]:
    """The run file of one method with one seed."""
    languages, objective, _ = METHODS[method]
    columns = {name: name for name in ("id", "group", "language", "text_a", "label")}
    if objective["name"] == "xmixup":
        columns["back_text_a"] = "back_text_a"
    return {
        "data_dir": str((output / "data" / "train").resolve()),
        "output_dir": str((run_folder(output, method, seed)).resolve()),
        "seed": seed,
        "max_steps": 300,
        "model": {"path": str((output / "encoder" / "model").resolve())},
        "data": {
            "languages": list(languages), "dominant": DOMINANT,
            "task": {"kind": "classification", "labels": list(LABELS)},
            "sources": [{"name": "toy", "files": [f"{each}.jsonl" for each in languages], "columns": columns}],
            "mixture": {"strategy": "proportional"},
            "slots_per_step": 32, "sequence_length": 96, "micro_batch_tokens": 8192, "workers": 1,
        },
        "objective": objective,
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"name": "linear", "warmup_ratio": 0.1},
        "precision": "fp32", "zero_stage": 1, "checkpoint": {"every": 300, "keep": 1}, "tracking": {"enabled": False},
    }  # fmt: skip


def run_folder(output: Path, method: str, seed: int) -> Path:
    return output / "runs" / f"{method.split(',')[0].lower()}-{seed}"


def train(values: Mapping[str, Any], nproc: int) -> None:
    """Run `crosslift train` on a run file beside the run folder, unless its export exists."""
    folder = Path(values["output_dir"])
    if (folder / "model").is_dir():
        return
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, str(SOURCE / "crosslift.py"), "train", str(file), "--nproc", str(nproc)]
    with folder.with_suffix(".log").open("ab") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)


def accuracies(model: Path, data: Path, mixup: MixupMode) -> Scores:
    """Accuracies by test and language; English, which has no translation, is predicted unmixed."""
    predictor = EncoderPredictor.open(model)
    found: Scores = {}
    for test in TESTS:
        for language in LANGUAGES:
            records = list(read_task_file(data / test / f"{language}.jsonl", "classification"))
            answers = predictor.predict(records, "auto" if mixup == "on" and language == DOMINANT else mixup).values
            correct = sum(answer == record.example.label for answer, record in zip(answers, records, strict=True))
            found.setdefault(test, {})[language] = 100 * correct / len(records)
    return found


def mean_of_others(scores: Mapping[str, float]) -> float:
    return sum(scores[language] for language in OTHERS) / len(OTHERS)


def summaries(by_seed: Mapping[str, Sequence[Scores]], test: str) -> dict[str, Any]:
    """English, the others' mean, their gap, and the difference to each baseline: (mean, low, high) each."""

    def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
        return clustered_mean([[value] for value in values])

    others = {method: [mean_of_others(scores[test]) for scores in seeds] for method, seeds in by_seed.items()}
    english = {method: [scores[test][DOMINANT] for scores in seeds] for method, seeds in by_seed.items()}
    summary: dict[str, Any] = {}
    for method in by_seed:
        gaps = [one - other for one, other in zip(english[method], others[method], strict=True)]
        summary[method] = {
            "english": over_seeds(english[method]), "others": over_seeds(others[method]), "gap": over_seeds(gaps),
            "others minus": {
                base: over_seeds([one - other for one, other in zip(others[method], others[base], strict=True)])
                for base in ("zero-shot", "translate-train") if base != method
            },
        }  # fmt: skip
    return summary


def shown(value: Sequence[float], signed: bool = False) -> str:
    mean, low, high = value
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" if signed else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def table(summary: Mapping[str, Any], title: str) -> str:
    """One test as Markdown."""
    lines = [f"{title}; chance {100 / len(LABELS):.1f} %", ""]
    lines += ["| method | English | mean of 9 others | gap | others, minus translate-train |", "|---|---|---|---|---|"]
    for method, found in summary.items():
        more = found["others minus"].get("translate-train")
        cells = [method, shown(found["english"]), shown(found["others"]), shown(found["gap"], signed=True)]
        lines.append(f"| {' | '.join([*cells, shown(more, signed=True) if more else '-'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("runs/mixup-toy"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--nproc", type=int, default=2)
    arguments = parser.parse_args()
    output = arguments.output
    if not (output / "data").is_dir():
        output.mkdir(parents=True, exist_ok=True)
        write_labelled_task(output / "data", SIZES, seed=0)
    train(encoder_values(output), arguments.nproc)
    by_seed: dict[str, list[Scores]] = {}
    for seed in SEEDS:
        for method, (_, _, mixup) in METHODS.items():
            train(run_values(output, method, seed), arguments.nproc)
            scores = accuracies(run_folder(output, method, seed) / "model", output / "data", mixup)
            by_seed.setdefault(method, []).append(scores)
            means = ", ".join(f"{test} {mean_of_others(scores[test]):.1f}" for test in TESTS)
            print(f"seed {seed}, {method}: others' mean {means}", file=sys.stderr, flush=True)
    found = {test: summaries(by_seed, test) for test in TESTS}
    print("\n\n".join(table(found[test], title) for test, title in TESTS.items()))
    if arguments.json is not None:
        content = {"machine": machine(arguments.nproc), "seeds": SEEDS, "summary": found, "accuracies": by_seed}
        arguments.json.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
