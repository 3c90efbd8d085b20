"""export_text.py: plain transformers gives an export the prompts and the end tokens of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_tokenizers import small_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config

from data_pipeline.records import Message
from data_pipeline.text.chat import Chat
from data_pipeline.text.templates import TemplateConfig
from training.checkpoints import checkpoint, saving
from training.checkpoints.export import export_checkpoint
from training.checkpoints.run_state import RunState
from training.checkpoints.saving import Saver
from training.engine import state as engine_state
from training.engine.start_checks import reference_inputs, reference_logits
from training.run_file import resolved, validate

IDS = torch.arange(16)[None]
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05}
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small_tokenizers(tmp_path_factory.mktemp("spm"))


def always(token: int, vocabulary: int, **ids: Any) -> Any:
    """A model that always generates this token."""
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=8, n_layer=1, n_head=2, n_positions=256, tie_word_embeddings=False
    )
    for name, value in ids.items():
        setattr(config, name, value)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token].fill_(1.0)
    return model


@pytest.fixture
def export(
    tmp_path: Path, tokenizers: dict[str, Any], tiny_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Export:
    """`export(template, emits)`: the export of a ChatML base trained with the template; it emits that token."""

    def make(
        template: dict[str, Any],
        emits: str,
        generation: dict[str, Any] | None = None,
        kind: str = "bytes",
        **changes: Any,
    ) -> Path:
        tokenizer = tokenizers[kind]
        changes = {"model": {"path": "base"}, "tokenizer": {}, **changes}
        values = tiny_run(tmp_path / "run", **{"objective": {"name": "sft"}, "data.template": template, **changes})
        end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        model = always(tokenizer.convert_tokens_to_ids(emits), len(tokenizer), eos_token_id=end, bos_token_id=end)
        weights: dict[str, Tensor] = dict(model.named_parameters())
        monkeypatch.setattr(engine_state, "consolidated", lambda *_: iter(weights.items()))
        folder = checkpoint.begin(tmp_path / "run", 12)
        model.config.save_pretrained(folder / "model_config")
        tokenizer.save_pretrained(folder / "model_config")
        if generation is not None:
            (folder / "model_config" / "generation_config.json").write_text(json.dumps(generation))
        with torch.no_grad():
            logits = reference_logits(model(**reference_inputs(IDS)))
        save_file({"input_ids": IDS, "logits": logits}, folder / checkpoint.REFERENCE_FILE)
        RunState(step=12, world_size=1, fingerprint={}, config=resolved(validate(values, "run")), versions={}).write(
            folder
        )
        return export_checkpoint(checkpoint.commit(tmp_path / "run", 12, {}), tmp_path / "model")

    return make


def answer_length(folder: Path, messages: list[dict[str, str]]) -> int:
    """New tokens of plain `generate` behind the export's own prompt, of 20 at most."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return int(model.generate(**inputs, max_new_tokens=20).shape[1] - inputs["input_ids"].shape[1])


QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 4?"}]
END_TOKENS = [
    ({"name": "chat"}, "<|im_end|>"),
    ({"name": "alpaca"}, "<|endoftext|>"),
    ({"name": "plain", "end_token": "</s>"}, "</s>"),
    ({"name": "custom", "prompt": "Q {user} A", "end_token": "<tool>"}, "<tool>"),
]


@pytest.mark.parametrize(("template", "end"), END_TOKENS, ids=[template["name"] for template, _ in END_TOKENS])
def test_plain_generate_stops_at_the_end_token_of_training(
    export: Export, tokenizers: dict[str, Any], template: dict[str, Any], end: str
) -> None:
    base_end = tokenizers["bytes"].eos_token_id
    trained_end = tokenizers["bytes"].convert_tokens_to_ids(end)
    folder = export(template, end, {"eos_token_id": base_end, "transformers_version": "4.40.0", **SAMPLING})
    assert answer_length(folder, QUESTION) == 1
    expected = trained_end if trained_end == base_end else [trained_end, base_end]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert {key: generation[key] for key in SAMPLING} == SAMPLING
    assert generation["eos_token_id"] == json.loads((folder / "config.json").read_text())["eos_token_id"] == expected


@pytest.mark.parametrize("template", [template for template, _ in END_TOKENS], ids=lambda each: each["name"])
def test_the_export_has_the_chat_template_of_training(
    export: Export, tokenizers: dict[str, Any], template: dict[str, Any]
) -> None:
    folder = export(template, "<|im_end|>")
    languages = ("en", "de", "sw", "zh")
    chat = Chat(tokenizers["bytes"], TemplateConfig(**template), languages)
    messages = [Message(each["role"], each["content"]) for each in QUESTION]  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for language in languages:
        found = tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_dict=False, language=language
        )
        assert found == chat.prompt_ids(messages, language, language)[0].tolist()


def test_all_end_tokens_of_the_base_model_still_end_an_answer(export: Export, tokenizers: dict[str, Any]) -> None:
    number = tokenizers["bytes"].convert_tokens_to_ids
    folder = export({"name": "chat"}, "</s>", {"eos_token_id": [number("</s>"), number("<|im_end|>"), 5000]})
    config = GenerationConfig.from_pretrained(folder)
    assert config.eos_token_id == [number(each) for each in ("<|im_end|>", "</s>", "<|endoftext|>")]
    assert answer_length(folder, QUESTION) == 1


def test_special_tokens_are_those_of_the_runs_own_tokenizer(export: Export, tokenizers: dict[str, Any]) -> None:
    folder = export({"name": "chat"}, "<|im_end|>", {"eos_token_id": 7, "bos_token_id": 8}, tokenizer={"path": "own"})
    number = tokenizers["bytes"].convert_tokens_to_ids
    for file in ("config.json", "generation_config.json"):
        values = json.loads((folder / file).read_text())
        assert values["eos_token_id"] == [number("<|im_end|>"), number("<|endoftext|>")]
        assert values.get("bos_token_id") is None


def test_bos_and_pad_tokens_are_those_of_the_tokenizer(export: Export, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["spm"]
    folder = export({"name": "plain"}, "</s>", {"bos_token_id": 77, "pad_token_id": 78}, kind="spm")
    for file in ("config.json", "generation_config.json"):
        values = json.loads((folder / file).read_text())
        assert (values["bos_token_id"], values["pad_token_id"]) == (tokenizer.bos_token_id, tokenizer.pad_token_id)
        assert tokenizer.eos_token_id in (values["eos_token_id"], *_listed(values["eos_token_id"]))


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


def test_sampling_defaults_that_transformers_refuses_are_exported_unchanged(export: Export) -> None:
    """Llama 2's file: a temperature without sampling, which `save_pretrained` refuses."""
    folder = export({"name": "chat"}, "<|im_end|>", {"temperature": 0.9, "top_p": 0.6, "_from_model_config": True})
    values = json.loads((folder / "generation_config.json").read_text())
    assert (values["temperature"], values["top_p"]) == (0.9, 0.6)
    assert "_from_model_config" not in values
    assert answer_length(folder, QUESTION) == 1


def test_a_checkpoint_keeps_the_base_models_generation_config(
    tmp_path: Path, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(SAMPLING))
    saver: Any = Saver.__new__(Saver)
    module = SimpleNamespace(config=GPT2Config(attn_implementation="eager"))
    saver.run = SimpleNamespace(
        objective=SimpleNamespace(save=lambda *_: None), config=SimpleNamespace(precision="fp32"),
        engine=SimpleNamespace(module=module, device=torch.device("cpu")),
        data=SimpleNamespace(tokenizer=tokenizers["bytes"]), model_dir=tmp_path / "base",
    )  # fmt: skip
    monkeypatch.setattr(saving, "rank", lambda: 0)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    saver._write_small_files(directory, SimpleNamespace(write=lambda *_: None), {"logits": torch.ones(2)})
    assert json.loads((directory / "model_config" / "generation_config.json").read_text()) == SAMPLING
