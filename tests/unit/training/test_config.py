"""config.py and run_file.py: run files are loaded and checked, errors reported together, all options used."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from training.config import RunConfig
from training.errors import ConfigError
from training.objectives.align import AlignConfig
from training.objectives.contrast import ContrastiveConfig
from training.objectives.registry import OBJECTIVES
from training.objectives.sft import SFTConfig
from training.objectives.shifcon import ShifConConfig
from training.run_file import _models_in, load_config, resolved, validate

ROOT = Path(__file__).resolve().parents[3]
# `crosslift xtreme run` makes run files of the sections of xtreme.yaml: see test_xtreme_run_config.py
OTHERS = ("xtreme.yaml", "slurm-site.example.yaml")  # not run files; other tests load them
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.name not in OTHERS)
ROOMS = ("crosslift.py", "training", "modeling", "data_pipeline", "evals", "slurm")
Values = dict[str, Any]
REMOVED = object()


@pytest.fixture
def values(tiny_run: Callable[..., Values]) -> Values:
    return tiny_run(Path("run"))


def changed(values: Values, key: str, value: Any) -> Values:
    """`values` with one dotted key set or removed."""
    node: Any = values
    *parents, last = key.split(".")
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
    if value is REMOVED:
        del node[last]
    else:
        node[last] = value
    return values


def mistakes(values: Values) -> list[str]:
    """The lines of the error, without the file name that starts each."""
    with pytest.raises(ConfigError) as refusal:
        validate(values, "run.yaml")
    assert refusal.value.exit_status == 2
    lines = str(refusal.value).splitlines()
    assert all(line.startswith("run.yaml: ") for line in lines)
    return [line.removeprefix("run.yaml: ") for line in lines]


def test_the_tiny_run_loads_and_is_frozen(values: Values) -> None:
    config = validate(values, "run.yaml")
    assert (config.data.languages, config.data.sources[0].name) == (("en", "de", "sw", "zh"), "problems")
    for section, field in ((config, "seed"), (config.data, "dominant"), (config.data.sources[0], "name")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, field, "x")


def test_the_resolved_config_is_plain_and_validates_to_the_same_config(values: Values) -> None:
    config = validate(values, "run.yaml")
    plain = resolved(config)
    assert plain["data"]["mixture"]["period"] == 65536, "defaults are filled in"
    assert plain["objective"]["layers"] == [1, 2]
    assert validate(plain, "again") == config


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("max_stepz", "max_stepz: unknown key; did you mean 'max_steps'?"),
        ("data.slots_per_stp", "data.slots_per_stp: unknown key; did you mean 'slots_per_step'?"),
        ("data.mixture.temprature", "data.mixture.temprature: unknown key; did you mean 'temperature'?"),
        ("data.sources.0.colums", "data.sources.0.colums: unknown key; did you mean 'columns'?"),
        ("data.sources.0.columns.promt", "data.sources.0.columns.promt: unknown key; did you mean 'prompt'?"),
        ("objective.layer", "objective.layer: unknown key; did you mean 'layers'?"),
        ("objective.contrastive.scael", "objective.contrastive.scael: unknown key; did you mean 'scale'?"),
        ("tokenizer.train.vocabsize", "tokenizer.train.vocabsize: unknown key; did you mean 'vocab_size'?"),
        ("schedule.zzz", "schedule.zzz: unknown key; known keys: final_ratio, name, warmup_ratio"),
    ],
)
def test_the_error_for_an_unknown_key_suggests_the_nearest_valid_one(values: Values, key: str, line: str) -> None:
    assert mistakes(changed(values, key, 1)) == [line]


def test_suggested_keys_belong_to_the_objective_of_the_run_file(values: Values) -> None:
    values["objective"] = {"name": "sft", "layers": [1, 2]}
    assert mistakes(values) == ["objective.layers: unknown key; known keys: name"]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("max_steps", "many", r"max_steps: .*integer.* \(found 'many'\)"),
        ("max_steps", 0, r"max_steps: .*greater than 0 \(found 0\)"),
        ("max_steps", REMOVED, r"max_steps: required, but missing"),
        ("precision", "fp16", r"precision: .*'bf16' or 'fp32' \(found 'fp16'\)"),
        ("data", [1], r"data: must be a section of keys \(found \[1\]\)"),
        ("model.init", 3, r"model\.init: must be a section of keys \(found 3\)"),
        ("data.sources", [], r"data\.sources: .*at least 1 .*"),
        ("data.sources.0.split", 3, r"data\.sources\.0\.split: .*string, in quotes \(found 3\)"),
        ("data.languages", "en", r"data\.languages: .*list \(found 'en'\)"),
        ("data.languages", [], r"data\.languages: .*at least 1 .*"),
        ("data.languages", ["en", False], r"data\.languages\.1: .*string, in quotes \(found False\)"),
        ("data.overlong", "cut", r"data\.overlong: .*'error', 'drop' or 'truncate' \(found 'cut'\)"),
        ("objective", {}, r"objective\.name: required, but missing"),
        ("objective.name", "dpo", r"objective\.name: 'dpo' is not one of 'sft', 'shifcon', 'align', .*"),
        ("objective.layers", [2, 1], r"objective\.layers: must be \[toward, back\] .*not \[2, 1\].*"),
        ("objective.contrastive.set_size", 1, r"objective\.contrastive\.set_size: .*greater than 1 \(found 1\)"),
        ("optimizer.betas", [0.9], r"optimizer\.betas\.1: required, but missing"),
        ("optimizer.betas", [0.9, 1.5], r"optimizer\.betas\.1: .*less than 1 \(found 1\.5\)"),
        ("schedule", {"warmup_ratio": 1.0}, r"schedule\.warmup_ratio: .*less than 1 \(found 1\.0\)"),
        (
            "data.mixture",
            {"strategy": "explicit", "weights": {"zh-Hant": "much"}},
            r"data\.mixture\.weights\.zh-Hant: .*number.* \(found 'much'\)",
        ),
    ],
)
def test_the_error_for_a_wrong_value_names_the_key_and_the_value(
    values: Values, key: str, value: Any, line: str
) -> None:
    (found,) = mistakes(changed(values, key, value))
    assert re.fullmatch(line, found)


def floats(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted keys of all float options in a section and its subsections."""
    for name, field in model.model_fields.items():
        if float in (field.annotation, *get_args(field.annotation)):
            yield ".".join((*path, name))
        for inner in _models_in(field.annotation):
            if inner is ShifConConfig or path != () or name != "objective":
                yield from floats(inner, (*path, name))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), "nan"])
@pytest.mark.parametrize("key", [key for key in floats(RunConfig) if not key.startswith("data.task")])
def test_non_finite_numbers_are_refused(values: Values, key: str, value: Any) -> None:
    if key.startswith("model.lora"):
        values["model"] = {"path": "model", "lora": {"rank": 1, "alpha": 1}}
    if key.startswith("tokenizer.train"):
        assert value != "nan" or values["tokenizer"]["train"]
    assert any(line.startswith(f"{key}: ") for line in mistakes(changed(values, key, value)))


def test_non_finite_numbers_in_lists_mappings_and_raw_sections_are_refused(values: Values) -> None:
    changed(values, "optimizer.betas", [0.9, float("nan")])
    changed(values, "data.mixture", {"strategy": "explicit", "weights": {"en": float("inf")}})
    changed(values, "model.init.rope_theta", float("inf"))
    changed(values, "deepspeed.zero_optimization.sub_group_size", float("nan"))
    found = mistakes(values)
    for key in ("optimizer.betas.1", "data.mixture.weights.en", "model.init: rope_theta", "deepspeed: zero_opt"):
        assert any(line.startswith(key) for line in found), (key, found)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": -1}, "seed: .*greater than or equal to 0 .*"),
        ({"seed": 2**63}, "seed: .*less than .*"),
        ({"optimizer.learning_rate": -1e-3}, "optimizer.learning_rate: .*greater than 0 .*"),
        ({"tracking.sync_seconds": 0}, "tracking.sync_seconds: .*greater than 0 .*"),
        ({"tracking.sync_seconds": 1e300}, "tracking.sync_seconds: .*less than or equal to 86400 .*"),
        ({"watchdog.stall_minutes": -1}, "watchdog.stall_minutes: .*greater than or equal to 0 .*"),
        ({"data.patience_seconds": -1}, "data.patience_seconds: .*greater than or equal to 0 .*"),
        ({"checkpoint.local_dir": ""}, "checkpoint.local_dir: .*at least 1 character.*"),
        ({"checkpoint.best_mode": "max"}, "'checkpoint.best_mode' needs 'checkpoint.best', which is not set"),
        ({"evaluation.swapped_prompts": True}, "'evaluation.swapped_prompts' .*: set 'evaluation.every'"),
        ({"schedule": {"name": "constant", "final_ratio": 0.1}}, "schedule: 'final_ratio' is for cosine .*"),
        ({"guard.spike": "rollback", "checkpoint.every": 12}, "'guard' rolls back .* no checkpoint is saved before .*"),
        ({"data.mixture.temperature": 2}, "data.mixture: 'temperature' applies only to .*, not to .*"),
        ({"data.mixture": {"strategy": "explicit", "weights": {"en": 1e300}}}, r".*: weights\.en is 1e\+300; .*"),
        ({"objective.sft_weight": 0, "objective.contrastive.weight": 0}, "objective: .* are both 0: nothing .*"),
        ({"data.languages": ["en", "de", "sw", ""]}, "data.languages: '' is not a language code; .*"),
        ({"data.languages": ["en", "de", "sw", "a b"]}, "data.languages: 'a b' is not a language code; .*"),
        ({"data.languages": ["en", "de", "sw", "none"]}, "data.languages: 'none' is not a language code; .*"),
        ({"model.init.tie_word_embeddings": "no"}, "model.init: tie_word_embeddings is the text 'no'; .*"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused(values: Values, changes: Values, line: str) -> None:
    for key, value in changes.items():
        changed(values, key, value)
    (found,) = mistakes(values)
    assert re.fullmatch(rf"(\(top level\): )?{line}", found), found


EVALUATED = {"evaluation.every": 2, "checkpoint.every": 2, "data.heldout_items": 4}


@pytest.mark.parametrize(
    ("best", "hint"),
    [
        ("eval/los", "did you mean 'eval/loss'?"),
        ("eval/loss/sv", "did you mean 'eval/loss/sw'?"),
        ("eval/loss_swapped", "did you mean 'eval/loss"),
        ("loss", "did you mean 'eval/loss'?"),
        ("train/mixup_ratio", "did you mean 'train/"),
        ("shift/norm/sw", ""),
        ("accuracy", ""),
    ],
)
def test_a_best_metric_that_no_checkpoint_has_is_refused_with_the_nearest(values: Values, best: str, hint: str) -> None:
    for key, value in {**EVALUATED, "checkpoint.best": best}.items():
        changed(values, key, value)
    (found,) = mistakes(values)
    assert found.startswith(f"(top level): 'checkpoint.best' is {best!r}, which this run does not measure at its check")
    assert hint in found


@pytest.mark.parametrize("best", ["eval/loss", "eval/loss/sw", "train/loss/zh", "train/contrastive", "train/grad_norm"])
def test_a_best_metric_that_every_checkpoint_has_is_accepted(values: Values, best: str) -> None:
    for key, value in {**EVALUATED, "checkpoint.best": best}.items():
        changed(values, key, value)
    assert validate(values, "run.yaml").checkpoint.best == best


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("htp://host", "'htp://host': MLflow does not support such an address; write http://HOST:PORT or sqlite:.*"),
        ("htp://me:hush@host", "'htp://host': MLflow does not .*"),
        ("http://", "'http://': incomplete; write http://HOST:PORT"),
        ("http://host:99999", "'http://host:99999': Port out of range 0-65535"),
        ("mlruns", "'mlruns': MLflow no longer writes to plain folders; write .*"),
        ("file:///a/mlruns", "'file:///a/mlruns': MLflow no longer writes to plain folders; .*"),
        ("sqlite://", "'sqlite://': names no file; write sqlite:////absolute/path/mlflow.db"),
        ("postgresql://host", "'postgresql://host': incomplete; write postgresql://USER@HOST:PORT/DATABASE"),
        ("", "'': MLflow no longer writes .*"),
        ("sqlite:////a?b/mlflow.db", r"'sqlite:////a\?b/mlflow.db': options such as .* follow a \?; write %3F for .*"),
        ("sqlite:////a/b?c", r"'sqlite:////a/b\?c': options such as .* follow a \?.*"),
    ],
)
def test_a_tracking_address_that_mlflow_does_not_support_is_refused(values: Values, uri: str, line: str) -> None:
    (found,) = mistakes(changed(values, "tracking.uri", uri))
    assert re.fullmatch(f"tracking.uri: {line}", found), found


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:hush@host/mlflow",
        "sqlite:///mlflow.db",
        "sqlite:////a/mlflow.db?timeout=30",
        "sqlite:////a%3Fb/mlflow.db",
        "postgresql+psycopg2://me@host/db",
        "mysql:///db",
        "databricks",
        "databricks://profile",
    ],
)
def test_a_tracking_address_that_mlflow_supports_is_accepted(values: Values, uri: str) -> None:
    assert validate(changed(values, "tracking.uri", uri), "run.yaml").tracking.uri == uri


def test_variables_and_tildes_in_paths_of_every_section_are_expanded(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("DISK", "/disk")
    values |= {"data_dir": "~/data", "output_dir": "${DISK}/run", "model": {"path": "$DISK/model"}}
    values["tokenizer"] = {"path": "~/tokenizer"}
    values["data"]["sources"][0]["files"] = ["$DISK/*.jsonl", "~/en.jsonl"]
    values["data"]["sources"] += [{**values["data"]["sources"][0], "name": "hub", "hub": "~/set"}]
    del values["data"]["sources"][1]["files"]
    values["tracking"] = {"uri": "sqlite:///~/mlflow.db"}
    values["checkpoint"] = {"local_dir": "$TMPDIR/run"}
    config = validate(values, "run.yaml")
    assert (config.data_dir, config.output_dir) == (Path("/home/ada/data"), Path("/disk/run"))
    assert (config.model.path, config.tokenizer.path) == ("/disk/model", "/home/ada/tokenizer")
    assert config.data.sources[0].files == ("/disk/*.jsonl", "/home/ada/en.jsonl")
    assert config.data.sources[1].hub == "/home/ada/set"
    assert config.tracking.uri == "sqlite:////home/ada/mlflow.db"
    assert config.checkpoint.local_dir == "$TMPDIR/run", "expanded on each node"
    assert validate(resolved(config), "again") == config


@pytest.mark.parametrize("key", ["data_dir", "output_dir", "tokenizer.path", "data.sources.0.files", "tracking.uri"])
def test_a_variable_that_is_not_set_is_named_with_its_key(
    values: Values, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    values["tokenizer"] = {}
    (found, *others) = mistakes(changed(values, key, "sqlite:///$NOWHERE/a" if "uri" in key else "$NOWHERE/a"))
    assert re.fullmatch(rf"{key}: .* names the variable NOWHERE, which is not set here; .*", found), found
    assert all("model.init" in line or key in line for line in others)


def test_numbers_such_as_3e_3_and_the_language_no_are_read_as_meant(
    tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    file = run_file(tmp_path, **{"data.languages": ["en", "sv"], "max_steps": 7})
    text = file.read_text(encoding="utf-8").replace("- sv", "- no").replace("max_steps: 7", "max_steps: 1_2e2")
    file.write_text(text.replace("learning_rate: 0.003", "learning_rate: 3e-3"), encoding="utf-8")
    config = load_config(
        file, ["data.mixture.period=1e4", "optimizer.eps=1e-6", "model.init.max_position_embeddings=1e3"]
    )
    assert (config.data.languages, config.max_steps, config.optimizer.learning_rate) == (("en", "no"), 1200, 0.003)
    assert (config.data.mixture.period, config.optimizer.eps) == (10_000, 1e-6)
    assert type((config.model.init or {})["max_position_embeddings"]) is int


def test_an_output_below_a_file_is_refused(tmp_path: Path, run_file: Callable[..., Path]) -> None:
    file = run_file(tmp_path)
    for place in (file, file / "a" / "b"):
        with pytest.raises(ConfigError, match=rf"^{file}: output_dir: .*{file}.* is a file; give a folder"):
            load_config(file, [f"output_dir={place}"])


def test_all_mistakes_are_reported_at_once(values: Values) -> None:
    changed(values, "max_steps", "many")
    changed(values, "data.mixture.temprature", 3)
    changed(values, "data.sources.0.columns.completion", REMOVED)
    changed(values, "objective.contrastive.scale", REMOVED)
    found = mistakes(values)
    assert [line.split(":")[0] for line in found] == [
        "max_steps",
        "data.sources.0.columns",
        "data.mixture.temprature",
        "objective.contrastive.scale",
    ]


def test_all_contradictions_within_a_section_are_reported_at_once(values: Values) -> None:
    changed(values, "data.dominant", "fr")
    changed(values, "data.sequence_length", 400)
    changed(values, "data.mixture", {"strategy": "explicit", "weights": {"en": 1, "dee": 1}})
    changed(values, "data.sources", [{**values["data"]["sources"][0], "language": "swa"}] * 2)
    known = "'languages' has en, de, sw, zh"
    assert mistakes(values) == [
        "data: 'dominant' is 'fr', which is not among 'languages'",
        f"data: 'mixture.weights' names 'dee'; {known}",
        "data: 'sequence_length' (400) is above 'micro_batch_tokens' (384): the longest sample would fit no "
        "micro-batch",
        "data: two sources have the name 'problems'",
        f"data: source 'problems' has language 'swa'; {known}",
    ]


def test_mistakes_between_sections_are_reported_at_once(values: Values) -> None:
    changed(values, "evaluation", {"every": 5})
    changed(values, "data.mixture", {"pairing": "none"})
    changed(values, "deepspeed", {"gradient_accumulation_steps": 2, "scheduler": {}, "fp16": {"enabled": True}})
    changed(values, "deepspeed.zero_optimization.stage", 2)
    assert mistakes(values) == [
        "(top level): 'deepspeed.gradient_accumulation_steps' follows from 'data.micro_batch_tokens'; leave it out",
        "(top level): 'deepspeed.scheduler' follows from 'schedule'; leave it out",
        "(top level): 'deepspeed.fp16.enabled' follows from 'precision'; leave it out",
        "(top level): 'deepspeed.zero_optimization.stage' follows from 'zero_stage'; leave it out",
        "(top level): 'evaluation.every' needs held-out samples: set 'data.heldout_items'",
        "(top level): the contrastive loss needs pairs: set 'data.mixture.pairing' to 'reuse' or 'fill', or "
        "'data.pairs'",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"fp16": {"enabled": False}}, {"bf16": {"enabled": False}}, {"zero_optimization": {"stage": 3}},
        {"gradient_clipping": 1.0}, {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}},
        {"optimizer": {"params": {"torch_adam": False}}}, {"optimizer": {"params": {"fused": False}}},
        {"amp": {"enabled": False}},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e8}},
    ],
)  # fmt: skip
def test_deepspeed_settings_that_agree_with_the_run_file_are_accepted(values: Values, settings: Values) -> None:
    assert validate(changed(values, "deepspeed", settings), "run.yaml").deepspeed == settings


@pytest.mark.parametrize(
    ("settings", "key", "source"),
    [
        ({"gradient_clipping": 0.3}, "gradient_clipping", "optimizer.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "precision"),
        ({"bf16": {"immediate_grad_update": True}}, "bf16.immediate_grad_update", "precision"),
        ({"fp16": 5}, "fp16", "precision"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled", "precision"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype", "precision"),
        ({"communication_data_type": "bf16"}, "communication_data_type", "precision"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer.params.lr", "optimizer.learning_rate"),
        ({"optimizer": {"params": {"betas": [0.8, 0.9]}}}, "optimizer.params.betas", "optimizer.betas"),
        ({"optimizer": {"params": {"foreach": True}}}, "optimizer.params.foreach", "optimizer"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "optimizer.name"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type", "schedule"),
        ({"train_batch_size": 1}, "train_batch_size", "data.slots_per_step"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu", "data.micro_batch_tokens"),
        ({"activation_checkpointing": {"profile": True}}, "activation_checkpointing.profile", "gradient_checkpointing"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal", "checkpoint"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", "zero_stage"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency.enabled", "data"),
    ],
)  # fmt: skip
def test_a_raw_deepspeed_key_set_by_the_run_file_is_refused_with_the_run_files_key(
    values: Values, settings: Values, key: str, source: str
) -> None:
    assert mistakes(changed(values, "deepspeed", settings)) == [
        f"(top level): 'deepspeed.{key}' follows from {source!r}; leave it out"
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"compile": {"deepcompile": True}}, {"gradient_allreduce_op": "sum"}, {"managed_gradient_accumulation": False},
        {"zero_optimization": {"compute_grad_norm": False}}, {"tensor_parallel": {"autotp_size": 2}},
        {"sequence_parallel_size": 2}, {"hybrid_engine": {"enabled": True}},
    ],
)  # fmt: skip
def test_a_raw_deepspeed_key_that_the_loop_fixes_is_refused_with_the_reason(values: Values, settings: Values) -> None:
    (found,) = mistakes(changed(values, "deepspeed", settings))
    assert re.fullmatch(r"\(top level\): 'deepspeed\.[\w.]+' is fixed: .+; leave it out", found)


def test_auto_values_that_only_hugging_faces_trainer_replaces_are_refused(values: Values) -> None:
    settings = {"train_batch_size": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}}
    message = "is 'auto', which only Hugging Face's Trainer replaces"
    assert mistakes(changed(values, "deepspeed", settings)) == [
        f"(top level): 'deepspeed.train_batch_size' {message}: it follows from 'data.slots_per_step'; leave it out",
        f"(top level): 'deepspeed.zero_optimization.reduce_bucket_size' {message}: give a value, or leave it out",
    ]


@pytest.mark.parametrize("name", ["sgd", "SGD", "lion", "muon", "nadam", "adagrad"])
def test_an_optimizer_that_is_not_offered_is_refused_with_the_reason(values: Values, name: str) -> None:
    (line,) = mistakes(changed(values, "optimizer.name", name))
    assert re.fullmatch(rf"optimizer.name: {name!r} is not offered: DeepSpeed.+; use adamw, adam or radam", line)


def test_an_unknown_optimizer_is_refused_with_the_known_ones(values: Values) -> None:
    (line,) = mistakes(changed(values, "optimizer.name", "adamx"))
    assert line == "optimizer.name: input should be 'adamw', 'adam' or 'radam' (found 'adamx')"


def test_torch_compile_is_refused_with_the_reason(values: Values) -> None:
    (line,) = mistakes(changed(values, "torch_compile", True))
    assert line.startswith(
        "torch_compile: not offered: under ZeRO-3 a graph breaks at every module, where weights are gathered"
    )


def test_an_error_in_an_option_of_several_types_names_only_its_key(values: Values) -> None:
    found = mistakes(changed(values, "data.sources.0.files", 5))
    assert [line.split(":")[0] for line in found] == ["data.sources.0.files"] * 3
    assert all(line.endswith("(found 5)") for line in found)


def test_the_contrastive_scale_has_no_default() -> None:
    assert ContrastiveConfig.model_fields["scale"].is_required()
    assert ContrastiveConfig.model_fields["weight"].is_required()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": {}}, "model: give exactly one of 'path' .*"),
        ({"model": {"path": "m", "init": {"model_type": "llama"}}}, "model: give exactly one of 'path' .*"),
        ({"tokenizer": {"path": "t", "train": {"vocab_size": 300}}}, "tokenizer: give 'path' or 'train', not both"),
        ({"tokenizer": {}}, r"\(top level\): 'model.init' starts from scratch, so 'tokenizer' needs .*"),
        ({"data.dominant": "fr"}, "data: 'dominant' is 'fr', which is not among 'languages'"),
        ({"data.languages": ["en", "de", "en"]}, "data: 'languages' names a language twice"),
        ({"data.sequence_length": 400}, r"data: 'sequence_length' \(400\) is above 'micro_batch_tokens' \(384\).*"),
        ({"data.mixture": {"pairing": "none"}}, r"\(top level\): the contrastive loss needs pairs: .*"),
        ({"data.languages": ["en"]}, r"\(top level\): objective 'shifcon' needs .* at least one other .*"),
        ({"evaluation": {"every": 5}}, r"\(top level\): 'evaluation.every' needs held-out samples.*"),
    ],
)
def test_contradicting_options_are_refused(values: Values, changes: Values, line: str) -> None:
    for key, value in changes.items():
        changed(values, key, value)
    (found,) = mistakes(values)
    assert re.fullmatch(line, found)


def test_consistent_options_are_accepted(values: Values) -> None:
    changed(values, "data.mixture.pairing", "none")
    changed(values, "objective.contrastive.weight", 0)
    validate(values, "no contrastive loss, so no pairs are needed")
    values["objective"] = {"name": "sft"}
    values["data"]["languages"] = ["en"]
    validate(values, "one language is enough for SFT")
    values["model"], values["tokenizer"] = {"path": "somewhere"}, {}
    validate(values, "an existing model has a tokenizer")
    changed(values, "data.heldout_items", 4)
    changed(values, "evaluation.every", 5)
    validate(values, "held-out items to evaluate on")


TASK_COLUMNS = {"classification": "text_a", "tagging": "words", "text": "text"}


@pytest.mark.parametrize("kind", ["classification", "tagging", "text"])
def test_the_default_and_the_values_of_overlong_depend_on_the_task(values: Values, kind: str) -> None:
    """The default is `drop` for conversations; among tasks, only samples of classification can be too long."""
    assert validate(values, "run.yaml").data.overlong == "drop"
    labels = [] if kind == "text" else ["no", "yes"]
    changed(values, "data.task", {"kind": kind, "labels": labels})
    changed(values, "data.mixture", {})
    changed(values, "data.sources.0.columns", {"language": "language", TASK_COLUMNS[kind]: "text"})
    values["objective"] = {"name": "mlm" if kind == "text" else "finetune"}
    config = validate(values, "run.yaml")
    assert config.data.overlong == "truncate"
    assert validate(resolved(config), "the resolved run file").data.overlong == "truncate"
    changed(values, "data.overlong", "drop")
    if kind == "classification":
        assert validate(values, "run.yaml").data.overlong == "drop"
    else:
        assert mistakes(values) == [
            f"data: 'overlong' is 'drop', but kind '{kind}' reads long texts in windows: none is too long; leave it out"
        ]


def test_the_authors_preset_sets_their_values_and_the_run_file_overrides_it(values: Values) -> None:
    values["objective"] = {"name": "shifcon", "preset": "authors"}
    objective = validate(values, "run.yaml").objective
    assert isinstance(objective, ShifConConfig)
    assert (objective.layers, objective.sft_weight) == ((12, 15), 0.5)
    assert objective.contrastive == ContrastiveConfig(weight=2.0, scale=1.0, set_size=12, normalise="none")
    values["objective"] |= {"layers": [1, 2], "contrastive": {"scale": 20.0}}
    objective = validate(values, "run.yaml").objective
    assert isinstance(objective, ShifConConfig)
    assert (objective.layers, objective.sft_weight) == ((1, 2), 0.5)
    assert objective.contrastive == ContrastiveConfig(weight=2.0, scale=20.0, set_size=12, normalise="none")


def test_an_unknown_preset_sets_no_values(values: Values) -> None:
    values["objective"] = {"name": "shifcon", "preset": "mine"}
    found = mistakes(values)
    assert {line.split(":")[0] for line in found} == {
        "objective.preset",
        "objective.layers",
        "objective.contrastive",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ndata: [1, 2\nmax_steps: 3\n", r":3: not valid YAML: .*"),
        ("seed: 1\n\tmax_steps: 3\n", r":2: not valid YAML: .*"),
        ("- seed\n", r": must hold a mapping of keys, not list"),
        ("", r": must hold a mapping of keys, not NoneType"),
        (b"seed: \xff\xfe", r": cannot be read: .*utf-8.*"),
        ("a: !!python/object/apply:os.getcwd []", r":1: not valid YAML: .*"),
    ],
)
def test_a_file_that_is_not_a_run_file_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    assert re.fullmatch(re.escape(str(path)) + message, str(refusal.value))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("seed: 1\nmax_steps: 3\nseed: 1\n", ["3: seed: given twice (lines 1 and 3); keep one"]),
        ("data:\n  dominant: en\n  'dominant': de\n", ["3: data.dominant: given twice (lines 2 and 3); keep one"]),
        ("data:\n  a: 1\nseed: 1\ndata:\n  b: 1\n", ["4: data: given twice (lines 1 and 4); keep one"]),
        ("model: {path: a, path: b}\n", ["1: model.path: given twice (lines 1 and 1); keep one"]),
        (
            "data:\n  sources:\n  - {name: a, files: x}\n  - name: b\n    files: x\n    name: c\nseed: 1\nseed: 2\n",
            [
                "6: data.sources.1.name: given twice (lines 4 and 6); keep one",
                "8: seed: given twice (lines 7 and 8); keep one",
            ],
        ),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_both_lines(tmp_path: Path, text: str, lines: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load_config(path, ["seed=3"])
    found = str(refusal.value).splitlines()
    assert (
        [line for line in found if "given twice" in line] == found[: len(lines)] == [f"{path}:{line}" for line in lines]
    )


def test_a_key_may_repeat_in_other_sections_over_an_anchor_and_as_an_override(tmp_path: Path, values: Values) -> None:
    path = tmp_path / "run.yaml"
    del values["checkpoint"]
    sections = "checkpoint: &often {every: 3}\nevaluation: {<<: *often, every: 0, items: 5}\n"
    path.write_text(yaml.safe_dump(values, allow_unicode=True) + sections)
    config = load_config(path, ["optimizer.learning_rate=2", "optimizer.learning_rate=3"])
    assert (config.checkpoint.every, config.evaluation.every, config.evaluation.items) == (3, 0, 5)
    assert config.optimizer.learning_rate == 3


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file$"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r": cannot be read: "):
        load_config(tmp_path)


def test_overrides_reach_every_depth(tmp_path: Path, run_file: Callable[..., Path]) -> None:
    config = load_config(
        run_file(tmp_path),
        [
            "max_steps=7",
            "data.mixture.period=128",
            "evaluation.every=5",
            "data.heldout_items=2",
            "data.sources.0.columns.system=hint",
            "data.languages.3=fr",
            "objective.contrastive={weight: 0.5, scale: 3}",
            "optimizer.learning_rate=1e-3",
            "data_dir=a=b",
            "model.init.rope_theta=5",
        ],
    )
    assert (config.max_steps, config.data.mixture.period, config.evaluation.every) == (7, 128, 5)
    assert config.data.sources[0].columns.system == "hint"
    assert config.data.languages == ("en", "de", "sw", "fr")
    assert isinstance(config.objective, ShifConConfig)
    assert config.objective.contrastive == ContrastiveConfig(weight=0.5, scale=3)
    assert config.optimizer.learning_rate == 1e-3
    assert config.data_dir == Path("a=b")
    assert config.model.init is not None
    assert (config.model.init["rope_theta"], config.model.init["hidden_size"]) == (5, 32)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps", "must be key.sub=value"),
        ("=3", "must be key.sub=value"),
        ("data.languages=[en", "the value is not valid YAML"),
        ("seed.deeper=1", "'seed' holds a value, not a section"),
        ("data.sources.0.name.x=1", "'data.sources.0.name' holds a value, not a section"),
        ("data.sources.1.name=x", "'1' is not an index of a list of 1"),
        ("data.sources.first.name=x", "'first' is not an index of a list of 1"),
        ("data.languages.4=fr", "'4' is not an index of a list of 4"),
        ("data.languages.-1=fr", "'-1' is not an index of a list of 4"),
    ],
)
def test_a_bad_override_is_quoted(tmp_path: Path, run_file: Callable[..., Path], override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(run_file(tmp_path), [override])
    assert str(refusal.value).startswith(f"override {override!r}: ")
    assert message in str(refusal.value)


def test_missing_inputs_are_reported_together_with_other_mistakes(
    tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    """Only then: for a valid run file, the command decides whether its inputs must exist."""
    (tmp_path / "here.jsonl").touch()
    file = run_file(tmp_path, data_dir=str(tmp_path), tokenizer={"path": "/none/tokenizer"})
    files = "data.sources.0.files=[here.jsonl, none-*.jsonl, 's3://bucket/x.jsonl']"
    assert load_config(file, [files]).tokenizer.path == "/none/tokenizer"
    with pytest.raises(ConfigError) as refusal:
        load_config(file, [files, "max_stepz=1", "data.workers=many"])
    assert str(refusal.value).splitlines()[1:] == [
        f"{file}: max_stepz: unknown key; did you mean 'max_steps'?",
        f"{file}: tokenizer.path: /none/tokenizer: no such folder",
        f"{file}: data.sources.0.files: no file matches {tmp_path / 'none-*.jsonl'}",
    ]
    assert str(refusal.value).startswith(f"{file}: data.workers: ")


@pytest.mark.parametrize("name", ["gpt2", "org/model"])
def test_a_model_name_that_may_be_on_the_hub_is_not_reported_as_missing(
    tmp_path: Path, run_file: Callable[..., Path], name: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(run_file(tmp_path, model={"path": name}), ["max_stepz=1"])
    (line,) = str(refusal.value).splitlines()
    assert "max_stepz" in line


def test_an_override_is_validated_like_the_file(tmp_path: Path, run_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: data\.slots_per: unknown key; did you mean 'slots_per_step'\?"):
        load_config(run_file(tmp_path), ["data.slots_per=4"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_loads(path: Path) -> None:
    load_config(path, ["data_dir=somewhere"])


def test_there_are_configs() -> None:
    assert CONFIGS


# --- every option is described and read


def sections() -> dict[type[BaseModel], set[type[BaseModel]]]:
    """Every config model, with itself and all models that contain it, directly or not."""
    holders: dict[type[BaseModel], set[type[BaseModel]]] = {}

    def walk(model: type[BaseModel], above: set[type[BaseModel]]) -> None:
        holders.setdefault(model, set()).update({model} | above)
        for field in model.model_fields.values():
            for inner in _models_in(field.annotation):
                walk(inner, {model} | above)

    walk(RunConfig, set())
    return holders


@pytest.mark.parametrize("model", sections(), ids=lambda model: model.__name__)
def test_every_option_has_a_description(model: type[BaseModel]) -> None:
    """A section, and the only value of the option that selects it, are described by the class's docstring."""
    assert model.__doc__
    fields = model.model_fields.items()
    undescribed = {name for name, field in fields if not (field.description or _models_in(field.annotation))}
    assert not {name for name in undescribed if len(get_args(model.model_fields[name].annotation)) != 1}


# Methods of an objective's section that other code calls: options that they read count as read, unlike options that
# only a validator reads.
METHODS_OF_OBJECTIVES = {"pairing", "probe_size", "build", "description", "export"}


def reads(source: ast.AST, inside: str = "") -> Iterator[tuple[str, str]]:
    """(attribute that code reads, enclosing class; "" inside METHODS_OF_OBJECTIVES of an objective's section)."""
    if isinstance(source, ast.ClassDef):
        inside = source.name
    elif isinstance(source, ast.FunctionDef) and inside in OBJECTIVE_SECTIONS and source.name in METHODS_OF_OBJECTIVES:
        inside = ""
    if isinstance(source, ast.Attribute) and isinstance(source.ctx, ast.Load):
        yield source.attr, inside
    for child in ast.iter_child_nodes(source):
        yield from reads(child, inside)


def class_names(source: ast.AST) -> set[str]:
    """Classes that a file imports or defines."""
    imported = {alias.name for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return imported | {node.name for node in ast.walk(source) if isinstance(node, ast.ClassDef)}


def read_by_pydantic(model: type[BaseModel], field: str) -> bool:
    """Options that select or fill in others while the file is loaded: an objective's name, a preset."""
    return (field == "name" and model in {SFTConfig, ShifConConfig, AlignConfig}) or (model, field) == (
        ShifConConfig,
        "preset",
    )


OBJECTIVE_SECTIONS = {each.__name__ for each in OBJECTIVES}


@cache
def sources() -> list[tuple[set[str], set[tuple[str, str]]]]:
    """(classes imported or defined, attributes read) of every source file."""
    files = [file for room in ROOMS for file in ((ROOT / room).rglob("*.py") if "." not in room else [ROOT / room])]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return [(class_names(tree), set(reads(tree))) for tree in trees]


OPTIONS = [
    pytest.param(model, holders, field, id=f"{model.__name__}.{field}")
    for model, holders in sections().items()
    for field in model.model_fields
    if not read_by_pydantic(model, field)
]


def test_the_sections_of_every_room_are_found() -> None:
    found = {model.__name__ for model in sections()}
    assert found >= {"RunConfig", "DataConfig", "SourceConfig", "ColumnMap", "MixtureConfig", "TemplateConfig"}
    assert found >= {"TokenizerTrainingConfig", "SFTConfig", "ShifConConfig", "ContrastiveConfig", "TrackingConfig"}


@pytest.mark.parametrize(("model", "holders", "field"), OPTIONS)
def test_every_option_is_read(model: type[BaseModel], holders: set[type[BaseModel]], field: str) -> None:
    """By a file that imports or defines the option's section or one around it: `path.name` elsewhere does not count."""
    own = {
        each.__name__ for each in model.__mro__ if each.__module__.startswith(("training.objectives", model.__module__))
    } - {"ObjectiveConfig"}
    section_names = {each.__name__ for each in holders} | own
    readers = [
        attributes
        for classes, attributes in sources()
        if section_names & classes and any(name == field and inside not in own for name, inside in attributes)
    ]
    assert readers, f"nothing reads {model.__name__}.{field}"
