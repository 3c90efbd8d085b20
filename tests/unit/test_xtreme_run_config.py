"""evals/xtreme/run_config.py: every run that configs/xtreme.yaml promises is one that `crosslift train` accepts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from data_pipeline.xtreme.tasks import TASKS
from evals.errors import EvalError
from evals.xtreme.run_config import compose, read_plan, steps_of
from training.config import RunConfig
from training.objective_config import FineTuneConfig, XMixupConfig
from training.run_file import validate

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "xtreme.yaml"
SECTIONS = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
TRAINED = [name for name, task in TASKS.items() if task.kind != "retrieval"]


def run_of(task: str, model: str, method: str, *overrides: str) -> RunConfig:
    plan = read_plan(CONFIG, task, model, method, overrides)
    chosen = plan.task.languages if plan.train == "all" else (plan.dominant,)
    files = {language: f"train/{language}.jsonl" for language in sorted(chosen, key=lambda each: each != "en")}
    return validate(compose(plan, Path("rows"), Path("out"), files, 1000, {}), "composed")


@pytest.mark.parametrize(
    ("task", "model", "method"), list(itertools.product(TRAINED, SECTIONS["models"], SECTIONS["methods"]))
)
def test_every_task_model_and_method_is_a_run(task: str, model: str, method: str) -> None:
    run = run_of(task, model, method)
    assert run.data.task is not None
    assert (run.data.task.kind, run.data.task.labels) == (TASKS[task].kind, TASKS[task].labels)
    assert run.data.slots_per_step == (32 if TASKS[task].kind == "qa" else 64)
    assert run.data.sequence_length == (384 if TASKS[task].kind == "qa" else 128)
    assert run.optimizer.learning_rate == (3e-5 if task == "tydiqa" else 5e-6)


@pytest.mark.parametrize(
    ("task", "alpha", "layer", "k"), [("xnli", 0.4, 0, 1000), ("udpos", 0.8, 3, 1000), ("mlqa", 0.2, 15, 2000)]
)
def test_x_mixup_has_the_settings_of_the_paper(task: str, alpha: float, layer: int, k: float) -> None:
    objective = run_of(task, "xlm-r-large", "x-mixup").objective
    assert isinstance(objective, XMixupConfig)
    assert (objective.alpha, objective.layer, objective.source_schedule) == (alpha, layer, k)


def test_zero_shot_reads_english_alone() -> None:
    run = run_of("xnli", "mbert", "zero-shot")
    assert isinstance(run.objective, FineTuneConfig)
    assert run.data.languages == ("en",)


def test_an_override_comes_last() -> None:
    objective = run_of("xnli", "xlm-r-large", "x-mixup", "objective.layer=7").objective
    assert isinstance(objective, XMixupConfig)
    assert objective.layer == 7


def test_an_epoch_is_as_many_steps_as_hold_its_rows() -> None:
    assert [steps_of(*each) for each in ((1, 64, 64), (1, 65, 64), (4, 1000, 64), (0.01, 10, 64))] == [1, 2, 63, 1]


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(EvalError, match="methods has no 'x-mix'"):
        read_plan(CONFIG, "xnli", "mbert", "x-mix")
