"""configs/xtreme.yaml: every combination is a valid run file with the paper's settings; how sections are composed."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.records import DataError
from data_pipeline.xtreme.tasks import TASKS
from evals.errors import EvalError
from evals.xtreme.run_file import compose, read_plan, steps_of
from evals.xtreme.run_table import PUBLISHED, TASK_ORDER, published_score
from training.config import RunConfig
from training.errors import ConfigError
from training.objectives.finetune import FineTuneConfig
from training.objectives.xmixup import XMixupConfig
from training.run_file import load_config, validate

CONFIG = Path(__file__).resolve().parents[4] / "configs" / "xtreme.yaml"
FINE_TUNED = tuple(name for name, task in TASKS.items() if task.kind != "retrieval")
MODELS = {"xlm-r-large": 24, "mbert": 12}
METHODS = ("zero-shot", "translate-train", "translate-train-consistency", "x-mixup")
ABLATIONS = ("no-mixup", "fixed-ratio", "no-scheduled-sampling", "no-consistency")


def composed(task: str, model: str, method: str, *overrides: str, rows: int = 6400) -> RunConfig:
    plan = read_plan(CONFIG, task, model, method, overrides)
    languages = ["en"] if plan.train == "dominant" else ["en", "de", "zh"]
    files = {language: f"train/{language}.jsonl" for language in languages}
    values = compose(plan, Path("/data"), Path("/run"), files, rows)
    return validate(values, f"{task} {model} {method}")


@pytest.mark.parametrize(("task", "model", "method"), list(product(FINE_TUNED, MODELS, METHODS + ABLATIONS)))
def test_every_combination_is_a_valid_run_file_with_the_papers_settings(task: str, model: str, method: str) -> None:
    config = composed(task, model, method)
    kind = TASKS[task].kind
    qa = kind == "qa"
    assert config.data.task is not None
    assert config.data.task.kind == kind
    assert config.data.task.labels == TASKS[task].labels
    assert config.data.sequence_length == (384 if qa else 128)
    assert not qa or config.data.task.doc_stride == 128
    assert config.data.slots_per_step == (32 if qa else 64)
    assert config.optimizer.learning_rate == (3e-5 if task == "tydiqa" else 5e-6)
    epochs = 2 if task in ("xquad", "mlqa") else 4
    assert config.max_steps == epochs * 6400 // config.data.slots_per_step
    assert (config.zero_stage, config.precision) == (3, "bf16")
    assert config.schedule.warmup_ratio == (0.1 if qa else 0)
    assert config.data.languages == (("en",) if method == "zero-shot" else ("en", "de", "zh"))
    assert config.data.sources[0].files == tuple(f"train/{language}.jsonl" for language in config.data.languages)
    objective = config.objective
    if method in ("zero-shot", "translate-train"):
        assert isinstance(objective, FineTuneConfig)
        return
    assert isinstance(objective, XMixupConfig)
    assert objective.alpha == {"classification": 0.4, "tagging": 0.8, "qa": 0.2}[kind]
    layer = {"classification": 0, "tagging": 3, "qa": 15 if model == "xlm-r-large" else 7}[kind]
    assert objective.layer == layer < MODELS[model]
    gold_only = method in ("translate-train-consistency", "no-scheduled-sampling")
    assert objective.source_schedule == (None if gold_only else 2000 if qa else 1000)
    assert objective.mix is (method not in ("translate-train-consistency", "no-mixup"))
    assert objective.ratio == (0.25 if method == "fixed-ratio" else "learned")
    assert objective.consistency_weight == (0 if method == "no-consistency" else 1)
    assert (objective.max_ratio, objective.entropy) == (0.5, "true")


def test_every_method_of_the_file_is_in_the_test_of_combinations() -> None:
    sections = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert set(sections["methods"]) == {*METHODS, *ABLATIONS}
    assert set(sections["models"]) == {*MODELS, "own"}
    assert set(sections["tasks"]) == set(FINE_TUNED)
    for method in METHODS + ABLATIONS:
        plan = read_plan(CONFIG, "xnli", "mbert", method)
        assert (plan.train, plan.select) == (("dominant",) * 2 if method == "zero-shot" else ("all",) * 2)


def test_train_reads_the_written_run_file(tmp_path: Path) -> None:
    plan = read_plan(CONFIG, "panx", "xlm-r-large", "x-mixup", ["objective.layer=7"])
    values = compose(plan, tmp_path, tmp_path / "run", {"en": "train/en.jsonl"}, 100)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    config = load_config(file)
    assert isinstance(config.objective, XMixupConfig)
    assert (config.objective.layer, config.objective.entropy) == (7, "true")
    assert config.data_dir == tmp_path


@pytest.mark.parametrize(
    ("epochs", "rows", "slots", "expected"),
    [(4, 64, 64, 4), (4, 65, 64, 5), (2, 33, 32, 3), (0.5, 64, 64, 1), (1, 1, 64, 1), (1.5, 100, 10, 15)],
)
def test_max_steps_cover_the_rows_for_the_given_epochs(epochs: float, rows: int, slots: int, expected: int) -> None:
    steps = steps_of(epochs, rows, slots)
    assert steps == expected
    assert (steps - 1) * slots < epochs * rows <= steps * slots


@pytest.mark.parametrize("rows", [64, 500, 6400, 6464, 99_999])
@pytest.mark.parametrize("kept", [1, 3, 8])
def test_every_checkpoint_to_be_scored_is_kept(rows: int, kept: int) -> None:
    config = composed("xnli", "mbert", "zero-shot", f"checkpoints={kept}", rows=rows)
    saved = {step for step in range(1, config.max_steps + 1) if step % config.checkpoint.every == 0}
    assert len({*saved, config.max_steps}) <= config.checkpoint.keep == kept


def test_overrides_are_applied_last_and_derived_keys_keep_given_values() -> None:
    config = composed(
        "xquad", "mbert", "x-mixup", "epochs=1", "data.slots_per_step=16", "objective.layer=2",
        "tracking.experiment=qa", "checkpoint.every=50",
    )  # fmt: skip
    assert (config.max_steps, config.checkpoint.every, config.checkpoint.keep) == (400, 50, 8)
    assert isinstance(config.objective, XMixupConfig)
    assert config.objective.layer == 2
    assert config.tracking.experiment == "qa"
    assert composed("xquad", "mbert", "x-mixup", "max_steps=9").max_steps == 9


SECTIONS: dict[str, Any] = {
    "base": {"epochs": 1, "checkpoints": 2, "train": "all", "select": "all", "seed": 1,
             "data": {"dominant": "en", "slots_per_step": 8}, "tasks": {"panx": {"seed": 2}}},
    "kinds": {"tagging": {"seed": 3, "models": {"m": {"seed": 4}}}},
    "models": {"m": {"model": {"path": "p"}}, "n": {"seed": 6, "model": {"path": "q"}}},
    "tasks": {"panx": {"kinds": {"tagging": {"data": {"sequence_length": 9}}}}},
    "methods": {"a": {"objective": {"name": "x", "layer": 1, "alpha": 1},
                      "models": {"n": {"tasks": {"panx": {"seed": 7}}}}},
                "b": {"extends": "a", "objective": {"layer": 2}}},
}  # fmt: skip


def sections(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "sections.yaml"
    file.write_text(yaml.safe_dump({**SECTIONS, **changes}), encoding="utf-8")
    return file


def test_values_are_read_as_in_a_run_file(tmp_path: Path) -> None:
    """`no` is the language Norwegian and 1e2 a number, in the file and in an override."""
    file = sections(tmp_path, tasks={"panx": {"data": {"languages": ["en", "LANGUAGE"], "sequence_length": "NUMBER"}}})
    text = file.read_text(encoding="utf-8").replace("LANGUAGE", "no").replace("NUMBER", "1e2")
    file.write_text(text, encoding="utf-8")
    found = read_plan(file, "panx", "m", "a", ("optimizer.eps=1e-7", "data.dominant=no")).values
    assert found["data"] == {"dominant": "no", "slots_per_step": 8, "sequence_length": 100, "languages": ["en", "no"]}
    assert found["optimizer"] == {"eps": 1e-7}


def test_later_sections_override_earlier_ones_and_conditions_nest(tmp_path: Path) -> None:
    file = sections(tmp_path)
    assert read_plan(file, "panx", "m", "b").values == {
        "seed": 4, "data": {"dominant": "en", "slots_per_step": 8, "sequence_length": 9}, "model": {"path": "p"},
        "objective": {"name": "x", "layer": 2, "alpha": 1},
    }  # fmt: skip
    assert read_plan(file, "panx", "n", "b").values["seed"] == 7


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({}, ("panx", "o", "a"), "models has no 'o'; there are m, n"),
        ({}, ("panx", "m", "c"), "methods has no 'c'; there are a, b"),
        ({}, ("udpos", "m", "a"), "tasks has no 'udpos'; there are panx"),
        ({"extra": {}}, ("panx", "m", "a"), "'extra' is not a section; there are base, kinds, models, tasks, methods"),
        ({"models": {"m": 3}}, ("panx", "m", "a"), "models.m: holds 3; it must hold keys"),
        (
            {"models": {"m": {"model": {"path": None}}}},
            ("panx", "m", "a"),
            "no section gives model.path; add model.path=DIR",
        ),
        ({"methods": {"a": {"extends": "a"}}}, ("panx", "m", "a"), "methods.a: extends itself"),
        ({"methods": {"a": {"epochs": 0}}}, ("panx", "m", "a"), "epochs is 0; it must be a number above 0"),
        ({"methods": {"a": {"checkpoints": 1.5}}}, ("panx", "m", "a"), "checkpoints is 1.5; it must be a number"),
        ({"methods": {"a": {"select": "some"}}}, ("panx", "m", "a"), "select is 'some'; it must be dominant or all"),
        ({"methods": {"a": {}}}, ("panx", "m", "a"), "no section gives objective.name"),
        ({"methods": None}, ("panx", "m", "a"), "methods has no 'a'; there are none"),
    ],
)
def test_mistakes_in_sections_are_named(tmp_path: Path, changes: Any, names: Any, message: str) -> None:
    with pytest.raises(EvalError) as error:
        read_plan(sections(tmp_path, **changes), *names)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "must be key.sub=value"),
        ("seed.x=1", "'seed' holds a value, not a section"),
        ("a={", "not valid YAML"),
    ],
)
def test_mistakes_in_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_plan(CONFIG, "xnli", "mbert", "x-mixup", [override])


def test_unknown_tasks_and_tasks_without_training_are_refused() -> None:
    with pytest.raises(DataError, match="'tatoeba' is not trained for"):
        read_plan(CONFIG, "tatoeba", "mbert", "x-mixup")
    with pytest.raises(DataError, match="not one of XTREME's"):
        read_plan(CONFIG, "xnl", "mbert", "x-mixup")


def test_published_rows_are_complete_and_equal_the_papers() -> None:
    assert all(len(row) == len(TASK_ORDER) for rows in PUBLISHED.values() for row in rows.values())
    assert set(TASK_ORDER) == set(FINE_TUNED)
    assert published_score("xlm-r-large", "x-mixup", "xnli") == {"accuracy": 85.3}
    assert published_score("mbert", "translate-train", "mlqa") == {"f1": 67.6, "exact_match": 49.8}
    assert published_score("mbert", "translate-train", "panx") is None
    assert published_score("xlm-r-large", "no-mixup", "xnli") is None
    # The paper's averages verify that the values were copied correctly: QA counts as the mean of F1 and EM.
    averages = {("xlm-r-large", "zero-shot"): 70.1, ("xlm-r-large", "translate-train"): 72.6,
                ("xlm-r-large", "x-mixup"): 75.5, ("xlm-r-large", "filter"): 74.4, ("xlm-r-large", "xtune"): 76.5,
                ("mbert", "zero-shot"): 63.2, ("mbert", "x-mixup"): 70.0}  # fmt: skip
    for (model, method), average in averages.items():
        found = [published_score(model, method, task) or {} for task in TASK_ORDER]
        assert sum(sum(cell.values()) / len(cell) for cell in found) / 7 == pytest.approx(average, abs=0.1)
