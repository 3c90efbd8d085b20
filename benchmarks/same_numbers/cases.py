"""The compared runs. A case takes a revision, runs commands, and returns its facts: names to values as text.

Values are text so that they compare to the last digit: floats as `repr`, tensors and files as SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.same_numbers import inputs
from benchmarks.same_numbers.revision import Revision, SameNumbersError

Facts = dict[str, str]
MEASURED = re.compile(r"seconds|per_second|gib|^ranks/")  # metrics of the machine, not of the run
PLANNED_RANKS = (1, 2, 8)
PLANNED_STEPS = "0:3"
RANKS = 2
SMALL_LLAMA = f"model={json.dumps({'init': inputs.DECODER})}"
# What a run file of configs/ needs to be planned here: those that start from a model that is not in the repository.
PLANNED: dict[str, list[str]] = {
    "quickstart-base": [],
    "quickstart-msft": [SMALL_LLAMA, "tokenizer.train.vocab_size=900"],
    "quickstart-shifcon": [SMALL_LLAMA, "tokenizer.train.vocab_size=900"],
    "gsm8k-parallel": ["tokenizer.train.vocab_size=900", "data.heldout_items=20"],
    "llama-8b-shifcon": [SMALL_LLAMA, "tokenizer.train.vocab_size=900", "data.heldout_items=20"],
    "encoder-mlm": ["tokenizer.train.vocab_size=900"],
}
NOT_RUN_FILES = ("xtreme", "slurm-site.example")  # XTREME's are composed by `xtreme run`, and planned in its cases
XTREME_METHODS = {"finetune": "translate-train", "xmixup": "x-mixup"}
XTREME_SETTINGS = (
    "precision=fp32", "zero_stage=3", "epochs=3", "checkpoints=2", "data.slots_per_step=32",
    "data.micro_batch_tokens=2048", "optimizer.learning_rate=2.0e-3", "tracking.enabled=false",
)  # fmt: skip
XTREME_OBJECTIVE = ("objective.layer=1", "objective.source_schedule=8")
GENERATED_TOKENS = 24


def plan(revision: Revision, data: Path) -> Facts:
    """`data plan` of every run file in configs/ on 1, 2 and 8 ranks."""
    plans: dict[str, list[object]] = {}
    for file in sorted((revision.tree / "configs").glob("*.yaml")):
        name = file.name.removesuffix(".yaml")
        if name in NOT_RUN_FILES:
            continue
        if name not in PLANNED:
            raise SameNumbersError(
                f"configs/{file.name}: not in PLANNED of {__file__}; add it there with its overrides"
            )
        output = revision.folder / "plan" / name
        plans[name] = [file, f"data_dir={_planned_data(data, file)}", f"output_dir={output}", *PLANNED[name]]
    return _plans(revision, plans)


def _planned_data(data: Path, config: Path) -> Path:
    """Rows in the languages and folders that a run file names; the same for both revisions."""
    section = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
    folder = data / "planned" / config.name.removesuffix(".yaml")
    for source in section["sources"]:
        place = folder / Path(source["files"]).parent
        if not place.exists() or not any(place.glob("*.jsonl")):
            inputs.write_questions(place, section["languages"])
    return folder


def _plans(revision: Revision, plans: dict[str, list[object]]) -> Facts:
    """The lines of `data plan` by name, for each number of ranks; `plans` has the run file and overrides of each."""
    requests = [(name, ranks) for name in plans for ranks in PLANNED_RANKS]
    printed = revision.crosslift_each(
        [["data", "plan", *plans[name], "--steps", PLANNED_STEPS, "--world-size", ranks] for name, ranks in requests]
    )
    return {
        f"plan {name} {ranks} ranks {number}": line
        for (name, ranks), lines in zip(requests, printed, strict=True)
        for number, line in enumerate(lines.splitlines())
    }


def sft(revision: Revision, data: Path) -> Facts:
    return _decoder(revision, data, "sft", {"name": "sft"})


def shifcon(revision: Revision, data: Path) -> Facts:
    """Includes answers of its export, generated with the shift."""
    facts = _decoder(revision, data, "shifcon", inputs.SHIFCON)
    model = revision.folder / "shifcon" / "model"
    questions = [
        {"prompt": inputs.question(language, 150)["question"], "language": language} for language in inputs.LANGUAGES
    ]
    commands = []
    for language, rows in (("auto", [{"prompt": row["prompt"]} for row in questions]), ("none", questions)):
        inputs.write_rows(file := revision.folder / f"questions-{language}.jsonl", rows)
        commands.append(
            ["generate", model, "--file", file, "--language", language, "--max-new-tokens", GENERATED_TOKENS, "--json"]
        )
    for number, lines in enumerate(revision.crosslift_each(commands)):
        facts |= {f"answer {number}.{place}": line for place, line in enumerate(lines.splitlines())}
    return facts


def lora(revision: Revision, data: Path) -> Facts:
    """Adapters on the export of `sft`."""
    if not (start := revision.folder / "sft" / "model").exists():
        sft(revision, data)
    values = inputs.decoder_run(data / "questions", revision.folder / "lora", inputs.SHIFCON)
    values["model"] = {"path": str(start), "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}}
    values["tokenizer"] = {}
    return _trained(revision, values)


def resumed(revision: Revision, data: Path) -> Facts:
    """ShifCon, killed with SIGKILL after its second checkpoint and started again."""
    values = inputs.decoder_run(data / "questions", revision.folder / "resumed", inputs.SHIFCON)
    values["tracking"] |= _every_step(revision)
    file = inputs.write_yaml(revision.folder / "resumed.yaml", values)
    output = Path(values["output_dir"])
    shutil.rmtree(output, ignore_errors=True)  # of an interrupted comparison
    after = values["checkpoint"]["every"] * 2
    revision.kill_when(lambda: _last_step(output) > after, "train", file, "--nproc", RANKS)
    if _last_step(output) >= values["max_steps"]:
        raise SameNumbersError(f"{output}: all steps were done before the kill, so nothing is resumed")
    facts = _trained(revision, values)
    starts = [event["resumed_step"] for event in _events(output) if event["kind"] == "start"]
    if len(starts) < 2 or not starts[-1]:
        raise SameNumbersError(f"{output}: started at the steps {starts}, so it was not resumed")
    return facts


def mlm(revision: Revision, data: Path) -> Facts:
    return _trained(revision, inputs.mlm_run(data / "questions", revision.folder / "mlm"))


def xtreme(objective: str, task: str) -> Callable[[Revision, Path], Facts]:
    """`xtreme run` of one task from the export of `mlm`: training, selection, predictions, scores."""

    def case(revision: Revision, data: Path) -> Facts:
        if not (start := revision.folder / "mlm" / "model").exists():
            mlm(revision, data)
        output = revision.folder / f"{objective}-{task}"
        revision.crosslift(
            "xtreme", "run", revision.tree / "configs" / "xtreme.yaml", "--task", task, "--model", "own",
            "--method", XTREME_METHODS[objective], "--data-dir", data / task, "--output", output, "--nproc", RANKS,
            f"model.path={start}", *XTREME_SETTINGS, *(f"tracking.{key}={value}" for key, value in
            _every_step(revision).items()), *(XTREME_OBJECTIVE if objective == "xmixup" else ()),
        )  # fmt: skip
        facts = _metrics(output / "training") | _tensors(output / "model")
        facts |= _plans(revision, {output.name: [output / "run.yaml"]})
        scores = json.loads((output / "scores.json").read_bytes())
        facts |= dict(_leaves("scores", {name: scores[name] for name in ("selection", "summary")}))
        for file in sorted((output / "predictions").rglob("*")):
            if file.is_file():
                facts[f"predictions {file.name}"] = _sha256(file.read_bytes())
        return facts

    return case


CASES: dict[str, Callable[[Revision, Path], Facts]] = {
    "plan": plan,
    "sft": sft,
    "shifcon": shifcon,
    "lora": lora,
    "resumed": resumed,
    "mlm": mlm,
    **{f"{objective}-{task}": xtreme(objective, task) for objective in XTREME_METHODS for task in inputs.TASKS},
}


def write_inputs(folder: Path) -> Path:
    """The data of all cases but `plan`, whose follow each run file."""
    inputs.write_questions(folder / "questions", list(inputs.LANGUAGES))
    for task in inputs.TASKS:
        inputs.write_task(folder / task, task)
    return folder


def _decoder(revision: Revision, data: Path, name: str, objective: dict[str, Any]) -> Facts:
    return _trained(revision, inputs.decoder_run(data / "questions", revision.folder / name, objective))


def _trained(revision: Revision, values: dict[str, Any]) -> Facts:
    output = Path(values["output_dir"])
    values["tracking"] |= _every_step(revision)
    file = inputs.write_yaml(output.with_suffix(".yaml"), values)
    revision.crosslift("train", file, "--nproc", RANKS)
    return _metrics(output) | _tensors(output / "model")


def _every_step(revision: Revision) -> dict[str, int]:
    """Keys of `tracking` with which every step logs: a revision that has no `log_every` does so."""
    knows = "log_every" in (revision.tree / "training" / "tracking" / "config.py").read_text(encoding="utf-8")
    return {"log_every": 1} if knows else {}


def _metrics(run: Path) -> Facts:
    """Every metric of every step, the last one written if a step was done twice."""
    facts = {
        f"step {event['step']} {name}": repr(value)
        for event in _events(run)
        if event["kind"] == "metrics"
        for name, value in event["values"].items()
        if not MEASURED.search(name)
    }
    if not any(name.endswith("train/loss") for name in facts):
        raise SameNumbersError(f"{run}: its record holds no loss")
    return facts


def _tensors(model: Path) -> Facts:
    """SHA-256 of every tensor in the safetensors files of an export."""
    facts = {f"tensor {name}": _sha256(tensor.tobytes()) for name, tensor in tensors(model)}
    if not facts:
        raise SameNumbersError(f"{model}: holds no tensor")
    return facts


def tensors(model: Path) -> Iterator[tuple[str, Any]]:
    """(`FILE:NAME`, array) of every tensor of an export, files in order."""
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "numpy") as content:
            for name in sorted(content.keys()):
                yield f"{file.name}:{name}", content.get_tensor(name)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name} {key}", inner)
    else:
        yield name, repr(value)


def _events(run: Path) -> list[dict[str, Any]]:
    lines = (run / "record.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _last_step(run: Path) -> int:
    """The last step in the record; 0 without one. An incomplete last line is ignored."""
    if not (run / "record.jsonl").exists():
        return 0
    found = re.findall(r'"step": ?(\d+)', (run / "record.jsonl").read_text(encoding="utf-8"))
    return max(map(int, found), default=0)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
