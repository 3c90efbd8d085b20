"""run_folder/date.py: prompts of a run have one date, saved with it and compared on resume only if prompts show it."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from small_tokenizers import CHATML
from transformers import AutoTokenizer

from data_pipeline.records import Message
from data_pipeline.text.chat import Chat
from training import fit
from training.check import inspect_data
from training.checkpoints import checkpoint
from training.checkpoints.run_state import RunState, differences
from training.config import RunConfig
from training.errors import ConfigError
from training.loop import resume
from training.run_file import resolved, validate
from training.run_folder import date as run_date
from training.run_folder.date import with_date
from training.run_folder.prepare import Prepared

DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0].role == 'system' %}Today Date: {{ date_string }}\n{% endif %}" + CHATML
)
FIRST, LATER = dt.date(2026, 11, 28), dt.date(2026, 12, 1)
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def dated_tokenizer(tmp_path_factory: pytest.TempPathFactory, prepared_run: Any) -> Path:
    """The tiny run's tokenizer with a chat template that prints the date if there is a system message."""
    folder = tmp_path_factory.mktemp("dated")
    tokenizer = AutoTokenizer.from_pretrained(prepared_run.prepared.tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make(
    tmp_path: Path, dated_tokenizer: Path, tiny_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Make:
    monkeypatch.setattr(run_date, "_today", lambda: LATER)

    def make(output_dir: Path = tmp_path / "run", **template: Any) -> RunConfig:
        changes = {"tokenizer": {"path": str(dated_tokenizer)}, "data.template": {"name": "chat", **template}}
        return validate(tiny_run(output_dir, **changes), "run")

    return make


def save(config: RunConfig, step: int = 4) -> Path:
    """A complete checkpoint of a run with this config."""
    directory = checkpoint.begin(config.output_dir, step)
    RunState(step=step, world_size=1, fingerprint={}, config=resolved(config), versions={}).write(directory)
    return checkpoint.commit(config.output_dir, step, {})


def day(config: RunConfig, tokenizer: Path, found: Path | None = None) -> dt.date | None:
    return with_date(config.data, AutoTokenizer.from_pretrained(tokenizer), config.output_dir, found).template.date


def test_the_date_is_the_run_files_else_the_saved_one_else_today(make: Make, dated_tokenizer: Path) -> None:
    config = make()
    assert day(config, dated_tokenizer) == LATER
    config.output_dir.mkdir()
    (config.output_dir / "config.yaml").write_text(yaml.safe_dump(resolved(make(date="2026-11-27"))))
    assert day(config, dated_tokenizer) == dt.date(2026, 11, 27), "the date of a first start without a checkpoint"
    for damaged in ("data: {template: {date: '2026", "", "data: {template: {date: x}}"):
        (config.output_dir / "config.yaml").write_text(damaged)
        assert day(config, dated_tokenizer) == LATER
    assert day(config, dated_tokenizer, save(make(date=FIRST))) == FIRST
    assert day(make(date="2020-01-02"), dated_tokenizer, save(make(date=FIRST))) == dt.date(2020, 1, 2)


def test_a_number_is_not_a_date(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"data.template.date: must be a day, written 2026-01-31"):
        make(date=20261128)


def test_a_date_that_no_prompt_shows_is_dropped(make: Make, dated_tokenizer: Path, tmp_path: Path) -> None:
    assert day(make(variables={"date_string": "today"}, date=FIRST), dated_tokenizer) is None
    plain = AutoTokenizer.from_pretrained(dated_tokenizer)
    plain.chat_template = CHATML
    plain.save_pretrained(tmp_path / "plain")
    assert day(make(), tmp_path / "plain") is None
    assert day(make(date=FIRST), tmp_path / "plain") is None


def test_a_resume_compares_dates_if_both_runs_have_one(make: Make, dated_tokenizer: Path) -> None:
    saved = RunState.read(save(make(date=FIRST)))
    assert differences(saved, {}, resolved(make(date=FIRST))) == []
    (line,) = differences(saved, {}, resolved(make(date="2026-11-29")))
    assert str(line) == "config data.template.date: was '2026-11-28', now '2026-11-29'"
    del saved.config["data"]["template"]["date"]  # as in checkpoints from before dates were saved
    assert differences(saved, {}, resolved(make(date="2026-11-29"))) == []


def test_data_inspect_shows_the_date_of_the_run(make: Make, dated_tokenizer: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    roles = {"system": "S", "user": "q", "assistant": "a"}
    messages = [{"role": role, "content": content} for role, content in roles.items()]
    (rows / "en.jsonl").write_text(json.dumps({"id": "1", "language": "en", "messages": messages}) + "\n")
    changes = {"data_dir": rows, "data": make().data.model_dump(mode="json")}
    changes["data"] |= {
        "languages": ["en"], "mixture": {"pairing": "none"},
        "sources": [{"name": "rows", "files": "*.jsonl", "columns": {k: k for k in ("id", "language", "messages")}}],
    }  # fmt: skip
    values = {**make().model_dump(mode="json"), **changes, "objective": {"name": "sft"}, "data_dir": str(rows)}
    config = validate(values, "run")
    assert "Today Date: 01 Dec 2026" in "\n".join(inspect_data(config, 1))
    values["data"] = {**values["data"], "template": {"name": "chat", "date": "2026-11-28"}}
    save(validate(values, "run"))
    assert "Today Date: 28 Nov 2026" in "\n".join(inspect_data(config, 1))


def test_a_run_trains_with_its_date_and_prompts_show_it(
    make: Make, dated_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    config.output_dir.mkdir()
    seen: list[RunConfig] = []

    def stop(config: RunConfig, prepared: Prepared) -> None:
        seen.append(config)
        raise InterruptedError

    prepared = SimpleNamespace(tokenizer_dir=str(dated_tokenizer), model_dir="unused")
    monkeypatch.setattr(fit, "prepare", lambda config, rank: prepared)
    monkeypatch.setattr(fit, "assemble", stop)
    monkeypatch.setattr(fit, "fingerprint", lambda prepared: {})
    monkeypatch.setattr(resume, "_other_shapes", lambda *_: [])
    for found, expected in ((None, LATER), (save(make(date=FIRST)), FIRST)):
        monkeypatch.setattr(fit, "find_checkpoint", lambda *_, found=found: found)
        with pytest.raises(InterruptedError):
            fit._fit(config, "auto", accept_changes=False, stop=fit.StopRequest())
        assert seen[-1].data.template.date == expected
    chat = Chat(AutoTokenizer.from_pretrained(dated_tokenizer), seen[-1].data.template, config.data.languages)
    ids, _ = chat.prompt_ids([Message("system", "S"), Message("user", "q")], "en", "en")
    assert "Today Date: 28 Nov 2026" in chat.decode(ids)
