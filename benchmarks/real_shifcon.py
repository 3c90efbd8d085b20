"""ShifCon on a pretrained model: topics of SIB-200 as generated answers, in English and eleven weak languages.

    python -m benchmarks.real_shifcon --models DIR --data DIR --output runs/real-shifcon --results DIR

DIR of `--models` holds `gemma-3-270m` (a Hugging Face folder; its vocabulary is cut to the data's tokens first), DIR of
`--data` holds `sib200/` and `ntrex/`. The protocol is that of docs/methods.md, section 1.5:

    base -> MSFT -> { MSFT continued, ShifCon, align }        equal steps, equal label tokens, same order of samples

1. Choices, on dev data and seed 0: learning rate and steps of MSFT; then, from that model, weights of ShifCon's and of
   align's contrastive loss. The layer area is chosen by `layers: auto`, once.
2. Main: five seeds of each, read on the test data once.
3. Ablations, three seeds: shift alone, contrast alone, raw states, random vectors, and the two runner-up areas.

A run's result is one file in `--results`, and a run that has one is skipped: the benchmark goes on after an
interruption, also on another machine, where models that others start from are trained again. `--until` ends after a
part. Everything is in fp32: a CPU without instructions for bf16 was 40 times slower in it. Regimes: `scarce` has all
701 English items and 70 of each other language; `full` has 701 of each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cut_vocabulary import cut_vocabulary
from benchmarks.ranks import SOURCE, machine
from data_pipeline.atomic import write_text
from data_pipeline.records import stable_hash
from data_pipeline.yaml_values import write_yaml
from training.tracking.run_record import read_events

# language: its name in SIB-200 and in NTREX (None: not there)
LANGUAGES: dict[str, tuple[str, str | None]] = {
    "en": ("eng_Latn", "eng"), "sw": ("swh_Latn", "swa"), "yo": ("yor_Latn", "yor"), "ha": ("hau_Latn", "hau"),
    "zu": ("zul_Latn", "zul"), "ig": ("ibo_Latn", "ibo"), "am": ("amh_Ethi", "amh"), "km": ("khm_Khmr", "khm"),
    "my": ("mya_Mymr", "mya"), "si": ("sin_Sinh", None), "bn": ("ben_Beng", "ben"), "th": ("tha_Thai", "tha"),
}  # fmt: skip
FEW = 70  # items of each other language in the scarce regime
NTREX_LINES = 512
PARTS = ("choices", "main", "ablations")
RATES, STEPS = (3e-5, 1e-4), (45, 90)
WEIGHTS, ALIGN_WEIGHTS = (0.05, 0.2, 0.8), (0.2, 0.8)
SCALE, SET_SIZE, PROBE_ITEMS = 10.0, 16, 32
CONTINUED = 100  # added to the seed of a run that continues MSFT: another order of the same samples
MAIN_SEEDS, ABLATION_SEEDS = range(5), range(3)
ANSWER_TOKENS = 8
PROMPT = "{user}\nTopic:"


@dataclass(frozen=True, slots=True)
class Training:
    """One training run and what it starts from."""

    name: str  # of its folder
    start: Training | None  # the run whose model it starts from; None: the pretrained model
    seed: int
    steps: int
    rate: float
    objective: Mapping[str, Any]
    regime: str = "scarce"


class Benchmark:
    """The folder of all runs."""

    def __init__(self, models: Path, data: Path, output: Path, results: Path) -> None:
        self.models, self.data, self.output, self.results = models, data, output.resolve(), results
        for folder in (output, results):
            folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Rows of every regime and the cut model, once."""
        for regime in ("scarce", "full"):
            folder = self.output / "rows" / regime
            folder.mkdir(parents=True, exist_ok=True)
            for language in LANGUAGES:
                rows = self.items(language, "train")
                if regime == "scarce" and language != "en":
                    rows = sorted(rows, key=lambda row: stable_hash("scarce", row["id"]))[:FEW]
                write_text(folder / f"{language}.jsonl", "".join(_line(row) for row in rows))
        if not self.base.exists():
            part = self.output / "base.part"
            subprocess.run(["rm", "-rf", str(part)], check=True)
            number = cut_vocabulary(self.models / "gemma-3-270m", self._texts(), part)
            print(f"vocabulary cut to {number} tokens", flush=True)
            part.rename(self.base)

    @property
    def base(self) -> Path:
        """The model that all runs start from."""
        return self.output / "base"

    def items(self, language: str, split: str) -> list[dict[str, str]]:
        """The rows of SIB-200: the text is the prompt, the English name of its topic the answer."""
        lines = (self.data / "sib200" / LANGUAGES[language][0] / f"{split}.tsv").read_text(encoding="utf-8")
        cells = [line.split("\t") for line in lines.splitlines()[1:]]
        return [{"id": number, "question": text, "answer": topic} for number, topic, text in cells]

    def sentences(self) -> dict[str, list[str]]:
        """The first lines of NTREX, translations of each other line by line."""
        names = {language: ntrex for language, (_, ntrex) in LANGUAGES.items() if ntrex is not None}
        files = {language: self.data / "ntrex" / f"{name}.txt" for language, name in names.items()}
        return {each: file.read_text(encoding="utf-8").splitlines()[:NTREX_LINES] for each, file in files.items()}

    def _texts(self) -> Iterator[str]:
        """All texts that the model reads, also within the prompt."""
        for language in LANGUAGES:
            for split in ("train", "dev", "test"):
                for row in self.items(language, split):
                    yield from (
                        row["question"],
                        row["answer"],
                        PROMPT.format(user=row["question"]) + row["answer"],
                    )
        for lines in self.sentences().values():
            yield from lines

    def train(self, run: Training) -> Path:
        """Trains a run to its end, after the one that it starts from; its folder."""
        folder = self.output / run.name
        if (folder / "done.json").exists():
            return folder
        model = self.base if run.start is None else self.train(run.start) / "model"
        file = self.output / f"{run.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, write_yaml(self._values(run, folder, model)))
        print(f"--- train {run.name}", flush=True)
        began = time.perf_counter()
        subprocess.run([sys.executable, str(SOURCE / "crosslift.py"), "train", str(file), "--nproc", "1"], check=True)
        write_text(folder / "done.json", json.dumps({"seconds": time.perf_counter() - began}))
        return folder

    def _values(self, run: Training, folder: Path, model: Path) -> dict[str, Any]:
        columns = {"id": "id", "prompt": "question", "completion": "answer"}
        return {
            "data_dir": str(self.output / "rows" / run.regime),
            "output_dir": str(folder),
            "seed": run.seed,
            "max_steps": run.steps,
            "model": {"path": str(model)},
            "data": {
                "languages": list(LANGUAGES),
                "dominant": "en",
                "sources": [
                    {
                        "name": each, "files": f"{each}.jsonl", "language": each, "response_language": "en",
                        "columns": columns,
                    }
                    for each in LANGUAGES
                ],
                "template": {"name": "custom", "prompt": PROMPT},
                "mixture": {"strategy": "proportional", "pairing": "reuse"},
                "slots_per_step": 48,
                "sequence_length": 320,
                "overlong": "truncate",
                "micro_batch_tokens": 4096,
            },
            "objective": dict(run.objective),
            "optimizer": {"learning_rate": run.rate, "betas": [0.9, 0.95]},
            "schedule": {"name": "cosine", "warmup_ratio": 0.1},
            "precision": "fp32",
            "checkpoint": {"every": 15, "keep": 1},
            "tracking": {"log_every": 5},
        }  # fmt: skip

    def score(self, run: Training, split: str) -> dict[str, list[int]]:
        """By language, whether each item was answered right; trained, answered and written once."""
        file = self.results / f"{run.name.replace('/', '-').replace(' ', '-')}-{split}.json"
        if not file.exists():
            folder = self.train(run)
            print(f"--- answer {run.name} on {split}", flush=True)
            answers = self._answers(folder / "model", split)
            write_text(folder / f"{split}.json", json.dumps(answers, ensure_ascii=False))
            found = {
                "run": run.name, "split": split, "seed": run.seed, "steps": run.steps, "rate": run.rate,
                "objective": run.objective, "regime": run.regime,
                "seconds": json.loads((folder / "done.json").read_text())["seconds"],
                "last": self._last_metrics(folder),
                "right": {language: "".join(str(row["right"]) for row in rows) for language, rows in answers.items()},
                "machine": machine(1),
            }  # fmt: skip
            write_text(file, json.dumps(found, indent=1) + "\n")
        right = json.loads(file.read_text(encoding="utf-8"))["right"]
        scores = {language: [int(each) for each in bits] for language, bits in right.items()}
        print(f"    {run.name} on {split}: weak {weak_mean(scores):.2f}, English {english(scores):.1f}", flush=True)
        return scores

    def _last_metrics(self, folder: Path) -> dict[str, float]:
        """The metrics of the run's last logged step, and those of the shift."""
        values: dict[str, float] = {}
        for _, event in read_events(folder / "record.jsonl"):
            if event["kind"] == "metrics":
                values.update(event["values"])
        return {name: value for name, value in values.items() if name.startswith(("train/", "shift/", "memory/"))}

    def _answers(self, model: Path, split: str) -> dict[str, list[dict[str, Any]]]:
        from evals.opening import Question, answer, open_model

        generator, chat = open_model(str(model), dtype="fp32")
        found = {}
        for language in LANGUAGES:
            rows = self.items(language, split)
            questions = [Question(row["question"], language, "en") for row in rows]
            outputs = answer(generator, chat, questions, max_new_tokens=ANSWER_TOKENS, batch_size=32)
            found[language] = [
                {
                    "id": row["id"],
                    "output": output["output"],
                    "right": int(output["output"].strip().lower() == row["answer"].lower()),
                }
                for row, output in zip(rows, outputs, strict=True)
            ]
        return found


def _line(row: Mapping[str, str]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def weak_mean(scores: Mapping[str, Sequence[int]]) -> float:
    """Mean accuracy over the weak languages, in per cent."""
    weak = [100 * sum(right) / len(right) for language, right in scores.items() if language != "en"]
    return sum(weak) / len(weak)


def english(scores: Mapping[str, Sequence[int]]) -> float:
    """Accuracy in English, in per cent."""
    return 100 * sum(scores["en"]) / len(scores["en"])


def shifcon(weight: float, layers: Any, **changes: Any) -> dict[str, Any]:
    """The objective of a ShifCon run."""
    contrastive = {"weight": weight, "scale": SCALE, "set_size": SET_SIZE, **changes.pop("contrastive", {})}
    return {"name": "shifcon", "layers": layers, "probe_items": PROBE_ITEMS, "contrastive": contrastive, **changes}


def align(weight: float, layer: int) -> dict[str, Any]:
    """The objective of an align run."""
    contrastive = {"weight": weight, "scale": SCALE, "set_size": SET_SIZE}
    return {"name": "align", "layer": layer, "probe_items": PROBE_ITEMS, "contrastive": contrastive}


def choices(bench: Benchmark) -> dict[str, Any]:
    """What is chosen on dev data; written once."""
    file = bench.results / "choices.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def value(run: Training) -> float:
        return weak_mean(bench.score(run, "dev"))

    def msft_run(rate: float, steps: int) -> Training:
        return Training(f"choices/msft-{rate:g}-{steps}", None, 0, steps, rate, {"name": "sft"})

    rate = max(RATES, key=lambda each: value(msft_run(each, STEPS[0])))
    msft = max((msft_run(rate, steps) for steps in STEPS), key=value)
    then = replace(msft, start=msft, seed=msft.seed + CONTINUED)
    value(replace(then, name="choices/continued"))
    area_file = bench.results / "layer_area.json"
    if not area_file.exists():
        first = replace(then, name="choices/area", steps=1, objective=shifcon(WEIGHTS[0], "auto"))
        found = json.loads((bench.train(first) / "layer_area.json").read_text(encoding="utf-8"))
        write_text(area_file, json.dumps({**found, "inputs": None}, indent=1) + "\n")
    area = json.loads(area_file.read_text(encoding="utf-8"))
    layer = sum(area["area"]) // 2
    of_shifcon = {
        each: replace(then, name=f"choices/shifcon-{each:g}", objective=shifcon(each, area["area"])) for each in WEIGHTS
    }
    of_align = {
        each: replace(then, name=f"choices/align-{each:g}", objective=align(each, layer)) for each in ALIGN_WEIGHTS
    }
    found = {
        "rate": msft.rate, "steps": msft.steps, "area": area["area"], "runners_up": area["runners_up"],
        "weight": max(of_shifcon, key=lambda each: value(of_shifcon[each])),
        "align_weight": max(of_align, key=lambda each: value(of_align[each])), "align_layer": layer,
    }  # fmt: skip
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found


def methods(chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The continuations of MSFT by name."""
    return {
        "MSFT continued": {"name": "sft"},
        "ShifCon": shifcon(chosen["weight"], chosen["area"]),
        "align": align(chosen["align_weight"], chosen["align_layer"]),
    }


def ablations(chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Variants of ShifCon by name."""
    weight, area = chosen["weight"], chosen["area"]
    return {
        "shift alone": shifcon(0.0, area),
        "contrast alone": shifcon(weight, area, shift=False),
        "raw states": shifcon(weight, area, contrastive={"normalise": "none"}),
        "random vectors": shifcon(weight, area, random_vectors=True),
        **{f"area {toward}-{back}": shifcon(weight, [toward, back]) for toward, back in chosen["runners_up"]},
    }


def run_all(
    bench: Benchmark, chosen: Mapping[str, Any], names: Mapping[str, dict[str, Any]], seeds: Sequence[int]
) -> None:
    """MSFT and its continuations on the test data, seed by seed."""
    for seed in seeds:
        msft = Training(f"seed-{seed}/MSFT", None, seed, chosen["steps"], chosen["rate"], {"name": "sft"})
        bench.score(msft, "test")
        for name, objective in names.items():
            bench.score(
                replace(msft, name=f"seed-{seed}/{name}", start=msft, objective=objective, seed=seed + CONTINUED),
                "test",
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_shifcon", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/real-shifcon"))
    parser.add_argument("--results", type=Path, required=True, help="folder of the results, one file a run")
    parser.add_argument("--until", choices=PARTS, default=PARTS[-1], help="the last part that is run")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    bench = Benchmark(options.models, options.data, options.output, options.results)
    bench.prepare()
    chosen = choices(bench)
    if options.until != "choices":
        run_all(bench, chosen, methods(chosen), MAIN_SEEDS)
    if options.until == "ablations":
        run_all(bench, chosen, ablations(chosen), ABLATION_SEEDS)


if __name__ == "__main__":
    main()
