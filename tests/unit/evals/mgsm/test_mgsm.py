"""MGSM from label files to results, with a scripted generator behind the real template and one tiny real model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from small_tokenizers import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_pipeline.text.chat import Chat
from data_pipeline.text.templates import TemplateConfig
from evals.errors import EvalError
from evals.mgsm import mgsm
from evals.mgsm.mgsm import MgsmSettings, evaluate_mgsm, read_problems, score_mgsm
from evals.mgsm.numbers import RULES
from evals.mgsm.report import mgsm_table
from modeling.export_info import ExportInfo
from modeling.generation import Generation, Prompt, ShiftedGenerator
from modeling.weights.weight_files import directory_hash

QUESTIONS = {
    "en": [("How many eggs?", "18"), ("How much?", "114,200")],
    "bn": [("কতগুলি ডিম?", "18"), ("কত টাকা?", "114,200")],
    "de": [("Wie viele Eier?", "18"), ("Wie viel?", "114,200")],
}
ANSWERS = {
    "How many eggs?": "16 + 2 = 18\n#### 18",
    "How much?": "The answer is $114,200.",
    "কতগুলি ডিম?": "উত্তর হল ১৮।",
    "কত টাকা?": "জানি না",
    "Wie viele Eier?": "Die Antwort lautet 18.",
    "Wie viel?": "Die Antwort lautet 114.200",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, and three special tokens."""
    return byte_tokenizer()


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> Chat:
    return Chat(tokenizer, TemplateConfig(name="alpaca"), ["en", "bn", "de"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for language, rows in QUESTIONS.items():
        text = "".join(f"{question}\t{gold}\n" for question, gold in rows)
        (folder / f"mgsm_{language}.tsv").write_text(text, encoding="utf-8")
    return folder


class ScriptedGenerator:
    """Gives prepared answers; all languages but Bengali have a vector. Raises at `interrupted_at`."""

    def __init__(self, chat: Chat, folder: Path | None, interrupted_at: str | None = None) -> None:
        if folder is not None:
            folder.mkdir(exist_ok=True)
            save_file({"weight": np.ones(2, np.float32)}, folder / "model.safetensors")
        self.model = SimpleNamespace(name_or_path=str(folder or ""), dtype=torch.float32)
        self.info = ExportInfo(objective="shifcon", languages=("en", "bn", "de"), dominant="en")
        self.chat, self.interrupted_at = chat, interrupted_at
        self.prompts: list[Prompt] = []
        self.calls: list[int] = []  # prompts of each call

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, num_beams: int = 1, batch_size: int = 16, progress=None
    ) -> list[Generation]:
        self.prompts += prompts
        self.calls.append(len(prompts))
        answers = []
        for prompt in prompts:
            if prompt.language == self.interrupted_at:
                raise KeyboardInterrupt
            question = self.chat.decode(prompt.ids).split("### Instruction:\n")[1].split("\n\n### Response:")[0]
            text = ANSWERS[question]
            answers.append(Generation(text, list(range(len(text))), "$" not in text, prompt.language != "bn"))
        return answers


def test_problems_with_bom_crlf_and_unusual_characters_are_read(tmp_path: Path) -> None:
    file = tmp_path / "mgsm_en.tsv"
    file.write_bytes('\ufeff"a\u2028b"\t18\r\nc\t114,200\r\nd\t-8.0'.encode())
    problems = read_problems(file)
    assert [(p.question, p.gold) for p in problems] == [('"a\u2028b"', "18"), ("c", "114,200"), ("d", "-8.0")]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n\r\n", "\n \n\n"])
def test_trailing_blank_lines_are_not_problems(tmp_path: Path, end: str) -> None:
    (tmp_path / "mgsm_en.tsv").write_text(f"a\t1\nb\t2{end}", newline="")
    assert [problem.gold for problem in read_problems(tmp_path / "mgsm_en.tsv")] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\t1\nb 2\n", "mgsm_en.tsv:2: not two columns"),
        (b"a\t1\nb\t2\t3\n", "mgsm_en.tsv:2: not two columns"),
        (b"a\teighteen\n", "mgsm_en.tsv:1: 'eighteen' is not a number"),
        (b"a\t\n", "mgsm_en.tsv:1: '' is not a number"),
        (b" \t1\n", "mgsm_en.tsv:1: the question is empty"),
        (b"a\t1\n\nb\t2\n", "mgsm_en.tsv:2: not two columns"),
        (b"a\t1\n\xff\t2\n", "mgsm_en.tsv:2: not UTF-8"),
        (b"", "mgsm_en.tsv:1: not two columns"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "mgsm_en.tsv"
    file.write_bytes(content)
    with pytest.raises(EvalError) as caught:
        read_problems(file)
    assert message in str(caught.value)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_an_evaluation_keeps_its_outputs_and_describes_the_run(tmp_path: Path, data: Path, chat: Chat) -> None:
    generator = ScriptedGenerator(chat, tmp_path / "model")
    results = evaluate_mgsm(generator, chat, data, tmp_path / "out")
    assert results == json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))

    file = tmp_path / "out" / "predictions" / "mgsm_bn.jsonl"
    row = json.loads(file.read_text(encoding="utf-8").split("\n")[0])
    assert row["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the"
        " request in Bengali. Please answer in Bengali.\n\n### Instruction:\nকতগুলি ডিম?\n\n### Response:"
    )
    assert (row["output"], row["gold"]) == ("উত্তর হল ১৮।", "18")
    assert (row["finished"], row["shifted"], row["tokens"]) == (True, False, 12)
    assert row["extracted"] == {"last_number": "18", "lm_eval_strict": None, "lm_eval_flexible": None, "robust": "18"}
    assert row["correct"] == {
        "last_number": True, "lm_eval_strict": False, "lm_eval_flexible": False, "robust": True
    }  # fmt: skip

    scores = results["languages"]
    right = {language: [scores[language]["accuracy"][rule]["correct"] for rule in RULES] for language in scores}
    assert right == {"bn": [1, 0, 0, 1], "de": [1, 2, 2, 2], "en": [2, 0, 2, 2]}
    assert scores["bn"]["accuracy"]["robust"]["value"] == 0.5
    assert scores["bn"]["accuracy"]["robust"]["low"] == pytest.approx(0.0945, abs=1e-4)
    assert scores["bn"]["no_number"]["robust"] == 0.5
    assert (scores["en"]["unfinished"], scores["bn"]["unfinished"]) == (0.5, 0.0)
    assert {language: score["shifted"] for language, score in scores.items()} == {
        "bn": False, "de": True, "en": True
    }  # fmt: skip
    assert (scores["en"]["n"], scores["en"]["available"]) == (2, 2)
    assert results["averages"]["all"]["last_number"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert results["averages"]["without_en"]["last_number"] == 0.5

    run = results["run"]
    assert run["model"]["hash"] == directory_hash(tmp_path / "model")
    assert run["protocol"]["max_new_tokens"] == 600
    assert run["protocol"]["template"]["name"] == "alpaca"
    assert set(run["data"]) == {"bn", "de", "en"}
    assert run["versions"]["torch"] == torch.__version__


def test_languages_limit_and_response_language_are_applied(tmp_path: Path, data: Path, chat: Chat) -> None:
    generator = ScriptedGenerator(chat, tmp_path / "model")
    results = evaluate_mgsm(generator, chat, data, tmp_path / "out", MgsmSettings(["de"], "en", limit=1))
    assert [(prompt.language, prompt.response_language) for prompt in generator.prompts] == [("de", "en")]
    assert "Please answer in English." in chat.decode(generator.prompts[0].ids)
    assert list(results["languages"]) == ["de"]
    # the rules read the answer as English, whatever the question's language
    assert results["languages"]["de"]["accuracy"]["lm_eval_strict"]["correct"] == 0
    with pytest.raises(EvalError, match=r"no mgsm_xx\.tsv; there are bn, de, en"):
        evaluate_mgsm(generator, chat, data, tmp_path / "other", MgsmSettings(["xx"]))
    with pytest.raises(EvalError, match="limit is 0"):
        evaluate_mgsm(generator, chat, data, tmp_path / "other", MgsmSettings(limit=0))
    with pytest.raises(EvalError, match=r"holds no mgsm_XX\.tsv"):
        evaluate_mgsm(generator, chat, tmp_path / "out", tmp_path / "other")


def test_finished_languages_survive_a_crash_and_the_evaluation_continues(
    tmp_path: Path, data: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, filled = tmp_path / "out", MgsmSettings(batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate_mgsm(ScriptedGenerator(chat, tmp_path / "model", interrupted_at="de"), chat, data, out, filled)
    assert [file.name for file in (out / "predictions").iterdir()] == ["mgsm_bn.jsonl"]
    assert not (out / "results.json").exists()

    again = ScriptedGenerator(chat, tmp_path / "model")
    advanced: list[int] = []
    monkeypatch.setattr(mgsm.Progress, "advance", lambda self, n=1: advanced.append(n))
    results = evaluate_mgsm(again, chat, data, out, filled)
    assert {prompt.language for prompt in again.prompts} == {"de", "en"}
    assert advanced == [2]
    whole = evaluate_mgsm(ScriptedGenerator(chat, tmp_path / "model"), chat, data, tmp_path / "whole")
    assert results == whole


def test_languages_with_few_problems_share_batches(tmp_path: Path, data: Path, chat: Chat) -> None:
    problems = [len(rows) for rows in QUESTIONS.values()]
    for size, calls in ((1, problems), (sum(problems[:2]), [sum(problems[:2]), problems[2]]), (100, [sum(problems)])):
        generator = ScriptedGenerator(chat, tmp_path / "model")
        results = evaluate_mgsm(generator, chat, data, tmp_path / f"of {size}", MgsmSettings(batch_size=size))
        assert generator.calls == calls
        assert list(results["languages"]) == sorted(QUESTIONS)
        for language in QUESTIONS:
            name = f"predictions/mgsm_{language}.jsonl"
            assert (tmp_path / f"of {size}" / name).read_bytes() == (tmp_path / "of 1" / name).read_bytes()


def test_the_folder_of_another_evaluation_is_refused(tmp_path: Path, data: Path, chat: Chat) -> None:
    generator, out = ScriptedGenerator(chat, tmp_path / "model"), tmp_path / "out"
    evaluate_mgsm(generator, chat, data, out)
    with pytest.raises(EvalError, match=r"another protocol\.max_new_tokens; name a new folder"):
        evaluate_mgsm(generator, chat, data, out, MgsmSettings(max_new_tokens=10))
    save_file({"weight": np.zeros(2, np.float32)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(EvalError, match=r"another model\.hash"):
        evaluate_mgsm(generator, chat, data, out)
    with pytest.raises(EvalError, match="not empty"):
        evaluate_mgsm(generator, chat, data, data)
    unnamed = ScriptedGenerator(chat, None)
    evaluate_mgsm(unnamed, chat, data, tmp_path / "unnamed")
    with pytest.raises(EvalError, match="cannot be identified"):
        evaluate_mgsm(unnamed, chat, data, tmp_path / "unnamed")


def test_scoring_kept_outputs_gives_the_same_results(tmp_path: Path, data: Path, chat: Chat) -> None:
    out = tmp_path / "out"
    results = evaluate_mgsm(ScriptedGenerator(chat, tmp_path / "model"), chat, data, out)
    assert score_mgsm(out, data) == results
    assert score_mgsm(out / "predictions", data) == results
    one = score_mgsm(out / "predictions" / "mgsm_bn.jsonl", data)
    assert one["languages"] == {"bn": results["languages"]["bn"]}


def test_outputs_of_other_programs_are_scored(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "mgsm_de.jsonl"
    file.write_text('{"output": "18"}\n', encoding="utf-8")
    results = score_mgsm(file, data)
    score = results["languages"]["de"]
    assert (score["n"], score["available"]) == (1, 2)
    assert score["accuracy"]["last_number"]["correct"] == 1
    assert score["unfinished"] is score["shifted"] is score["mean_tokens"] is score["prompts_sha256"] is None
    assert results["run"] is None
    assert "de " in mgsm_table({"elsewhere": results})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"output": "18"}', "x"], "mgsm_de.jsonl:2: not an answer"),
        (["[]"], "mgsm_de.jsonl:1: not an answer"),
        (['{"output": 18}'], "mgsm_de.jsonl:1: not an answer"),
        (['{"output": "1"}'] * 3, "mgsm_de.jsonl:3: problem 2 is not one of the 2"),
        (['{"output": "1", "index": 0}'] * 2, "mgsm_de.jsonl:2: problem 0 occurs twice"),
        (['{"output": "1", "question": "Wie?"}'], "mgsm_de.jsonl:1: answers another question"),
    ],
)
def test_malformed_predictions_are_named(tmp_path: Path, data: Path, lines: list[str], message: str) -> None:
    file = tmp_path / "mgsm_de.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(EvalError) as caught:
        score_mgsm(file, data)
    assert message in str(caught.value)


def test_the_table_marks_languages_without_a_vector(tmp_path: Path, data: Path, chat: Chat) -> None:
    shifcon = evaluate_mgsm(ScriptedGenerator(chat, tmp_path / "model"), chat, data, tmp_path / "out")
    plain = json.loads(json.dumps(shifcon))
    plain["run"]["model"]["objective"] = "sft"  # a model without vectors gets no marks
    for score in plain["languages"].values():
        score["shifted"] = False
    del plain["languages"]["de"]
    lines = mgsm_table({"msft": plain, "shifcon": shifcon}).split("\n")
    names = [line.split()[0] for line in lines]
    assert [name for name in names if not name.startswith("---")] == [
        "language", "bn†", "en", "de", "mean", "mean", "†", "*"
    ]  # fmt: skip
    assert lines[-2:] == ["† no language vector: ran unshifted", "* msft: means lack languages: not evaluated: de"]
    assert "*" not in mgsm_table({"msft": plain})
    rules = mgsm_table({"shifcon": shifcon}, list(RULES))
    assert rules.split("\n")[0].split() == ["language", *RULES]


def test_every_partial_number_is_marked(tmp_path: Path, data: Path, chat: Chat) -> None:
    """Some problems of a language, or some languages of the data: in the table, in JSON, and in results.json."""
    generator = ScriptedGenerator(chat, tmp_path / "model")
    whole = evaluate_mgsm(generator, chat, data, tmp_path / "whole")
    assert "*" not in mgsm_table({"": whole})
    assert (whole["partial"], whole["missing"]) == ([], {})
    assert not any(score["partial"] for score in whole["languages"].values())

    limited = evaluate_mgsm(generator, chat, data, tmp_path / "limited", MgsmSettings(limit=1))
    assert {lang: (each["n"], each["available"], each["partial"]) for lang, each in limited["languages"].items()} == {
        "bn": (1, 2, True), "de": (1, 2, True), "en": (1, 2, True)
    }  # fmt: skip
    assert limited["partial"] == ["all", "without_en"]
    assert limited == json.loads((tmp_path / "limited" / "results.json").read_text(encoding="utf-8"))
    assert score_mgsm(tmp_path / "limited", data) == limited
    for rules in (["last_number"], list(RULES)):
        lines = mgsm_table({"": limited}, rules).split("\n")
        cells = [line.count("%*") for line in lines[2:7]]
        assert cells == [len(rules)] * 5
        assert lines[-1] == "* 1 of 2 problems: bn, de, en"

    two = evaluate_mgsm(generator, chat, data, tmp_path / "two", MgsmSettings(["en", "de"]))
    assert (two["partial"], two["missing"]) == (["all", "without_en"], {"bn": "not requested"})
    table = mgsm_table({"two": two, "whole": whole})
    assert [line.split("  ")[0] for line in table.split("\n") if "%*" in line] == ["mean all", "mean without en"]
    assert table.count("%*") == 2
    assert table.endswith("* two: means lack languages: not requested: bn")

    (tmp_path / "limited" / "predictions" / "mgsm_bn.jsonl").unlink()
    scored = score_mgsm(tmp_path / "limited", data)
    assert scored["missing"] == {"bn": "no predictions"}
    assert mgsm_table({"": scored}).endswith("* 1 of 2 problems: de, en\n* means lack languages: no predictions: bn")


def test_partial_telugu_leaves_the_published_mean_complete(tmp_path: Path) -> None:
    labels, predictions = tmp_path / "labels", tmp_path / "predictions"
    for folder in (labels, predictions):
        folder.mkdir()
    for language in ["bn", "de", "en", "es", "fr", "ja", "ru", "sw", "th", "zh", "te", "xx"]:
        (labels / f"mgsm_{language}.tsv").write_text("How many?\t18\nHow much?\t2\n")
        n = 1 if language == "te" else 2
        if language != "xx":
            (predictions / f"mgsm_{language}.jsonl").write_text('{"output": "18"}\n' * n)
    results = score_mgsm(predictions, labels)
    assert results["partial"] == ["all"]
    assert [line.split("  ")[0] for line in mgsm_table({"": results}).split("\n") if "%*" in line] == ["te", "mean all"]


def test_a_tiny_real_model_is_evaluated_with_its_shift(
    tmp_path: Path, data: Path, tokenizer: PreTrainedTokenizerFast, chat: Chat
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    generator = ShiftedGenerator.from_directory(tmp_path / "model")
    results = evaluate_mgsm(generator, chat, data, tmp_path / "out", MgsmSettings(max_new_tokens=4, batch_size=2))
    assert results["run"]["model"] == {
        "path": str(tmp_path / "model"),
        "hash": directory_hash(tmp_path / "model"),
        "objective": "sft",
        "dominant": None,
        "vectors": None,
        "dtype": "float32",
    }
    assert all(score["n"] == 2 and score["shifted"] is False for score in results["languages"].values())
    assert score_mgsm(tmp_path / "out", data) == results
