"""Batched, cached, left-padded, shifted generation equals one prompt at a time without a cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_export import AREA, END, LANGUAGES, write_export
from torch import Tensor

from modeling.errors import ModelError
from modeling.export_info import ExportInfo
from modeling.generation import Generation, Prompt, Sampling, ShiftedGenerator


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    languages = [("de", None), ("sw", "en"), ("en", None), ("xx", None), (None, None), ("de", "sw")]
    return [
        Prompt(torch.randint(4, 64, (length,), generator=generator).tolist(), *language)
        for length, language in zip((7, 3, 12, 5, 1, 9), languages, strict=True)
    ]


def reference(generator: ShiftedGenerator, prompt: Prompt, tokens: int) -> list[int]:
    """Reference implementation: no cache, no batch, each token's shift added to the states in a hook."""
    vectors, ids = generator.vectors, list(prompt.ids)
    response = prompt.response_language or generator.info.response_language or prompt.language
    for _ in range(tokens):
        of_token = [prompt.language] * len(prompt.ids) + [response] * (len(ids) - len(prompt.ids))
        if not generator.info.shift_first_token:
            of_token[0] = None
        deltas = []
        for place, sign in ((0, 1), (1, -1)):
            rows = torch.zeros(len(ids), 32)
            for t, language in enumerate(of_token):
                if vectors is not None and language is not None and vectors.has(language):
                    mean = vectors.mean[:, place]
                    rows[t] = sign * (mean[0] - mean[vectors.languages.index(language)])
            deltas.append(rows)
        layers = generator.model.model.layers if hasattr(generator.model, "model") else generator.model.gpt_neox.layers

        def adding(delta: Tensor) -> Any:
            return lambda _, args: (args[0] + delta, *args[1:])

        handles = [layers[at].register_forward_pre_hook(adding(d)) for at, d in zip(AREA, deltas, strict=True)]
        with torch.no_grad():
            token = int(generator.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        for handle in handles:
            handle.remove()
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt.ids) :]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gpt_neox"])
def test_batched_cached_generation_equals_the_reference(tmp_path: Path, model_type: str, first: bool) -> None:
    generator = ShiftedGenerator.from_directory(write_export(tmp_path, model_type, shift_first_token=first))
    answers = generator.generate(prompts(), max_new_tokens=8, batch_size=4)
    expected = [reference(generator, prompt, 8) for prompt in prompts()]
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.shifted for answer in answers] == [True, True, True, False, False, True]
    for answer in answers:
        assert answer.text.split() == [str(id - 4) for id in answer.token_ids if id > 3]  # none special
        assert answer.finished == (len(answer.token_ids) < 8)
    unshifted = ShiftedGenerator(generator.model, generator.tokenizer, ExportInfo(), None)
    assert generator.shift is not None
    with generator.shift.disabled():
        plain = unshifted.generate(prompts(), max_new_tokens=8)
    assert [a.token_ids == b.token_ids for a, b in zip(plain, answers, strict=True)] == (
        [False, False, True, True, True, False]
    )


def test_beams_batched_equal_single(tmp_path: Path) -> None:
    generator = ShiftedGenerator.from_directory(write_export(tmp_path))
    batched = generator.generate(prompts(), max_new_tokens=6, num_beams=3)
    single = [generator.generate([prompt], max_new_tokens=6, num_beams=3)[0] for prompt in prompts()]
    assert batched == single
    assert batched != generator.generate(prompts(), max_new_tokens=6)


def test_samples_are_drawn_from_the_shifted_distribution(tmp_path: Path) -> None:
    """Against the softmax of one prompt's logits: 2,000 draws of a first token, each token's count within 5 sigma."""
    generator = ShiftedGenerator.from_directory(write_export(tmp_path))
    prompt, draws, temperature = prompts()[0], 2000, 0.7
    found = generator.generate([prompt] * draws, 1, batch_size=draws, sampling=Sampling(temperature, seed=3))
    drawn = torch.tensor([END if each.finished else each.token_ids[0] for each in found])
    ids_BT, mask_BT = torch.tensor([prompt.ids]), torch.ones(1, len(prompt.ids), dtype=torch.long)
    with torch.no_grad(), generator.shifted([prompt], mask_BT):
        logits = generator.model(ids_BT, use_cache=False).logits[0, -1].double()
    expected = (logits / temperature).softmax(0)
    counts = torch.bincount(drawn, minlength=64)
    sigma = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 5 * sigma + 1).all()
    assert (counts > 0).sum() > 3
    few = generator.generate([prompt] * 300, 1, batch_size=300, sampling=Sampling(temperature, top_k=2))
    likeliest = set(expected.topk(2).indices.tolist())
    assert {END if each.finished else each.token_ids[0] for each in few} == likeliest


def test_nearest_language_refuses_a_prompt_beyond_the_models_positions(tmp_path: Path) -> None:
    generator = ShiftedGenerator.from_directory(write_export(tmp_path))
    generator.positions = 8  # as of a model with 8 position embeddings
    assert generator.nearest_language([5] * 7, [True] * 7) in LANGUAGES
    with pytest.raises(ModelError, match=r"^a prompt of 9 tokens leaves no room for an answer: .* positions for 8"):
        generator.nearest_language([5] * 9, [True] * 9)


def test_answers_keep_the_order_of_prompts_for_every_batch_size(tmp_path: Path) -> None:
    generator = ShiftedGenerator.from_directory(write_export(tmp_path))
    counts: list[int] = []
    many = prompts() * 2
    answers = generator.generate(many, max_new_tokens=4, batch_size=5, progress=counts.append)
    assert counts == [5, 5, 2]
    assert answers[:6] == answers[6:] == generator.generate(prompts(), max_new_tokens=4, batch_size=1)
    assert generator.generate([], max_new_tokens=4) == []
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        generator.generate([Prompt([5]), Prompt([])], max_new_tokens=4)


def reference_nearest(generator: ShiftedGenerator, ids: list[int], content: list[bool]) -> str:
    """Reference implementation: one token at a time, one language at a time."""
    with torch.no_grad():
        states = generator.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[AREA[0]][0].double()
    total, n = torch.zeros(32).double(), 0
    for place, is_content in enumerate(content):
        if is_content and place > 0:
            total, n = total + states[place], n + 1
    if n == 0:
        for place in range(1, len(ids)):
            total, n = total + states[place], n + 1
    if n == 0:
        total, n = states[0], 1
    assert generator.vectors is not None
    distances, vectors = {}, generator.vectors
    for language, mean, tokens in zip(LANGUAGES, vectors.text_mean, vectors.tokens, strict=True):
        if tokens > 0:
            distances[language] = float((((mean.double() - total / n) / vectors.text_deviation) ** 2).sum())
    return min(distances, key=distances.__getitem__)


def test_auto_is_the_language_nearest_to_the_content_tokens(tmp_path: Path) -> None:
    generator = ShiftedGenerator.from_directory(write_export(tmp_path))
    assert generator.vectors is not None
    assert generator.shift is not None
    drawn = torch.Generator().manual_seed(4)
    found = set()
    for case in range(40):
        ids = torch.randint(4, 64, (2 + case % 9,), generator=drawn).tolist()
        content = (torch.rand(len(ids), generator=drawn) < (0.4, 0.0)[case % 5 == 4]).tolist()
        with torch.no_grad():
            states = generator.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[AREA[0]][0]
        # one language's mean is that of the right tokens, the others' are those of wrong ones
        chosen = [place for place, inside in enumerate(content) if inside and place]
        places = [chosen or [*range(1, len(ids))], [*range(len(ids))], [0]]
        vectors = replace(generator.vectors, text_mean=generator.vectors.text_mean.clone())
        for language, tokens in zip(torch.randperm(3, generator=drawn).tolist(), places, strict=True):
            vectors.text_mean[language] = states[tokens].mean(dim=0)
        generator.vectors = vectors
        generator.shift.set_vectors(vectors)
        language = generator.nearest_language(ids, content)
        assert language == reference_nearest(generator, ids, content), (ids, content)
        found.add(language)
    assert found == {"en", "de", "sw"}
    assert generator.nearest_language([9], [False]) == reference_nearest(generator, [9], [False])


def test_auto_ignores_template_tokens(tmp_path: Path) -> None:
    """Any number of template tokens leaves the result unchanged, also without attention between tokens."""
    generator = ShiftedGenerator.from_directory(write_export(tmp_path))
    assert generator.vectors is not None
    with torch.no_grad():
        for layer in generator.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()  # no attention between tokens
        states = generator.model(torch.arange(64)[None], output_hidden_states=True).hidden_states[AREA[0]][0]
    for language, token in enumerate((30, 40, 50)):
        generator.vectors.text_mean[language] = states[token]
    for language, token in zip(("en", "de", "sw"), (30, 40, 50), strict=True):
        for template in (30, 40, 50):
            for before in range(1, 6):
                ids = [template] * before + [token] + [template] * 5
                content = [place == before for place in range(len(ids))]
                assert generator.nearest_language(ids, content) == language


def test_the_response_language_of_the_export_is_the_default(tmp_path: Path) -> None:
    generator = ShiftedGenerator.from_directory(write_export(tmp_path, response_language="en"))
    (ids, _, _) = (prompt.ids for prompt in prompts()[:3])
    implied, explicit, other = generator.generate(
        [Prompt(ids, "de"), Prompt(ids, "de", "en"), Prompt(ids, "de", "de")], max_new_tokens=8
    )
    assert implied == explicit != other


def test_without_any_language_nothing_is_shifted(tmp_path: Path) -> None:
    """Nor is the answer of a model with a fixed response language."""
    generator = ShiftedGenerator.from_directory(write_export(tmp_path, response_language="sw"))
    assert generator.shift is not None
    unknown = [Prompt(prompt.ids) for prompt in prompts()]
    answers = generator.generate(unknown, max_new_tokens=8)
    with generator.shift.disabled():
        plain = generator.generate(prompts(), max_new_tokens=8)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
    assert not any(answer.shifted for answer in answers)
    only_the_answer = generator.generate([Prompt(prompt.ids, None, "sw") for prompt in prompts()], max_new_tokens=8)
    assert [answer.token_ids for answer in only_the_answer] != [answer.token_ids for answer in plain]


def test_the_end_token_ends_an_answer(tmp_path: Path) -> None:
    generator = ShiftedGenerator.from_directory(write_export(tmp_path))
    (answer,) = generator.generate(prompts()[:1], max_new_tokens=8)
    assert not answer.finished
    generator.end_ids[:] = [answer.token_ids[3]]
    generator.model.generation_config.eos_token_id = generator.end_ids
    stop = answer.token_ids.index(answer.token_ids[3])
    (ended, _) = generator.generate(prompts()[:2], max_new_tokens=8)
    assert ended == Generation(ended.text, answer.token_ids[:stop], True, True)


def test_a_plain_directory_runs_unshifted(tmp_path: Path) -> None:
    write_export(tmp_path, vectors=False)
    (tmp_path / "crosslift.json").unlink()
    generator = ShiftedGenerator.from_directory(tmp_path)
    answers = generator.generate(prompts(), max_new_tokens=5)
    assert [answer.token_ids for answer in answers] == [reference(generator, prompt, 5) for prompt in prompts()]
    assert not any(answer.shifted for answer in answers)


def test_shifcon_models_refuse_to_load_without_their_own_vectors(tmp_path: Path) -> None:
    whole = write_export(tmp_path / "whole")
    with pytest.raises(ModelError, match=r"language_vectors\.safetensors: missing"):
        ShiftedGenerator.from_directory(write_export(tmp_path / "without", vectors=False))
    other = write_export(tmp_path / "other", "qwen3", vectors=False)
    vectors = (whole / "language_vectors.safetensors").read_bytes()
    (other / "language_vectors.safetensors").write_bytes(vectors)
    with pytest.raises(ModelError, match="but those beside it are"):
        ShiftedGenerator.from_directory(other)
    (whole / "language_vectors.safetensors").write_bytes(vectors[:-7])
    with pytest.raises(ModelError, match=r"language_vectors\.safetensors"):
        ShiftedGenerator.from_directory(whole)
    assert (
        not ShiftedGenerator.from_directory(write_export(tmp_path / "sft", vectors=False, objective="sft"))
        .generate(prompts()[:1], 2)[0]
        .shifted
    )


def test_descriptions_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for content, message in {
        "{": "not an export's description",
        '{"format": 2}': "another version of crosslift",
        '{"format": 1, "objective": "sft", "languages": [], "dominent": "en"}': "dominent",
        "[]": "not an export's description",
    }.items():
        (tmp_path / "crosslift.json").write_text(content)
        with pytest.raises(ModelError, match=message) as caught:
            ExportInfo.read(tmp_path)
        assert "\n" not in str(caught.value)
