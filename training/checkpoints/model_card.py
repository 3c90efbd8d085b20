"""The model card of an export, its README.md: what it was trained from and on, how to use it, and its scores.

It states only what the checkpoint, the run's record and evaluations say, and names files and folders by their last
part, as it is published with the weights. `card_sections.py` has its form, and the scores.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.atomic import write_text
from data_pipeline.config import SourceConfig
from data_pipeline.secrets import Redactor
from data_pipeline.settings import flat
from modeling.export_info import ADAPTER_FOLDER, RUN_EXPORT, VECTORS_FILE
from training.checkpoints.card_sections import CARD_FILE, NOT_EVALUATED, join, scores_of, split, table
from training.checkpoints.run_state import RunState
from training.config import RunConfig
from training.tracking.run_record import RECORD_NAME, read_events

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

PIPELINES = {
    "chat": "text-generation", "classification": "text-classification", "tagging": "token-classification",
    "qa": "question-answering", "text": "fill-mask",
}  # fmt: skip
LICENSE_KEYS = ("license", "license_name", "license_link")
LISTED_FILES = 50
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/(\w+)")  # a model's folder in the hub's cache
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ISO_639 = re.compile(r"[a-z]{2,3}(?![^\W_])")  # the hub takes no script or region: zh-Hant is zh, eng_Latn is eng
_HASH = re.compile(r"[0-9a-f]{64}")

SNIPPET = """\
```python
from transformers import {model_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("MODEL")
model = {model_class}.from_pretrained("MODEL")
{call}
```"""
GENERATE = """\
messages = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
SHIFTED = """\
In every language but {dominant}, hidden states are shifted into the subspace of {dominant} and back, by the
language vectors in `{vectors}`. Plain transformers opens the weights without this
shift, which is not the model that was trained. crosslift applies it, to prompts and answers:

```
crosslift generate MODEL --language {language} --prompt "..."
```

```python
from crosslift import load_shifted

model = load_shifted("MODEL", dtype="auto", device="cuda")
answers = model.generate(**prompts, languages=["{language}"])
```

`crosslift export MODEL --bake {language} --output DIR` writes a plain model for one language, for any engine."""


def write_card(checkpoint: Path, config: RunConfig, state: RunState, output: Path) -> None:
    """Writes the card of the export in `output`, which holds its weights and vectors already."""
    run = checkpoint.parent.parent
    name, hub = _base_name(config, state)
    kind = "language model" if config.data.task is None else f"{config.data.task.kind} model"
    start = f"{name}, fine-tuned" if config.model.path is not None else f"{name}, trained from scratch"
    sections = {
        "": f"# {start} with {config.objective.name}\n\nA {kind} for {', '.join(config.data.languages)}, trained by "
        f"crosslift with its `{config.objective.name}` objective.",
        "Training": _training(config, state, name, _commit(run)),
        "Data": _data(config, state),
        "Use": _use(config),
        "Scores": scores_of(run, state, output),
        "Limits": _limits(config),
    }
    _write(_metadata(config, state, hub), sections, output)


def write_baked_card(export: Path, language: str, output: Path) -> None:
    """Writes the card of a model for one language: the card of the export whose shift is now in the weights.

    The export of an older version has no card; then only what holds for any baked model is said.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data, sections = ModelCardData(library_name="transformers", pipeline_tag=PIPELINES["chat"], tags=["crosslift"]), {}
    if (export / CARD_FILE).is_file():
        card = ModelCard.load(export / CARD_FILE)
        data, sections = card.data, split(card.text, "## ")
    data.language, data.tags = _iso_codes([language]), [*(data.tags or ()), "baked"]
    title = sections.get("", "# A ShifCon model").splitlines()[0]
    _write(data, {
        **sections,
        "": f"{title}, for {language} only\n\nThe shift of {language} is in the weights, as biases, so any engine "
        "serves this model as it is, without language vectors.",
        "Use": SNIPPET.format(model_class="AutoModelForCausalLM", call=GENERATE),
        "Scores": f"{NOT_EVALUATED} Scores of the model with vectors are not copied, as its weights are others.",
        "Limits": f"- Prompts and answers in any other language are shifted as if they were in {language}.",
    }, output)  # fmt: skip


def _write(data: ModelCardData, sections: Mapping[str, str], output: Path) -> None:
    text = f"---\n{data.to_yaml()}\n---\n\n{join(sections, '## ')}"
    write_text(output / CARD_FILE, Redactor(os.environ).redact(text))


def _metadata(config: RunConfig, state: RunState, hub: str | None) -> ModelCardData:
    from huggingface_hub import ModelCard, ModelCardData

    license_values = {}
    for folder in (config.model.path, (state.base or {}).get("directory")):
        if folder is not None and (card := Path(folder, CARD_FILE)).is_file():
            base = ModelCard.load(card, ignore_metadata_errors=True).data
            license_values = {key: value for key in LICENSE_KEYS if (value := base.get(key)) is not None}
            break
    return ModelCardData(
        language=_iso_codes(config.data.languages),
        library_name="transformers",
        pipeline_tag=PIPELINES[config.data.kind],
        base_model=hub,
        datasets=[hub for source in config.data.sources if (hub := _hub_dataset(source, config))] or None,
        tags=["crosslift", config.objective.name, *(["lora"] if config.model.lora is not None else [])],
        **license_values,
    )


def _iso_codes(languages: Iterable[str]) -> list[str] | None:
    return list(dict.fromkeys(found[0] for each in languages if (found := _ISO_639.match(each)))) or None


def _hub_dataset(source: SourceConfig, config: RunConfig) -> str | None:
    name = source.hub
    return name if name and _HUB_NAME.fullmatch(name) and not Path(config.data_dir or "", name).is_dir() else None


def _base_name(config: RunConfig, state: RunState) -> tuple[str, str | None]:
    """The base model's name for readers, and its name on the hub; None if it is not from there."""
    path, directory = config.model.path, (state.base or {}).get("directory", "")
    if path is None:
        return f"{(config.model.init or {}).get('model_type')}", None
    if found := _SNAPSHOT.search(directory) or _SNAPSHOT.search(path):
        name = f"{found[1]}/{found[2]}"
        return f"{name} (revision {found[3]})", name
    if _HUB_NAME.fullmatch(path) and not directory.startswith(path) and not Path(path).is_dir():
        return path, path
    folder = Path(path).absolute()
    of_run = folder.name == RUN_EXPORT and (folder.parent / RECORD_NAME).is_file()
    return f"{folder.parent.name if of_run else folder.name}", None


def _commit(run: Path) -> str | None:
    """The commit of crosslift that trained last, as the run's record has it."""
    record = run / RECORD_NAME
    tags = [event["values"] for _, event in read_events(record) if event["kind"] == "tags"] if record.is_file() else []
    known = next((each for each in reversed(tags) if "commit" in each), None)
    return known and known["commit"] + (", with local changes" if known.get("dirty") == "true" else "")


def _training(config: RunConfig, state: RunState, name: str, commit: str | None) -> str:
    data, optimizer, schedule = config.data, config.optimizer, config.schedule
    start_hash = f"; hash of the weights at the start: `{state.base['hash']}`" if state.base is not None else ""
    lora = {"lora": config.model.lora.model_dump(mode="json")} if config.model.lora is not None else {}
    settings = flat(config.objective.model_dump(mode="json", exclude={"name"}) | lora)
    rows: dict[str, Any] = {
        "base model" if config.model.path is not None else "from scratch": f"{name}{start_hash}",
        "objective": f"`{config.objective.name}`",
        **{f"`{key}`": f"`{json.dumps(value)}`" for key, value in settings.items() if value is not None},
        "dominant language": data.dominant,
        "steps": f"{state.step:,}",
        "samples in a step": f"{data.slots_per_step:,}",
        "longest sample": f"{data.sequence_length:,} tokens",
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g} at the peak, "
        f"weight decay {optimizer.weight_decay:g}",
        "schedule": f"{schedule.name}, warm-up over {schedule.warmup_ratio:g} of the steps",
        "precision": config.precision,
        "ranks": state.world_size,
        "seed": config.seed,
        "versions": ", ".join(f"{package} {version}" for package, version in state.versions.items()),
        "commit of crosslift": commit,
    }
    return table(("setting", "value"), ((key, value) for key, value in rows.items() if value not in (None, "")))


def _data(config: RunConfig, state: RunState) -> str:
    filled, labels = (state.totals.get(name, {}) for name in ("filled", "labels"))
    languages = [
        (language, _count(state.rows, language), *_share(filled, language), *_share(labels, language))
        for language in config.data.languages
    ]
    unit = "label tokens" if config.data.kind in ("chat", "text") else "labels"
    sources = [(source.name, _hub_dataset(source, config) or "files") for source in config.data.sources]
    files = [(name.rpartition("/")[2], f"`{value}`") for name, value in state.fingerprint.items()
             if _HASH.fullmatch(value) and name != "tokenizer"]  # fmt: skip
    parts = [
        table(("language", "rows", "samples read", "share", unit, "share"), languages),
        f"Mixture: `{config.data.mixture.strategy}`. Sources:",
        table(("source", "from"), sources),
        table(("content", "sha256"), files[:LISTED_FILES]) if files else "",
        f"{len(files) - LISTED_FILES:,} more files are not listed." if len(files) > LISTED_FILES else "",
        f"Hash of the tokenizer: `{state.fingerprint['tokenizer']}`." if "tokenizer" in state.fingerprint else "",
    ]
    return "\n\n".join(filter(None, parts))


def _count(counts: Mapping[str, int], language: str) -> str:
    return f"{counts[language]:,}" if language in counts else "not recorded"


def _share(counts: Mapping[str, int], language: str) -> tuple[str, str]:
    return _count(
        counts, language
    ), f"{counts[language] / (sum(counts.values()) or 1):.1%}" if language in counts else ""


def _use(config: RunConfig) -> str:
    from modeling.architectures import ARCHITECTURE_OF, auto_class

    others = [language for language in config.data.languages if language != config.data.dominant]
    if config.objective.description().get("shifted"):
        text = SHIFTED.format(vectors=VECTORS_FILE, dominant=config.data.dominant, language=others[0])
    elif config.data.task is None:
        text = SNIPPET.format(model_class="AutoModelForCausalLM", call=GENERATE)
    else:
        call = 'print(model(**tokenizer("...", return_tensors="pt")).logits)'
        if config.data.kind == "qa":
            call = call.replace('"...", ', '"question", "context", ').replace("logits", "start_logits")
        text = SNIPPET.format(model_class=auto_class(ARCHITECTURE_OF[config.data.kind]).__name__, call=call)
    if config.model.lora is not None:
        text += f"\n\nThe adapters are merged into these weights; `{ADAPTER_FOLDER}/` has them for peft as well."
    return f"`MODEL` is this folder, or this repository's name.\n\n{text}"


def _limits(config: RunConfig) -> str:
    languages = ", ".join(config.data.languages)
    lines = [f"Trained on {languages} only. Languages without a row under Scores were not evaluated."]
    if config.objective.description().get("shifted"):
        lines.append("A language without a vector runs unshifted; crosslift marks its answers and scores.")
    return "\n".join(f"- {line}" for line in lines)
