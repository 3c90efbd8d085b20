"""A run end to end: trained without a compiler, exported, opened, used to generate, scored; and by every launcher."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from ranks import SOURCE, checked, environment, run_command, run_ranks
from tiny_run import LANGUAGES, RANK_ITEMS, XMIXUP, rank_values, write_config, write_data, write_task_data

from data_pipeline.records import ChatSample, Message, Split
from modeling.export_info import VECTORS_FILE
from training.config import RunConfig
from training.objectives.base import ObjectiveParts
from training.objectives.shifcon import ShifConConfig

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.text.chat import Chat
    from modeling.generation import ShiftedGenerator


def crosslift(*arguments: str, extra: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "crosslift.py", *arguments]
    return subprocess.run(command, env=environment(extra), cwd=SOURCE, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", RANK_ITEMS)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ShifCon run on one rank, with no compiler on the PATH and MLflow on."""
    folder = tmp_path_factory.mktemp("run")
    output = folder / "run"
    changes = {
        "max_steps": 6,
        "tracking": {"enabled": True, "sync_seconds": 0.5, "log_every": 1},
        "data.heldout_items": 12,
        "evaluation": {"every": 3, "items": 4, "swapped_prompts": True},
        "objective.shift_first_token": False,
    }
    values = rank_values(data, output, **changes)
    bare = folder / "bin"
    bare.mkdir()
    (bare / "python").symlink_to(sys.executable)
    for tool in ("ps", "uname", "git"):
        if found := shutil.which(tool):
            (bare / tool).symlink_to(found)
    extra = {"PATH": str(bare), "CC": "", "CXX": "", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    assert shutil.which("cc", path=str(bare)) is None
    done = crosslift("train", str(write_config(folder / "run.yaml", values)), "--nproc", "1", extra=extra)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / "extensions").exists(), "DeepSpeed compiled something"
    return output


def test_the_export_opens_in_plain_transformers(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(trained / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert AutoTokenizer.from_pretrained(trained / "model").decode([5, 6]) is not None
    assert model.config.use_cache


def test_the_export_passed_its_check_and_has_the_prompts_of_training(trained: Path, finished: Finished) -> None:
    from transformers import AutoTokenizer

    from modeling.export_info import ExportInfo

    check = ExportInfo.read(trained / "model").check
    assert check is not None
    assert (check["passed"], check["attention"], check["bound"]) == (True, "sdpa", 1e-4)
    generation = json.loads((trained / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == finished.chat.template.end_id
    ids, _ = finished.chat.prompt_ids([Message("user", "3 na 4?")], "sw", "sw")
    conversation = [{"role": "user", "content": "3 na 4?"}]
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    found = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False, language="sw")
    assert found == ids.tolist()


def test_the_run_folder_records_metrics_of_every_kind(trained: Path) -> None:
    names: set[str] = set()
    for line in (trained / "record.jsonl").read_text().splitlines():
        event = json.loads(line)
        names |= set(event["values"]) if event["kind"] == "metrics" else set()
    wanted = {"train/loss", "train/contrastive", "train/grad_norm", "train/tokens_per_second", "train/step_seconds"}
    wanted |= {"memory/host_peak_gib", "eval/loss", "shift/norm/sw", "shift/restoration_error/zh"}
    wanted |= {f"{kind}/{code}" for code in LANGUAGES for kind in ("train/loss", "train/token_share", "eval/loss")}
    wanted |= {f"eval/loss_swapped/{code}" for code in LANGUAGES}
    assert wanted <= names


def test_every_checkpoint_has_all_metrics_that_may_select_the_best_one(trained: Path) -> None:
    from training.checkpoints.checkpoint import step_folders
    from training.checkpoints.run_state import RunState
    from training.checks.metric_names import metric_names
    from training.run_file import validate

    states = [RunState.read(folder) for folder in step_folders(trained)]
    config = validate(states[-1].config, "state.json")
    known = set(metric_names(config.objective, config.data.languages, config.evaluation.swapped_prompts))
    measured = [state for state in states if state.step % config.evaluation.every == 0]
    assert measured
    for state in measured:
        assert known - set(state.metrics) == {"memory/gpu_peak_gib"}  # which only runs on GPUs have


def test_mlflow_has_the_run_with_its_artefacts(trained: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{trained}/mlflow.db")
    experiment = client.get_experiment_by_name("crosslift")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["objective.name"] == "shifcon"
    assert "deepspeed" in run.data.tags
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(1, 7))
    found = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "language_vectors.safetensors", "plots"} <= found


def test_generate_answers_with_the_shift_on(trained: Path) -> None:
    done = run_command(
        "generate", str(trained / "model"), "--language", "sw", "--prompt", "3 maembe 4 ?", "--json",
        "--max-new-tokens", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["language"], row["shifted"]) == ("sw", True)


class Finished(NamedTuple):
    """A finished run, opened for generation as a user opens it."""

    checkpoint: Path
    config: RunConfig
    generator: ShiftedGenerator
    chat: Chat

    def losses(self, sample: ChatSample, language: str, response_language: str, shifted: bool = True) -> Tensor:
        """(N,): the cross entropy of each label, given to the generator after its prompt."""
        import torch
        from torch.nn import functional

        from modeling.generation import Prompt

        ids = torch.tensor(sample.input_ids[None]).long()
        prompt = Prompt(ids[0, : int(sample.labels.argmax())].tolist(), language, response_language)
        shift = self.generator.shifted([prompt], torch.ones(1, len(prompt.ids), dtype=torch.int64))
        with torch.no_grad(), shift if shifted else nullcontext():
            logits = self.generator.model(ids, use_cache=False).logits[0]
        labels = torch.tensor(sample.labels).nonzero()[:, 0]
        return functional.cross_entropy(logits[labels - 1], ids[0, labels], reduction="none")


@pytest.fixture(scope="module")
def finished(trained: Path) -> Finished:
    from evals.opening import open_model
    from training.checkpoints.disks import shared_disk
    from training.checkpoints.run_state import RunState
    from training.checkpoints.search import find_checkpoint
    from training.run_file import validate

    checkpoint = find_checkpoint("auto", [shared_disk(trained)])
    assert checkpoint is not None
    config = validate(RunState.read(checkpoint).config, str(checkpoint))
    return Finished(checkpoint, config, *open_model(str(trained / "model")))


def test_generation_from_the_export_has_the_losses_of_training(trained: Path, finished: Finished) -> None:
    """The held-out losses, from the export alone, are those that the run logged at its last step."""
    import torch

    from training.run_folder.prepare import open_index

    events = map(json.loads, (trained / "record.jsonl").read_text().splitlines())
    logged = [event["values"] for event in events if event["kind"] == "metrics" and event["step"] == 6][-1]
    index, items = open_index(finished.config), finished.config.evaluation.items
    for number, language in enumerate(LANGUAGES):
        records = [index.record(int(row)) for row in index.rows(number, Split.HELD_OUT)[:items]]
        samples = [finished.chat.tokenize(record) for record in records]
        found, plain = (
            torch.cat([finished.losses(sample, language, language, shifted) for sample in samples])
            for shifted in (True, False)
        )
        assert float(found.mean()) == pytest.approx(logged[f"eval/loss/{language}"], rel=2e-6)
        moved = float((found - plain).abs().mean())
        assert moved == 0 if language == "en" else moved > 1e-4, "the shift changes these losses"


def test_each_token_of_the_export_is_shifted_as_in_training(finished: Finished) -> None:
    """Answers in another language than their prompts: training's objective on a packed row, the generator, and the
    formulas (docs/methods.md, section 1.2) from the last checkpoint's vectors and the exported weights give the same
    losses."""
    import torch
    from torch.nn import functional

    from data_pipeline.batching.chat import ChatCollator
    from data_pipeline.batching.grid import Grid
    from data_pipeline.batching.packer import Packer
    from data_pipeline.records import Conversation, Record
    from modeling.loading import load_pretrained
    from modeling.shifcon.language_vectors import LanguageVectors
    from training.objectives.shifcon import ShifCon

    config, chat = finished.config, finished.chat
    assert isinstance(config.objective, ShifConConfig)
    turns = [
        ("sw", "zh", "Basi lina watu 3?", "答案：7"),
        ("zh", "en", "3加4？", "Answer: 7"),
        ("en", "de", "3+4?", "7"),
    ]
    samples = [
        chat.tokenize(
            Record("", str(n), language, "", Conversation((Message("user", q), Message("assistant", a)), response))
        )
        for n, (language, response, q, a) in enumerate(turns)
    ]
    directory = finished.generator.model.name_or_path
    model: Any = load_pretrained(directory, torch.float32, "eager", "cpu")

    objective = ShifCon(
        model,
        config.objective,
        config.objective.layers,
        ObjectiveParts("chat", config.data.languages, config.data.dominant),
    )
    objective.load(finished.checkpoint)
    batch = Packer(Grid("packed", 512, 512), ChatCollator(0)).batch(samples)
    assert len(batch.input_ids) == 1
    with torch.no_grad():
        trained = objective.loss_terms(SimpleNamespace(forward=model), batch).label_losses
    objective.shift.remove()
    generated = torch.cat(
        [finished.losses(s, *languages) for s, (*languages, _, _) in zip(samples, turns, strict=True)]
    )

    vectors = LanguageVectors.load(finished.checkpoint / VECTORS_FILE)
    expected = []
    for sample, (language, response, _, _) in zip(samples, turns, strict=True):
        handles = []
        for sign, layer in zip((1, -1), config.objective.layers, strict=True):
            mean = dict(zip(vectors.languages, vectors.at(layer), strict=True))
            delta = torch.stack(
                [sign * (mean["en"] - mean[response if is_label else language]) for is_label in sample.labels]
            )
            delta[0] = 0  # shift_first_token is off

            def add(_: object, args: tuple, delta: Tensor = delta) -> tuple:
                return (args[0] + delta, *args[1:])

            handles.append(model.model.layers[layer].register_forward_pre_hook(add))
        ids = torch.tensor(sample.input_ids[None]).long()
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        for place in range(1, len(sample)):
            if sample.labels[place]:
                expected.append(functional.cross_entropy(logits[place - 1], ids[0, place]))
    torch.testing.assert_close(trained, torch.stack(expected), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(generated, torch.stack(expected), rtol=2e-6, atol=2e-6)


def test_a_shifcon_export_without_vectors_is_refused(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(trained / "model", copy)
    (copy / "language_vectors.safetensors").unlink()
    done = run_command("generate", str(copy), "--prompt", "x")
    assert done.returncode == 2
    assert "language_vectors.safetensors: missing" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_eval_scores_mgsm_and_keeps_every_output(trained: Path, tmp_path: Path) -> None:
    tests = tmp_path / "mgsm"
    tests.mkdir()
    for language in ("en", "sw", "bn"):
        (tests / f"mgsm_{language}.tsv").write_text("2 apples 3 ?\t5\n4 apples 4 ?\t8\n", encoding="utf-8")
    output = tmp_path / "scores"
    done = run_command(
        "eval", str(trained / "model"), "--tasks", "mgsm", "--data-dir", str(tests), "--output", str(output),
        "--max-new-tokens", "8", "--limit", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bn†" in done.stdout
    assert "no language vector: ran unshifted" in done.stdout
    results = json.loads((output / "results.json").read_text())
    assert set(results["languages"]) == {"en", "sw", "bn"}
    for language in results["languages"]:
        assert len((output / "predictions" / f"mgsm_{language}.jsonl").read_text().splitlines()) == 2
    card = (trained / "model" / "README.md").read_text()
    assert f"scores: in the model card {trained / 'model' / 'README.md'}" in done.stderr
    assert "bn†" in card.partition("## Scores")[2].partition("## Limits")[0]
    assert "### Held-out loss" in card, "of the last step, by the run itself"
    again = run_command("export", str(trained), "--output", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "README.md").read_text().count("bn†") == 1
    baked = run_command("export", str(trained), "--bake", "sw", "--output", str(tmp_path / "baked"))
    assert baked.returncode == 2
    assert "was trained without a shift of the first token" in baked.stderr
    assert not (tmp_path / "baked").exists()


def test_the_model_card_has_the_run_s_own_counts_and_start(trained: Path) -> None:
    from training.checkpoints.card_sections import split

    card = (trained / "model" / "README.md").read_text()
    sections = split(card, "## ")
    assert f"| en | {RANK_ITEMS - 12:,} | 240 | 50.0% |" in sections["Data"]
    state = json.loads((trained / "checkpoints" / "step-00000006" / "state.json").read_text())
    for name in ("en.jsonl", "zh.jsonl"):
        assert f"| {name} | `{state['fingerprint'][name]}` |" in sections["Data"]
    assert "| steps | 6 |" in sections["Training"]
    assert str(trained) not in card


@pytest.mark.parametrize("objective", ["shifcon", "xmixup"])
def test_bf16_trains_and_exports_under_zero_3(objective: str, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    changes = {"max_steps": 4, "precision": "bf16", "gradient_checkpointing": True}
    if objective == "xmixup":
        data, changes = write_task_data(tmp_path / "data", RANK_ITEMS), {**XMIXUP, **changes}
    values = rank_values(data, tmp_path / "run", **changes)
    done = run_ranks(["-m", "training", str(write_config(tmp_path / "run.yaml", values))], 2)
    checked(done)
    assert "reopened the export" in done[0].stderr
    kinds = {str(tensor.dtype) for tensor in load_file(tmp_path / "run/model/model.safetensors").values()}
    assert kinds == {"torch.bfloat16"}
    events = [json.loads(line) for line in (tmp_path / "run" / "record.jsonl").read_text().splitlines()]
    steps = [event["values"] for event in events if event["kind"] == "metrics"]
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    if objective == "xmixup":
        learned = load_file(tmp_path / "run/model/xmixup.safetensors")
        assert all(abs(float(learned[name]) - start) > 1e-4 for name, start in (("w", 1), ("b", 0)))


PHASES = {"waiting for data", "agreeing on the step", "forward 1", "backward", "all-reduce", "update"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of `by_launcher`."""
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def by_launcher(data: Path, folder: Path) -> dict[str, list[float]]:
    """Losses of one 2-rank run, started by three launchers; the first also writes a profile."""
    rank_program = ["-m", "training"]
    launchers = {
        "crosslift": [sys.executable, "crosslift.py", "train"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *rank_program],
        "bare": [],
    }
    losses = {}
    for name, command in launchers.items():
        output = folder / name
        config = str(write_config(folder / f"{name}.yaml", rank_values(data, output, max_steps=3)))
        if name == "bare":
            checked(run_ranks([*rank_program, config], world_size=2))
        else:
            tail = ["--nproc", "2", "--profile", "1"] if name == "crosslift" else []
            extra = {"MASTER_PORT": "29611"}
            done = subprocess.run(
                [*command, config, *tail], env={**environment(), **extra}, cwd=SOURCE, capture_output=True, text=True,
                timeout=240,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
        events = [json.loads(line) for line in (output / "record.jsonl").read_text().splitlines()]
        losses[name] = [event["values"]["train/loss"] for event in events if event["kind"] == "metrics"]
    return losses


def test_the_profile_holds_the_phases_of_the_chosen_step(by_launcher: dict[str, list[float]], folder: Path) -> None:
    """That it changes no number is seen below: only one of the launchers' runs is profiled."""
    (trace,) = (folder / "crosslift" / "profile").iterdir()
    assert trace.name == "from-step-3.json.gz"
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    (step,) = [each for each in ranges if each["name"].startswith("ProfilerStep")]
    phases = [each for each in ranges if each["tid"] == step["tid"] and each["name"] in PHASES]
    assert {each["name"] for each in phases} == PHASES
    for one, following in itertools.pairwise(sorted(phases, key=lambda each: each["ts"])):
        assert one["ts"] + one["dur"] <= following["ts"], "phases follow each other"
    update = next(each for each in phases if each["name"] == "update")
    (adam,) = {each["name"] for each in ranges if "AdamW" in each["name"]}
    inside = [each for each in ranges if each["name"] == adam]
    assert all(update["ts"] <= each["ts"] <= update["ts"] + update["dur"] for each in inside)
    matrices = [event for event in events if event.get("name") == "aten::mm"]
    for name in ("forward 1", "backward"):
        first = next(each for each in phases if each["name"] == name)
        assert any(first["ts"] <= each["ts"] <= first["ts"] + first["dur"] for each in matrices), name
    assert not list((folder / "torchrun").glob("profile"))


@pytest.mark.parametrize("launcher", ["torchrun", "bare"])
def test_every_launcher_starts_the_same_loop(by_launcher: dict[str, list[float]], launcher: str) -> None:
    assert len(by_launcher["crosslift"]) == 3
    assert by_launcher[launcher] == by_launcher["crosslift"]


@pytest.mark.skipif(
    shutil.which("deepspeed", path=os.path.dirname(sys.executable)) is None, reason="no deepspeed launcher"
)
def test_the_deepspeed_launcher_starts_the_same_loop_too(
    data: Path, tmp_path: Path, by_launcher: dict[str, list[float]]
) -> None:
    config = write_config(tmp_path / "run.yaml", rank_values(data, tmp_path / "run", max_steps=3))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", "2", "--master_port", "29612", "--module", "training", str(config)]
    extra = {"PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, env=environment(extra), cwd=SOURCE, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    events = [json.loads(line) for line in (tmp_path / "run" / "record.jsonl").read_text().splitlines()]
    assert [e["values"]["train/loss"] for e in events if e["kind"] == "metrics"] == by_launcher["crosslift"]
