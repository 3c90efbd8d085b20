"""`crosslift probe`: its files, what it writes, and wrong input. Measures: `test_layer_area.py` of ShifCon."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from small_tokenizers import small_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from crosslift import app
from evals.errors import EvalError
from evals.probe import Sentence, probe, probe_table, read_sentences, write_probe
from evals.probe_plots import discriminant_directions
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.layer_probe import MEASURES

NUMBER = 40
WORDS = {"en": ("apples", "more", "many"), "de": ("Äpfel", "weitere", "viele"), "sw": ("tufaha", "zaidi", "ngapi")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of four layers from a random start, with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizers(folder / "tokenizers")["bytes-bos"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.4, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(language: str) -> list[str]:
    one, two, three = WORDS[language]
    return [
        f"{one} {number} {two if number % 2 else three} {number * 7 % 13} {one * (number % 3)}"
        for number in range(NUMBER)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """English and German as lines, Swahili as rows; German has a language of its own in the rows too."""
    folder = tmp_path_factory.mktemp("texts")
    for language in ("en", "de"):
        (folder / f"{language}.txt").write_text("\n".join(sentences(language)) + "\n", encoding="utf-8")
    rows = [{"id": str(number), "language": "sw", "text": text} for number, text in enumerate(sentences("sw"))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [folder / "en.txt", folder / "de.txt", folder / "rows.jsonl"]


def test_lines_and_rows_are_sentences_by_language(files: list[Path]) -> None:
    found = read_sentences(files, limit=20)
    assert {language: len(each) for language, each in found.items()} == {"en": 20, "de": 20, "sw": 20}
    assert [each.item for each in found["en"]] == [each.item for each in found["de"]]
    assert len({each.item for each in found["sw"]}) == 20


def test_the_command_writes_json_vectors_and_plots(model: Path, files: list[Path], tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    options = [argument for file in files for argument in ("--data", str(file))]
    app(["probe", str(model), *options, "--output", str(output)], standalone_mode=False)
    printed = capsys.readouterr().out
    found = json.loads((output / "probe.json").read_text())
    toward, back = found["area"]
    assert f"layer area [{toward}, {back})" in printed
    assert f"layers: [{toward}, {back}]" in printed
    assert found["rule"] == "retrieval"
    assert set(found["languages"]) == {"de", "sw"}
    assert (found["languages"]["de"]["pairs"], found["languages"]["sw"]["pairs"]) == (NUMBER, 0)
    for name in MEASURES:
        assert len(found["languages"]["de"][name]) == len(found["languages"]["de"]["standard_error"][name]) == 5
    assert found["languages"]["sw"]["retrieval"] == [None] * 5
    vectors = LanguageVectors.load(output / "language_vectors.safetensors")
    assert (vectors.area, vectors.layers, vectors.languages[0]) == ((toward, back), (0, 1, 2, 3, 4), "en")
    assert (output / "probe.png").read_bytes()[:4] == (output / "scatter.png").read_bytes()[:4] == b"\x89PNG"


def test_ranks_find_what_one_process_finds(model: Path, files: list[Path], tmp_path: Path) -> None:
    options = [argument for file in files for argument in ("--data", str(file))]
    ranks = []
    for rank in range(2):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()) if not ranks else ranks[0][1], "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "crosslift", "probe", str(model), *options, "--output", str(tmp_path / "two")]
        ranks.append((subprocess.Popen(command, env={**os.environ, **variables}), variables["MASTER_PORT"]))
    assert [process.wait(timeout=120) for process, _ in ranks] == [0, 0]
    two = json.loads((tmp_path / "two" / "probe.json").read_text())
    write_probe(probe(str(model), read_sentences(files), dominant="en"), tmp_path / "one")
    one = json.loads((tmp_path / "one" / "probe.json").read_text())
    assert two["area"] == one["area"]
    for language in ("de", "sw"):
        for name in MEASURES:
            found, expected = (
                [math.nan if each is None else each for each in report["languages"][language][name]]
                for report in (two, one)
            )
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)


def test_the_table_marks_the_area_and_says_what_is_singular(model: Path, files: list[Path]) -> None:
    few = {
        language: [Sentence(number, f"{number} {word}") for number in range(16)]
        for language, (word, *_) in WORDS.items()
    }
    report = probe(str(model), few, dominant="en", max_length=2)  # one token of content each
    text = probe_table(report)
    assert f"{report.choice.area[0]}*" in text
    assert "no more tokens than the 16 dimensions" in text
    assert "48 sentences were cut" in text


def test_the_shift_moves_languages_onto_the_dominant_one(model: Path, files: list[Path]) -> None:
    """At `toward`; and after `back` they are apart again."""
    report = probe(str(model), read_sentences(files), dominant="en")
    toward, back = report.choice.area
    scatter = report.scatter

    def distance(states: torch.Tensor, layer: int) -> float:
        means = [
            states[[place for place, each in enumerate(scatter.languages) if each == language], layer].mean(dim=0)
            for language in ("en", "de")
        ]
        return float((means[0] - means[1]).norm())

    assert distance(scatter.shifted, toward) < 0.3 * distance(scatter.plain, toward)
    assert distance(scatter.shifted, back) > 0.5 * distance(scatter.plain, back)
    # Below the shift, the same sentences have the same states, up to the rounding of other batches.
    torch.testing.assert_close(scatter.shifted[:, :toward], scatter.plain[:, :toward], rtol=0, atol=1e-5)


def test_discriminant_directions_separate_languages() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(90, 8, generator=generator, dtype=torch.float64)
    states[:, 5] *= 20  # varies most, and says nothing
    languages = ["a"] * 30 + ["b"] * 30 + ["c"] * 30
    states[30:60, 2] += 5
    states[60:, 6] += 5
    directions = discriminant_directions(states, languages)
    strength = directions.abs() * states.std(dim=0)[:, None]
    assert {2, 6} == set(strength.sum(dim=1).topk(2).indices.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dominant": "fr"}, "--dominant fr: no sentences in it; there are de, en, sw"),
        ({"keep": ["en"]}, "only 'en' has sentences"),
        ({"limit": 15}, "'en' has 15 sentences; 16 are needed"),
    ],
)
def test_too_little_to_compare_is_refused(model: Path, files: list[Path], change: dict[str, Any], message: str) -> None:
    found = read_sentences(files, change.get("limit"))
    kept = {language: each for language, each in found.items() if language in change.get("keep", found)}
    with pytest.raises(EvalError, match=message):
        probe(str(model), kept, dominant=change.get("dominant", "en"))


def test_a_language_that_is_split_into_bytes_is_refused(model: Path, tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "am.txt").write_text(
        "\n".join(f"ሩጫ ባለው ለውጥ ፍጥነት {chr(0x1200 + n)}" for n in range(20)), encoding="utf-8"
    )
    with pytest.raises(EvalError, match=r"'am': \d+ tokens for \d+ bytes of text"):
        probe(str(model), read_sentences([*files, tmp_path / "am.txt"]), dominant="en")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 3}', r"rows.jsonl:2: no text; a row has one of text_a, question"),
        ('{"text": "x"}', r"rows.jsonl:2: no `id` or `group`"),
        ('{"id": 3, "text": "x", "language": 5}', r"rows.jsonl:2: `language` is 5, not a code"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "text": "one"}\n' + line + "\n")
    with pytest.raises(EvalError, match=message):
        read_sentences([tmp_path / "rows.jsonl"])
    with pytest.raises(EvalError, match=r"missing\.txt: cannot be read"):
        read_sentences([tmp_path / "missing.txt"])
