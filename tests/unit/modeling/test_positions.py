"""Models with learned position embeddings: longer samples are refused, and answers end at the last position."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import run_values
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from data_pipeline.batching.chat import ChatCollator
from data_pipeline.batching.grid import Grid
from data_pipeline.batching.packer import Packer
from evals.errors import EvalError
from evals.opening import Question, answer, open_model
from modeling.errors import ModelError
from modeling.generation import Prompt, ShiftedGenerator
from modeling.layers import position_limit, position_table
from training.check import check_run
from training.checks.front import check_model_files, check_starting_model
from training.config import RunConfig
from training.engine.start_checks import check_packing
from training.errors import ConfigError
from training.run_file import validate
from training.run_folder.prepare import prepare

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
TABLES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64},
    "opt": {"max_position_embeddings": 64, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_bigcode": {"n_positions": 64},
    "gpt_neo": {"max_position_embeddings": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    "bert": {"max_position_embeddings": 64, "intermediate_size": 64},
    "xlm-roberta": {"max_position_embeddings": 66, "pad_token_id": 1, "intermediate_size": 64},
}
COMPUTED = {"llama": {"intermediate_size": 64, "max_position_embeddings": 64}, "bloom": {}}


def begin_training(config: RunConfig) -> None:
    """What `crosslift train` does before any rank starts."""
    check_model_files(config)
    check_starting_model(config.model, config.data, config.objective, prepare(config))


@pytest.mark.parametrize("model_type", TABLES)
def test_the_position_limit_is_the_longest_input_that_the_model_runs_with(model_type: str) -> None:
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **{**SMALL, **TABLES[model_type]})).eval()
    assert (position_table(model) is not None, position_limit(model)) == (True, 64)
    with torch.no_grad():
        model(input_ids=torch.full((1, 64), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 65), 5))


@pytest.mark.parametrize(("model_type", "limit"), [("llama", 64), ("bloom", None)])
def test_computed_positions_have_no_embedding_table(model_type: str, limit: int | None) -> None:
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **{**SMALL, **COMPUTED[model_type]}))
    assert (position_table(model), position_limit(model)) == (None, limit)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, prepared_run: Any) -> Path:
    """A GPT-2 of 64 positions with the tiny run's tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SMALL, **TABLES["gpt2"])).save_pretrained(folder)
    AutoTokenizer.from_pretrained(prepared_run.prepared.tokenizer_dir).save_pretrained(folder)
    return folder


def test_check_and_train_refuse_longer_samples_with_both_numbers(gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    message = r"^data\.sequence_length: 96 tokens, but the model has positions for 64; set data\.sequence_length=64"
    made = {key: value for key, value in SMALL.items() if key != "vocab_size"} | {
        "model_type": "gpt2",
        "n_positions": 64,
    }
    for changes in ({"model": {"path": str(gpt2)}, "tokenizer": {}}, {"model": {"init": made}}):
        config = validate(run_values(corpus, tmp_path / "run", **changes), "test")
        for begin in (lambda config: list(check_run(config)), begin_training):
            with pytest.raises(ConfigError, match=message):
                begin(config)
    fits = {"model": {"path": str(gpt2)}, "tokenizer": {}, "data.sequence_length": 64}
    check_model_files(validate(run_values(corpus, tmp_path / "run", **fits), "test"))


def test_samples_beyond_the_positions_of_a_rotary_model_give_a_warning(corpus: Path, tmp_path: Path) -> None:
    values = run_values(corpus, tmp_path / "run", **{"model.init.max_position_embeddings": 64})
    lines = list(check_run(validate(values, "test")))
    assert any(line.startswith("warning: data.sequence_length is 96, but the model was made for 64") for line in lines)
    assert lines[-1] == "ready to train"


@pytest.fixture
def generator(gpt2: Path) -> ShiftedGenerator:
    found = ShiftedGenerator.from_directory(gpt2)
    found.end_ids = []  # so that only the limits end an answer
    return found


def test_answers_end_at_the_limit_whatever_else_is_in_the_batch(
    generator: ShiftedGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [Prompt([5] * length) for length in (10, 60, 58, 63, 58)]
    with caplog.at_level(logging.WARNING):
        together = generator.generate(prompts, max_new_tokens=20)
    assert [len(each.token_ids) for each in together] == [20, 4, 6, 1, 6]
    assert "4 of 5 answers have room for fewer than 20 tokens: the model has positions for 64" in caplog.text
    alone = [generator.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert [each.token_ids for each in alone] == [each.token_ids for each in together]
    assert not any(each.finished for each in together)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_without_room_is_refused_with_both_numbers(generator: ShiftedGenerator, beams: int) -> None:
    message = (
        r"^prompt 1: a prompt of 64 tokens leaves no room for an answer: the model has positions for 64; shorten it"
    )
    with pytest.raises(ModelError, match=message):
        generator.generate([Prompt([5]), Prompt([5] * 64)], max_new_tokens=20, num_beams=beams)
    assert len(generator.generate([Prompt([5] * 63)], max_new_tokens=20, num_beams=beams)[0].token_ids) == 1


def test_the_question_is_named_by_its_line(gpt2: Path) -> None:
    generator, chat = open_model(str(gpt2), template="plain")
    questions = [Question("2 plus 3?", "none"), Question("7 " * 80, "none", origin="asked.jsonl:2")]
    with pytest.raises(EvalError, match=r"^asked\.jsonl:2: a prompt of \d+ tokens leaves no room .* positions for 64"):
        list(answer(generator, chat, questions, max_new_tokens=4))
    assert len(list(answer(generator, chat, questions[:1], max_new_tokens=100))) == 1


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            (float("nan"), float("nan")),
            r"^model: its loss on the first samples is nan before any update",
        ),
        ((1.0, float("inf")), r"^model: its loss on the first samples is inf before any update"),
        ((float("nan"), 1.0), r"^data\.layout: packed rows give a loss nan off"),
        ((1.1, 1.0), r"^data\.layout: packed rows give a loss 1\.0e-01 off the sample-by-sample one"),
        ((1.0, 1.0), None),
    ],
)
def test_only_differences_due_to_packing_are_reported_as_such(
    monkeypatch: pytest.MonkeyPatch, losses: tuple[float, float], message: str | None
) -> None:
    monkeypatch.setattr("training.engine.start_checks.all_sum", lambda values, device: values)
    given = iter(losses)

    class Engine:
        device = torch.device("cpu")

        def evaluating(self) -> Any:
            return torch.no_grad()

    def loss_terms(engine: Any, batch: Any) -> Any:
        return SimpleNamespace(label_losses=torch.tensor([next(given)]))

    packer = Packer(Grid("packed", 64, 64), ChatCollator(0))
    run: Any = SimpleNamespace(
        data=SimpleNamespace(packer=packer), engine=Engine(),
        objective=SimpleNamespace(loss_terms=loss_terms), config=SimpleNamespace(precision="fp32"),
    )  # fmt: skip
    batch: Any = SimpleNamespace(micro_batches=[packer.idle()])
    if message is None:
        check_packing(run, batch)
        return
    with pytest.raises(ConfigError, match=message):
        check_packing(run, batch)
