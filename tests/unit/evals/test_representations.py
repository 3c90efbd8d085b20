"""The report's measures equal those of single forward passes; its table, JSON and plot show them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from covariance import centroid_distance, linear_cka
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast

from data_pipeline.atomic import WriteError
from evals import representations
from evals.errors import EvalError
from evals.representation_plots import _apart, draw, write_report
from evals.representations import (
    MEASURES,
    ModelRepresentations,
    RepresentationReport,
    analyse,
    representation_table,
)
from modeling.errors import ModelError

WORDS = [f"w{number}" for number in range(40)]
TEXTS = {
    language: (
        [" ".join(WORDS[(i * 7 + j) % 40] for j in range(1 + i % 5)) for i in range(30)],
        [" ".join(WORDS[(i * 7 + 3 * j + shift) % 40] for j in range(1 + i % 4)) for i in range(30)],
    )
    for shift, language in enumerate(["de", "sw"])
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`before` and `after`: two XLM-R models with different weights and the same tokenizer."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    made = {}
    for seed, label in enumerate(["before", "after"]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "xlm-roberta", vocab_size=44, hidden_size=12, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=20, initializer_range=0.4, pad_token_id=1,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(label)
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[label] = str(folder)
    return made


def one_by_one(folder: str, texts: list[str], pooling: str) -> list[Tensor]:
    """(N, H) at each layer: one unpadded forward pass of transformers per sentence."""
    model = AutoModel.from_pretrained(folder).eval()
    rows: list[list[Tensor]] = [[], [], []]
    for text in texts:
        ids = [0, *(4 + WORDS.index(word) for word in text.split()), 2]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            rows[layer].append(state[0, 1:-1].mean(dim=0) if pooling == "mean" else state[0, 0])
    return [torch.stack(row) for row in rows]


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_measures_equal_those_of_single_forward_passes(
    folders: dict[str, str], pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    advanced: list[int] = []
    monkeypatch.setattr(representations, "BATCH_SIZE", 7)
    monkeypatch.setattr(representations.Progress, "advance", lambda self, n=1: advanced.append(n))
    report = analyse(folders, TEXTS, dominant="en", pooling=pooling)
    assert sum(advanced) == 2 * 2 * 30
    assert report.sentences == {"de": 30, "sw": 30}
    for label, folder in folders.items():
        model = report.models[label]
        assert (model.layers, model.width, model.dtype, model.truncated) == (2, 12, "float32", 0)
        for language, (own, translated) in TEXTS.items():
            x, y = one_by_one(folder, translated, pooling), one_by_one(folder, own, pooling)
            for layer in range(3):
                found = {measure: model.curves[measure][language][layer] for measure in MEASURES}
                distance = centroid_distance(x[layer], y[layer])
                assert found["centroid_distance"] == pytest.approx(float(distance.relative), rel=1e-4, abs=1e-6)
                assert found["centroid_cosine"] == pytest.approx(float(distance.cosine), rel=1e-3, abs=1e-6)
                if pooling == "first" and layer == 0:  # the same token at the same place in every sentence
                    assert found["cka"] is None
                    assert found["cka_debiased"] is None
                else:
                    assert found["cka"] == pytest.approx(float(linear_cka(x[layer], y[layer])), rel=1e-4)
                    debiased = float(linear_cka(x[layer], y[layer], debiased=True))
                    assert found["cka_debiased"] == pytest.approx(debiased, rel=1e-3, abs=1e-5)


def test_equal_texts_have_cka_1_and_distance_0(folders: dict[str, str]) -> None:
    own = TEXTS["de"][0]
    report = analyse({"one": folders["before"]}, {"de": (own, own), "sw": (own, own[::-1])}, dominant="en")
    curves = report.models["one"].curves
    assert curves["cka"]["de"] == pytest.approx([1, 1, 1])
    assert curves["centroid_distance"]["de"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert max(value or 0 for value in curves["cka"]["sw"]) < 0.9  # as many sentences, but not translations
    assert curves["centroid_distance"]["sw"] == pytest.approx([0, 0, 0], abs=1e-6)
    mean = report.models["one"].mean("cka")
    assert mean[1] == pytest.approx((1 + (curves["cka"]["sw"][1] or 0)) / 2)


def test_texts_that_are_not_parallel_are_refused(folders: dict[str, str]) -> None:
    own, translated = TEXTS["de"]
    for texts, message in [
        ({"de": (own, translated[1:])}, "texts of 'de': 29 sentences, but 30 in 'en'; line i of one must translate"),
        ({"de": (own[:3], translated[:3])}, "texts of 'de': 3 sentences; at least 4 are needed"),
        ({"de": (own, [*translated[:4], " ", *translated[5:]])}, "texts of 'de': sentence 5 in 'de' is empty"),
        ({"de": (["", *own[1:]], translated)}, "texts of 'de': sentence 1 in 'en' is empty"),
        ({"en": (own, own)}, "texts of 'en': that is the dominant language"),
        ({}, "no language to compare with 'en'"),
    ]:
        with pytest.raises(EvalError, match=message) as caught:
            analyse(folders, texts, dominant="en")
        assert "\n" not in str(caught.value)
    with pytest.raises(EvalError, match="no model to analyse; give one or more, such as before=DIR"):
        analyse({}, TEXTS, dominant="en")
    with pytest.raises(ModelError, match="nowhere"):
        analyse({"before": "/nowhere/at/all"}, TEXTS, dominant="en")


def made_up(few: bool = False) -> RepresentationReport:
    """Two models of 3 and 2 layers, whose first CKA is undefined in one language."""

    def model(layers: int, at: float) -> ModelRepresentations:
        curves = {
            measure: {language: tuple(at + part + 0.1 * n for n in range(layers + 1)) for language, part in parts}
            for measure in MEASURES
        }
        curves["cka"]["sw"] = (None, *curves["cka"]["sw"][1:])
        return ModelRepresentations("model", "hash", "float32", layers, 64, 128, 0, curves)

    parts = (("de", 0.2), ("sw", 0.0))
    return RepresentationReport(
        "en", "mean", {"de": 500, "sw": 40 if few else 400}, {"before": model(3, 0.1), "after": model(2, 0.3)}
    )


def test_the_table_shows_layers_languages_and_notes() -> None:
    lines = representation_table(made_up(few=True)).splitlines()
    assert lines[0] == "States of sentences against their translations in 'en', pooling 'mean'"
    heads = ["before CKA", "before debiased", "before distance", "after CKA", "after debiased", "after distance"]
    by_layer = lines[lines.index("Mean over languages") + 1 :]
    assert by_layer[0].split("  ")[-6:] == heads
    assert by_layer[2].split() == ["0", "-", "0.200", "0.200", "-", "0.400", "0.400"]
    assert by_layer[3].split() == ["1", "0.300", "0.300", "0.300", "0.500", "0.500", "0.500"]
    assert by_layer[5].split() == ["3", "0.500", "0.500", "0.500", "-", "-", "-"]  # after has no such layer
    by_language = lines[lines.index("Mean over layers") + 1 :]
    assert by_language[2].split() == ["de", "500", "0.450", "0.450", "0.450", "0.600", "0.600", "0.600"]
    assert by_language[3].split() == ["sw", "40", "0.300", "0.250", "0.250", "0.450", "0.400", "0.400"]
    assert lines[-1].endswith("only the debiased one compares: sw")
    assert len({len(line) for line in by_layer[:6]}) == 1  # aligned
    assert "Fewer" not in representation_table(made_up())


def test_languages_that_a_limit_may_have_cut_are_marked() -> None:
    report = made_up()
    language, number = next(iter(report.sentences.items()))
    limited = replace(report, sentences={**report.sentences, language: number - 1}, limit=number - 1)
    assert (limited.partial, limited.to_json()["partial"]) == ([language], [language])
    text = representation_table(limited)
    assert f"{number - 1}*" in text
    assert f"* the first {number - 1} sentences; the files may hold more" in text
    assert "*" not in representation_table(report)


def test_json_and_plot_are_written(tmp_path: Path, folders: dict[str, str]) -> None:
    report = analyse(folders, TEXTS, dominant="en", pooling="first")
    data, plot = write_report(report, tmp_path / "new")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["representations.json", "representations.png"]
    content = json.loads(data.read_text(encoding="utf-8"))
    assert content["models"].keys() == {"before", "after"}
    before = content["models"]["before"]
    assert before["languages"]["de"]["cka"][0] is None  # not NaN, which is not valid JSON
    assert before["languages"]["de"]["cka"][1] == report.models["before"].curves["cka"]["de"][1]
    assert before["mean"]["cka"] == list(report.models["before"].mean("cka"))
    assert before["hash"] != content["models"]["after"]["hash"]
    assert content["measures"].keys() == before["mean"].keys() == MEASURES.keys()
    image = plot.read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(image) > 20_000
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"):
        write_report(report, tmp_path / "file")


def test_the_plot_shows_every_curve() -> None:
    figure = draw(made_up(few=True))
    cka, distance = figure.axes
    assert (cka.get_title(), distance.get_title()) == ("Linear CKA", "Distance between centroids")
    assert cka.get_xlabel() == distance.get_xlabel() == "layer (0: embeddings)"
    assert (cka.get_ylabel(), distance.get_ylabel()) == ("1: alike, 0: unrelated", "share of the states' mean length")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]
    bold = {line.get_label(): line for line in distance.lines if line.get_linewidth() > 2}
    thin = [line for line in distance.lines if line.get_linewidth() < 1]
    assert bold.keys() == {"before", "after"}
    assert list(bold["after"].get_xdata()) == [0, 1, 2]
    assert list(bold["before"].get_ydata()) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert [line.get_ydata()[0] for line in thin] == pytest.approx([0.3, 0.1, 0.5, 0.3])
    assert bold["before"].get_color() != bold["after"].get_color()
    assert bold["before"].get_linestyle() != bold["after"].get_linestyle()
    assert distance.get_ylim()[0] == 0
    named = {text.get_text() for text in distance.texts}
    assert named == {"de", "sw"}
    assert "over 2 languages" in figure.get_suptitle()
    assert any(text.get_text().startswith("too high for 1 of 2") for text in cka.texts)
    debiased = draw(made_up(few=True), debiased=True).axes[0]
    assert debiased.get_title() == "Linear CKA, debiased"
    assert {text.get_text() for text in debiased.texts} == {"de", "sw"}
    assert {text.get_text() for text in draw(made_up()).axes[0].texts} == {"de", "sw"}


@pytest.mark.parametrize("heights", [[0.5] * 12, [0.0, 0.01, 1.0, 0.99, 0.98], [0.2, 0.8], [0.97] * 40, []])
def test_names_are_separated_ordered_and_inside_the_plot(heights: list[float]) -> None:
    names = {f"{number:02d}": height for number, height in enumerate(heights)}
    placed = _apart(names, 0.03)
    assert placed.keys() == names.keys()
    ordered = sorted(placed.values())
    assert all(b - a > min(0.03, 1 / 40) - 1e-9 for a, b in pairwise(ordered))
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in ordered)
    for one in names:
        for other in names:
            assert placed[one] < placed[other] or names[one] >= names[other]
    if heights == [0.2, 0.8]:
        assert placed == names  # names that do not overlap are not moved
    if heights == [0.5] * 12:
        assert sum(placed.values()) / 12 == pytest.approx(0.5)
