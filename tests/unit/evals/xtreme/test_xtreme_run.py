"""`crosslift xtreme run` with a fake training: composing, selecting, predicting, scoring, resuming."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from small_encoders import WORDS
from tiny_task_model import export

from crosslift import app
from data_pipeline.records import DataError
from data_pipeline.sources.index import build_index
from data_pipeline.tasks.rows import read_task_file
from data_pipeline.xtreme.tasks import TASKS
from evals.errors import EvalError
from evals.xtreme.label_files import read_labels
from evals.xtreme.predict import EncoderPredictor
from evals.xtreme.run import run_xtreme
from evals.xtreme.run_file import XtremeRun
from training import start
from training.errors import TrainingEnded
from training.objectives.xmixup import XMixupConfig
from training.run_file import load_config

CONFIG = Path(__file__).resolve().parents[4] / "configs" / "xtreme.yaml"
LABELS = TASKS["xnli"].labels
STEPS = (2, 4, 6)
BEST = 4
ALL_WORDS = [word for words in WORDS.values() for word in words]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One untrained model for each checkpoint; all have X-Mixup, as some methods need."""
    folder = tmp_path_factory.mktemp("models")
    return {
        step: export(folder / str(step), "classification", LABELS, mixup_layer=1, step=step, seed=step)
        for step in STEPS
    }


class Stage:
    """Replaces training, exports and tracking."""

    def __init__(self, models: Mapping[int, Path]) -> None:
        self.models, self.calls = models, []  # type: ignore[var-annotated]
        self.steps: tuple[int, ...] = STEPS
        self.fails = False
        self.tracked = Tracked()

    def train(self, config: Path, nproc: int | None) -> None:
        self.calls.append("train")
        if self.fails:
            raise TrainingEnded(config, 2)
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
        for step in self.steps:
            folder = Path(values["output_dir"], "checkpoints", f"step-{step:08d}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "COMPLETE").write_text('{"files": {}}')
        (folder.parent / "step-00000009").mkdir(exist_ok=True)  # incomplete: no marker
        shutil.rmtree(Path(values["output_dir"], "model"), ignore_errors=True)
        shutil.copytree(self.models[max(self.steps)], Path(values["output_dir"], "model"))
        print("what training prints")

    def export(self, checkpoint: Path, folder: Path) -> None:
        self.calls.append("export")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.models[int(checkpoint.name.removeprefix("step-"))], folder)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Stage:
        monkeypatch.setattr("evals.xtreme.run.train_to_end", self.train)
        monkeypatch.setattr("evals.xtreme.run.parent_run", self.tracked)
        for name in ("export_checkpoint", "export_newest"):
            monkeypatch.setattr(f"evals.xtreme.selection.{name}", self.export)
        return self


@pytest.fixture
def stage(models: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(models).install(monkeypatch)


def text(rng: np.random.Generator) -> str:
    return " ".join(ALL_WORDS[at] for at in rng.integers(len(ALL_WORDS), size=rng.integers(2, 9)))


def write_rows(file: Path, language: str, n: int, seed: int, back: bool = True) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        row = {"id": f"{file.parent.name}-{number}", "group": f"g{number}", "language": language,
               "text_a": text(rng), "text_b": text(rng), "label": LABELS[int(rng.integers(3))]}  # fmt: skip
        if back and language != "en":
            row |= {"back_text_a": text(rng), "back_text_b": text(rng)}
        rows.append(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def relabel(file: Path, labels: list[str]) -> None:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "label": label}, ensure_ascii=False) for row, label in zip(rows, labels, strict=True)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path, models: dict[int, Path]) -> Path:
    """Prepared rows of en and de; the dev labels are the predictions of the checkpoint of step BEST."""
    folder = tmp_path / "data"
    for split, n in (("train", 30), ("dev", 24), ("test", 18)):
        for seed, language in enumerate(("en", "de")):
            write_rows(folder / split / f"{language}.jsonl", language, n, 10 * n + seed)
    best = EncoderPredictor.open(models[BEST])
    for language in ("en", "de"):
        file = folder / "dev" / f"{language}.jsonl"
        relabel(file, best.predict(list(read_task_file(file, "classification"))).values)
    return folder


def make(data: Path, output: Path, method: str = "x-mixup", **more: Any) -> XtremeRun:
    return XtremeRun(CONFIG, "xnli", "mbert", method, data, output, **more)


class Tracked:
    """Replaces `training.tracking.tracker.parent_run` and the tracker that it yields."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.artifacts: list[str] = []
        self.followed: list[tuple[Path, dict[str, Any]]] = []

    @contextmanager
    def __call__(
        self, folder: Path, section: Mapping[str, Any], params: Mapping[str, Any]
    ) -> Iterator[tuple[Tracked, dict[str, Any]]]:
        self.followed.append((folder, dict(params)))
        yield self, {"uri": f"sqlite:///{len(self.followed)}.db", "parent": "p1"}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.setdefault(step, {}).update(metrics)

    def artifact(self, path: Path, folder: str = "") -> None:
        self.artifacts.append(path.name)


def test_the_best_checkpoint_on_dev_predicts_the_test_rows(
    data: Path, tmp_path: Path, models: dict[int, Path], stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    output, tracked = tmp_path / "run", stage.tracked
    results = run_xtreme(make(data, output))
    assert stage.calls == ["train", "export", "export", "export"]  # the last step's export is there already
    selection = json.loads((output / "selection.json").read_bytes())
    assert selection["step"] == BEST
    assert selection["languages"] == ["de", "en"]
    assert selection["scores"]["4"] == 100
    assert max(score for step, score in selection["scores"].items() if step != "4") < 100
    assert json.loads((output / "model" / "crosslift.json").read_bytes())["step"] == BEST
    assert not list(output.glob(".*"))
    predictor = EncoderPredictor.open(models[BEST])
    right = {}
    for language in ("en", "de"):
        records = list(read_task_file(data / "test" / f"{language}.jsonl", "classification"))
        expected = predictor.predict(records)
        assert expected.mixed == 18  # English rows are their own sources
        assert read_labels(output / "predictions" / "xnli" / f"test-{language}.tsv", LABELS) == expected.values
        pairs = zip(expected.values, records, strict=True)
        right[language] = 100 * sum(label == record.example.label for label, record in pairs) / 18
    summary = results["summary"]
    assert {language: scores["accuracy"] for language, scores in summary["languages"].items()} == pytest.approx(right)
    assert summary["average"]["accuracy"] == pytest.approx(sum(right.values()) / 2)
    assert summary["gap"]["accuracy"] == pytest.approx(right["en"] - right["de"])
    assert summary["published"] == {"accuracy": 78.8}
    assert summary["difference"]["accuracy"] == pytest.approx(sum(right.values()) / 2 - 78.8)
    assert json.loads((output / "scores.json").read_bytes()) == results
    assert results["predicted"] == {"de": {"rows": 18, "mixed": 18}, "en": {"rows": 18, "mixed": 18}}
    out = capsys.readouterr().out
    assert "what training prints" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["de", f"{right['de']:.2f}"] in rows
    assert ["published", "78.80"] in rows
    assert tracked.metrics[BEST]["dev/score"] == 100
    assert tracked.metrics[BEST]["test/accuracy/de"] == pytest.approx(right["de"])
    assert tracked.metrics[BEST]["test/gap/accuracy"] == pytest.approx(right["en"] - right["de"])
    assert tracked.metrics[BEST]["test/n/de"] == 18
    assert tracked.artifacts == ["run.yaml", "scores.json", "table.txt"]
    assert (output / "table.txt").read_text() in out


def test_the_run_file_has_the_methods_settings_and_the_existing_rows(data: Path, tmp_path: Path, stage: Stage) -> None:
    run_xtreme(make(data, tmp_path / "run", nproc=2))
    config = load_config(tmp_path / "run" / "run.yaml")
    assert isinstance(config.objective, XMixupConfig)
    assert config.max_steps == 4  # 4 epochs of 60 rows, 64 a step
    assert config.data.languages == ("en", "de")
    assert config.data.sources[0].files == ("train/en.jsonl", "train/de.jsonl")
    assert (config.data_dir, config.output_dir) == (data, tmp_path / "run" / "training")
    tracking = config.tracking
    assert (tracking.uri, tracking.parent, tracking.run_name) == ("sqlite:///1.db", "p1", "run-training")


def test_a_second_call_continues_where_the_first_stopped(
    data: Path, tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(data, tmp_path / "run")
    first = run_xtreme(run)
    stage.calls.clear()
    opened: list[Path] = []
    original = EncoderPredictor.open
    monkeypatch.setattr(EncoderPredictor, "open", lambda path: (opened.append(path), original(path))[1])
    assert run_xtreme(run) == first
    assert (stage.calls, opened) == (["train"], [])
    (tmp_path / "run" / "predictions" / "xnli" / "test-de.tsv").unlink()
    (tmp_path / "run" / "predictions" / "made_by.json").unlink()
    assert run_xtreme(run) == first
    assert opened == [tmp_path / "run" / "model"]
    opened.clear()
    run_xtreme(make(data, tmp_path / "run", mixup="off"))  # other predictions, and another dev score each
    assert len(opened) == len(STEPS) + 1


def test_a_folder_of_another_run_is_refused(data: Path, tmp_path: Path, stage: Stage) -> None:
    tracked = stage.tracked
    run_xtreme(make(data, tmp_path / "run"))
    with pytest.raises(
        EvalError, match=r"run\.yaml: belongs to a run with another objective.layer; name a new --output"
    ):
        run_xtreme(make(data, tmp_path / "run", overrides=("objective.layer=5",)))
    assert len(tracked.followed) == 1  # the refused run is not tracked
    run_xtreme(make(data, tmp_path / "run", nproc=4))  # ranks and stores may differ
    assert tracked.followed[0] == tracked.followed[1]
    assert tracked.followed[1][0] == tmp_path / "run"
    assert tracked.followed[1][1]["method"] == "x-mixup"


def test_a_run_file_that_training_refused_can_be_corrected(data: Path, tmp_path: Path, stage: Stage) -> None:
    stage.fails = True
    with pytest.raises(TrainingEnded, match="ended with status 2"):
        run_xtreme(make(data, tmp_path / "run", overrides=("optimizer.learning_rat=1",)))
    stage.fails = False
    run_xtreme(make(data, tmp_path / "run"))
    assert load_config(tmp_path / "run" / "run.yaml").optimizer.learning_rate == 5e-6


def test_an_own_model_needs_its_path(data: Path, tmp_path: Path, stage: Stage) -> None:
    run = XtremeRun(CONFIG, "xnli", "own", "x-mixup", data, tmp_path / "run")
    with pytest.raises(EvalError, match=r"xtreme\.yaml: no section gives model\.path; add model\.path=DIR"):
        run_xtreme(run)
    assert not (tmp_path / "run").exists()
    run_xtreme(replace(run, overrides=("model.path=encoder",)))
    assert load_config(tmp_path / "run" / "run.yaml").model.path == "encoder"


def test_columns_that_are_empty_in_all_training_rows_are_left_out(data: Path, tmp_path: Path, stage: Stage) -> None:
    """A source that maps a column which none of its rows has is refused, as a typo would be."""
    for method, more in (("zero-shot", {"mixup": "off"}), ("translate-train", {}), ("x-mixup", {})):
        run_xtreme(make(data, tmp_path / method, method, **more))
        config = load_config(tmp_path / method / "run.yaml")
        backs = {"back_text_a", "back_text_b"} if method != "zero-shot" else set()
        columns = config.data.sources[0].columns.named()
        assert set(columns) == {"id", "group", "language", "text_a", "text_b", "label"} | backs
        build_index(
            config.data.sources, config.data.languages, data, tmp_path / "index" / method, task=config.data.task
        )  # fmt: skip


def test_zero_shot_selects_on_english_dev_rows_only(data: Path, tmp_path: Path, stage: Stage) -> None:
    results = run_xtreme(make(data, tmp_path / "run", "zero-shot", mixup="off"))
    assert results["selection"]["languages"] == ["en"]
    assert load_config(tmp_path / "run" / "run.yaml").data.languages == ("en",)
    assert list(results["summary"]["languages"]) == ["de", "en"]
    wider = run_xtreme(make(data, tmp_path / "wide", "zero-shot", overrides=("select=all",)))
    assert wider["selection"]["languages"] == ["de", "en"]


def test_the_last_checkpoint_is_used_without_dev_rows(
    data: Path, tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(data / "dev")
    results = run_xtreme(make(data, tmp_path / "run"))
    assert results["selection"] == {"step": 6, "languages": [], "mixup": "auto", "scores": {}}
    assert "the last checkpoint is used" in capsys.readouterr().err


def test_the_gap_reduction_is_reported_against_a_baseline(
    data: Path, tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    run_xtreme(make(data, tmp_path / "base", "zero-shot", mixup="off"))
    file = tmp_path / "base" / "scores.json"
    before = json.loads(file.read_bytes())
    before["summary"]["gap"] = {"accuracy": 40.0}
    file.write_text(json.dumps(before), encoding="utf-8")
    results = run_xtreme(make(data, tmp_path / "run", baseline=tmp_path / "base"))
    gap = results["summary"]["gap"]["accuracy"]
    assert results["summary"]["baseline"]["reduction"]["accuracy"] == pytest.approx(100 * (40 - gap) / 40)
    assert f"gap cut by* {100 * (40 - gap) / 40:.1f} %" in " ".join(capsys.readouterr().out.split())
    file.write_text(json.dumps({**before, "task": "pawsx"}), encoding="utf-8")
    stage.calls.clear()
    with pytest.raises(EvalError, match=r"scores\.json: is of task 'pawsx', not 'xnli'"):
        run_xtreme(make(data, tmp_path / "run", baseline=tmp_path / "base"))
    assert not stage.calls  # refused before training


def test_unlabelled_test_rows_give_predictions_but_no_scores(
    data: Path, tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (data / "test").iterdir():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        bare = [{key: value for key, value in row.items() if key != "label"} for row in rows]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bare), encoding="utf-8")
    results = run_xtreme(make(data, tmp_path / "run"))
    assert results["summary"] is None
    assert len(read_labels(tmp_path / "run" / "predictions" / "xnli" / "test-de.tsv", LABELS)) == 18
    assert "predictions and no scores" in capsys.readouterr().out


def options_named(message: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", message))


def options_of(*command: str) -> set[str]:
    found: Any = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    return {option for parameter in found.params for option in parameter.opts}


def test_error_messages_name_only_options_of_their_command() -> None:
    """Each message of modules that one command uses, and of those that several use."""
    root = CONFIG.parents[1]
    run, prepare = options_of("xtreme", "run"), options_of("xtreme", "prepare")
    of_files = {
        "evals/xtreme/run*.py": run,
        "evals/xtreme/selection.py": run,
        "evals/xtreme/prepared.py": run | options_of("xtreme", "soft-labels"),
        "evals/xtreme/teacher.py": options_of("xtreme", "soft-labels"),
        "evals/xtreme/retrieval.py": options_of("xtreme", "retrieve"),
        "evals/mgsm/mgsm.py": options_of("eval") & options_of("score"),
        "data_pipeline/xtreme/*.py": prepare & run
        | {"--remake"},  # prepare's messages, in which run replaces the options
    }
    for pattern, options in of_files.items():
        for file in root.glob(pattern):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            refusals = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Raise)]
            assert [text for text in refusals if not options_named(text) <= options] == [], file.name


def test_xtremes_own_files_are_prepared_first(tmp_path: Path, stage: Stage) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "raw" / "xnli"
    source.mkdir(parents=True)
    for name, n in (("train-en", 12), ("dev-en", 12), ("dev-de", 12), ("test-en", 12), ("test-de", 12)):
        rows = [f"{text(rng)}\t{text(rng)}\t{LABELS[number % 3]}\n" for number in range(n)]
        (source / f"{name}.tsv").write_text("".join(rows), encoding="utf-8")
    results = run_xtreme(make(tmp_path / "raw", tmp_path / "run", "zero-shot"))
    assert (tmp_path / "run" / "data" / "test" / "de.jsonl").is_file()
    assert list(results["summary"]["languages"]) == ["de", "en"]
    assert load_config(tmp_path / "run" / "run.yaml").max_steps == 1
    for file in source.iterdir():
        os.utime(file)  # other times, same content
    assert run_xtreme(make(tmp_path / "raw", tmp_path / "run", "zero-shot"))["summary"] == results["summary"]
    kept = (source / "dev-de.tsv").read_bytes()
    (source / "dev-de.tsv").write_bytes(kept + kept)
    with pytest.raises(
        DataError, match=r"content of dev/de: dev-de\.tsv\); name a new --output, or run it with"
    ) as error:
        run_xtreme(make(tmp_path / "raw", tmp_path / "run", "zero-shot"))
    assert options_named(str(error.value)) <= options_of("xtreme", "run")
    prepared = make(tmp_path / "run" / "data", tmp_path / "again", "zero-shot")
    assert run_xtreme(prepared)["summary"]["average"] == results["summary"]["average"]
    other = XtremeRun(CONFIG, "pawsx", "mbert", "zero-shot", tmp_path / "run" / "data", tmp_path / "other")
    with pytest.raises(EvalError, match=r"prepared\.json: holds the rows of xnli, not of pawsx"):
        run_xtreme(other)
    with pytest.raises(EvalError, match="is prepared already, so --translations cannot be added"):
        run_xtreme(make(tmp_path / "run" / "data", tmp_path / "more", translations=tmp_path))


@pytest.mark.parametrize("status", [1, 2, 75])
def test_a_failed_training_ends_the_run_with_its_status(
    data: Path, tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("evals.xtreme.run.train_to_end", start.train_to_end)
    monkeypatch.setattr(start, "train", lambda *_: status)
    with pytest.raises(TrainingEnded, match=f"training ended with status {status}; its messages are above") as ended:
        run_xtreme(make(data, tmp_path / "run"))
    assert ended.value.exit_status == status


def test_an_interrupted_training_is_an_interrupt(
    data: Path, tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evals.xtreme.run.train_to_end", start.train_to_end)
    monkeypatch.setattr(start, "train", lambda *_: 130)
    with pytest.raises(KeyboardInterrupt):
        run_xtreme(make(data, tmp_path / "run"))


def test_rows_that_a_method_cannot_learn_from_are_refused_before_training(
    data: Path, tmp_path: Path, stage: Stage
) -> None:
    write_rows(data / "train" / "de.jsonl", "de", 30, 0, back=False)
    with pytest.raises(EvalError, match=r"no back-translations .* set objective.source_schedule=null"):
        run_xtreme(make(data, tmp_path / "a"))
    run_xtreme(make(data, tmp_path / "b", overrides=("objective.source_schedule=null",)))
    (data / "train" / "de.jsonl").unlink()
    for method in ("translate-train", "x-mixup"):
        with pytest.raises(EvalError, match=r"only 'en', but the method learns from translations; give --translations"):
            run_xtreme(make(data, tmp_path / "c", method))
    (data / "train" / "en.jsonl").unlink()
    with pytest.raises(EvalError, match=r"en\.jsonl: missing, or empty; training needs it"):
        run_xtreme(make(data, tmp_path / "c", "zero-shot"))
    assert stage.calls.count("train") == 1


def tagged(file: Path, language: str, **labels: Any) -> None:
    row = {"id": "r0", "group": "g0", "language": language, "words": list(WORDS["en"][:2]), **labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")


def test_translations_for_a_tagger_need_a_teacher(tmp_path: Path, models: dict[int, Path], monkeypatch: Any) -> None:
    folder = tmp_path / "panx"
    for split in ("train", "dev", "test"):
        tagged(folder / split / "en.jsonl", "en", tags=["O", "B-LOC"])
    tagged(folder / "train" / "de.jsonl", "de", back_words=["old", "bridge"])
    tags = TASKS["panx"].labels
    Stage({s: export(tmp_path / f"m{s}", "tagging", tags, step=s) for s in STEPS}).install(monkeypatch)
    run = {"config": CONFIG, "task": "panx", "model": "mbert", "method": "x-mixup", "data_dir": folder}
    with pytest.raises(EvalError, match=r"de\.jsonl:1: neither tags nor soft_tags; a teacher writes them"):
        run_xtreme(XtremeRun(**run, output=tmp_path / "a"))
    with pytest.raises(EvalError, match=r"holds no <language>\.jsonl of panx's languages"):
        run_xtreme(XtremeRun(**run, output=tmp_path / "a", soft_labels=tmp_path / "nothing"))
    soft = [[1 / len(tags)] * len(tags)] * 2
    tagged(tmp_path / "soft" / "de.jsonl", "de", soft_tags=soft, back_words=["old", "bridge"])
    run_xtreme(XtremeRun(**run, output=tmp_path / "a", soft_labels=tmp_path / "soft"))
    files = load_config(tmp_path / "a" / "run.yaml").data.sources[0].files
    assert files == ("train/en.jsonl", str(tmp_path / "soft" / "de.jsonl"))
