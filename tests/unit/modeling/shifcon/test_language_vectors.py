"""Vectors equal plain means, their file is checked, and the restoration error equals its formula."""

import dataclasses
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from modeling.errors import ModelError
from modeling.layers import state_hook
from modeling.shifcon.language_vectors import (
    CHUNK_ELEMENTS,
    LanguageVectors,
    StateMeans,
    random_directions,
    restoration_error,
)
from modeling.shifcon.shift import LanguageShift, shift_tables

IDS = torch.arange(1, 21).view(2, 10)
LANGUAGES = torch.tensor([[-1, 0, 0, 1, 1, 1, 0, -1, 3, 3], [3, 3, 1, 0, 0, 0, -1, -1, -1, -1]])
NAMES = ("en", "de", "xx", "sw")  # xx gets no token


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)).eval()


def measured(model: LlamaForCausalLM, languages: Tensor = LANGUAGES) -> LanguageVectors:
    with StateMeans(model, (1, 3, 4), 4) as means, torch.no_grad():
        for row in range(2):  # in two passes: sums add up
            with means.batch(languages[row : row + 1]):
                model(IDS[row : row + 1])
    return means.vectors(NAMES, "en", (1, 3), model_hash="abc")


def test_means_and_norms_equal_those_of_transformers_hidden_states() -> None:
    model = tiny()
    vectors = measured(model)
    states = model(IDS, output_hidden_states=True).hidden_states
    assert vectors.tokens.tolist() == [(language == LANGUAGES).sum() for language in range(4)]
    for position, layer in enumerate((1, 3)):
        for language in (0, 1, 3):
            tokens = torch.stack([states[layer][b, t] for b, t in (language == LANGUAGES).nonzero().tolist()])
            torch.testing.assert_close(vectors.mean[language, position], tokens.mean(0))
            torch.testing.assert_close(vectors.state_norm[language, position], tokens.norm(dim=1).mean())
    assert (vectors.mean[2] == 0).all()
    assert vectors.has("sw")
    assert not vectors.has("xx")
    assert not vectors.has("unknown")


class LargestFp64(TorchDispatchMode):
    """Inside, `elements` is the size of the largest fp64 tensor that an operation made; `known` ones do not count."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {each.untyped_storage().data_ptr() for each in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float64:
            known = made.untyped_storage().data_ptr() in self.known
            self.elements = max(self.elements, 0 if known else made.numel())
        return made


@pytest.mark.parametrize("n_languages", [3, 1000])
def test_many_tokens_and_languages_are_summed_in_small_chunks(n_languages: int) -> None:
    """As a loop over languages in numpy sums them, in bf16, without a large tensor of fp64."""
    model, rows, tokens = tiny().bfloat16(), 128, 300
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (rows, tokens), generator=generator)
    languages = torch.randint(-1, n_languages, (rows, tokens), generator=generator)
    assert ids.numel() * model.config.hidden_size > CHUNK_ELEMENTS
    states: list[Tensor] = []
    for layer in (1, 4):
        state_hook(model, layer, states.append)
    with (
        torch.no_grad(),
        StateMeans(model, (1, 4), n_languages) as means,
        means.batch(languages),
        LargestFp64(means.sums, means.norms) as largest,
    ):
        model(ids)
    assert 0 < largest.elements <= CHUNK_ELEMENTS
    of = languages.flatten().numpy()
    for position, state in enumerate(states):
        flat = state.double().flatten(0, 1).numpy()
        for language in range(n_languages):
            mine = flat[of == language]
            assert means.counts[language] == len(mine)
            np.testing.assert_allclose(means.sums[language, position].numpy(), mine.sum(0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(means.norms[language, position], np.sqrt((mine**2).sum(1)).sum(), rtol=1e-12)


def test_measuring_uses_shifted_states_and_leaves_no_hook() -> None:
    model = tiny()
    shift = LanguageShift(model, 1, 3)
    shift.set_vectors(measured(model))
    with StateMeans(model, (1,), 4) as means, torch.no_grad():
        with shift.batch(LANGUAGES), means.batch(LANGUAGES):
            model(IDS)
        model(IDS)  # outside a batch: not counted
    mean = means.means()[:, 0]
    # Shifted toward it, every language's mean is the dominant language's.
    for language in (0, 1, 3):
        torch.testing.assert_close(mean[language], mean[0], rtol=1e-4, atol=1e-4)
    assert means.counts.tolist() == [6, 4, 0, 4]
    assert sum(len(layer._forward_pre_hooks) for layer in model.model.layers) == 3  # the shift's own


def test_the_restoration_error_equals_values_computed_by_hand() -> None:
    model = tiny()
    vectors = measured(model)
    back = vectors.at(3)
    assert list(restoration_error(vectors, back)) == ["de", "sw"]
    assert all(error == 0 for error in restoration_error(vectors, back).values())
    away = back.clone()
    away[1] = back[0]  # not shifted back at all: an error of 1
    away[3] += 0.25 * (back[3] - back[0])
    errors = restoration_error(vectors, away)
    assert errors["de"] == pytest.approx(1.0)
    assert errors["sw"] == pytest.approx(0.25)
    # As a refresh measures it: mean h[back] with the shift on, against the unshifted vector.
    shift = LanguageShift(model, 1, 3)
    shift.set_vectors(vectors)
    states: list[Tensor] = []
    with StateMeans(model, (3,), 4) as means, torch.no_grad():
        model.model.layers[3].register_forward_pre_hook(lambda _, args: states.append(args[0]))
        with shift.batch(LANGUAGES), means.batch(LANGUAGES):
            model(IDS)
    german = torch.stack([states[0][b, t] for b, t in (LANGUAGES == 1).nonzero().tolist()]).mean(0)
    expected = (german - back[1]).norm() / (back[1] - back[0]).norm()
    errors = restoration_error(vectors, means.means()[:, 0])
    assert errors["de"] == pytest.approx(expected.item(), rel=1e-4)
    assert errors["de"] > 0.01


def test_nearest_is_decided_by_all_dimensions_and_not_by_two_of_huge_variance() -> None:
    """In two dimensions states are large and vary without regard to the language; the other 14 tell the language."""
    drawn = torch.Generator().manual_seed(5)
    centre = torch.zeros(4, 16)
    known = [0, 1, 3]  # the third has no vector
    centre[known, 2:] = torch.randn(3, 14, generator=drawn)
    centre[known, :2] = torch.randn(3, 2, generator=drawn)
    deviation = torch.full((16,), 0.3)
    deviation[:2] = 300.0
    vectors = replace(measured(tiny()), text_mean=centre, text_deviation=deviation)
    states = centre[known, None] + deviation * torch.randn(3, 100, 16, generator=drawn)
    found = [[vectors.nearest(state) for state in of_language] for of_language in states]
    share = sum(each == NAMES[number] for number, names in zip(known, found, strict=True) for each in names) / 300
    assert share > 0.95
    without = replace(vectors, text_mean=centre * (deviation < 1), text_deviation=deviation)
    same = [
        without.nearest(state * (deviation < 1)) == name
        for of_language, names in zip(states, found, strict=True)
        for state, name in zip(of_language, names, strict=True)
    ]
    assert sum(same) >= 297
    raw = replace(vectors, text_deviation=torch.ones(16))
    assert sum(raw.nearest(state) == "en" for state in states[0]) < 60  # chance is 33
    # A language without a vector is never the nearest, though its zeros are.
    assert vectors.nearest(torch.zeros(16)) != "xx"


def test_nearest_needs_means_of_texts() -> None:
    with pytest.raises(ModelError, match="hold no means of texts"):
        measured(tiny()).nearest(torch.zeros(16))


def test_a_loaded_file_equals_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    vectors = measured(tiny())
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    loaded = LanguageVectors.load(path)
    for field in dataclasses.fields(LanguageVectors):
        before, after = getattr(vectors, field.name), getattr(loaded, field.name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.safetensors"]


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """As versions before the shared format wrote it, written out in full."""
    vectors = measured(tiny())
    tensors = {"mean": vectors.mean, "state_norm": vectors.state_norm, "tokens": vectors.tokens}
    header = json.dumps({
        "languages": ["en", "de", "xx", "sw"], "dominant": "en", "layers": [1, 3, 4], "area": [1, 3],
        "estimator": "mean over tokens, unshifted", "model_hash": "abc",
    })  # fmt: skip
    content = hashlib.sha256(header.encode())
    for tensor in tensors.values():
        content.update(tensor.numpy().tobytes())
    metadata = {"format": "crosslift language vectors 1", "about": header, "sha256": content.hexdigest()}
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    loaded = LanguageVectors.load(tmp_path / "old.safetensors")
    assert torch.equal(loaded.mean, vectors.mean)
    assert (loaded.languages, loaded.area, loaded.model_hash, loaded.strength) == (NAMES, (1, 3), "abc", 1.0)
    vectors.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about == {**json.loads(header), "strength": 1.0}


def test_truncated_and_changed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    measured(tiny()).save(path)
    good = path.read_bytes()
    for cut in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(ModelError, match="no usable language vectors"):
            LanguageVectors.load(path)
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with pytest.raises(ModelError) as caught:
            LanguageVectors.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="no usable language vectors"):
        LanguageVectors.load(tmp_path / "absent.safetensors")


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    save_file({"mean": torch.zeros(1, 1, 1)}, path)
    with pytest.raises(ModelError, match="its format is None"):
        LanguageVectors.load(path)
    measured(tiny()).save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["about"])
    save_file(tensors, path, {**metadata, "about": json.dumps({**about, "dominant": "de"})})
    with pytest.raises(ModelError, match="does not match its checksum"):
        LanguageVectors.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dominant": "xx"}, "dominant language 'xx' has no vector"),
        ({"dominant": "fr"}, "dominant language 'fr' has no vector"),
        ({"languages": ("en", "en", "de", "sw")}, "languages are not distinct"),
        ({"languages": ("en",)}, "mean is not"),
        ({"area": (1, 2)}, "is not two measured layers"),
        ({"area": (3, 1)}, "is not two measured layers"),
        ({"mean": torch.full((4, 3, 16), torch.nan)}, "a value is not finite"),
        ({"mean": torch.zeros(4, 3, 16, dtype=torch.float64)}, "mean is not"),
        ({"tokens": torch.ones(3, dtype=torch.int64)}, "tokens is not"),
        ({"state_norm": torch.ones(4)}, "state_norm is not"),
    ],
)
def test_impossible_vectors_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(measured(tiny()), **change)


def test_random_directions_have_the_distances_of_the_means_and_no_other_likeness() -> None:
    vectors = measured(tiny())
    found = random_directions(vectors)
    dominant = vectors.mean[0]
    assert torch.equal(found.mean[0], dominant)
    for number in (1, 3):  # "xx" has no vector
        lengths = [(each.mean[number] - dominant).norm(dim=1) for each in (vectors, found)]
        torch.testing.assert_close(*lengths)
        cosines = torch.cosine_similarity(vectors.mean[number] - dominant, found.mean[number] - dominant, dim=1)
        assert float(cosines.abs().max()) < 0.9
    assert torch.equal(random_directions(vectors).mean, found.mean)
    assert not torch.allclose(found.mean[1] - dominant, found.mean[3] - dominant)


def test_the_strength_scales_both_shifts() -> None:
    vectors = measured(tiny())
    half = shift_tables(dataclasses.replace(vectors, strength=0.5))
    torch.testing.assert_close(half, 0.5 * shift_tables(vectors))
