"""Tatoeba retrieval equals encoding single sentences and a loop over all pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_encoders import WORDS
from tiny_task_model import export

from data_pipeline import console
from data_pipeline.records import DataError
from data_pipeline.xtreme.tasks import TATOEBA_CODES
from evals.commands import xtreme_retrieve
from evals.errors import EvalError
from evals.xtreme.label_files import read_indices
from evals.xtreme.retrieval import SentenceEncoder, nearest, retrieve_tatoeba
from evals.xtreme.score import score_table

ALL_WORDS = [word for words in WORDS.values() for word in words]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("model"), "classification", ("a", "b"))


def sentences(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(ALL_WORDS[at] for at in rng.integers(len(ALL_WORDS), size=rng.integers(1, 9))) for _ in range(n)]


def slow_vector(encoder: SentenceEncoder, text: str, layer: int, specials: bool) -> Any:
    """One sentence by transformers, whose hidden_states[0] are the embeddings and [l + 1] the output of layer l."""
    inputs = encoder.states.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        states = encoder.states.model(**inputs, output_hidden_states=True).hidden_states[layer + 1][0].double()
    mean = states.mean(dim=0) if specials else states[1:-1].mean(dim=0)
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("specials", [False, True])
def test_sentence_vectors_are_mean_states_after_the_layer(
    model: Path, layer: int, specials: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evals.xtreme.retrieval.BATCH_TOKENS", 60)  # several batches
    encoder = SentenceEncoder.open(model, layer, specials, dtype="fp32")
    texts = sentences(20, 0)
    expected = [slow_vector(encoder, text, layer, specials) for text in texts]
    np.testing.assert_allclose(encoder.encode(texts), np.stack(expected), atol=1e-5)


def test_the_default_layer_is_xtremes(model: Path) -> None:
    assert SentenceEncoder.open(model).layer == 1  # 3 layers: the same depth as 7 of 12

    class States:
        def __init__(self, layers: int) -> None:
            self.layers = layers

    for depth, layer in ((12, 7), (24, 13), (6, 3)):
        assert SentenceEncoder(States(depth)).layer == layer  # type: ignore[arg-type]
    with pytest.raises(EvalError, match="layer 3: the model has layers 0 to 2"):
        SentenceEncoder.open(model, 3)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_nearest_sentences_equal_those_of_a_loop(chunk: int) -> None:
    rng = np.random.default_rng(0)
    queries, candidates = (rng.normal(size=(n, 5)).astype(np.float32) for n in (11, 7))
    candidates[4] = candidates[2]  # of equal ones the first
    queries[3] = candidates[2]
    queries, candidates = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, candidates))
    expected = []
    for query in queries:
        best, found = -np.inf, -1
        for number, candidate in enumerate(candidates):
            product = float(sum(float(a) * float(b) for a, b in zip(query, candidate, strict=True)))
            if product > best + 1e-6:
                best, found = product, number
        expected.append(found)
    assert nearest(queries, candidates, chunk) == expected
    assert expected[3] == 2


def laser(folder: Path, language: str, source: list[str], english: list[str]) -> None:
    code = TATOEBA_CODES[language]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"tatoeba.{code}-eng.{code}").write_text("".join(f"{text}\n" for text in source), encoding="utf-8")
    (folder / f"tatoeba.{code}-eng.eng").write_text("".join(f"{text}\n" for text in english), encoding="utf-8")


def test_a_folder_gives_predictions_and_scores(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english = list(dict.fromkeys(sentences(15, 1)))
    other = list(dict.fromkeys(sentences(12, 2)))
    laser(tmp_path / "tatoeba", "de", english, english)  # a "translation" that is the same is found
    laser(tmp_path / "tatoeba", "sw", other[::-1], other)
    encoder = SentenceEncoder.open(model, 1, dtype="fp32")
    advanced: list[int] = []
    monkeypatch.setattr(console.Progress, "advance", lambda self, n=1: advanced.append(n))
    results, scores = retrieve_tatoeba(encoder, tmp_path, tmp_path / "out")
    assert scores is not None
    assert list(scores.tasks["tatoeba"].languages) == ["de", "sw"]
    assert scores.tasks["tatoeba"].languages["de"]["accuracy"] == 100
    assert scores.tasks["tatoeba"].languages["sw"]["accuracy"] < 50
    assert advanced == [1, 1]
    order = sorted(range(len(english)), key=english.__getitem__)
    predictions = tmp_path / "out" / "predictions" / "tatoeba"
    assert read_indices(predictions / "test-de.tsv") == order
    # For each English sentence, in their order, the source line; here by a loop over both sides.
    sides = [np.stack([slow_vector(encoder, text, 1, False) for text in side]) for side in (sorted(other), other[::-1])]
    expected = [max(range(len(other)), key=lambda at, q=query: float(q @ sides[1][at])) for query in sides[0]]
    assert read_indices(predictions / "test-sw.tsv") == expected
    assert json.loads((tmp_path / "out" / "results.json").read_bytes())["layer"] == results["layer"] == 1


def test_files_without_gold_give_predictions_but_no_scores(model: Path, tmp_path: Path) -> None:
    english = sorted(set(sentences(9, 3)))
    (tmp_path / "tatoeba").mkdir()
    for side in ("de", "en"):
        (tmp_path / "tatoeba" / f"de-en.{side}").write_text("".join(f"{text}\n" for text in english), encoding="utf-8")
    encoder = SentenceEncoder.open(model, 1, dtype="fp32")
    results, scores = retrieve_tatoeba(encoder, tmp_path, tmp_path / "out")
    assert scores is None
    assert results["scores"] is None
    assert read_indices(tmp_path / "out" / "predictions" / "tatoeba" / "test-de.tsv") == list(range(len(english)))


def test_a_sentence_without_tokens_is_named_and_the_run_continues(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    english = sorted(set(sentences(9, 4)))
    broken, nothing = list(english), list(english)
    broken[2], nothing[3], nothing[-1] = "", "\u200b", ""
    laser(tmp_path / "tatoeba", "de", broken, english)
    laser(tmp_path / "tatoeba", "fr", english, nothing)
    laser(tmp_path / "tatoeba", "sw", english, english)
    results, scores = retrieve_tatoeba(SentenceEncoder.open(model, 1, dtype="fp32"), tmp_path, tmp_path / "out")
    assert scores is not None
    found = {language: each["accuracy"] for language, each in scores.tasks["tatoeba"].languages.items()}
    n = len(english)
    assert found["sw"] == 100
    assert found["de"] == pytest.approx(100 * (n - 1) / n)
    assert found["fr"] >= 100 * (n - 2) / n
    folder = tmp_path / "tatoeba"
    assert results["without_tokens"]["de"] == [f"{folder / 'tatoeba.deu-eng.deu'}:3: ''"]
    named = results["without_tokens"]["fr"]
    assert f"{folder / 'tatoeba.fra-eng.eng'}:{n}: ''" in named
    assert all(len(read_indices(tmp_path / f"out/predictions/tatoeba/test-{each}.tsv")) == n for each in found)
    xtreme_retrieve(str(model), tmp_path, tmp_path / "out", 1)
    assert f"de: {folder / 'tatoeba.deu-eng.deu'}:3: '' has no tokens" in capsys.readouterr().err


def test_absent_languages_are_reported_as_missing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    english = sorted(set(sentences(5, 5)))
    for language in ("de", "fr", "sw"):
        laser(tmp_path / "tatoeba", language, english, english)
    (tmp_path / "tatoeba" / "tatoeba.fra-eng.eng").unlink()
    encoder = SentenceEncoder.open(model, 1, dtype="fp32")
    results, scores = retrieve_tatoeba(encoder, tmp_path, tmp_path / "out")
    assert scores is not None
    missing = scores.tasks["tatoeba"].missing
    assert (missing["af"], missing["fr"]) == ("no files", "no file tatoeba.fra-eng.eng")
    assert "not requested" not in score_table(scores)
    assert results["missing"] == missing == results["scores"]["tasks"]["tatoeba"]["missing"]
    _, some = retrieve_tatoeba(encoder, tmp_path, tmp_path / "some", languages=["de"])
    assert some is not None
    missing_of_some = some.tasks["tatoeba"].missing
    assert (missing_of_some["sw"], missing_of_some["af"]) == ("not requested", "no files")
    for side in ("de", "en"):
        (tmp_path / "sorted").mkdir(exist_ok=True)
        (tmp_path / "sorted" / f"de-en.{side}").write_text("".join(f"{text}\n" for text in english), encoding="utf-8")
    xtreme_retrieve(str(model), tmp_path / "sorted", tmp_path / "b", 1)
    out = capsys.readouterr().out
    assert "missing: no files: af, ar" in out
    assert "not requested" not in out


def test_an_unreadable_file_is_named_before_anything_is_computed(model: Path, tmp_path: Path) -> None:
    english = sorted(set(sentences(5, 6)))
    laser(tmp_path / "tatoeba", "de", english, english)
    laser(tmp_path / "tatoeba", "sw", english[1:], english)
    with pytest.raises(DataError, match=r"tatoeba\.swh-eng\.eng: \d+ sentences, but .*they must have the same number"):
        retrieve_tatoeba(SentenceEncoder.open(model, 1, dtype="fp32"), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ties_up_to_rounding_are_broken_by_order() -> None:
    queries = np.array([[1.0, 0.0]], np.float32)
    for short, first in ((2e-7, 0), (1e-4, 1)):
        candidates = np.array([[1 - short, 0.0], [1.0, 0.0]], np.float32)
        assert candidates[0, 0] < candidates[1, 0]
        assert nearest(queries, candidates) == [first]


def test_a_sentence_without_tokens_has_no_nearest_sentence() -> None:
    """A zero vector ranks below every cosine, also negative ones."""
    candidates = np.array([[0.0, 0.0], [-1.0, 0.0]], np.float32)
    assert nearest(np.array([[1.0, 0.0]], np.float32), candidates) == [1]
