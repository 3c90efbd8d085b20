"""`load_shifted`: transformers' own `generate`, with rows of different languages, equals the generator of crosslift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_export import LANGUAGES, write_export
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from crosslift import load_shifted
from modeling.errors import ModelError
from modeling.generation import Prompt, ShiftedGenerator
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifted_model import ShiftedModel

ROWS = ["de", "sw", "en", None]
NEW = 8


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_export(tmp_path_factory.mktemp("export"))
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(folder)
    return folder


@pytest.fixture
def model(export: Path) -> ShiftedModel:
    return load_shifted(export)


def batch() -> dict[str, torch.Tensor]:
    """Four left-padded prompts."""
    ids = torch.randint(4, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 6, 1)):
        ids[row, :padding], mask[row, :padding] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, **options: Any) -> list[list[int]]:
    """New tokens of each row, up to the end token; `options` of `generate`."""
    options = {**batch(), "languages": ROWS, "max_new_tokens": NEW, "do_sample": False, **options}
    output = model.generate(**options)
    width = options["input_ids"].shape[1]
    return [[token for token in row[width:].tolist() if token not in (1, 2)] for row in output]


def expected(export: Path, beams: int = 1, **response: Any) -> list[list[int]]:
    """The same by crosslift's generator, which is compared with a slow reference in `test_generation.py`."""
    inputs = batch()
    prompts = [
        Prompt(ids[mask.bool()].tolist(), language, **response)
        for ids, mask, language in zip(inputs["input_ids"], inputs["attention_mask"], ROWS, strict=True)
    ]
    answers = ShiftedGenerator.from_directory(export).generate(prompts, NEW, num_beams=beams, batch_size=1)
    return [answer.token_ids for answer in answers]


def test_it_is_a_model_of_transformers(model: ShiftedModel, export: Path) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(export).padding_side in ("left", "right")
    assert model.generation_config.eos_token_id == 1
    assert model.dtype == torch.float32
    assert load_shifted(export, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_a_batch_have_their_own_languages(model: ShiftedModel, export: Path, beams: int) -> None:
    found = generated(model, num_beams=beams)
    assert found == expected(export, beams)
    assert found != generated(model, languages=[None] * 4, num_beams=beams)


def test_response_languages_act_on_generated_tokens(model: ShiftedModel, export: Path) -> None:
    found = generated(model, response_languages="en")
    assert found == expected(export, response_language="en")
    assert found != generated(model)


def test_one_code_serves_all_rows(model: ShiftedModel) -> None:
    assert generated(model, languages="sw") == generated(model, languages=["sw"] * 4)


def test_the_mask_is_inferred_from_padding_as_transformers_does(tmp_path: Path) -> None:
    """Where the first token is not shifted, it is the first one after the padding."""
    folder = write_export(tmp_path, shift_first_token=False)
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(folder)
    model = load_shifted(folder)
    assert generated(model, attention_mask=None) == generated(model)
    assert generated(model) == expected(folder)


# Ways to decode that give what plain greedy decoding gives.
SAME_AS_GREEDY: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "prompt in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("name", SAME_AS_GREEDY)
def test_every_cache_gives_the_same_tokens(model: ShiftedModel, name: str) -> None:
    assert generated(model, **SAME_AS_GREEDY[name]) == generated(model)


def test_samples_of_a_seed_and_several_per_prompt(model: ShiftedModel) -> None:
    """Row i of three samples of a prompt is shifted by the language of that prompt."""

    def drawn(**options: Any) -> list[list[int]]:
        torch.manual_seed(0)
        return generated(model, do_sample=True, **options)

    assert drawn() == drawn()
    assert drawn() != drawn(languages=[None] * 4)
    cold = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 3}
    assert generated(model, **cold) == [row for row in generated(model) for _ in range(3)]


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}])
def test_assisted_decoding_gives_what_plain_decoding_gives(
    model: ShiftedModel, export: Path, options: dict[str, Any]
) -> None:
    """Several tokens are checked in one pass, and the cache is cut back where they are refused."""
    if options.pop("assistant", False):
        options = {"assistant_model": AutoModelForCausalLM.from_pretrained(export)}
    for row, language in enumerate(ROWS):
        inputs = {name: tensor[row : row + 1, 6:] for name, tensor in batch().items()}
        one = {**inputs, "languages": [language], "max_new_tokens": 20}
        assert generated(model, **one, **options) == generated(model, **one)


def test_an_assistant_that_shifts_is_refused(model: ShiftedModel, export: Path) -> None:
    with pytest.raises(ModelError, match="assistant_model must be a plain model"):
        generated(model, assistant_model=load_shifted(export))


def test_a_compiled_model_gives_the_same_tokens_and_logits(model: ShiftedModel) -> None:
    inputs = batch()
    with torch.no_grad(), model.in_languages(ROWS, inputs["attention_mask"]):
        plain = model(**inputs).logits
    greedy = generated(model)
    model.forward = torch.compile(model.forward, backend="aot_eager")  # type: ignore[method-assign]
    with torch.no_grad(), model.in_languages(ROWS, inputs["attention_mask"]):
        torch.testing.assert_close(model(**inputs).logits, plain)
    assert generated(model) == greedy


def test_logits_of_a_forward_pass_are_shifted_inside_in_languages(model: ShiftedModel, export: Path) -> None:
    inputs = batch()
    unshifted = AutoModelForCausalLM.from_pretrained(export)(**inputs).logits
    with torch.no_grad(), model.in_languages(ROWS, inputs["attention_mask"]):
        found = model(**inputs).logits
    for row, language in enumerate(ROWS):
        real = inputs["attention_mask"][row].bool()
        same = torch.allclose(found[row, real], unshifted[row, real], atol=1e-5)
        assert same == (language in ("en", None)), language


def test_a_forward_pass_without_languages_is_refused(model: ShiftedModel) -> None:
    with pytest.raises(ModelError, match="shifts states by language and was given none"):
        model(**batch())
    with pytest.raises(ModelError, match=r"give the prompts .* and their `languages`"):
        model.generate(**batch(), max_new_tokens=2)
    with pytest.raises(ModelError, match="3 for 4 rows"):
        generated(model, languages=["sw", "de", "en"])
    with pytest.raises(ModelError, match="'fr' is not one of the model's, which are en, de, sw, xx"):
        generated(model, languages="fr")
    assert len(generated(model)) == 4  # the refused call left nothing behind


def test_a_language_without_a_vector_runs_unshifted_and_is_named(
    model: ShiftedModel, caplog: pytest.LogCaptureFixture
) -> None:
    assert generated(model, languages="xx") == generated(model, languages=[None] * 4)
    assert "language 'xx' has no vector, so its rows run unshifted" in caplog.text


def test_a_saved_model_has_its_vectors(model: ShiftedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(model.export_directory).save_pretrained(tmp_path / "saved")
    again = load_shifted(tmp_path / "saved")
    assert generated(again, languages=ROWS) == generated(model)
    assert again.config.architectures == ["LlamaForCausalLM"]
    vectors = LanguageVectors.load(tmp_path / "saved" / "language_vectors.safetensors")
    assert vectors.languages == LANGUAGES


def test_a_model_without_shift_is_refused(tmp_path: Path) -> None:
    export = write_export(tmp_path, vectors=False, objective="sft")
    with pytest.raises(ModelError, match=r"has no shift; open it with transformers' AutoModelForCausalLM"):
        load_shifted(export)
